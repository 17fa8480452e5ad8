"""Train SFT and DPO on the embedded sentiment data through train.py, then compare base, SFT and DPO model.

    make demo          (or: python experiments/demo.py --folder demo)

The controlled sentiment task of the DPO paper (arXiv:2305.18290, section 6.1), small. The true reward is known (VADER's
compound score), so reward and KL can be measured. The recipes are config/experiment/sentiment_sft.yaml and
sentiment_dpo.yaml. 10 to 20 minutes on 2 cores. Run it again to resume.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from dpo.utils import log, make_dir, visible
from opening import ends, run_train
from report import write_report
from results import EXAMPLES, Z95, Run, load_runs, quick_estimate, sentiment
from settings import quoted
from utils import HelpFormatter, run_main

Samples = dict[str, list[tuple[str, str]]]
"""Model -> (prompt, response) of each sample."""


def train(overrides: Sequence[str], sweep: bool = False) -> None:
    """Run train.py as a process; it resumes an earlier run or sweep. Raises UserError if it fails."""
    run_train([*["-m"] * sweep, *overrides, "resume=auto", "wandb.enabled=false"])


def samples_of(sft: Run, dpo: Run) -> Samples:
    """Return the responses of base, SFT and DPO model to the prompts on which DPO is evaluated: those with a pair."""
    last = [(prompt, row) for prompt, rows in dpo.last_samples().items() for row in rows]
    prompts = {prompt for prompt, _ in last}
    first = [row for row in sft.samples if row[EXAMPLES] == 0 and row["prompt"] in prompts]
    return {
        "base": [(row["prompt"], row["policy"]) for row in first],
        "SFT": [(prompt, row["reference"]) for prompt, row in last],
        "DPO": [(prompt, row["policy"]) for prompt, row in last],
    }


def format_table(samples: Samples, sft: dict[str, float], dpo: dict[str, float]) -> str:
    """Return a line for each model. `sft` and `dpo` are the metrics of the runs' last evaluations."""
    lines = [f"{'':6}{'sentiment (95 % interval)':>28}{'KL, nats (95 % interval)':>28}{'pair accuracy':>15}"]
    for name, metrics, start in (("base", {}, ""), ("SFT", sft, "base"), ("DPO", dpo, "SFT")):
        prompts, responses = zip(*samples[name])
        found = quick_estimate([sentiment(p + r) for p, r in zip(prompts, responses)], prompts)
        cells = [f"{found.value:+.3f} {ends(found._asdict(), '+.3f')}", "-", "-"]
        if start:
            kl, error = metrics["kl_eval/rao_blackwell"], metrics["kl_eval/rao_blackwell_error"]
            cells[1] = f"{kl:.2f} ± {Z95 * error:.2f} from {start}"
        if "rewards_eval/accuracies" in metrics:
            cells[2] = f"{metrics['rewards_eval/accuracies']:.3f}"
        lines.append(f"{name:6}{cells[0]:>28}{cells[1]:>28}{cells[2]:>15}")
    return "\n".join(lines)


def format_samples(samples: Samples, n: int = 4) -> str:
    """Return the first sample of each model for `n` prompts."""
    by_model = {model: dict(reversed(rows)) for model, rows in samples.items()}
    lines = []
    for prompt in list(dict(samples["DPO"]))[:n]:
        lines.append(f"\n{visible(prompt)} ...")
        for model, responses in by_model.items():
            response = responses[prompt]
            lines.append(f"  {model:4} {sentiment(prompt + response):+.2f} {visible(response.strip())!r}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "demo", help="runs and results go here")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for both runs, as train.py takes them")
    arguments = parser.parse_args()
    folder = make_dir(arguments.folder.resolve(), "--folder")
    start, sft, dpo = time.time(), folder / "sft", folder / "dpo"
    train(["+experiment=sentiment_sft", f"local_run_dir={quoted(sft)}", *arguments.overrides])
    archive = f"model.archive={quoted(sft)}"
    train(["+experiment=sentiment_dpo", f"local_run_dir={quoted(dpo)}", archive, *arguments.overrides])
    runs = load_runs([sft, dpo])
    write_report(runs, folder, 8, "make demo")
    samples = samples_of(*runs)
    table = format_table(samples, *(run.evaluations[-1] for run in runs))
    (folder / "table.txt").write_text(table + "\n", encoding="utf-8")
    log(format_samples(samples))
    n = len(dict(samples["DPO"]))
    log(f"\n{table}\n\nTwo samples for each of {n} held-out prompts. Sentiment: VADER's score, -1 to 1. KL: on the")
    log("model's own samples. Accuracy: share of held-out pairs that the implicit reward ranks as VADER does.")
    log(f"Curves and samples: {folder / 'report.html'}\nfinished in {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    run_main(main)
