"""Samples of a trained policy and of its reference for the same prompts, with estimates of the KL divergence.

    python scripts/sample.py RUN "Rivers are" --n 4
    python scripts/sample.py RUN - < prompt.txt
    python scripts/sample.py RUN --prompts prompts.txt --out samples.jsonl

RUN is a run's folder, a checkpoint, a model folder or a hub id; the reference is the one it was trained against, and
`--reference none` goes without. Prompts: on the command line (`-`: all of stdin), where samples are printed and written
only to a given --out; or --prompts: one a line of a .txt file, or the column `prompt` of a .jsonl file: text, or a list
of {role, content}, to be rendered with the chat template. Text is taken literally, unless the run was trained with
chat_format=template (or that is given): then it is a user's turn. Started again after an interruption
with the same --out it resumes, and the file becomes the same. KEY=VALUE are overrides as train.py
takes them: device=cpu, model.policy_dtype=bfloat16.
"""

import argparse
import fcntl
import functools
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dpo.utils import UserError
from options import check_name, refused, take_overrides
from utils import HelpFormatter, run_main


def read_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.usage = "%(prog)s RUN (PROMPT ... | - | --prompts FILE) [options] [KEY=VALUE ...]"
    parser.add_argument("run")
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="text, or - for all of stdin")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help=".jsonl or .txt")
    parser.add_argument("--out", type=Path, help="file of the result; of --prompts by default samples.jsonl")
    parser.add_argument("--overwrite", action="store_true", help="start --out anew")
    parser.add_argument("--reference", metavar="NAME", help="run, checkpoint, model folder, hub id, or none")
    parser.add_argument("--n", type=int, default=1, help="samples a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of each response")
    parser.add_argument("--temperature", type=float, default=1.0, help="1: the model's own distribution")
    parser.add_argument("--top-p", type=float, default=1.0, help="1: the model's own distribution")
    parser.add_argument("--greedy", action="store_true", help="the likeliest token each time: temperature 0")
    parser.add_argument("--batch-size", type=int, default=16, help="samples at a time")
    parser.add_argument("--seed", type=int, default=0, help="with a batch's number it gives its samples")
    others, overrides = take_overrides(sys.argv[1:])
    given = parser.parse_intermixed_args(others)
    rules = [
        *((key, vars(given)[key] >= 1, "at least 1") for key in ("n", "max_new_tokens", "batch_size")),
        ("temperature", 0 <= given.temperature < float("inf"), "0 or more"),
        ("top_p", 0 < given.top_p <= 1, "above 0 and at most 1"),
        ("seed", 0 <= given.seed < 2**62, "0 or more, and less than 2^62"),
    ]
    wrong = refused(given, rules)
    if given.greedy and (given.temperature, given.top_p) != (1, 1):
        wrong.append("--greedy takes neither --temperature nor --top-p")
    given.temperature = 0.0 if given.greedy else given.temperature
    if given.temperature == 0 and given.n > 1:
        wrong.append(f"--n {given.n}: greedy samples of a prompt are all the same; leave it out, or --greedy")
    if bool(given.prompt) == bool(given.prompts):
        wrong.append("give prompts on the command line, - for stdin, or --prompts FILE")
    if wrong:
        raise UserError("\n".join(wrong))
    given.out = given.out or (Path("samples.jsonl") if given.prompts else None)
    check_name(given.run)
    return given, overrides


if __name__ == "__main__":
    run_main(read_arguments)  # before the slow imports: --help and mistakes are answered at once

from dpo.data.parse import decode
from dpo.data.rendering import ChatFormat
from dpo.data.rows import BadRow, ParsedRow, Text, text_or_messages, to_messages
from dpo.data.tokenise import own_bos
from dpo.model.checks import positions
from dpo.model.loading import load_tokenizer, pick_device
from dpo.model.patches import quiet_transformers
from dpo.reference import LiveReference
from dpo.run.config import Config
from dpo.run.saved import Saved
from dpo.run.weights import weights_identity
from dpo.sampling import ESTIMATORS, Sampling, continuation, divergence, mean_and_error, sample
from dpo.utils import file_hash, log, make_dir, progress, visible
from opening import find_reference, find_saved, warn_of_formats

