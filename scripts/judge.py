"""Win rates of one model's responses against another's, or against the data's own, by a judge.

    python scripts/judge.py RUN RUN2 --endpoint https://api.openai.com/v1 --model NAME    # key: OPENAI_API_KEY
    python scripts/judge.py a.jsonl b.jsonl --reward-model NAME
    python scripts/judge.py RUN chosen --prompts hh --function rewards:helpful

A and B: a run's folder, a checkpoint, a model folder or a hub id, which is sampled; a file with the columns prompt (or
instruction) and response (or policy, output); or `chosen`, the data's preferred responses. Prompts: by default those of
the files, or the held-out ones of what the run was trained on. Of several responses to a prompt, the first is compared
with the first, and so on; a single one with each. An endpoint is asked about each pair in both orders; a pair counts
half if the orders disagree or an answer is none. Run it again to resume: answers and samples stay in --out, results are
replaced. KEY=VALUE are overrides as train.py takes them, for both models.
"""

import argparse
import functools
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dpo.utils import UserError
from options import add_judges, judge_problems, read, refused, take_overrides
from utils import HelpFormatter, run_main


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.usage = "%(prog)s A B (--endpoint URL --model NAME | --reward-model NAME | --function M:F | --sentiment) ..."
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    add_judges(parser)
    parser.add_argument("--prompts", nargs="+", metavar="FILE_OR_SET", help="as datasets=[...] takes them")
    parser.add_argument("--limit", type=int, default=256, metavar="N", help="compare on the first N prompts")
    parser.add_argument("--temperatures", default="1", metavar="T,T", help="at which models are sampled")
    parser.add_argument("--n", type=int, default=1, help="samples a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of each sample")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--out", type=Path, default=Path("judge"), help="folder of answers, samples and results")
    parser.add_argument("--wandb", action="store_true", help="log tables to Weights & Biases, too")
    others, overrides = take_overrides(sys.argv[1:])
    given = parser.parse_args(others)
    given.overrides = overrides
    if wrong := problems(given):
        raise UserError("\n".join(wrong))
    given.temperatures = [*dict.fromkeys(map(float, given.temperatures.split(",")))]
    return given


def problems(given: argparse.Namespace) -> list[str]:
    """Return what is wrong with the options."""
    temperatures = read(lambda: [*map(float, given.temperatures.split(","))])
    rules = [
        *((key, vars(given)[key] >= 1, "at least 1") for key in ("limit", "n", "max_new_tokens")),
        ("seed", 0 <= given.seed < 2**62, "0 or more, and less than 2^62"),
        ("temperatures", temperatures and all(0 <= t < float("inf") for t in temperatures), "numbers such as 0,0.5,1"),
    ]
    return refused(given, rules) + judge_problems(given)


if __name__ == "__main__":
    run_main(read_arguments)  # before the slow imports: --help and mistakes are answered at once
sys.path.append("")  # the current folder, which may hold the module of --function

import numpy as np
from matplotlib.figure import Figure

from dpo.data.files import SUFFIXES, numbered_rows
from dpo.data.parse import decode, prompt_key
from dpo.data.records import in_test_split
from dpo.data.rendering import ChatFormat
from dpo.data.rows import BadRow, ParsedRow, SkippedRow, Text, text_or_messages
from dpo.data.sources import PAIRS, TARGETS, find_source
from dpo.files import atomic_write
from dpo.judging.endpoint import Answers, Endpoint
from dpo.judging.judges import (
    ANSWERS,
    REFUSED,
    UNPARSABLE,
    A,
    B,
    Judge,
    Pair,
    ScoreJudge,
    Verdict,
    function_judge,
    reward_model_judge,
)
from dpo.judging.statistics import length_controlled, win_rate
from dpo.model.checks import positions
from dpo.model.loading import pick_device
from dpo.model.patches import quiet_transformers
from dpo.run.config import Config
from dpo.run.saved import Saved
from dpo.run.trackers import open_wandb
from dpo.tables import aligned
from dpo.utils import log, make_dir, redact
from opening import ends, find_saved, warn_of_formats
from preference_datasets import REGISTRY
from results import sentiment
from sample import job, rendered, sampled, write_samples
from settings import data_settings, load_config

