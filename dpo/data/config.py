"""Configuration keys of the data; each is explained in config/config.yaml."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from dpo.config import Component, Count, Inherited, MayChange, NotNegative, Positive
from dpo.data.rows import COLUMNS


@dataclass(kw_only=True)
class DataConfig(Component):
    """Which rows a run reads, and how they become token ids."""

    datasets: Annotated[list[str], Inherited]
    dataset_sources: Annotated[dict[str, str | None], Inherited]
    dataset_weights: list[NotNegative] | None
    chat_format: Annotated[Literal["auto", "template", "hh"], Inherited]
    chat_date: Annotated[str, Inherited]
    columns: Annotated[dict[str, str | None], Inherited]
    sft_turns: Annotated[Literal["last", "all"], Inherited]
    max_pairs_per_prompt: Annotated[Positive, Inherited]
    max_row_mb: Annotated[float, Field(gt=0, le=1024), Inherited, MayChange]
    holdout_fraction: Annotated[Annotated[float, Field(ge=0, lt=1)] | None, Inherited]
    drop_bad_rows: Annotated[bool, Inherited]
    num_proc: Annotated[Count, MayChange]
    max_length: Annotated[Positive, Inherited]
    max_prompt_length: Annotated[Positive, Inherited]

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not self.datasets:
            yield "datasets is empty: name at least one, such as datasets=[hh]"
        weights = self.dataset_weights
        if weights is not None and len(weights) != len(self.datasets):
            yield f"dataset_weights={weights} must have one number for each of datasets={self.datasets}"
        if weights is not None and not math.fsum(weights):
            yield f"dataset_weights={weights} leaves no example; raise one of them"
        for column in sorted(self.columns.keys() - set(COLUMNS)):
            yield f"columns.{column} is not a column that rows can have; choose from: {', '.join(COLUMNS)}"
        try:
            datetime.fromisoformat(self.chat_date)
        except ValueError:
            yield f"chat_date={self.chat_date} must be a date, such as 2024-07-26"
        if self.max_prompt_length >= self.max_length:
            yield f"max_prompt_length={self.max_prompt_length} must be less than max_length={self.max_length}"
