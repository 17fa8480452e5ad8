"""Files on disk and data sets on the hub -> chunks of numbered rows, as many as one worker parses at a time."""

import functools
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from utils import UserError, file_hash, log

Row = Mapping[str, Any]
NumberedRows = Iterator[tuple[int, bytes | Row]]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
CHUNK_ROWS = 512  # what one worker gets at a time
PIECE = 1 << 19  # characters of a JSON list that are read at a time


@dataclass(frozen=True)
class Layout:
    """How a folder or hub set is laid out: split names, of which the first that exists is used."""

    train: tuple[str, ...] = ("train",)
    test: tuple[str, ...] = ("test", "validation", "val", "valid", "dev")
    loader: Mapping[str, str] = field(default_factory=dict)  # further arguments of `datasets.load_dataset`


PLAIN = Layout()


class Chunk(NamedTuple):
    """Rows, their numbers, and where they are: "file:" or "file: row ", to be followed by a number."""

    where: str
    numbers: Sequence[int]
    rows: Sequence[bytes | Row] | pa.RecordBatch


def numbered_rows(chunk: Chunk) -> Iterator[tuple[str, bytes | Row]]:
    rows = chunk.rows.to_pylist() if isinstance(chunk.rows, pa.RecordBatch) else chunk.rows
    return ((f"{chunk.where}{number}", row) for number, row in zip(chunk.numbers, rows, strict=True))


def chunks_of_rows(where: str, rows: NumberedRows) -> Iterator[Chunk]:
    while taken := list(itertools.islice(rows, CHUNK_ROWS)):
        numbers, held = zip(*taken)
        yield Chunk(where, numbers, held)


def chunks_of_batches(where: str, batches: Iterable[pa.RecordBatch]) -> Iterator[Chunk]:
    first = 1
    for batch in batches:
        yield Chunk(where, range(first, first + batch.num_rows), batch)
        first += batch.num_rows


def read_json_list(path: Path, handle: Any) -> NumberedRows:
    """The objects of one JSON list, decoded as they come so that the file is never in memory as a whole."""
    decoder, closing, number, at = json.JSONDecoder(), re.compile(r"\s*\]"), 0, 0
    text = iter(lambda: handle.read(PIECE), "")
    buffer = next(text, "").lstrip("\ufeff \t\r\n")[1:]
    while True:
        try:
            if end := closing.match(buffer, at):
                if (buffer[end.end() :] + "".join(text)).strip():
                    raise ValueError("something follows its closing bracket; a file holds one list")
                return
            gap = re.compile(r"\s*,\s*" if number else r"\s*").match(buffer, at)
            if gap is None:
                raise ValueError("a comma is missing")
            row, stop = decoder.raw_decode(buffer, gap.end())
            if stop == len(buffer):  # a number might go on
                raise ValueError("unfinished")
        except (ValueError, RecursionError) as error:
            more = next(text, "")
            if not more:
                raise UserError(f"{path}: invalid JSON after row {number} of the list: {error}") from None
            buffer, at = buffer[at:] + more, 0
        else:
            number, at = number + 1, stop
            yield number, row


def read_file(path: Path) -> Iterator[Chunk]:
    """The rows of one file, in order, by chunks."""
    if path.suffix == ".parquet":
        file = pq.ParquetFile(path, memory_map=True, pre_buffer=False)
        yield from chunks_of_batches(f"{path}: row ", file.iter_batches(batch_size=CHUNK_ROWS))
        return
    with open(path, "rb") as head:
        opener: Any = gzip.open if head.read(2) == b"\x1f\x8b" else open
    with opener(path, "rb") as handle:
        is_list = ".json" in path.suffixes and handle.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        handle.seek(0)
        if is_list:
            yield from chunks_of_rows(f"{path}: row ", read_json_list(path, io.TextIOWrapper(handle, "utf-8")))
        else:
            lines = ((number, line) for number, line in enumerate(handle, 1) if not line.isspace())
            yield from chunks_of_rows(f"{path}:", lines)


def read_files(files: Sequence[Path]) -> Iterator[Chunk]:
    """The rows of all files. Raises UserError naming the file that cannot be read, and the last row before."""
    for path in files:
        last = "its start"
        try:
            for chunk in read_file(path):
                yield chunk
                last = f"row {chunk.numbers[-1]}"
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: gzip file cut off or damaged after {last} ({error}); copy it anew") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 after {last} ({error}); convert the file to UTF-8") from error
        except pa.ArrowException as error:
            raise UserError(f"{path}: not a readable parquet file ({error}); copy it anew") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        if last == "its start":
            raise UserError(f"{path}: the file is empty; give a file with at least one row, or remove it")


class Source(NamedTuple):
    """Where the rows of one split come from. `held_out`: the split is to be taken out of these rows by prompt."""

    identity: list[Any]  # what the rows depend on
    chunks: Callable[[], Iterator[Chunk]]
    held_out: bool
    label: str


log_once = functools.cache(log)  # the train and the test split have the same to say about their folder


def local_files(root: Path, layout: Layout, split: str) -> tuple[list[Path], bool]:
    """The files of a split and whether the split must be held out of them, because the folder has no test files."""
    accepted = f"accepted are {', '.join(SUFFIXES)}"
    if root.is_file():
        if not root.name.endswith(SUFFIXES):
            raise UserError(f"{root}: not a data file; {accepted}")
        return [root], True
    if not root.is_dir():
        raise UserError(f"{root}: no such file or folder")
    inner = root / layout.loader.get("data_dir", "")
    root = inner if inner.is_dir() else root
    files = sorted(path for path in root.rglob("*") if path.name.endswith(SUFFIXES) and path.is_file())
    files = [path for path in files if not re.match(r"dataset_infos?\.json|\.", path.name)]
    if not files:
        raise UserError(f"{root}: the folder holds no data file; {accepted}")

    def named(words: Sequence[str]) -> list[Path]:
        """Files that are, or lie in a folder, named the first possible of `words` and then no letter (train-0)."""
        for name in (re.compile(rf"{re.escape(word)}(?![A-Za-z])") for word in words):
            if hits := [path for path in files if any(map(name.match, path.relative_to(root).parts))]:
                return hits
        return []

    train, test = named(layout.train), named(layout.test)
    if not train and not test:
        return files, True
    if not train:
        raise UserError(f"{root}: the folder has files named {layout.test[0]}*, but none named {layout.train[0]}*")
    known = {*train, *test}
    if others := [path.name for path in files if path not in known]:
        shown = ", ".join(sorted(set(others))[:5])
        log_once(f"{root}: {len(others)} files belong to neither train nor test and are not read ({shown} ...)")
    return (test if split == "test" and test else train), not test


def local_source(root: Path, layout: Layout, split: str) -> Source:
    files, held_out = local_files(root, layout, split)
    identity = [[path.relative_to(root).as_posix() if path != root else "", file_hash(path)] for path in files]
    return Source(identity, lambda: read_files(files), held_out, str(root))


def hub_source(hub: str, layout: Layout, split: str, advice: str) -> Source:
    """A split of a data set on the Hugging Face hub. Raises UserError with `advice` if it cannot be had."""
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

    return Source([hub, name, rows._fingerprint], chunks, test is None, f"{hub} [{name}]")