CHOSEN = "chosen"
HH = ChatFormat(None, "hh", "2024-07-26")  # how judges see messages
PROMPT, RESPONSE = ("prompt", "instruction"), ("response", "policy", "output", "completion")
RATES = {"win_rate": "win rate of A", "length_controlled": "at equal length"}


class Responses(dict[str, list[str]]):
    """Prompt, as judges see it -> responses. `forms`: these prompts as a file has them."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.forms: dict[str, Text] = {}


Side = Saved | Responses | None
"""A model, the responses of a file, or (None) the data's own."""

# --- Reading ---


def as_text(given: Text, prompt: bool = True) -> str:
    """Return text as it is; of messages a prompt in the style of HH, or what a response says."""
    if isinstance(given, str):
        return given
    return HH.prompt(given) if prompt else "\n\n".join(message["content"] for message in given)


def read_rows(
    name: str, config: Config, own: bool, parse: Callable[[Any], ParsedRow] | None = None, split: str = "test"
) -> list[ParsedRow]:
    """Return the rows of a file or data set, of its `split` if it has one. Raise UserError.

    `own`: of undivided data only what a run of `config` holds out ("test"), or trains on ("train"). `parse`: by default
    the data set's own parser.
    """
    kind = TARGETS if name in REGISTRY and REGISTRY[name].sft_only else PAIRS
    settings = replace(data_settings(config), names=(name,), rows=kind)
    facts, source = find_source(name, settings, split, REGISTRY)
    rows = []
    for where, row in (each for chunk in source.chunks() for each in numbered_rows(chunk)):
        try:
            row = decode(row) if isinstance(row, bytes) else row
            if not isinstance(row, Mapping):
                raise BadRow("not an object", f"a row is {{...}}, this one is {type(row).__name__}")
            alone = parse is None and [*row] == ["prompt"]
            rows.append(ParsedRow(text_or_messages(row, "prompt"), [], []) if alone else (parse or facts.parse)(row))
        except BadRow as bad:
            if not (config.drop_bad_rows or isinstance(bad, SkippedRow)):
                raise UserError(f"{where}: {bad}; mend or remove the row, or set drop_bad_rows=true") from None
    if own and source.held_out:
        test = in_test_split(np.array([prompt_key(row) for row in rows]), settings.holdout_fraction)
        rows = [row for row, held_out in zip(rows, test, strict=True) if held_out == (split == "test")]
    if any(row.tools for row in rows):
        log(f"warning: {name}: tools of the prompts are not shown to models and judges")
    if not rows:
        raise UserError(f"{name} holds no rows; give a file or data set with at least one")
    return rows


def read_responses(path: str, config: Config) -> Responses:
    """Return the responses of a file. Raise UserError."""

    def parse(row: Mapping[str, Any]) -> ParsedRow:
        names = [next((name for name in names if name in row), names[0]) for names in (PROMPT, RESPONSE)]
        return ParsedRow(text_or_messages(row, names[0]), [text_or_messages(row, names[1])], [])

    responses = Responses()
    for row in read_rows(path, config, False, parse):
        responses.forms.setdefault(text := as_text(row.prompt), row.prompt)
        responses.setdefault(text, []).append(as_text(row.responses[0], prompt=False))
    return responses


def find_side(name: str, overrides: list[str]) -> Side:
    """Return what A or B means. Raise UserError."""
    if name == CHOSEN:
        return None
    if name.lower().endswith(SUFFIXES):
        return read_responses(name, load_config(["exp_name=judge", *overrides]))
    if "/" not in name and Path(name).suffix not in ("", ".gguf", ".pt") and not Path(name).exists():
        raise UserError(f"{name}: there is no such file or folder; files of responses end in {', '.join(SUFFIXES[:4])}")
    return find_saved(name, overrides)