ADVICE = "give another --out, or --overwrite"


class Prompt(NamedTuple):
    """A prompt as the model sees it, the line it stands in, and how that was rendered."""

    where: str
    text: str
    ids: list[int]
    format: str


Item = tuple[Prompt, int]
"""A prompt and which of its samples."""


def read_prompts(path: Path, tokenizer: Any, chat: ChatFormat) -> list[Prompt]:
    """Return the prompts of a .jsonl or .txt file. Raise UserError naming the line that is none."""
    if path.suffix not in (".jsonl", ".txt"):
        raise UserError(f"--prompts {path}: give a .jsonl file with a column 'prompt', or a .txt file, a prompt a line")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read: {error}; give a UTF-8 text file") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = line.removesuffix("\r") if path.suffix == ".txt" else _prompt_of(line)
            prompts.append(as_prompt(f"{path}:{number}", prompt, tokenizer, chat))
        except BadRow as bad:
            raise UserError(f"{path}:{number}: {bad}; mend or remove the line") from None
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompt; give a file with at least one")
    return prompts


def prompts_given(texts: Sequence[str], tokenizer: Any, chat: ChatFormat) -> list[Prompt]:
    """Return the prompts of the command line; "-" is what stdin holds. Raise UserError."""
    read = [
        ("stdin", sys.stdin.read().removesuffix("\n")) if text == "-" else (f"prompt {text!r}", text) for text in texts
    ]
    try:
        return [as_prompt(where, text, tokenizer, chat) for where, text in read]
    except BadRow as bad:
        raise UserError(f"a prompt of the command line: {bad}; give text") from None


def as_prompt(where: str, prompt: Text, tokenizer: Any, chat: ChatFormat) -> Prompt:
    """Return text or messages as the model sees them. Raise BadRow."""
    text, format_ = _rendered(prompt, chat)
    ids, bos = tokenizer(text, add_special_tokens=False)["input_ids"], own_bos(tokenizer)
    if not text.strip() or not ids:
        raise BadRow("empty prompt")
    return Prompt(where, text, ids if ids[: len(bos)] == bos else bos + ids, format_)


def rendered(prompts: Mapping[str, Text], model: Saved, config: Config) -> dict[str, Prompt]:
    """Return prompts, by name, as a model sees them whose chat is rendered as `config` says. Raise UserError."""
    tokenizer = load_tokenizer(model.config)
    chat = ChatFormat(tokenizer, config.chat_format, config.chat_date)
    try:
        return {name: as_prompt(name, prompt, tokenizer, chat) for name, prompt in prompts.items()}
    except BadRow as bad:
        raise UserError(f"a prompt cannot be rendered for {model.config.model.start}: {bad}; remove it") from None


def _prompt_of(line: str) -> Any:
    """Return the prompt of a line of JSON: text or messages. Raise BadRow."""
    row = decode(line.encode())
    if not isinstance(row, dict):
        raise BadRow("not an object", f"a row is {{...}}, this one is {type(row).__name__}")
    return text_or_messages(row, "prompt")


def _rendered(prompt: Any, chat: ChatFormat) -> tuple[str, str]:
    """Return the text of a prompt, as in training, and how it was rendered. Raise BadRow."""
    if isinstance(prompt, str) and not prompt.strip():
        raise BadRow("empty prompt")
    if chat.wraps_text:
        prompt = to_messages(ParsedRow(prompt, [""], [])).prompt
    text, format_ = (prompt, "text") if isinstance(prompt, str) else (chat.prompt(prompt), chat.name)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("broken Unicode", "half of a surrogate pair") from None
    return text, format_


def check_lengths(prompts: Sequence[Prompt], models: Sequence[Saved], max_new_tokens: int) -> None:
    """Raise UserError if a prompt leaves no room for its response in the positions that the models have."""
    limits = [positions(model.architecture()) for model in models]
    most, reason = min(((limit, reason) for limit, reason in limits if limit), default=(sys.maxsize, ""))
    for prompt in prompts:
        n = len(prompt.ids)
        if n + max_new_tokens > most:
            raise UserError(
                f"{prompt.where}: {n} tokens of the prompt + --max-new-tokens {max_new_tokens} = {n + max_new_tokens} "
                f"is more than the {most} positions {reason}; lower the latter, or shorten the prompt"
            )


