"""The records of data sets, kept in memory-mapped Arrow files that the next run reuses.

    rows (files, hub) --parse--> folder rows-<key> --merge, tokenise, truncate--> folder tokens-<key>: `Record`s

Each key is a hash of everything that the folder's content depends on. Every row is either in a record or counted in the
funnel, under the reason why it is not.
"""

import ast
import functools
import inspect
import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo.data.cache import ArrowRows, cached, digest, parallel, write_arrow
from dpo.data.files import CHUNK_ROWS, Source, log_once
from dpo.data.parse import ROWS, UNDESIRED, ParseRows, Tally
from dpo.data.rendering import ChatFormat
from dpo.data.rows import Pairs, ParsedRow
from dpo.data.sources import LABELLED, NEEDS, PAIRS, RANKED, TARGETS, DataSettings, Registry, find_source
from dpo.data.tokenise import (
    COUNTS,
    MERGED,
    PAIR_COUNTS,
    RANK_COUNTS,
    RECORDS,
    UNSPELLED,
    TokeniseRecords,
    own_bos,
    tokenizer_identity,
)
from dpo.tables import aligned
from dpo.utils import UserError, log, progress, visible

# Raise it whenever the code makes other rows or records of the same input. It is part of the caches' keys.
FORMAT = 3
MOST_FILES = 12  # named in the log; data_funnel.json names all
SILENT = "rows that state no preference are not used"


@dataclass(frozen=True)
class Record:
    """One prompt, its distinct responses, and pairs (preferred, dispreferred) of their indices.

    If the loss learns from targets or labelled completions: one response, no pairs. If it learns from rankings: the
    responses, best first, and one pair, the best and the worst.

    `masks` tells which tokens of each response are the assistant's and count in the loss; None: all do.
    """

    prompt: list[int]
    responses: list[list[int]]
    pairs: Pairs
    masks: list[list[bool]] | None = None
    columns: dict[str, list[float]] = field(default_factory=dict)  # of `pair_columns`: a value a pair; SFT: one value