def find_prompts(given: argparse.Namespace, sides: Sequence[Side]) -> tuple[dict[str, Text], Responses]:
    """Return the prompts to compare on, as judges see them and as rows have them, and the data's own responses.

    Raise UserError if it is not clear which, or if a side has no responses to them.
    """
    files = [side for side in sides if isinstance(side, Responses)]
    runs = [side.config for side in sides if isinstance(side, Saved) and side.trained]
    if not (given.prompts or files or runs):
        raise UserError("it is not known which prompts to judge on: give --prompts <file or data set>")
    if files and not given.prompts:
        prompts, chosen = dict(files[0].forms), Responses()
        if files[0].keys() != files[-1].keys() and (n := len(files[0].keys() & files[-1].keys())):
            sizes = f"{len(files[0])} and {len(files[1])}"
            raise UserError(f"the files have {sizes} prompts, {n} of them in common; say which with --prompts")
    else:
        config = load_config(["exp_name=judge", *given.overrides]) if given.prompts else runs[0]
        names = given.prompts or config.datasets
        rows = [row for name in names for row in read_rows(name, config, own=not given.prompts)]
        prompts = {as_text(row.prompt): row.prompt for row in rows}
        preferred = [row for row in rows if row.responses and row.label is not False]
        said = [(as_text(row.prompt), as_text(row.responses[row.target], prompt=False)) for row in preferred]
        chosen = Responses({prompt: [response] for prompt, response in said})
    if None in sides and not chosen:
        raise UserError(f"{CHOSEN}: the prompts come without preferred responses; give --prompts <rows that have them>")
    known = [*files, *[chosen] * (None in sides)]
    common = [text for text in prompts if all(text in each for each in known)]
    if not common:
        firsts = "; ".join(repr(next(iter(texts)))[:80] for texts in ([*prompts], *known))
        raise UserError(f"no prompts in common, the first are {firsts}; give responses to the same prompts")
    log(f"{min(given.limit, len(common))} of {len(prompts)} prompts" + " (--limit)" * (given.limit < len(common)))
    return {text: prompts[text] for text in common[: given.limit]}, chosen


def responses_of(side: Saved, prompts: Mapping[str, Text], given: argparse.Namespace, temperature: float) -> Responses:
    """Return a model's responses, sampled at `temperature`; prompts that leave no room for one are left out. Both
    models have the same seed, so that the samples of the same model are the same."""
    found = rendered(prompts, side, side.config)
    warn_of_formats(side, {prompt.format for prompt in found.values()}, "prompts")
    most = (positions(side.architecture())[0] or sys.maxsize) - given.max_new_tokens
    fitting = {text: prompt for text, prompt in found.items() if len(prompt.ids) <= most}
    if len(fitting) < len(found):
        log(f"{len(found) - len(fitting)} prompts leave no room for --max-new-tokens {given.max_new_tokens}")
    n = 1 if temperature == 0 else given.n
    options = {key: vars(given)[key] for key in ("max_new_tokens", "batch_size", "seed")} | {"temperature": temperature}
    items, how, settings = job(side, None, given.overrides, [*fitting.values()], n, options)
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    make = functools.partial(sampled, side, None, how, items)
    rows = write_samples(given.out / f"samples-{name}.jsonl", make, items, settings) if items else []
    return Responses({text: [row["policy"] for row in rows[i * n : (i + 1) * n]] for i, text in enumerate(fitting)})


def pairs_of(prompts: Mapping[str, Text], ours: Responses, theirs: Responses) -> list[Pair]:
    """Return (prompt, response of A, response of B): one by one, or a single response with each. Raise UserError."""
    pairs: list[Pair] = []
    for text in prompts:
        a, b = ours.get(text, []), theirs.get(text, [])  # [] if the prompt is too long for a model
        n = max(len(a), len(b)) if a and b else 0
        if n and not {len(a), len(b)} <= {1, n}:
            raise UserError(f"A has {len(a)} responses to {text[:60]!r} and B has {len(b)}; give as many, or one")
        pairs += [(text, a[i % len(a)], b[i % len(b)]) for i in range(n)]
    if not pairs:
        raise UserError("no prompt is short enough for both; lower --max-new-tokens, or give shorter prompts")
    return pairs


# --- Results ---


