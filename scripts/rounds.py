"""On-policy preference training: sample, judge, train, and again, in rounds.

    python scripts/rounds.py --sentiment --rounds 4 +experiment=sentiment_dpo model.archive=<SFT run>
    python scripts/rounds.py --reward-model NAME --k 8 model=llama3-8b 'datasets=[hh]' loss=dpo loss.beta=0.1 ...

Each round samples k responses to each of its prompts from the newest policy, has a judge score them (see judge.py),
makes pairs, and trains on these through train.py, from the newest policy. KEY=VALUE are the overrides of that training,
the same in each round: lengths such as n_examples are those of a round. Prompts are those of `datasets`; the held-out
ones measure every round. The very start is model.archive, or the base model.

--engine vllm takes the samples to train on from vLLM, and --serve 'program {model} --port {port}' from any
OpenAI-compatible server of completions; it is started anew for each policy. What is measured is sampled here.

One folder, --out, holds all: round-<i>/pairs.jsonl, round-<i>/run (train.py's), samples, rounds.md, rounds.json,
rounds.png and a report. Run it again to resume: the result is that of an uninterrupted run. With --prompts N it can
go on with more --rounds, too.
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dpo.config import Inherited, keys
from dpo.run.config import Config
from dpo.utils import UserError
from options import add_judges, judge_problems, key_of, read, refused, take_overrides
from utils import HelpFormatter, run_main

OWN = ("datasets", "model.archive", "reference.archive", "local_run_dir", "exp_name", "resume", "n_eval_examples")
"""Keys of train.py that each round sets itself."""
ENGINES = {"vllm": "vllm serve {model} --port {port} --generation-config vllm"}  # not the top-k of a model's own folder
"""What --serve is for an --engine."""


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.usage = "%(prog)s (--endpoint URL --model NAME | --reward-model NAME | --function M:F | --sentiment) ..."
    add_judges(parser)
    parser.add_argument("--rounds", type=int, default=2, help="rounds of training")
    parser.add_argument("--k", type=int, default=4, help="responses sampled for each prompt")
    parser.add_argument("--prompts", type=int, metavar="N", help="prompts of a round; by default all, shared out")
    parser.add_argument("--repeat", action="store_true", help="the same prompts in each round, not fresh ones")
    parser.add_argument("--pairs", choices=("best-worst", "all"), default="best-worst", help="of a prompt's responses")
    parser.add_argument(
        "--reference", choices=("moved", "fixed"), default="moved", help="the round's start or the first"
    )
    parser.add_argument("--keep-cut", action="store_true", help="train on cut responses, too, as if they ended")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of each sample")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples to train on")
    parser.add_argument("--top-p", type=float, default=1.0, help="of the samples to train on")
    server = parser.add_mutually_exclusive_group()
    server.add_argument("--engine", choices=ENGINES, help="sample from a server of this program, if it is installed")
    server.add_argument("--serve", metavar="COMMAND", help="sample from the server that this starts: see above")
    parser.add_argument("--eval-prompts", type=int, default=256, metavar="N", help="held-out prompts to measure on")
    parser.add_argument("--eval-n", type=int, default=2, metavar="N", help="samples of each, at temperature 1")
    parser.add_argument("--seed", type=int, default=0, help="of samples and of the order of prompts")
    parser.add_argument("--out", type=Path, default=Path("rounds"), help="folder of everything")
    others, given_overrides = take_overrides(sys.argv[1:])
    given = parser.parse_args(others)
    counts = ("rounds", "prompts", "max_new_tokens", "eval_prompts", "eval_n")
    rules = [
        *((key, vars(given)[key] is None or vars(given)[key] >= 1, "at least 1") for key in counts),
        ("k", given.k >= 2, "at least 2"),
        ("temperature", 0 < given.temperature < float("inf"), "above 0"),
        ("top_p", 0 < given.top_p <= 1, "above 0 and at most 1"),
        ("engine", given.engine is None or importlib.util.find_spec(given.engine), "installed in this environment"),
        ("serve", given.serve is None or read(lambda: shlex.split(given.serve)), "a command line"),
        ("seed", 0 <= given.seed < 2**62, "0 or more, and less than 2^62"),
    ]
    taken = [key for key in map(key_of, given_overrides) if key in OWN and key not in ("datasets", "model.archive")]
    wrong = [f"{key}=... is set by each round itself: leave it out" for key in taken]
    if wrong := wrong + refused(given, rules) + judge_problems(given):
        raise UserError("\n".join(wrong))
    given.overrides, given.serve = given_overrides, ENGINES.get(given.engine, given.serve)
    opened = {"device", "cache_dir", *keys(Config, Inherited)}
    given.opening = [o for o in given_overrides if {key_of(o), key_of(o).partition(".")[0]} & opened]
    return given


if __name__ == "__main__":
    run_main(read_arguments)  # before the slow imports: --help and mistakes are answered at once
sys.path.append("")  # the current folder, which may hold the module of --function

import numpy as np
import torch
from matplotlib.figure import Figure

from dpo.data.rows import Text
from dpo.files import atomic_write
from dpo.judging.judges import Judge, ScoreJudge
from dpo.judging.statistics import interval, win_rate
from dpo.model.loading import local_folder
from dpo.model.patches import quiet_transformers
from dpo.run.saved import Saved
from dpo.sampling import mean_and_error
from dpo.serving import serving
from dpo.tables import markdown
from dpo.utils import log, make_dir, progress, redact
from judge import as_text, find_judge, read_rows
from opening import ends, find_saved, run_train
from report import write_report
from results import Z95, load_runs
from sample import Prompt, job, rendered, write_samples
from sample import sampled as sample
from settings import load_config, quoted

KL_COLUMN = "kl_rao_blackwell"


# --- Prompts ---


def find_prompts(given: argparse.Namespace, config: Config) -> tuple[dict[str, Text], dict[str, Text]]:
    """Return the prompts to train and to measure on, as judges see them and as rows have them. Raise UserError."""
    found = []
    for split, limit in (("train", None), ("test", given.eval_prompts)):
        rows = [row for name in config.datasets for row in read_rows(name, config, True, split=split)]
        found.append(dict([*{as_text(row.prompt): row.prompt for row in rows}.items()][:limit]))
    shared = found[0].keys() & found[1].keys()
    if shared:
        log(f"{len(shared)} prompts of the test split are in the training split, too; they only measure")
    return {text: form for text, form in found[0].items() if text not in shared}, found[1]


def prompts_of_round(prompts: Mapping[str, Text], number: int, given: argparse.Namespace) -> dict[str, Text]:
    """Return the prompts of round `number` (from 1): the next of a shuffled order, or, --repeat, the same again."""
    order = np.random.default_rng(given.seed).permutation(len(prompts))
    n, turn = given.prompts, 0 if given.repeat else number - 1
    texts = list(prompts)
    return {texts[order[i % len(order)]]: prompts[texts[order[i % len(order)]]] for i in range(turn * n, turn * n + n)}


def fitting(prompts: Mapping[str, Text], policy: Saved, config: Config) -> dict[str, Prompt]:
    """Return prompts as the model sees them in training; those that would be cut there are left out."""
    every, most = rendered(prompts, policy, config), config.max_prompt_length
    found = {text: prompt for text, prompt in every.items() if len(prompt.ids) <= most}
    if len(found) < len(every):
        log(f"{len(every) - len(found)} prompts have more than max_prompt_length={most} tokens")
    if not found:
        raise UserError(f"no prompt has up to max_prompt_length={most} tokens; raise it")
    return found


# --- Stages of a round ---


def sampled(
    path: Path, policy: Saved, reference: Saved | None, prompts: Mapping[str, Prompt], n: int,
    options: dict[str, Any], given: argparse.Namespace, serve: str | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return `n` samples of each prompt, of which those written to `path` before are kept. They come from the
    server that the command `serve` starts, or from this process."""
    options = {"max_new_tokens": given.max_new_tokens, "batch_size": given.batch_size} | options
    items, how, settings = job(policy, reference, given.opening, [*prompts.values()], n, options)
    with contextlib.ExitStack() as stack:

        def served_after(done: int) -> Iterator[list[dict[str, Any]]]:
            model = str(local_folder(policy.config.model.start, policy.config.cache))
            server = stack.enter_context(serving(serve or "", model, path.with_name("server.log")))
            for start in progress(range(done, len(items), how.batch_size), desc="batches"):
                some = items[start : start + how.batch_size]
                found = server.sample([prompt.ids for prompt, _ in some], start, how)
                yield [{"prompt": prompt.text, "sample": i} | row for (prompt, i), row in zip(some, found, strict=True)]

        here = functools.partial(sample, policy, reference, how, items, both=False)
        rows = write_samples(path, served_after if serve else here, items, settings)
    gc.collect()  # before training loads its models: one refers to itself
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rows


