"""SFT and DPO on the embedded sentiment data, through train.py, and what they did to the model.

    make demo          (or: python scripts/demo.py --folder demo)

The controlled sentiment task of the DPO paper (arXiv:2305.18290, section 6.1), small: the true reward is known (VADER's
compound score), so that reward and KL can be measured. About 9 minutes on 2 cores.
"""

import argparse
import math
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

from report import EXAMPLES, Z95, Run, load_runs, sentiment, write_report
from sampling import mean_and_error
from utils import UserError, log, make_dir, run_main, visible

COMMON = ["model=smollm2", "datasets=[sentiment]", "max_length=32", "max_prompt_length=16", "optimizer=AdamW"]
COMMON += ["+optimizer_kwargs.fused=true", "warmup_steps=2", "lr_schedule=linear", "kl_during_eval=true"]
SFT = ["loss=sft", "lr=2e-5", "batch_size=16", "n_examples=160"]
DPO = ["loss=dpo", "loss.beta=0.1", "lr=2e-4", "batch_size=32", "n_examples=832", "do_first_eval=false"]
EVALUATION = ["n_eval_examples=392", "n_eval_model_samples=80", "n_eval_samples_per_prompt=2", "eval_batch_size=80"]
EVALUATION += ["wandb.enabled=false"]
MARKER = ".made_by_the_demo"


def train(name: str, folder: Path, overrides: list[str]) -> Path:
    """Run train.py with `overrides`; returns its run folder."""
    run_dir = folder / name
    arguments = ["train.py", f"exp_name=demo_{name}", f"local_run_dir={run_dir}", *COMMON, *overrides, *EVALUATION]
    log(f"\n=== {name.upper()} ===\npython {shlex.join(arguments)}")
    if subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False).returncode:
        sys.exit(f"error: {name} failed; see above")
    return run_dir


Sampled = dict[str, dict[str, list[str]]]
"""Model -> prompt -> responses."""


def sampled(sft: Run, dpo: Run) -> Sampled:
    """What base, SFT and DPO model answered to the prompts that DPO is evaluated on: those with a pair."""
    last = dpo.last_samples()
    first = [row for row in sft.samples if row[EXAMPLES] == 0]
    return {
        "base": {prompt: [row["policy"] for row in first if row["prompt"] == prompt] for prompt in last},
        "SFT": {prompt: [row["reference"] for row in rows] for prompt, rows in last.items()},
        "DPO": {prompt: [row["policy"] for row in rows] for prompt, rows in last.items()},
    }


def table(models: Sampled, sft: dict[str, float], dpo: dict[str, float]) -> str:
    """A line for each model; `sft` and `dpo` are the metrics of their last evaluations."""
    lines = [f"{'':6}{'sentiment (95 % interval)':>28}{'KL, nats (95 % interval)':>28}{'pair accuracy':>15}"]
    for name, row, start in (("base", {}, ""), ("SFT", sft, "base"), ("DPO", dpo, "SFT")):
        scores = [(sentiment(prompt + text), prompt) for prompt, texts in models[name].items() for text in texts]
        reward, error = mean_and_error(*zip(*scores))
        width = Z95 * (error or math.nan)
        interval = f"{reward:+.3f} [{reward - width:+.3f}, {reward + width:+.3f}]"
        far = [row[f"kl_eval/rao_blackwell{end}"] for end in ("", "_error")] if start else []
        kl = f"{far[0]:.2f} ± {Z95 * far[1]:.2f} from {start}" if far else "-"
        accuracy = f"{row['rewards_eval/accuracies']:.3f}" if "rewards_eval/accuracies" in row else "-"
        lines.append(f"{name:6}{interval:>28}{kl:>28}{accuracy:>15}")
    return "\n".join(lines)


def show_samples(models: Sampled, n: int = 4) -> str:
    lines = []
    for prompt in list(models["DPO"])[:n]:
        lines.append(f"\n{visible(prompt)} ...")
        for name, texts in models.items():
            text = texts[prompt][0]
            lines.append(f"  {name:4} {sentiment(prompt + text):+.2f} {visible(text.strip())!r}")
    return "\n".join(lines)


def prepare(folder: Path) -> None:
    """Make `folder`, or clear what an earlier demo left there. Raises UserError if it holds anything else."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise UserError(f"--folder {folder} holds something that is no demo; give an empty or new one")
    for name in ("sft", "dpo"):
        shutil.rmtree(folder / name, ignore_errors=True)
    make_dir(folder, "--folder")
    (folder / MARKER).touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "demo", help="results go here; emptied first")
    folder = parser.parse_args().folder.resolve()
    start = time.time()
    prepare(folder)
    sft = train("sft", folder, SFT)
    dpo = train("dpo", folder, [*DPO, f"model.archive={sft}"])
    runs = load_runs([sft, dpo])
    write_report(runs, folder, 8, "make demo")
    models = sampled(*runs)
    result = table(models, *(run.evaluations[-1] for run in runs))
    (folder / "table.txt").write_text(result + "\n")
    log(show_samples(models))
    n = len(models["DPO"])
    log(f"\n{result}\n\nTwo samples for each of {n} held-out prompts; sentiment: VADER's score, -1 to 1; KL: on")
    log("the model's own samples; accuracy: of held-out pairs, those that the implicit reward ranks as VADER does.")
    log(f"Curves and samples: {folder / 'report.html'}\nfinished in {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    run_main(main)