def summary(pairs: Sequence[Pair], verdicts: Sequence[Verdict], ordered: bool) -> dict[str, Any]:
    """Return counts, win rates of A with their intervals, and mean lengths in characters.

    If the judge sees responses in an order (`ordered`), also what that did. position_bias: the share of answers for
    the response shown first minus that for the second, 0 without bias.
    """
    wins, prompts = [verdict.win for verdict in verdicts], [pair[0] for pair in pairs]
    lengths = np.array([[len(a.strip()), len(b.strip())] for _, a, b in pairs])
    result: dict[str, Any] = {"prompts": len(set(prompts)), "pairs": len(pairs)}
    result |= {name: wins.count(win) for name, win in (("wins", 1.0), ("ties", 0.5), ("losses", 0.0))}
    result["win_rate"] = win_rate(wins, prompts)._asdict()
    result["length_controlled"] = length_controlled(wins, (lengths[:, 0] - lengths[:, 1]).tolist(), prompts)._asdict()
    result["characters"] = lengths.mean(0).tolist()
    if ordered:
        first = sum((forward == A) + (backward == B) for forward, backward in verdicts)
        second = sum((forward == B) + (backward == A) for forward, backward in verdicts)
        said = Counter(answer for verdict in verdicts for answer in verdict)
        result["position_bias"] = (first - second) / (first + second) if first + second else None
        result["orders_disagree"] = sum(x != y for x, y in verdicts if not {REFUSED, UNPARSABLE} & {x, y})
        result |= {answer: said[answer] for answer in ANSWERS[2:]}
    return result


def table(results: Mapping[str, dict[str, Any]]) -> str:
    """Return a line for each temperature."""
    counts, more = ["prompts", "wins", "ties", "losses"], ["orders_disagree", REFUSED, UNPARSABLE]
    lines = []
    for temperature, found in results.items():
        cells = {"temperature": temperature} | {name: str(found[name]) for name in counts}
        for name, shown in RATES.items():
            cells[shown] = f"{found[name]['rate']:.3f} {ends(found[name])}"
        cells["characters A, B"] = ", ".join(f"{length:.0f}" for length in found["characters"])
        if "position_bias" in found:
            bias = found["position_bias"]
            cells["position bias"] = "-" if bias is None else f"{bias:+.2f}"
            cells |= {name.replace("_", " "): str(found[name]) for name in more}
        lines.append(cells)
    return aligned([[*lines[0]], *([*cells.values()] for cells in lines)])