def paired(
    prompts: Mapping[str, Text], rows: Sequence[dict[str, Any]], judge: Judge, given: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return the rows to train on: of each prompt the best and the worst response, or all, with their scores.

    Responses that did not end, or are empty, are left out, and so are prompts whose responses are all as good.
    """
    groups: dict[str, list[str]] = {}
    texts = list(prompts)
    for i, row in enumerate(rows):
        if (row["ended"] or given.keep_cut) and row["policy"].strip():
            groups.setdefault(texts[i // given.k], []).append(row["policy"])
    distinct = {text: list(dict.fromkeys(group)) for text, group in groups.items()}
    several = [(text, group) for text, group in distinct.items() if len(group) > 1]
    found = []
    for (text, group), scores in zip(several, judge.scores(several), strict=True):
        ranked = sorted(zip(scores, group, strict=True), key=lambda each: -each[0])  # stable: equal ones as sampled
        if ranked[0][0] > ranked[-1][0]:
            kept = ranked if given.pairs == "all" else [ranked[0], ranked[-1]]
            found.append({"prompt": prompts[text], "responses": [r for _, r in kept], "scores": [s for s, _ in kept]})
    ended = sum(row["ended"] for row in rows)
    unlike = f"{len(found)} of {len(prompts)} prompts have a better and a worse"
    log(f"{len(rows)} responses, {ended} of them ended; {unlike}")
    if not found:
        advice = "or --keep-cut, to train on responses that were cut" if ended < len(rows) else "or another judge"
        raise UserError(f"no prompt has two responses of different score: raise --k or --max-new-tokens, {advice}")
    return found


def train(number: int, folder: Path, archive: str | None, start: str | None, given: argparse.Namespace) -> None:
    """Train round `number` through train.py; what is finished stays. Raise UserError if it fails."""
    own = {"datasets": [folder / "pairs.jsonl"], "local_run_dir": folder / "run", "exp_name": f"round-{number}"}
    own |= {"holdout_fraction": 0, "n_eval_examples": 0, "kl_during_eval": None, "resume": "auto"}
    own |= {"model.archive": archive} if archive else {}
    own |= {"reference.archive": start} if start and number > 1 else {}
    others = [override for override in given.overrides if key_of(override) not in own]
    run_train([*others, *(f"{key}={quoted(value)}" for key, value in own.items())])


def measured(
    rows: Sequence[dict[str, Any]], first: Sequence[dict[str, Any]], texts: Sequence[str], judge: Judge
) -> dict[str, Any]:
    """Return what a round's policy is like: `rows` are its samples to the measuring prompts, `first` the start's."""
    prompts = [text for text in texts for _ in range(len(rows) // len(texts))]
    found: dict[str, Any] = {"samples": len(rows), "prompts": len(texts)}
    found["tokens"], found["ended"] = (float(np.mean([row[key] for row in rows])) for key in ("tokens_policy", "ended"))
    found["kl"], found["kl_error"] = 0.0, 0.0
    if KL_COLUMN in rows[0]:
        found["kl"], found["kl_error"] = mean_and_error([row[KL_COLUMN] for row in rows], prompts)
        wins = [v.win for v in judge.compare([(p, a["policy"], b["policy"]) for p, a, b in zip(prompts, rows, first)])]
        found["win_rate"] = win_rate(wins, prompts)._asdict()
    if isinstance(judge, ScoreJudge):  # scores of other judges compare responses of one prompt only
        scores = np.array([s for [s] in judge.scores([(p, [row["policy"]]) for p, row in zip(prompts, rows)])])
        found["reward"] = {"mean": float(scores.mean()), "interval": interval(scores, np.array(prompts))}
    return found


# --- Results ---


def table(rounds: Sequence[dict[str, Any]], judge: str) -> str:
    """Return a line for each round, as Markdown."""
    head = ["round", "pairs", f"reward ({judge})", "KL from the start, nats", "win rate against round 0"]
    head += ["tokens", "ended"]
    lines = [head]
    for number, found in enumerate(rounds):
        reward = f"{found['reward']['mean']:.3f} {ends(found['reward'])}" if "reward" in found else "-"
        wins = f"{found['win_rate']['rate']:.3f} {ends(found['win_rate'])}" if "win_rate" in found else "-"
        error = found["kl_error"]
        kl = f"{found['kl']:.2f}" + (f" ± {Z95 * error:.2f}" if error is not None else " (one sample)")
        cells = [str(number), str(found.get("pairs", "-")), reward, kl if number else "0", wins]
        lines.append([*cells, f"{found['tokens']:.1f}", f"{found['ended']:.0%}"])
    return "\n".join(markdown(lines))


def draw(rounds: Sequence[dict[str, Any]], judge: str, path: Path) -> None:
    """Draw reward, or win rate against round 0, over the KL divergence from the start."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    name, key = ("reward", "mean") if "reward" in rounds[0] else ("win_rate", "rate")
    shown = [found for found in rounds if name in found]
    y = np.array([found[name][key] for found in shown])
    spans = np.array([found[name]["interval"] or [v, v] for found, v in zip(shown, y)])
    x, errors = [found["kl"] for found in shown], [Z95 * (found["kl_error"] or 0) for found in shown]
    axes.errorbar(x, y, np.abs(spans.T - y), errors, marker="o", capsize=3)
    for found, value in zip(shown, y):
        axes.annotate(str(rounds.index(found)), (found["kl"], value), xytext=(5, 5), textcoords="offset points")
    axes.set(xlabel="KL from the start, nats a response", ylabel=f"{name.replace('_', ' ')} ({judge}), 95 % interval")
    figure.savefig(path, dpi=130)


def write(rounds: Sequence[dict[str, Any]], judge: str, given: argparse.Namespace, command: str) -> None:
    """Write the results so far, and print them."""
    text = table(rounds, judge)
    notes = f"{rounds[0]['samples']} samples of {rounds[0]['prompts']} held-out prompts; ± and [,]: 95 %, over prompts"
    page = f"# Rounds\n\n`{command}`\n\n{text}\n\n{notes}; reference {given.reference}; {given.pairs} pairs.\n"
    atomic_write(given.out / "rounds.md", redact(page))
    atomic_write(given.out / "rounds.json", redact(json.dumps({"command": command, "rounds": rounds}, indent=1)) + "\n")
    if len(rounds) > 1:
        draw(rounds, judge, given.out / "rounds.png")
        folders = [given.out / f"round-{i}" / "run" for i in range(1, len(rounds))]
        write_report(load_runs(folders), given.out, 4, command)
    log(f"\n{text}\n{notes}")


# --- The command ---


def check_out(given: argparse.Namespace, settings: Mapping[str, Any]) -> None:
    """Write what the rounds depend on, or raise UserError if --out was made with something else."""
    path, settings = given.out / "settings.json", json.loads(redact(json.dumps(settings)))
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
        changes = [f"{k} was {before.get(k)} and is {v}" for k, v in settings.items() if before.get(k) != v]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--out: {path} cannot be read ({error}); give another --out") from error
    if changes:
        raise UserError(f"--out {given.out} was made with other settings ({'; '.join(changes)}): give another --out")
    atomic_write(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    given = read_arguments()
    quiet_transformers()
    config = load_config(["exp_name=rounds", *given.overrides])
    if given.serve and config.adapter.peft_type:
        raise UserError(
            f"--serve needs whole weights, and adapter={config.adapter.peft_type} writes an adapter: leave one out"
        )
    if not config.loss.needs_rejected:
        raise UserError(f"loss={config.loss.name} learns from no pairs: choose a loss of pairs, such as loss=dpo")
    train_prompts, eval_prompts = find_prompts(given, config)
    share = -(-len(train_prompts) // (1 if given.repeat else given.rounds))
    given.prompts = min(given.prompts or share, len(train_prompts))
    given.out = make_dir(given.out.resolve(), "--out")
    left_out = ("out", "rounds", "opening", "timeout", "parallel", "price_in", "price_out")
    judge, start = find_judge(given), find_saved(config.model.start, given.opening)
    check_out(given, {k: v for k, v in vars(given).items() if k not in left_out})
    command = f"python scripts/rounds.py {shlex.join(sys.argv[1:])}"
    policy, rounds = start, [dict[str, Any]() for _ in range(given.rounds + 1)]
    held_out = fitting(eval_prompts, start, config)
    alike = {"temperature": 1.0, "top_p": 1.0, "seed": given.seed}
    first: list[dict[str, Any]] = []
    for number in range(given.rounds + 1):
        folder = given.out / f"round-{number}"
        make_dir(folder, "--out")
        found: dict[str, Any] = {}
        if number:
            log(f"\n=== round {number} of {given.rounds} ===")
            policy, found = one_round(number, folder, policy, config, train_prompts, judge, given)
        reference = start if number else None
        rows = sampled(folder / "measured.jsonl", policy, reference, held_out, given.eval_n, alike, given)
        first = first or rows
        rounds[number] = found | measured(rows, first, list(held_out), judge)
        write(rounds[: number + 1], judge.name, given, command)
    log(f"written to {given.out}")


def one_round(
    number: int, folder: Path, policy: Saved, config: Config, prompts: Mapping[str, Text], judge: Judge,
    given: argparse.Namespace,
) -> tuple[Saved, dict[str, Any]]:  # fmt: skip
    """Return the policy after round `number`, and counts."""
    path, start = folder / "pairs.jsonl", config.model.start
    if not path.exists():
        chosen = prompts_of_round(prompts, number, given)
        seen = fitting(chosen, policy, config)
        options = {"temperature": given.temperature, "top_p": given.top_p, "seed": given.seed + number}
        rows = sampled(folder / "samples.jsonl", policy, None, seen, given.k, options, given, given.serve)
        found = paired({text: chosen[text] for text in seen}, rows, judge, given)
        atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
    archive = str(folder.with_name(f"round-{number - 1}") / "run") if number > 1 else config.model.archive
    fixed = given.reference == "fixed" and config.loss.needs_reference
    train(number, folder, archive, start if fixed else None, given)
    counts = {"pairs": sum(1 for _ in path.open(encoding="utf-8"))}
    return find_saved(str(folder / "run"), given.opening), counts


if __name__ == "__main__":
    run_main(main)
