"""SFT and DPO on the embedded sentiment data, through train.py, and what they did to the model.

    make demo          (or: python experiments/demo.py --folder demo)

The controlled sentiment task of the DPO paper (arXiv:2305.18290, section 6.1), small: the true reward is known (VADER's
compound score), so that reward and KL can be measured. About 9 minutes on 2 cores; given again, it goes on where it
ended.
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from dpo.utils import HelpFormatter, UserError, log, make_dir, run_main, visible
from report import EXAMPLES, Z95, Run, interval, load_runs, sentiment, write_report
from settings import quoted

COMMON = ["model=smollm2", "datasets=[sentiment]", "max_length=32", "max_prompt_length=16", "optimizer=AdamW"]
COMMON += ["+optimizer_kwargs.fused=true", "warmup_steps=2", "lr_schedule=linear", "kl_during_eval=true"]
SFT = ["loss=sft", "lr=2e-5", "batch_size=16", "n_examples=160"]
DPO = ["loss=dpo", "loss.beta=0.1", "lr=2e-4", "batch_size=32", "n_examples=832", "do_first_eval=false"]
EVALUATION = ["n_eval_examples=392", "n_eval_model_samples=80", "n_eval_samples_per_prompt=2", "eval_batch_size=80"]
Sampled = dict[str, list[tuple[str, str]]]
"""Model -> (prompt, response) of each sample."""


def train(name: str, overrides: Sequence[str], sweep: bool = False) -> None:
    """Run train.py, which goes on where the run or sweep ended. Raises UserError where it fails."""
    arguments = [*["-m"] * sweep, f"exp_name={name}", "resume=auto", "wandb.enabled=false", *overrides]
    log(f"\n=== {name} ===\npython train.py {shlex.join(arguments)}")
    if subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], check=False).returncode:
        raise UserError(f"{name} failed; see above. The same command goes on from here")


def sampled(sft: Run, dpo: Run) -> Sampled:
    """What base, SFT and DPO model answered to the prompts that DPO is evaluated on: those with a pair."""
    last = [(prompt, row) for prompt, rows in dpo.last_samples().items() for row in rows]
    prompts = {prompt for prompt, _ in last}
    first = [row for row in sft.samples if row[EXAMPLES] == 0 and row["prompt"] in prompts]
    return {
        "base": [(row["prompt"], row["policy"]) for row in first],
        "SFT": [(prompt, row["reference"]) for prompt, row in last],
        "DPO": [(prompt, row["policy"]) for prompt, row in last],
    }


def table(models: Sampled, sft: dict[str, float], dpo: dict[str, float]) -> str:
    """A line for each model; `sft` and `dpo` are the metrics of their last evaluations."""
    lines = [f"{'':6}{'sentiment (95 % interval)':>28}{'KL, nats (95 % interval)':>28}{'pair accuracy':>15}"]
    for name, row, start in (("base", {}, ""), ("SFT", sft, "base"), ("DPO", dpo, "SFT")):
        reward, width, _ = interval([sentiment(p + text) for p, text in models[name]], [p for p, _ in models[name]])
        cells = [f"{reward:+.3f} [{reward - width:+.3f}, {reward + width:+.3f}]", "-", "-"]
        if start:
            kl, error = row["kl_eval/rao_blackwell"], row["kl_eval/rao_blackwell_error"]
            cells[1] = f"{kl:.2f} ± {Z95 * error:.2f} from {start}"
        if "rewards_eval/accuracies" in row:
            cells[2] = f"{row['rewards_eval/accuracies']:.3f}"
        lines.append(f"{name:6}{cells[0]:>28}{cells[1]:>28}{cells[2]:>15}")
    return "\n".join(lines)


def show_samples(models: Sampled, n: int = 4) -> str:
    texts = {name: dict(reversed(samples)) for name, samples in models.items()}  # of each prompt, the first
    lines = []
    for prompt in list(dict(models["DPO"]))[:n]:
        lines.append(f"\n{visible(prompt)} ...")
        for name, text in ((name, own[prompt]) for name, own in texts.items()):
            lines.append(f"  {name:4} {sentiment(prompt + text):+.2f} {visible(text.strip())!r}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "demo", help="runs and results go here")
    folder = make_dir(parser.parse_args().folder.resolve(), "--folder")
    start, sft, dpo = time.time(), folder / "sft", folder / "dpo"
    train("demo_sft", [f"local_run_dir={quoted(sft)}", *COMMON, *SFT, *EVALUATION])
    train("demo_dpo", [f"local_run_dir={quoted(dpo)}", f"model.archive={quoted(sft)}", *COMMON, *DPO, *EVALUATION])
    runs = load_runs([sft, dpo])
    write_report(runs, folder, 8, "make demo")
    models = sampled(*runs)
    result = table(models, *(run.evaluations[-1] for run in runs))
    (folder / "table.txt").write_text(result + "\n", encoding="utf-8")
    log(show_samples(models))
    n = len(dict(models["DPO"]))
    log(f"\n{result}\n\nTwo samples for each of {n} held-out prompts; sentiment: VADER's score, -1 to 1; KL: on")
    log("the model's own samples; accuracy: of held-out pairs, those that the implicit reward ranks as VADER does.")
    log(f"Curves and samples: {folder / 'report.html'}\nfinished in {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    run_main(main)
