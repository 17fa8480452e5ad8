"""Files on disk and data sets on the hub -> chunks of numbered rows. A worker parses one chunk at a time."""

import csv
import datetime
import functools
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dpo.utils import UserError, file_hash_once, log

Row = Mapping[str, Any]
NumberedRows = Iterator[tuple[int, bytes | Row, int]]
"""Number, row, and the bytes (or characters) of the file that the row takes."""

SUFFIXES = tuple(f".{kind}{packed}" for kind in ("jsonl", "json", "csv", "tsv") for packed in ("", ".gz", ".zst"))
SUFFIXES += (".parquet", ".arrow")
# Files that describe data: those of the hub, of `save_to_disk`, and its caches.
NO_ROWS = re.compile(r"(dataset_infos?|dataset_dict|state)\.json|(cache|tmp).*\.arrow")
CHUNK_ROWS = 512  # of a chunk, or fewer if they exceed CHUNK_BYTES
CHUNK_BYTES = 2**25
PIECE = 1 << 19  # characters of a JSON list that are read at a time
TESTS = ("test", "testing", "eval", "evaluation", "held_out", "held-out", "heldout", "holdout")
VALIDATIONS = ("validation", "valid", "val", "dev")


@dataclass(frozen=True)
class Layout:
    """Names of the splits of a folder or hub set. Of a split's names the first that exists is used."""

    train: tuple[str, ...] = ("train", "training")
    test: tuple[str, ...] = TESTS + VALIDATIONS
    loader: Mapping[str, str] = field(default_factory=dict)  # further arguments of `datasets.load_dataset`


PLAIN = Layout()


class TextRow(dict[str, Any]):
    """A row of a CSV or TSV file. All its values are text; numbers and lists are JSON."""


class Chunk(NamedTuple):
    """Rows, their numbers, and where they are: "file:" or "file: row ", before a number."""

    where: str
    numbers: Sequence[int]
    rows: Sequence[bytes | Row] | pa.RecordBatch


def numbered_rows(chunk: Chunk) -> Iterator[tuple[str, bytes | Row]]:
    rows = _from_arrow(chunk) if isinstance(chunk.rows, pa.RecordBatch) else chunk.rows
    return ((f"{chunk.where}{number}", row) for number, row in zip(chunk.numbers, rows, strict=True))


def _from_arrow(chunk: Chunk) -> list[Row]:
    """Return the rows of a record batch without columns of times: nothing reads them, and not all fit Python's types.
    Raises UserError for a column that cannot be read."""
    batch: Any = chunk.rows
    columns: dict[str, list[Any]] = {}
    for name, column in zip(batch.schema.names, batch.columns):
        if pa.types.is_temporal(column.type):
            continue
        try:
            values = column.to_pylist()
        except (pa.ArrowException, ValueError, OverflowError) as error:
            where = f"{chunk.where}{chunk.numbers[0]} to {chunk.numbers[-1]}"
            raise UserError(f"{where}: column {name!r} cannot be read ({error}); mend or remove it") from error
        columns[name] = [_without_nulls(value) for value in values] if pa.types.is_nested(column.type) else values
    return [dict(zip(columns, values)) for values in zip(*columns.values())] or [{} for _ in chunk.numbers]


def _without_nulls(value: Any) -> Any:
    """Return `value` without times and without the nulls that Arrow adds if other rows have more fields."""
    if isinstance(value, Mapping):
        times = (datetime.date, datetime.time, datetime.timedelta)
        return {k: _without_nulls(v) for k, v in value.items() if v is not None and not isinstance(v, times)}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def chunks_of_rows(where: str, rows: NumberedRows) -> Iterator[Chunk]:
    numbers: list[int] = []
    held: list[bytes | Row] = []
    size = 0
    for number, row, length in rows:
        numbers.append(number)
        held.append(row)
        size += length
        if len(held) == CHUNK_ROWS or size > CHUNK_BYTES:
            yield Chunk(where, numbers, held)
            numbers, held, size = [], [], 0
    if held:
        yield Chunk(where, numbers, held)