def group_rows(table: ArrowRows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group rows by prompt, in the order of first occurrence: prompt i has the rows `order[starts[i]:ends[i]]`.

    Prompts with equal 64-bit hashes are the same. A demonstration is a group of its own.
    """
    hashes, alone = table.table["hash"].to_numpy(), table.table["demonstration"].to_numpy()
    order = np.lexsort((alone, hashes))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (hashes[order[1:]] != hashes[order[:-1]]) | alone[order[1:]]
    starts = np.flatnonzero(new)
    ends = np.append(starts, len(order))[1:]
    by_first = np.argsort(order[starts])
    return order, starts[by_first], ends[by_first]


def in_test_split(hashes: np.ndarray, fraction: float | None) -> np.ndarray:
    """Return which prompts are held out: those with the lowest hashes, at least one.

    With a `fraction`: those in the lowest part of the range of hashes, so that a prompt's split does not depend on the
    other rows. None: 1 % of the prompts but at least 50, or a tenth of them if that is fewer.
    """
    distinct = np.unique(hashes)
    if fraction == 0 or not len(distinct):
        return np.zeros(len(hashes), dtype=bool)
    if fraction is None:
        n_below = max(len(distinct) // 100, min(50, len(distinct) // 10))
    else:
        n_below = int(np.searchsorted(distinct, np.uint64(int(fraction * 2**64))))
    n_test = min(max(n_below, 1), len(distinct) - 1)
    return hashes < distinct[n_test]


def parser_identity(parse: Callable[..., ParsedRow]) -> list[Any]:
    """Return a parser's syntax tree without docstrings (nor comments and layout), and its columns.

    Functions and classes of its own module that it calls are part of it, except in this package, which has `FORMAT`.
    """
    columns = dict(parse.keywords["columns"]) if isinstance(parse, functools.partial) else {}
    used: list[Any] = [parse.func if isinstance(parse, functools.partial) else parse]
    trees = []
    for code in used:  # grows
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
        except (OSError, TypeError, SyntaxError):  # there is no source, as in a notebook
            trees.append(code.__qualname__)
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        trees.append(ast.dump(tree))
        module = sys.modules.get(code.__module__ or "")
        if module is not None and not code.__module__.startswith("dpo."):
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            others = (getattr(module, name, None) for name in sorted(names))
            used += [o for o in others if getattr(o, "__module__", "") == code.__module__ and o not in used]
    return [trees, columns]


@dataclass(frozen=True)
class LoadedSet:
    """One split of one data set: the folder of its records, and what became of its rows."""

    folder: Path
    funnel: dict[str, int]
    notes: dict[str, int]
    formats: list[str]
    source: Source


class Loader:
    """One split of one data set. Parses and tokenises what is not cached yet."""

    def __init__(self, name: str, settings: DataSettings, tokenizer: Any, split: str, registry: Registry):
        self.name, self.settings, self.tokenizer, self.split = name, settings, tokenizer, split
        self.cache_dir = Path(settings.cache_dir)
        self.data_set, self.source = find_source(name, settings, split, registry)
        if self.source.held_out and split == "test" and settings.holdout_fraction == 0:
            raise UserError(
                f"data set {name!r} ({self.source.label}) has no test split and holdout_fraction=0 holds none out; "
                "set holdout_fraction, for example 0.01, or add test files"
            )

    def load(self) -> LoadedSet:
        """Return the records and log warnings about the rows. Raises UserError if no example is left."""
        s = self.settings
        chat = ChatFormat(self.tokenizer, s.chat_format, s.chat_date)
        parser = ParseRows(self.data_set, chat, self.tokenizer.eos_token, s)
        parsed_by = [FORMAT, parser_identity(self.data_set.parse), self.data_set.hub, parser.eos, chat.identity]
        choices = [s.drop_bad_rows, s.max_pairs_per_prompt, parser.all_turns, s.pair_columns, s.rows == LABELLED]
        raw = digest(parsed_by, self.source.identity, choices)
        held_out = (self.split, s.holdout_fraction) if self.source.held_out else None
        tokens = digest(raw, tokenizer_identity(self.tokenizer), s.max_length, s.max_prompt_length, s.rows, held_out)

        def tokenise(folder: Path) -> None:
            rows = cached(self.cache_dir, f"rows-{raw}", lambda folder: self._write_rows(folder, parser))
            self._write_records(folder, rows)

        folder = cached(self.cache_dir, f"tokens-{tokens}", tokenise)
        told = json.loads((folder / "funnel.json").read_text(encoding="utf-8"))
        for note, n in told["notes"].items():
            log_once(f"warning: {self.name}: {note} ({n} rows, the first at {told['first'][note]})")
        if not told["funnel"]["examples"]:
            raise self._no_example(told["funnel"], told["notes"])
        return LoadedSet(folder, told["funnel"], told["notes"], told["formats"], self.source)

    def _no_example(self, funnel: dict[str, int], notes: Mapping[str, int]) -> UserError:
        hint = ""
        if self.split == "test" and self.source.held_out and funnel.get("prompts", funnel.get("completions", 0)) < 2:
            hint = "\nToo few prompts to hold one out for evaluation: add rows, or set n_eval_examples=0."
        elif UNDESIRED in notes:
            hint = "\nThe rows are completions with labels, which state no preferences: loss=kto learns from them."
        elif self.settings.rows in (PAIRS, RANKED) and not (funnel.get("pairs") or funnel.get("rankings")):
            hint = f"\nThe rows state no preferences. {NEEDS[self.settings.rows]}. Demonstrations are for loss=sft."
        table = _table({self.name: funnel})
        return UserError(f"data set {self.name!r} ({self.split}) has no example left:\n{table}{hint}")

    def _write_rows(self, folder: Path, parser: ParseRows) -> None:
        bar = progress(desc=f"{self.name}: reading", unit=" rows")
        batches = parallel(parser, self.source.chunks(), self.settings.num_proc)
        total = Tally()
        for tally in write_arrow(folder / "rows.arrow", ROWS, batches, bar):
            total.add(tally)
        for reason, count in total.dropped.items():
            log(f"{self.name}: dropped {count} rows ({reason}), the first at {total.first[reason]}")
        (folder / "tally.json").write_text(json.dumps(vars(total), sort_keys=True), encoding="utf-8")

    def _write_records(self, folder: Path, rows: Path) -> None:
        table = ArrowRows(rows / "rows.arrow")
        told = json.loads((rows / "tally.json").read_text(encoding="utf-8"))
        funnel, groups = self._groups(table, told)
        bar = progress(desc=f"{self.name}: tokenising", total=len(groups), unit=" prompts")
        work = TokeniseRecords(rows / "rows.arrow", self.tokenizer, self.settings)
        chunks = (groups[start : start + CHUNK_ROWS] for start in range(0, len(groups), CHUNK_ROWS))
        batches = parallel(work, chunks, self.settings.num_proc)
        counts: Counter[str] = sum(write_arrow(folder / "records.arrow", RECORDS, batches, bar), Counter())
        kinds = {TARGETS: (MERGED, *COUNTS), LABELLED: COUNTS, RANKED: (*RANK_COUNTS, *COUNTS)}
        wanted = kinds.get(self.settings.rows, PAIR_COUNTS + COUNTS)
        funnel |= {key: counts[key] for key in wanted if counts[key] or key != UNSPELLED}
        silent = 0 if self.settings.rows in (TARGETS, LABELLED) else int(table.table["demonstration"].to_numpy().sum())
        if 0 < silent < len(table):
            told["notes"] |= {SILENT: silent}
            told["first"].setdefault(SILENT, "a row of the form prompt, completion or messages")
        told |= {"funnel": funnel, "formats": sorted(told["formats"])}
        (folder / "funnel.json").write_text(json.dumps(told), encoding="utf-8")

    def _groups(self, table: ArrowRows, told: dict[str, Any]) -> tuple[dict[str, int], list[np.ndarray]]:
        """Return the funnel's counts of rows and prompts (or completions) of this split, and the rows of each."""
        dropped, unit = told["dropped"], "completions" if self.settings.rows == LABELLED else "prompts"
        funnel = {"rows": len(table) + sum(dropped.values())}
        funnel |= {f"rows dropped: {reason}": count for reason, count in dropped.items()}
        order, starts, ends = group_rows(table)
        labels = set(pc.unique(table.table["label"]).to_pylist())
        if self.settings.rows == LABELLED and len(labels) == 1:
            log(f"warning: {self.name}: all completions have label {labels.pop()}; this loss learns from both kinds")
        undesired = pc.equal(table.table["label"], False).fill_null(False).to_numpy()
        if self.settings.rows == TARGETS and undesired.any():
            if not self.settings.drop_bad_rows:
                raise UserError(
                    f"{told['first'][UNDESIRED]}: {UNDESIRED}, and loss=sft would learn it. Remove such rows (there "
                    f"are {told['notes'][UNDESIRED]}), set drop_bad_rows=true to leave them out, or take loss=kto"
                )
            wanted = ~undesired[order[starts]]  # each demonstration is a group of its own
            funnel[f"rows dropped: {UNDESIRED}"] = int(undesired.sum())
            starts, ends = starts[wanted], ends[wanted]
        funnel |= {"rows kept": int((ends - starts).sum()), unit: len(starts)}
        if self.source.held_out:
            test = in_test_split(table.table["key"].to_numpy()[order[starts]], self.settings.holdout_fraction)
            wanted = test if self.split == "test" else ~test
            other = "held out for evaluation" if self.split == "train" else "used for training"
            funnel[f"{unit} dropped: {other}"] = int((~wanted).sum())
            starts, ends = starts[wanted], ends[wanted]
        return funnel, [order[start:end] for start, end in zip(starts, ends, strict=True)]


def _numbers(column: Any) -> np.ndarray:
    """Return numbers of Arrow, without nulls, as an array. Arrow's `to_numpy` would import pandas, for 0.2 s."""
    return np.from_dlpack(column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column)


class PreferenceData:
    """One split of a mixture of data sets. `data[i]` reads a `Record` from disk."""

    def __init__(self, settings: DataSettings, sets: Sequence[LoadedSet]):
        names = self.names = settings.names
        self.rows, self.pair_columns, self.max_length = settings.rows, settings.pair_columns, settings.max_length
        self.funnel = {name: loaded.funnel for name, loaded in zip(names, sets, strict=True)}
        self.notes = {name: loaded.notes for name, loaded in zip(names, sets, strict=True)}
        self.identity = [loaded.folder.name for loaded in sets]  # of each data set: a hash of all it depends on
        self.formats = sorted({name for loaded in sets for name in loaded.formats})  # how rows were rendered
        self.sources = [  # where the rows come from, and a hash of their content
            {"name": name, "path": s.label, "files": [*s.files], "hashes": [*s.hashes], "digest": digest(s.identity)}
            | ({"hub": s.hub} if s.hub else {})
            for name, s in zip(names, (loaded.source for loaded in sets), strict=True)
        ]
        sizes = [loaded.funnel["records"] for loaded in sets]
        self.source = np.repeat(np.arange(len(names)), sizes)  # [records], index into `names`
        self._rows = ArrowRows(*(loaded.folder / "records.arrow" for loaded in sets))
        n_pairs = _numbers(pc.list_value_length(self._rows.table["pairs"])).astype(np.int64)
        self.n_examples = np.maximum(n_pairs, 1)  # [records]: pairs; SFT: 1
        self.keys = _numbers(self._rows.table["key"])  # [records], a hash of each prompt, whatever its rendering
        self.pair_keys = _numbers(pc.list_flatten(self._rows.table["pair_keys"]))  # [examples]

    def __len__(self) -> int:
        return len(self._rows)

    def row_tokens(self, padded: bool) -> np.ndarray:
        """Return how many tokens are computed for each record with all its responses, int64 [records]: as one row, or,
        `padded`, as one for each response. A response's last token predicts nothing."""
        prompts, counts, responses = self.lengths()
        starts = np.cumsum(counts) - counts
        if padded:
            return counts * (prompts + np.maximum.reduceat(responses - 1, starts))
        return prompts + np.add.reduceat(responses - 1, starts)

    def lengths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the tokens of each prompt [records], its number of responses [records], and the tokens of each
        response [responses]; all int64."""
        responses = self._rows.table["responses"]
        lists = (self._rows.table["prompt"], responses, pc.list_flatten(responses))
        prompts, counts, lengths = (_numbers(pc.list_value_length(each)).astype(np.int64) for each in lists)
        return prompts, counts, lengths

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Return every pair, int64 [pairs, 2]: chosen and rejected, as responses of its record; and that [pairs]."""
        flat = pc.list_flatten(self._rows.table["pairs"])
        sides = _numbers(pc.list_flatten(flat)).astype(np.int64).reshape(-1, 2)
        return sides, np.repeat(np.arange(len(self)), _numbers(pc.list_value_length(self._rows.table["pairs"])))

    def prompt_ids(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of the prompts of records `start` to `stop`, one after the other, and how many each has."""
        prompts = self._rows.table["prompt"][start:stop]
        return _numbers(pc.list_flatten(prompts)), _numbers(pc.list_value_length(prompts)).astype(np.int64)

    def __getitem__(self, i: int) -> Record:
        row = self._rows.row(range(len(self))[i])
        prompt, responses, pairs, masks, columns = (row.column(name)[0] for name in RECORDS.names[:5])
        return Record(
            _numbers(prompt.values).tolist(),
            [_numbers(response.values).tolist() for response in responses],
            [(a, b) for a, b in pairs.as_py()],
            masks.as_py(),
            {name: list(values) for name, values in zip(self.pair_columns, zip(*columns.as_py()))},
        )


def load(settings: DataSettings, tokenizer: Any, split: str, registry: Registry | None = None) -> PreferenceData:
    """Load the "train" or "test" split of the mixture `settings.names`.

    A name is a key of `registry`, a path, or a hub id. Raises UserError for anything that a user can put right.
    """
    if split not in ("train", "test"):
        raise UserError(f"split={split!r} is not one of train, test")
    longest, longest_prompt = settings.max_length, settings.max_prompt_length
    if not len(own_bos(tokenizer)) < longest_prompt < longest:
        raise UserError(f"max_prompt_length={longest_prompt} must hold a token and be less than max_length={longest}")
    twice = [name for name, count in Counter(settings.names).items() if count > 1]
    if twice:
        raise UserError(f"datasets names {twice[0]!r} twice; name each once")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, which ends every response; choose a tokenizer that has one")
    sets = [Loader(name, settings, tokenizer, split, registry or {}).load() for name in settings.names]
    return PreferenceData(settings, sets)


def short_names(names: Sequence[str]) -> list[str]:
    """Return the last part of each path or hub id, or all of it if others have the same last part."""
    last = [Path(name).name or name for name in names]
    return [short if last.count(short) == 1 else name for short, name in zip(last, names)]


def _table(funnel: Mapping[str, Mapping[str, int]]) -> str:
    keys: list[str] = []
    for counts in funnel.values():  # insert a key that only a later set has at its place in that set
        at = 0
        for key in counts:
            if key not in keys:
                keys.insert(at, key)
            at = keys.index(key) + 1
    quiet = re.compile("dropped|truncated|not used")  # lines that say nothing if they are zero
    keys = [key for key in keys if not quiet.search(key) or any(counts.get(key) for counts in funnel.values())]
    cells = [[f"{counts[key]:,}" if key in counts else "-" for counts in funnel.values()] for key in keys]
    return aligned([["", *short_names(list(funnel))], *([key, *line] for key, line in zip(keys, cells))])


def format_funnel(data: PreferenceData) -> str:
    """Format what became of the rows: a line a count, a column a data set. Then the files that were read."""
    lines = [_table(data.funnel)]
    for source in data.sources:
        files = source["files"]
        more = f" and {len(files) - MOST_FILES} more" if len(files) > MOST_FILES else ""
        lines.append(f"{source['path']}: {', '.join(files[:MOST_FILES])}{more}")
    return visible("\n".join(lines))
