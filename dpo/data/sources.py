"""Which rows a data set's name means: a registered set, a local file or folder, or a data set on the hub."""

import difflib
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from dpo.data.config import DataConfig
from dpo.data.files import PLAIN, SUFFIXES, Layout, Source, hub_source, local_source
from dpo.data.rows import ParsedRow, generic
from dpo.utils import UserError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name; a relative path may look the same


# What a loss learns from: pairs, one target a prompt, completions with a label, or a ranking of responses.
PAIRS, TARGETS, LABELLED, RANKED = "pairs", "targets", "labelled", "ranked"
NEEDS = {
    PAIRS: "This loss needs preferences: columns chosen and rejected, or responses and scores",
    TARGETS: "This loss needs demonstrations: columns prompt and completion, or messages; preferences do, too",
    LABELLED: "This loss needs columns prompt, completion and label (true or false). loss=dpo and others learn from "
    "pairs, loss=sft from completions without a label",
    RANKED: "This loss needs columns prompt, responses, and scores or ranking; or chosen and rejected",
}


@dataclass(frozen=True)
class DataSettings:
    """What the data depends on, besides the tokenizer. Lengths are in tokens."""

    names: tuple[str, ...]  # registered sets, files, folders or hub ids
    sources: Mapping[str, str | None] = field(default_factory=dict)  # registered name -> local copy in the hub's layout
    rows: str = PAIRS  # what the loss learns from: a key of NEEDS
    max_length: int = 512  # prompt + response with EOS
    max_prompt_length: int = 256  # with BOS
    chat_format: str = "auto"  # "auto" | "template" | "hh"
    chat_date: str = "2024-07-26"  # replaces today's date in chat templates
    columns: Mapping[str, str | None] = field(default_factory=dict)  # this program's name of a column -> the files'
    sft_turns: str = "last"  # "last" | "all": which answers of a conversation SFT learns
    pair_columns: tuple[str, ...] = ()  # numeric columns that the loss asks for, such as weight or margin
    max_pairs_per_prompt: int = 10_000
    max_row_mb: float = 16  # of a line, or of an object of a list, unpacked, in MiB
    holdout_fraction: float | None = None  # of the prompts, if a source has no test split; None: see `in_test_split`
    drop_bad_rows: bool = False
    cache_dir: str = ".cache"
    num_proc: int = 0  # 0: all cores

    @classmethod
    def of(cls, config: DataConfig, cache_dir: str, rows: str, pair_columns: tuple[str, ...]) -> "DataSettings":
        """Return the settings that a configuration holds, and those that depend on the loss."""
        same = {key.name: getattr(config, key.name) for key in fields(cls) if hasattr(config, key.name)}
        places = {"names": tuple(config.datasets), "sources": config.dataset_sources, "cache_dir": cache_dir}
        return cls(**same | places, rows=rows, pair_columns=pair_columns)


@dataclass(frozen=True)
class DataSet:
    """A registered data set: how a row is parsed, and where its rows come from (`hub` or `local`).

    A set on the hub may have rows with an empty prompt or response, or with the EOS string: they are dropped and
    counted. In other sets they are errors.
    """

    parse: Callable[..., ParsedRow]
    hub: str | None = None
    layout: Layout = PLAIN
    local: Path | None = None
    sft_hub: str | None = None  # the hub id of its demonstrations, if they live elsewhere
    sft_only: bool = False


Registry = Mapping[str, DataSet]


def find_source(name: str, settings: DataSettings, split: str, registry: Registry) -> tuple[DataSet, Source]:
    """Return the data set called `name` and the rows of its `split`. Raises UserError for an unknown name."""
    limit = round(settings.max_row_mb * 2**20)
    if name in registry:
        data_set = registry[name]
        if data_set.sft_only and settings.rows != TARGETS:
            raise UserError(f"data set {name!r} has no preferences, so it is for loss=sft only; choose another")
        if local := settings.sources.get(name) or data_set.local:
            return data_set, local_source(Path(local).expanduser(), data_set.layout, split, limit, strict=False)
        hub, layout = data_set.hub, data_set.layout
        if settings.rows == TARGETS and data_set.sft_hub:
            hub, layout = data_set.sft_hub, PLAIN
        advice = f"If the hub is out of reach, give a local copy in its layout: dataset_sources.{name}=<folder>"
        return data_set, hub_source(str(hub), layout, split, advice)
    path = Path(name).expanduser()
    columns = {column: theirs for column, theirs in settings.columns.items() if theirs is not None}
    data_set = DataSet(functools.partial(generic, columns=columns) if columns else generic)
    if path.exists() or name.lower().endswith(SUFFIXES) or name.startswith(("/", ".", "~")):
        return data_set, local_source(path, PLAIN, split, limit, strict=True)
    if HUB_ID.fullmatch(name):
        return data_set, hub_source(name, PLAIN, split, "Check the id, or give a local copy's path.")
    close = difflib.get_close_matches(name, registry, n=1)
    known = f" Known are {', '.join(registry)}; a path" if registry else " A path"
    raise UserError(
        f"unknown data set {name!r}.{f' Did you mean {close[0]!r}?' if close else ''}{known} to a file or folder or a "
        "hub id (owner/name) works too."
    )
