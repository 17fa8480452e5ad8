"""Direct Preference Optimization: the machinery below train.py, for scripts, notebooks and other projects.

    import dpo

    run = dpo.load_run("runs/me/hh_dpo_...", device="cpu")
    run.sample(["\\n\\nHuman: Why is the sky blue?\\n\\nAssistant:"])
    run.score([{"prompt": "...", "chosen": "...", "rejected": "..."}])

Importing this package is cheap: torch and transformers are imported when they are first needed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo.api import Run, load_run

__version__ = "1.0.0"
__all__ = ["Run", "load_run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dpo import api

    return getattr(api, name)
