"""Chunks of rows -> Arrow batches of rendered text, in several processes."""

import bisect
import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from dpo.data.files import Chunk, Row, numbered_rows
from dpo.data.rendering import ChatFormat, leaves
from dpo.data.rows import (
    HUMAN,
    BadRow,
    Pairs,
    ParsedRow,
    SkippedRow,
    Text,
    all_answers,
    dialogue_parts,
    number,
    to_messages,
    unused_column,
)
from dpo.data.sources import LABELLED, NEEDS, TARGETS, DataSet, DataSettings
from dpo.utils import UserError, visible

PAIR_LIST = pa.list_(pa.list_(pa.int32(), 2))
ROWS = pa.schema(
    {
        "prompt": pa.string(),
        "responses": pa.list_(pa.list_(pa.string())),  # in parts: the assistant's and, in turn, those between
        "pairs": PAIR_LIST,
        "target": pa.int32(),
        "score": pa.float64(),
        "ties": pa.int64(),
        "over": pa.int64(),  # pairs beyond max_pairs_per_prompt
        "keep_end": pa.bool_(),
        "demonstration": pa.bool_(),
        "label": pa.bool_(),  # of a demonstration; null: the row does not say
        "places": pa.list_(pa.int32()),  # of the responses by score, 0 for the best; null: they have no scores
        "columns": pa.list_(pa.float64()),  # values of `pair_columns`, for each of the row's pairs
        "hash": pa.uint64(),  # equal for rows of one prompt
        "key": pa.uint64(),  # of the prompt, whatever its rendering
    }
)
UNDESIRED = "label is false: the completion is not wanted"
EMPTY, HOLDS_EOS = "empty", "text holds the EOS string"
DEFECTS = {f"{EMPTY} response", f"{EMPTY} prompt", HOLDS_EOS}  # of sets on the hub: counted and dropped, not fatal


def hash64(text: str) -> int:
    """Return a 64-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def prompt_key(parsed: ParsedRow) -> int:
    """Return a hash of a prompt's content: the same for text and messages, and for every rendering."""
    turns: Any = to_messages(replace(parsed, responses=[])).prompt
    contents = [(message["role"], message["content"].strip()) for message in turns]
    return hash64(json.dumps([contents, parsed.tools], sort_keys=True, default=str))


def ranked_pairs(scores: Sequence[float], most: int, seed: int) -> tuple[Pairs, int, int]:
    """Return pairs of unequal scores, the higher first; the number of equal pairs; the number of pairs over `most`.

    If there are more than `most`, a random choice is taken. It depends on `seed` alone.
    """
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    n_lower: list[int] = []  # of each in `order`: how many have a lower score
    for place, i in enumerate(order):
        equal = place > 0 and scores[i] == scores[order[place - 1]]
        n_lower.append(n_lower[-1] if equal else place)
    starts = [0, *itertools.accumulate(n_lower)]  # pair number starts[p] + q is (order[p], order[q])
    unequal = starts[-1]
    ties = len(scores) * (len(scores) - 1) // 2 - unequal
    numbers = range(unequal) if unequal <= most else random.Random(seed).sample(range(unequal), most)
    places = ((number, bisect.bisect_right(starts, number) - 1) for number in numbers)
    pairs = [(order[place], order[number - starts[place]]) for number, place in places]
    return sorted(pairs, key=lambda pair: (min(pair), max(pair))), ties, unequal - len(pairs)


@dataclass
class Tally:
    """Counts over rows, by reason or kind, and where the first row of each is."""

    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)  # "text", "hh" or "template:<its hash>"
    first: dict[str, str] = field(default_factory=dict)

    def count(self, kind: Counter[str], what: str, where: str) -> None:
        kind[what] += 1
        self.first.setdefault(what, where)

    def add(self, other: "Tally") -> None:
        self.dropped += other.dropped
        self.notes += other.notes
        self.formats += other.formats
        self.first = other.first | self.first


