"""Processes and sharded models: the only package that talks to torch.distributed.

Every function also works without a process group, as the one process of its group. The names of `processes` and
`sharding` are attributes of the package. torch is imported when one of them first needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo.parallel.processes import *  # noqa: F403
    from dpo.parallel.sharding import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Return the attribute `name` of `processes`, or else of `sharding`."""
    if not name.startswith("__"):
        for module in ("processes", "sharding"):
            if name == module or hasattr(import_module(f"{__name__}.{module}"), name):
                found = import_module(f"{__name__}.{module}")
                return found if name == module else getattr(found, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
