"""SFT and DPO on the embedded sentiment data, through train.py, and what they did to the model.

    make demo          (or: python scripts/demo.py --folder demo)

The controlled sentiment task of the DPO paper (arXiv:2305.18290, section 6.1), small: the true reward is known (VADER's
compound score), so that reward and KL can be measured. About 9 minutes on 2 cores.
"""

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from models import Computation, load_policy, load_tokenizer, pick_device, quiet_transformers
from preference_datasets import load_data
from sampling import Divergence, Sampling, divergence, mean_and_error, sample
from settings import Config, data_settings, load_config
from utils import UserError, log, make_dir, run_main

COMMON = ["model=smollm2", "datasets=[sentiment]", "max_length=32", "max_prompt_length=16", "optimizer=AdamW"]
COMMON += ["+optimizer_kwargs.fused=true", "warmup_steps=2", "lr_schedule=linear"]
SFT = ["loss=sft", "lr=2e-5", "batch_size=16", "n_examples=160"]
DPO = ["loss=dpo", "loss.beta=0.1", "lr=2e-4", "batch_size=32", "n_examples=832"]
EVALUATION = ["n_eval_examples=392", "n_eval_model_samples=8", "eval_batch_size=48", "do_first_eval=false"]
EVALUATION += ["wandb.enabled=false"]
SAMPLES_PER_PROMPT = 2
MODELS = ("base", "SFT", "DPO")
MARKER = ".made_by_the_demo"


@dataclass
class Measured:
    """Samples of one model on held-out prompts; all lists have one entry a sample."""

    prompts: list[str]
    responses: list[str]
    rewards: list[float]
    divergence: Divergence
    lengths: list[int]


def train(name: str, folder: Path, overrides: list[str]) -> Path:
    """Run train.py with `overrides`; returns its run folder."""
    run_dir = folder / name
    arguments = ["train.py", f"exp_name=demo_{name}", f"local_run_dir={run_dir}", *COMMON, *overrides, *EVALUATION]
    log(f"\n=== {name.upper()} ===\npython {shlex.join(arguments)}")
    if subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False).returncode:
        sys.exit(f"error: {name} failed; see above")
    return run_dir


def measure(model: PreTrainedModel, reference: PreTrainedModel, task: "Task") -> Measured:
    """Sample from `model`, score the samples, and estimate how far it is from `reference`."""
    config, tokenizer = task.config, task.tokenizer
    room = config.max_length - max(map(len, task.prompts))
    sampled = sample(model, tokenizer, task.prompts, Sampling(room, 64, seed=1, dtype=config.compute_dtype))
    responses = tokenizer.batch_decode(sampled, skip_special_tokens=True)
    score = SentimentIntensityAnalyzer().polarity_scores
    rewards = [score(prompt + response)["compound"] for prompt, response in zip(task.texts, responses)]
    found = divergence(model, reference, task.prompts, sampled, Computation(config.compute_dtype))
    return Measured(task.texts, responses, rewards, found, [len(ids) for ids in sampled])


@dataclass
class Task:
    """The held-out prompts, each repeated SAMPLES_PER_PROMPT times: token ids and text."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    texts: list[str]


def load_task(config: Config) -> Task:
    tokenizer = load_tokenizer(config)
    data = load_data(data_settings(config), tokenizer, "test")
    prompts = [data[i].prompt for i in range(len(data)) for _ in range(SAMPLES_PER_PROMPT)]
    return Task(config, tokenizer, prompts, tokenizer.batch_decode(prompts, skip_special_tokens=True))


def table(measured: dict[str, Measured], accuracy: float) -> str:
    rows = [f"{'':6}{'sentiment (95 % interval)':>28}{'KL to SFT, nats':>18}{'pair accuracy':>15}{'tokens':>8}"]
    for name, m in measured.items():
        reward, error = mean_and_error(m.rewards, m.prompts)
        width = 1.96 * (error or 0.0)
        kl = f"{statistics.fmean(m.divergence.rao_blackwell):.2f}"
        shown = f"{accuracy:.3f}" if name == "DPO" else "-"
        interval = f"{reward:+.3f} [{reward - width:+.3f}, {reward + width:+.3f}]"
        rows.append(f"{name:6}{interval:>28}{kl:>18}{shown:>15}{statistics.fmean(m.lengths):>8.1f}")
    return "\n".join(rows)


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def plot(sft: Path, dpo: Path, target: Path) -> None:
    """Training curves of both runs as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (sft, "SFT: loss (nats a response)", ["loss/train", "loss/eval"]),
        (dpo, "DPO: loss", ["loss/train", "loss/eval"]),
        (dpo, "DPO: accuracy of pairs", ["rewards_train/accuracies", "rewards_eval/accuracies"]),
        (dpo, "DPO: implicit rewards", ["rewards_train/chosen", "rewards_train/rejected", "rewards_train/margins"]),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (run, title, names) in zip(axes.flat, panels):
        events = read_metrics(run)
        for name in names:
            points = [(event["counters/examples"], event[name]) for event in events if name in event]
            axis.plot(*zip(*points), marker="o", markersize=3, label=name)
        axis.set(title=title, xlabel="examples")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(target, dpi=110)


def prepare(folder: Path) -> None:
    """Make `folder`, or clear what an earlier demo left there. Raises UserError if it holds anything else."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise UserError(f"--folder {folder} holds something that is no demo; give an empty or new one")
    for name in ("sft", "dpo"):
        shutil.rmtree(folder / name, ignore_errors=True)
    make_dir(folder, "--folder")
    (folder / MARKER).touch()


def show_samples(task: Task, measured: dict[str, Measured], n: int = 4) -> str:
    lines = []
    for i in range(0, n * SAMPLES_PER_PROMPT, SAMPLES_PER_PROMPT):
        lines.append(f"\n{task.texts[i]} ...")
        lines += [f"  {name:4} {m.rewards[i]:+.2f} {m.responses[i].strip()!r}" for name, m in measured.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "demo", help="results go here; emptied first")
    folder = parser.parse_args().folder.resolve()
    start = time.time()
    quiet_transformers()
    prepare(folder)
    sft = train("sft", folder, SFT)
    dpo = train("dpo", folder, [*DPO, f"model.archive={sft}"])

    log("\n=== sampling from the three models on held-out prompts ===")
    config = load_config(["exp_name=demo", "loss=dpo", "loss.beta=0.1", *COMMON])
    task = load_task(config)
    models = {}
    for name, archive in zip(MODELS, (None, sft, dpo)):
        config.model.archive = str(archive) if archive else None
        models[name] = load_policy(config, pick_device(config), archive=config.model.archive).eval()
    measured = {name: measure(model, models["SFT"], task) for name, model in models.items()}
    plot(sft, dpo, folder / "curves.png")
    accuracy = next(e for e in reversed(read_metrics(dpo)) if "rewards_eval/accuracies" in e)["rewards_eval/accuracies"]
    result = table(measured, accuracy)
    (folder / "table.txt").write_text(result + "\n")
    log(show_samples(task, measured))
    n_prompts = len(task.prompts) // SAMPLES_PER_PROMPT
    log(
        f"\n{result}\n\n{len(task.prompts)} samples on {n_prompts} held-out prompts; sentiment: VADER's compound score,"
    )
    log("-1 to 1. KL(model || SFT) estimated on the model's own samples; accuracy: held-out pairs that the implicit")
    log(f"reward ranks as VADER does. Training curves: {folder / 'curves.png'}")
    log(f"finished in {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    run_main(main)
