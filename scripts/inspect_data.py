"""What the model will see: the funnel from rows to examples, then a few examples as tokens with their loss mask.

    python scripts/inspect_data.py 'datasets=[hh]' n=3 split=train
    python scripts/inspect_data.py --json 'datasets=[hh]' n=3 > examples.jsonl

takes the overrides of train.py and, besides, `n` (examples shown) and `split` (train or test). Preference pairs are
shown unless told loss=sft. Tokens are set apart by `|`: prompt dim, response (what the loss sees) green, special tokens
highlighted. Without a terminal, or with NO_COLOR set, marks stand for the colours: `<<...>>` around what the loss sees,
`[...]` around special tokens.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dpo.utils import UserError
from settings import check_command
from utils import HelpFormatter, run_main


def read_arguments() -> tuple[int, str, bool, list[str]]:
    """Return `n`, `split`, whether JSON is wanted, and the overrides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.usage = "%(prog)s [--json] [n=N] [split=SPLIT] [KEY=VALUE ...]"
    parser.add_argument("--json", action="store_true", help="one JSON object a record, and nothing else, on stdout")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="n (default 3), split (default train), or as train.py"
    )
    arguments = parser.parse_intermixed_args()
    given = {argument.partition("=")[0]: argument for argument in arguments.overrides}
    n = given.pop("n", "n=3").removeprefix("n=")
    split = given.pop("split", "split=train").removeprefix("split=")
    if not re.fullmatch("[0-9]{1,9}", n):
        raise UserError(f"n={n} must be a whole number of examples, 0 or more")
    overrides = [*([] if "loss" in given else ["loss=dpo", "loss.beta=0.1"]), *given.values()]
    check_command(overrides)
    return int(n), split, arguments.json, overrides


if __name__ == "__main__":
    run_main(read_arguments)  # before the slow imports: --help and mistakes are answered at once

from dpo.data.records import PreferenceData, Record, format_funnel
from dpo.model.loading import load_tokenizer
from dpo.utils import visible
from preference_datasets import load_data
from settings import data_settings, load_config

DIM, GREEN, SPECIAL, RESET = "\033[2m", "\033[32m", "\033[1;30;43m", "\033[0m"


def in_colour() -> bool:
    """Return whether to show colours."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Return the text of each token. A character that several tokens make up stands where it is complete, `·` before
    it."""
    texts, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        # The replacement character means an unfinished UTF-8 sequence, of at most 4 bytes and so at most 4 tokens.
        whole = not text.endswith("\ufffd") or end - start == 4 or end == len(ids)
        texts.append(text if whole else "·")
        start = end if whole else start
    return texts


def show_tokens(ids: Sequence[int], tokenizer: Any, colour: str) -> str:
    """Return the tokens of `ids` with their boundaries, in `colour` if that is not empty."""
    special = set(tokenizer.all_special_ids)
    shown = []
    for token, text in zip(ids, pieces(ids, tokenizer), strict=True):
        text = visible(text).replace("\n", "⏎\n")
        if token in special:
            text = f"{SPECIAL}{text}{RESET}{colour}" if colour else f"[{text}]"
        shown.append(text)
    return f"{colour}{'|'.join(shown)}{RESET}" if colour else "|".join(shown)


def masks_of(record: Record) -> list[list[bool]]:
    """Return which tokens of each response count in the loss."""
    return record.masks or [[True] * len(response) for response in record.responses]


def as_json(record: Record, tokenizer: Any, name: str, number: int) -> str:
    """Return a record as one line of JSON: texts as the model sees them, ids, loss masks, and pairs."""

    def side(ids: list[int]) -> dict[str, Any]:
        return {"text": tokenizer.decode(ids, clean_up_tokenization_spaces=False), "ids": ids}

    responses = [side(ids) | {"loss_mask": mask} for ids, mask in zip(record.responses, masks_of(record), strict=True)]
    row = {"dataset": name, "record": number, "prompt": side(record.prompt), "responses": responses}
    return json.dumps(row | {"pairs": record.pairs, "columns": record.columns})


def show_response(ids: Sequence[int], mask: Sequence[bool], tokenizer: Any, colours: bool) -> str:
    """Return the tokens of a response, those that count in the loss apart from the others."""
    shown, start = [], 0
    for counts, run in itertools.groupby(mask):
        end = start + len(list(run))
        text = show_tokens(ids[start:end], tokenizer, (GREEN if counts else DIM) if colours else "")
        shown.append(text if colours or not counts else f"<<{text}>>")
        start = end
    return "|".join(shown) if colours else "".join(shown)


def show_record(record: Record, tokenizer: Any, colours: bool) -> str:
    dim = DIM if colours else ""
    lines = [f"prompt, {len(record.prompt)} tokens, no loss:", show_tokens(record.prompt, tokenizer, dim)]
    for number, (response, mask) in enumerate(zip(record.responses, masks_of(record), strict=True)):
        lost = "" if response[-1] == tokenizer.eos_token_id else ", cut: no EOS"
        shown = show_response(response, mask, tokenizer, colours)
        lines += [f"response {number}, {len(response)} tokens{lost}:", shown]
    last = len(record.responses) - 1
    if last > 1 and record.pairs == [(0, last)]:
        lines.append("ranking: " + " > ".join(map(str, range(last + 1))))
    elif record.pairs:
        lines.append("pairs, preferred > other: " + ", ".join(f"{a} > {b}" for a, b in record.pairs))
    lines += [f"{name}: {', '.join(f'{value:g}' for value in values)}" for name, values in record.columns.items()]
    return "\n".join(lines)


def examples(data: PreferenceData, n: int) -> list[int]:
    """Return the records to show: the first of each data set in turn."""
    by_set = [[i for i, source in enumerate(data.source.tolist()) if source == s][:n] for s in range(len(data.names))]
    turns = [i for turn in range(n) for records in by_set for i in records[turn : turn + 1]]
    return turns[:n]


def main() -> None:
    n, split, as_lines, overrides = read_arguments()
    config = load_config(["exp_name=inspect_data", *overrides])
    with contextlib.redirect_stdout(sys.stderr) if as_lines else contextlib.nullcontext():
        tokenizer = load_tokenizer(config)
        data = load_data(data_settings(config), tokenizer, split)
        print(visible(format_funnel(data)))
    for i in examples(data, n):
        name = data.names[int(data.source[i])]
        if as_lines:
            print(as_json(data[i], tokenizer, name, i))
            continue
        print(f"\n--- {visible(name)}, {split} record {i} of {len(data)}")
        print(show_record(data[i], tokenizer, in_colour()))


if __name__ == "__main__":
    run_main(main)