def draw(results: Mapping[str, dict[str, Any]], title: str, path: Path) -> None:
    """Draw win rates over sampling temperatures, as in the paper's figures 2 and 3."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, label in RATES.items():
        rates = [found[name] for found in results.values()]
        y, spans = [rate["rate"] for rate in rates], [rate["interval"] or [rate["rate"]] * 2 for rate in rates]
        errors = np.abs(np.array(spans) - np.array(y)[:, None]).T
        axes.errorbar([*map(float, results)], y, errors, marker="o", capsize=3, label=label)
    axes.axhline(0.5, color="grey", linewidth=1, linestyle="--")
    axes.set(xlabel="sampling temperature", ylabel="win rate, 95 % interval", ylim=(0, 1))
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def write_alpaca(folder: Path, rows: Sequence[tuple[Pair, Verdict]], a: str, b: str, judge: str) -> None:
    """Write pairs and verdicts as AlpacaEval does: output_1 is B's, output_2 is A's; preference 1 is for B, 2 for A."""
    make_dir(folder, "--out")
    outputs = [{"instruction": prompt, "output_1": y, "output_2": x} for (prompt, x, y), _ in rows]
    named = [row | {"generator_1": b, "generator_2": a, "annotator": judge} for row in outputs]
    files = {
        "model_outputs": [{"instruction": p, "output": x, "generator": a} for (p, x, _), _ in rows],
        "reference_outputs": [{"instruction": p, "output": y, "generator": b} for (p, _, y), _ in rows],
        "annotations": [row | {"preference": 1 + verdict.win} for row, (_, verdict) in zip(named, rows, strict=True)],
    }
    for name, content in files.items():
        atomic_write(folder / f"{name}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def send_to_wandb(
    outcome: Mapping[str, Any], rows: Mapping[str, Sequence[tuple[Pair, Verdict]]], given: argparse.Namespace
) -> None:
    """Log the win rates, and a table of all pairs, to W&B."""
    import wandb

    run = open_wandb(load_config(["exp_name=judge", *given.overrides]), given.out, outcome["settings"])
    lines = [[t, *pair, *verdict, verdict.win] for t, some in rows.items() for pair, verdict in some]
    run.log({"pairs": wandb.Table([*("temperature", "prompt", "A", "B", "A first", "B first", "win of A")], lines)})
    rates = [[t, *(found[name]["rate"] for name in RATES)] for t, found in outcome["results"].items()]
    run.log({"win_rates": wandb.Table(["temperature", *RATES], rates)})
    run.finish()


# --- The command ---


def find_judge(given: argparse.Namespace) -> Judge:
    """Return the judge that the options name. Raise UserError."""
    if given.endpoint:
        own = {"timeout": given.timeout, "parallel": given.parallel, "fields": json.loads(given.fields)}
        return Endpoint(given.endpoint, given.model, given.criterion, Answers(given.out / "answers.jsonl"), **own)
    if given.reward_model:
        device = pick_device(load_config(["exp_name=judge", *given.overrides]))
        return reward_model_judge(given.reward_model, device, given.batch_size)
    if given.function:
        return function_judge(given.function)
    return ScoreJudge("sentiment", lambda items: [sentiment(prompt + response) for prompt, response in items])


def usage(judge: Endpoint, given: argparse.Namespace) -> dict[str, Any]:
    """Log and return what the answers took; with prices also the cost."""
    used = judge.usage
    line = f"{used.answers} answers, {used.asked} of them asked for now"
    if used.tokens_in is not None and used.tokens_out is not None:
        line += f"; {used.tokens_in:,} tokens of questions and {used.tokens_out:,} of answers"
    cost = None if given.price_in is None else used.cost(given.price_in, given.price_out)
    log(line + ("" if cost is None else f", cost {cost:.4g}"))
    return used._asdict() | {"cost": cost}


def main() -> None:
    given = read_arguments()
    quiet_transformers()
    sides = [find_side(name, given.overrides) for name in (given.a, given.b)]
    prompts, chosen = find_prompts(given, sides)
    make_dir(given.out, "--out")
    judge = find_judge(given)
    sampled = any(isinstance(side, Saved) for side in sides)
    if len(given.temperatures) > 1 and not sampled:
        raise UserError("--temperatures: neither A nor B is a model to sample from; leave it out")
    results: dict[str, dict[str, Any]] = {}
    rows: dict[str, list[tuple[Pair, Verdict]]] = {}
    for temperature in given.temperatures:
        name, both = f"{temperature:g}" if sampled else "-", []
        for side in sides:
            known = chosen if side is None else side
            both.append(responses_of(known, prompts, given, temperature) if isinstance(known, Saved) else known)
        pairs = pairs_of(prompts, both[0], both[1])
        rows[name] = list(zip(pairs, judge.compare(pairs), strict=True))
        results[name] = summary(pairs, [verdict for _, verdict in rows[name]], isinstance(judge, Endpoint))
        if (n := results[name].get(UNPARSABLE, 0)) > len(pairs) / 5:  # of two answers each
            log(
                f"warning: {n} answers have no verdict and count as ties; raise max_tokens in --fields if they were cut"
            )
        folder = given.out / f"temperature-{name}" if len(given.temperatures) > 1 else given.out
        write_alpaca(folder, rows[name], given.a, given.b, judge.name)
    title = f"A: {given.a}\nB: {given.b}\njudge: {judge.name}"
    log(f"{title}\n{table(results)}")
    settings = {key: value for key, value in vars(given).items() if key not in ("out", "wandb")}
    outcome: dict[str, Any] = {"settings": settings | {"judge": judge.name}, "results": results}
    outcome["usage"] = usage(judge, given) if isinstance(judge, Endpoint) else None
    atomic_write(given.out / "results.json", redact(json.dumps(outcome, indent=1, ensure_ascii=False)) + "\n")
    if len(results) > 1:
        draw(results, title, given.out / "win_rates.png")
    if given.wandb:
        send_to_wandb(outcome, rows, given)
    log(f"written to {given.out}")


if __name__ == "__main__":
    run_main(main)