def chunks_of_batches(where: str, batches: Iterable[pa.RecordBatch]) -> Iterator[Chunk]:
    first = 1
    for batch in batches:
        for start in range(0, batch.num_rows, CHUNK_ROWS):
            part = batch.slice(start, CHUNK_ROWS)
            yield Chunk(where, range(first, first + part.num_rows), part)
            first += part.num_rows


def _too_long(where: str, limit: int) -> UserError:
    return UserError(
        f"{where}: the row is longer than {limit / 2**20:g} MiB (max_row_mb). If it is meant to be, raise max_row_mb; "
        "else mend the file: each row is one line, or one object of a list"
    )


def read_lines(path: Path, handle: Any, limit: int) -> NumberedRows:
    """Yield the lines that are not blank. Raises UserError if one, or a run of blank ones, exceeds `limit` bytes."""
    number = blank = 0
    while line := handle.readline(limit + 1):
        number += 1
        blank = blank + len(line) if line.isspace() else 0
        if len(line) > limit or blank > limit:
            raise _too_long(f"{path}:{number}", limit)
        if not blank:
            yield number, line, len(line)


def read_json_list(path: Path, handle: Any, limit: int) -> NumberedRows:
    """Yield the objects of one JSON list. They are decoded in turn: the file is never in memory as a whole."""
    decoder, closing, number, at = json.JSONDecoder(), re.compile(r"\s*\]"), 0, 0
    text = iter(lambda: handle.read(PIECE), "")
    buffer = next(text, "").lstrip("\ufeff \t\r\n")[1:]
    while True:
        try:
            if end := closing.match(buffer, at):
                if any(piece.strip() for piece in itertools.chain([buffer[end.end() :]], text)):
                    raise ValueError("something follows its closing bracket; a file holds one list")
                return
            gap = re.compile(r"\s*,\s*" if number else r"\s*").match(buffer, at)
            if gap is None:
                raise ValueError("a comma is missing")
            row, stop = decoder.raw_decode(buffer, gap.end())
            if stop == len(buffer):  # a number might continue
                raise ValueError("unfinished")
        except (ValueError, RecursionError) as error:
            if len(buffer) - at > limit:
                raise _too_long(f"{path}: row {number + 1}", limit) from None
            more = next(text, "")
            if not more:
                raise UserError(f"{path}: invalid JSON after row {number} of the list: {error}") from None
            buffer, at = buffer[at:] + more, 0
        else:
            number, size, at = number + 1, stop - at, stop
            if size > limit:
                raise _too_long(f"{path}: row {number}", limit)
            yield number, row, size


def read_csv(path: Path, handle: Any, limit: int) -> NumberedRows:
    """Yield the rows of a CSV or (by the file's name) TSV file. An empty field is null. Raises UserError."""
    csv.field_size_limit(limit)
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    number = 0

    def lines() -> Iterator[str]:
        while line := handle.readline(limit + 1):
            if len(line) > limit:
                raise _too_long(f"{path}: row {number + 1}", limit)
            yield line

    try:
        reader = csv.reader(lines(), delimiter=delimiter, strict=True)
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise csv.Error("two columns have the same name")
        for values in filter(None, reader):
            if len(values) != len(names):
                raise csv.Error(f"it has {len(values)} fields, and the header {len(names)}")
            row = TextRow((name, value if value else None) for name, value in zip(names, values))
            number += 1
            yield number, row, sum(map(len, values))
    except csv.Error as error:
        raise UserError(f"{path}: row {number + 1} is no row of this table: {error}; mend the file") from None