class ParseRows:
    """Chunk -> (Arrow batch in the schema `ROWS`, tally). Raises UserError at a row that must not be dropped."""

    def __init__(self, data_set: DataSet, chat: ChatFormat, eos: str, settings: DataSettings):
        self.data_set, self.chat, self.eos, self.settings = data_set, chat, eos, settings
        self.all_turns = settings.rows == TARGETS and settings.sft_turns == "all"

    def __call__(self, chunk: Chunk) -> tuple[pa.RecordBatch, Tally]:
        rows: list[dict[str, Any]] = []
        tally = Tally()
        for where, row in numbered_rows(chunk):
            try:
                parsed, format_, notes = self.parse(row)
            except BadRow as bad:
                if not self._may_drop(bad):
                    advice = "Mend the row, or set drop_bad_rows=true to drop such rows and count them."
                    raise UserError(f"{where}: {visible(str(bad))}\n{advice}") from None
                tally.count(tally.dropped, bad.reason, where)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            except Exception as error:  # whatever a row holds, it must not end in a traceback
                told = visible(f"{type(error).__name__}: {error}")
                raise UserError(f"{where}: the row cannot be used ({told}); mend or remove it") from error
            else:
                rows.append(parsed)
                for note in notes:
                    tally.count(tally.notes, note, where)
                tally.count(tally.formats, format_, where)
        try:
            return pa.RecordBatch.from_pylist(rows, schema=ROWS), tally
        except (pa.ArrowException, OverflowError, ValueError) as error:
            where = f"{chunk.where}{chunk.numbers[0]} to {chunk.numbers[-1]}"
            raise UserError(f"{where}: a number or text of these rows is too large ({error})") from error

    def _may_drop(self, bad: BadRow) -> bool:
        known_defect = self.data_set.hub is not None and bad.reason in DEFECTS
        return self.settings.drop_bad_rows or isinstance(bad, SkippedRow) or known_defect

    def parse(self, row: bytes | Row) -> tuple[dict[str, Any], str, list[str]]:
        """Return a row in the schema `ROWS`, the name of its format, and its warnings. Raises BadRow."""
        row = decode(row) if isinstance(row, bytes) else row
        if not isinstance(row, Mapping):
            raise BadRow("not an object", f"a row is {{...}}, this one is {type(row).__name__}")
        parsed = self.data_set.parse(row)
        self.check(parsed.prompt, "prompt")
        for response in parsed.responses:
            self.check(response, "response")
        if self.chat.wraps_text:
            parsed = to_messages(parsed)
        exact: Any = parsed.prompt
        exact = exact if isinstance(exact, str) else json.dumps([exact, parsed.tools], default=str)
        wanted = self.settings.pair_columns
        more: dict[str, Any] = {"hash": hash64(exact), "key": prompt_key(parsed), "over": 0}
        if self.settings.rows == LABELLED and parsed.label is None:
            raise BadRow("no label", f"the row is no completion with a label. {NEEDS[LABELLED]}")
        labels = {"label": float(parsed.label)} if parsed.label is not None else {}
        more["columns"] = [labels[name] if name in labels else number(row, name) for name in wanted]
        if parsed.scores is not None:
            most = self.settings.max_pairs_per_prompt
            parsed.pairs, parsed.ties, more["over"] = ranked_pairs(parsed.scores, most, more["key"])
            place = {score: k for k, score in enumerate(sorted(set(parsed.scores), reverse=True))}
            more["places"] = [place[score] for score in parsed.scores]
        if self.all_turns:
            parsed = all_answers(parsed)
        notes = [note for note in parsed.notes if note not in [unused_column(name) for name in wanted]]
        notes += [UNDESIRED] if parsed.label is False and self.settings.rows != LABELLED else []
        if isinstance(parsed.prompt, str):
            texts = [str(side) for side in parsed.responses]
            dialogue = parsed.prompt.startswith(HUMAN)
            more["responses"] = [dialogue_parts(text) if dialogue else [text] for text in texts]
            return vars(parsed) | more, "text", notes
        rendering = self.chat(parsed.prompt, parsed.responses, parsed.tools)  # type: ignore[arg-type]
        more |= {"prompt": rendering.prompt, "responses": rendering.responses}
        return vars(parsed) | more, self.chat.name, notes + rendering.notes

    def check(self, side: Text, kind: str) -> None:
        """Raise BadRow for text that is empty, no Unicode, or holds the EOS string.

        A prompt that is text may hold it, as one that is rendered already does.
        """
        if isinstance(side, str):
            self._check_text(side, kind, may_be_empty=False, may_hold_eos=kind == "prompt")
            return
        for message in side:
            others = message["role"] not in ("user", "assistant") or "tool_calls" in message
            self._check_text(message["content"], kind, may_be_empty=others)
            for text in leaves({key: value for key, value in message.items() if key not in ("role", "content")}):
                self._check_text(text, kind, may_be_empty=True)

    def _check_text(self, text: str, kind: str, may_be_empty: bool, may_hold_eos: bool = False) -> None:
        if not text.strip() and not may_be_empty:
            raise BadRow(f"{EMPTY} {kind}")
        if self.eos in text and not may_hold_eos:
            raise BadRow(HOLDS_EOS, f"{self.eos!r} in the {kind}; the model would learn to stop there")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRow("broken Unicode", f"half of a surrogate pair in the {kind}") from None


def decode(line: bytes) -> Any:
    """Decode a line of JSON. Raises BadRow."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", str(error)) from None
    except (ValueError, RecursionError) as error:
        raise BadRow("invalid JSON", str(error)) from None
