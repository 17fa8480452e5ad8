"""Files and hub data sets -> rows -> token ids -> batches.

    from dpo.data import DataSettings, load

    data = load(DataSettings(names=("pairs.jsonl",)), tokenizer, "train")
    data[0]  # a Record: prompt, responses and pairs
    print(format_funnel(data))  # what became of every row

Importing this package is cheap: what it offers is imported when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo.data.batching import Batch, make_batch
    from dpo.data.records import PreferenceData, Record, format_funnel, load
    from dpo.data.rows import BadRow, ParsedRow
    from dpo.data.sources import DataSet, DataSettings

__all__ = ["BadRow", "Batch", "DataSet", "DataSettings", "ParsedRow", "PreferenceData"]
__all__ += ["Record", "format_funnel", "load", "make_batch"]
HOMES = ("records", "sources", "rows", "batching")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = (importlib.import_module(f"{__name__}.{home}") for home in HOMES)
    return next(getattr(module, name) for module in modules if hasattr(module, name))