def read_arrow(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of an Arrow file or stream (`datasets` writes streams)."""
    with pa.memory_map(os.fsencode(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pa.ipc.open_file(source)
            yield from (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            source.seek(0)
            yield from pa.ipc.open_stream(source)


def open_bytes(path: Path) -> Any:
    """Open a file, and unpack it if its content is gzip or zstd, whatever its name."""
    file: Any = open(path, "rb")
    start = file.peek(4)[:4]
    if start[:2] == b"\x1f\x8b":
        return gzip.open(file)
    if start == b"\x28\xb5\x2f\xfd":
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file), "zstd"), 2**20)
    return file


def read_file(path: Path, limit: int) -> Iterator[Chunk]:
    """Yield the rows of one file, in order, in chunks."""
    name, by_row = path.name.lower(), f"{path}: row "
    if name.endswith(".parquet"):
        file = pq.ParquetFile(open(path, "rb"), pre_buffer=False)
        yield from chunks_of_batches(by_row, file.iter_batches(batch_size=CHUNK_ROWS))
        return
    if name.endswith(".arrow"):
        yield from chunks_of_batches(by_row, read_arrow(path))
        return
    with open_bytes(path) as handle:
        if re.search(r"\.[ct]sv(\.|$)", name):
            text = io.TextIOWrapper(handle, "utf-8-sig", newline="")
            yield from chunks_of_rows(by_row, read_csv(path, text, limit))
        elif ".jsonl" not in name and handle.peek(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            yield from chunks_of_rows(by_row, read_json_list(path, io.TextIOWrapper(handle, "utf-8"), limit))
        else:
            yield from chunks_of_rows(f"{path}:", read_lines(path, handle, limit))


def read_files(files: Sequence[Path], limit: int) -> Iterator[Chunk]:
    """Yield the rows of all files. Raises UserError with the name of an unreadable file and the last row read."""
    for path in files:
        last = "its start"
        try:
            for chunk in read_file(path, limit):
                yield chunk
                last = f"row {chunk.numbers[-1]}"
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: gzip file cut off or damaged after {last} ({error}); copy it anew") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 after {last} ({error}); convert the file to UTF-8") from error
        except pa.ArrowException as error:
            kind = path.suffix.removeprefix(".")
            raise UserError(f"{path}: not a readable {kind} file after {last} ({error}); copy it anew") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read after {last} ({error.strerror or error})") from error
        if last == "its start":
            raise UserError(f"{path}: the file is empty; give a file with at least one row, or remove it")


class Source(NamedTuple):
    """Where the rows of one split come from. `held_out`: the split is a part of these rows, chosen by prompt."""

    identity: list[Any]  # what the rows depend on
    chunks: Callable[[], Iterator[Chunk]]
    held_out: bool
    label: str
    files: Sequence[str] = ()  # names, below the folder
    hashes: Sequence[str] = ()  # SHA-256 of each file; of a set on the hub its fingerprint by `datasets`
    hub: str | None = None  # the id of the set on the hub, of which a local copy may be read


log_once = functools.cache(log)  # both splits would warn of the same folder


def _data_files(root: Path) -> list[Path]:
    """Return the data files below `root`, each once. Links are followed; hidden files and folders are skipped."""
    found: dict[str, Path] = {}
    folders: set[str] = set()
    for folder, inner, names in os.walk(root, followlinks=True):
        inner[:] = sorted(name for name in inner if not name.startswith((".", "__")))
        if os.path.realpath(folder) in folders:  # links may form a circle
            inner.clear()
            continue
        folders.add(os.path.realpath(folder))
        for name in sorted(names):
            path = Path(folder, name)
            holds_rows = name.lower().endswith(SUFFIXES) and not name.startswith(".") and not NO_ROWS.fullmatch(name)
            if holds_rows and path.is_file():
                found.setdefault(os.path.realpath(path), path)
    return sorted(found.values())


def _words(path: Path, root: Path, words: Sequence[str]) -> set[str]:
    """Return which of `words` the file's name holds, or else the name of the nearest folder that holds any.

    A word has no letter beside it and may be in capitals: dpo_train, Test-0.
    """
    parts = path.relative_to(root).parts
    for part in reversed(parts):
        found = {word for word in words if re.search(rf"(?<![a-z]){re.escape(word)}(?![a-z])", part.lower())}
        if found:
            return found
    return set()


def local_files(root: Path, layout: Layout, split: str, strict: bool = True) -> tuple[list[Path], bool]:
    """Return the files of a split, and whether the split must be held out of them because there are no test files.

    Raises UserError if there are none, or if it is not clear which files belong to which split. If not `strict`, files
    of no split are left out: a copy of a hub's set may have them.
    """
    accepted = f"accepted are {', '.join(SUFFIXES)}"
    if root.is_file():
        if not root.name.lower().endswith(SUFFIXES):
            raise UserError(f"{root}: not a data file; {accepted}")
        return [root], True
    if not root.is_dir():
        raise UserError(f"{root}: no such file or folder")
    inner = root / layout.loader.get("data_dir", "")
    root = inner if inner.is_dir() else root
    files = _data_files(root)
    if not files:
        raise UserError(f"{root}: the folder holds no data file; {accepted}")
    words = {path: _words(path, root, (*layout.train, *layout.test)) for path in files}

    def having(*names: str) -> list[Path]:
        return [path for path in files if words[path] & {*names}]

    train, unclear = having(*layout.train), [path for path in having(*layout.train) if words[path] & {*layout.test}]
    groups = [TESTS, VALIDATIONS] if layout == PLAIN else [(name,) for name in layout.test]
    test = next(filter(None, (having(*group) for group in groups)), [])
    if not train and not test:
        return files, True
    others = [path for path in files if not words[path]]
    if unclear or (others and strict):
        shown = "\n".join(f"  {path.relative_to(root)}" for path in (unclear or others)[:20])
        raise UserError(
            f"{root}: is it for training or for tests? Not clear from the names of {len(unclear or others)} files:\n"
            f"{shown}\nname files or folders after one split (train, test or validation), or move these away"
        )
    if not train:
        raise UserError(f"{root}: the folder has files named {layout.test[0]}*, but none named {layout.train[0]}*")
    if not_read := [path for path in files if path not in {*train, *test}]:
        shown = ", ".join(str(path.relative_to(root)) for path in not_read[:5])
        log_once(f"{root}: {len(not_read)} files are of no split that is used, and not read ({shown} ...)")
    return (test if split == "test" and test else train), not test


def local_source(root: Path, layout: Layout, split: str, limit: int, strict: bool) -> Source:
    files, held_out = local_files(root, layout, split, strict)
    names = [path.relative_to(root).as_posix() if path != root else path.name for path in files]
    hashes = [file_hash_once(path) for path in files]
    identity = [[name if files != [root] else "", hashed] for name, hashed in zip(names, hashes)]
    return Source(identity, lambda: read_files(files, limit), held_out, str(root), names, hashes)


def hub_source(hub: str, layout: Layout, split: str, advice: str) -> Source:
    """Return a split of a data set on the Hugging Face hub. Raises UserError, with `advice`, if it cannot be loaded."""
    import datasets

    try:
        names = datasets.get_dataset_split_names(hub, **layout.loader)
        train = next((name for name in layout.train if name in names), None)
        test = next((name for name in layout.test if name in names), None)
        name = (test if split == "test" else None) or train
        if name is None:
            raise ValueError(f"it has the splits {', '.join(names)}, none of {', '.join(layout.train)}")
        rows = datasets.load_dataset(hub, split=name, **layout.loader)
    except Exception as error:  # the library raises whatever its many layers do
        raise UserError(f"hub data set {hub!r} cannot be loaded: {type(error).__name__}: {error}\n{advice}") from error

    def chunks() -> Iterator[Chunk]:
        tables = rows.with_format("arrow").iter(batch_size=CHUNK_ROWS)
        batches = (batch for table in tables for batch in table.combine_chunks().to_batches())
        return chunks_of_batches(f"{hub} [{name}] row ", batches)

    label, fingerprint = f"{hub} [{name}]", rows._fingerprint
    return Source([hub, name, fingerprint], chunks, test is None, label, [label], [fingerprint], hub)