def identity(saved: Saved) -> list[str | None]:
    """Return a model's name, and what tells its weights from others."""
    return [saved.config.model.start, weights_identity(saved.config.model.start)]


def job(
    policy: Saved, reference: Saved | None, overrides: Sequence[str], prompts: Sequence[Prompt], n: int,
    options: dict[str, Any], digest: str | None = None,
) -> tuple[list[Item], Sampling, dict[str, Any]]:  # fmt: skip
    """Return `n` items of each prompt, how they are sampled, and what the samples depend on. `options` are those of
    Sampling, `digest` a hash of the prompts: by default of their texts."""
    texts = json.dumps([prompt.text for prompt in prompts])
    settings = {
        "policy": identity(policy),
        "reference": reference and identity(reference),
        "overrides": sorted(overrides),
        "device": str(pick_device(policy.config)),
        "dtype": str(policy.config.compute_dtype),
        "prompts_sha256": digest or hashlib.sha256(texts.encode()).hexdigest(),
        "n": n,
        **options,
    }
    items = [(prompt, number) for prompt in prompts for number in range(n)]
    return items, Sampling(dtype=policy.config.compute_dtype, **options), settings


# --- The file that grows ---


def open_out(path: Path, settings: dict[str, Any], items: Sequence[Item], overwrite: bool) -> tuple[BinaryIO, int]:
    """Open `path` for adding rows. Return it, and how many of `items` it holds: a whole number of batches.

    Raise UserError if it holds anything else than what `settings` make, or another process writes to it.
    """
    beside = path.with_name(f"{path.name}.settings.json")
    try:
        file = open(path, "ab+")
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}; give another one") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"--out {path}: another process writes to it; wait for it, or give another --out") from error
    if path.stat().st_size and not overwrite:
        _check_settings(path, beside, settings)
    else:
        file.truncate(0)
        beside.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    file.seek(0)
    lines = file.read().split(b"\n")[:-1]  # what follows the last line's end is a line that was cut
    try:
        written = [(row["prompt"], row["sample"]) for row in map(json.loads, lines)]
    except (ValueError, TypeError, KeyError):
        written = None
    if written != [(prompt.text, number) for prompt, number in items[: len(lines)]]:
        raise UserError(f"--out {path} holds rows that are not of this command; {ADVICE}")
    done = len(lines) if len(lines) == len(items) else len(lines) - len(lines) % settings["batch_size"]
    file.truncate(sum(len(line) + 1 for line in lines[:done]))
    return file, done


def _check_settings(path: Path, beside: Path, settings: dict[str, Any]) -> None:
    try:
        before = json.loads(beside.read_text(encoding="utf-8"))
        changes = [f"{k} was {before.get(k)} and is {v}" for k, v in settings.items() if before.get(k) != v]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--out {path} exists, and {beside.name} does not say what made it; {ADVICE}") from error
    if changes:
        raise UserError(f"--out {path} was made with other settings ({'; '.join(changes)}): {ADVICE}")


# --- Sampling ---


def sampled(
    policy: Saved, reference: Saved | None, how: Sampling, items: Sequence[Item], done: int, both: bool = True
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of `items` after the first `done`, a batch at a time: samples from the policy, or from `both`
    models, and their divergence."""
    model, tokenizer, computation = policy.open()
    other = LiveReference(reference.open()[0], computation) if reference is not None else None
    for start in progress(range(done, len(items), how.batch_size), desc="batches"):
        prompts, numbers = zip(*items[start : start + how.batch_size])
        ids, own = [prompt.ids for prompt in prompts], replace(how, first_batch=start // how.batch_size)
        responses = sample(model, tokenizer, ids, own)
        columns: dict[str, Sequence[Any]] = {"prompt": [prompt.text for prompt in prompts], "sample": numbers}
        columns["policy"] = [*map(continuation, itertools.repeat(tokenizer), ids, responses)]
        if other is not None:
            if both:
                theirs = sample(other.model, tokenizer, ids, own)
                columns["reference"] = [*map(continuation, itertools.repeat(tokenizer), ids, theirs)]
            if how.own_distribution:
                compared = divergence(model, other, ids, responses, computation)
                columns |= {f"kl_{name}": getattr(compared, name) for name in ESTIMATORS}
        columns["tokens_policy"] = [len(response) for response in responses]
        columns["ended"] = [response[-1] == tokenizer.eos_token_id for response in responses]
        yield [dict(zip(columns, values)) for values in zip(*columns.values())]


def write_samples(
    path: Path, rows_after: Callable[[int], Iterator[list[dict[str, Any]]]], items: Sequence[Item],
    settings: dict[str, Any], overwrite: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write the samples of `items` to `path`, after those that are there, and return all rows. Raise UserError as
    `open_out` does. `rows_after(done)` yields the missing ones, a batch at a time."""
    file, done = open_out(path, settings, items, overwrite)
    with file:
        if done:
            log(f"{path} has {done} of {len(items)} samples")
        for rows in rows_after(done) if done < len(items) else ():
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
        file.seek(0)
        return [json.loads(line) for line in file]


def summary(rows: Sequence[dict[str, Any]], how: Sampling, every: bool = False) -> str:
    """Return the means over the rows of a finished file, and the first of them, or all."""
    lines = []
    for row in rows if every else [row for row in rows if row["sample"] == 0][:3]:
        lines.append(f"\n{visible(row['prompt'])}")
        lines += [f"  {name:9} {visible(row[name])}" for name in ("policy", "reference") if name in row]
    prompts = [row["prompt"] for row in rows]
    length, ended = (sum(row[key] for row in rows) / len(rows) for key in ("tokens_policy", "ended"))
    of = f"{len(rows)} samples of {len(set(prompts))} prompts"
    lines.append(f"\n{of}: {length:.1f} tokens on average, {ended:.1%} ended")
    if "reference" not in rows[0]:
        lines.append("no KL divergence: there is no reference")
    elif not how.own_distribution:
        what = f"temperature {how.temperature:g}, top-p {how.top_p:g}"
        lines.append(f"no KL divergence: samples at {what} are not of the policy's own distribution, as it needs them")
    else:
        for name in ESTIMATORS:
            mean, error = mean_and_error([row[f"kl_{name}"] for row in rows], prompts)
            shown = f"{error:.3f} (standard error over prompts)" if error is not None else "unknown (one sample)"
            lines.append(f"KL(policy || reference), nats a response, {name:13} {mean:.3f} ± {shown}")
    return "\n".join(lines)


def main() -> None:
    given, overrides = read_arguments()
    quiet_transformers()
    policy = find_saved(given.run, overrides)
    reference = None if given.reference == "none" else find_reference(policy, given.reference, overrides)
    tokenizer = load_tokenizer(policy.config)
    chat = ChatFormat(tokenizer, policy.config.chat_format, policy.config.chat_date)
    if given.prompt:
        prompts, digest = prompts_given(given.prompt, tokenizer, chat), None
    else:
        prompts, digest = read_prompts(given.prompts, tokenizer, chat), file_hash(given.prompts)
    warn_of_formats(policy, {prompt.format for prompt in prompts}, str(given.prompts or "the prompt"))
    check_lengths(prompts, [policy, reference] if reference else [policy], given.max_new_tokens)
    options = {key: vars(given)[key] for key in ("max_new_tokens", "batch_size", "seed", "temperature", "top_p")}
    items, how, settings = job(policy, reference, overrides, prompts, given.n, options, digest)
    make = functools.partial(sampled, policy, reference, how, items)
    if given.out:
        make_dir(given.out.parent, "--out")
        rows = write_samples(given.out, make, items, settings, given.overwrite)
    else:
        rows = [*itertools.chain.from_iterable(make(0))]
    log(summary(rows, how, every=bool(given.prompt)))
    if given.out:
        log(f"written to {given.out}")


if __name__ == "__main__":
    run_main(main)
