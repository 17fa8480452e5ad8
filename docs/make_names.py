"""Write docs/names.md, what other trainers' arguments are called here, from dpo/hints.py: python docs/make_names.py

A test compares the file with what this returns.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dpo.hints import ELSEWHERE
from utils import run_main

FILE = ROOT / "docs" / "names.md"
HEAD = """# Names of TRL, transformers and others

`python docs/make_names.py` writes this file from `dpo/hints.py`. `train.py` answers each of these names with the same
words, in a second or two: `python train.py learning_rate=1e-6` says `here that is lr=1e-6`. `max_length`,
`max_prompt_length`, `gradient_accumulation_steps`, `max_grad_norm`, `weight_decay`, `warmup_steps` and `seed` are
called the same here.
"""


def text() -> str:
    """Return the content of docs/names.md."""
    rows = [(", ".join(f"`{name}`" for name in names.split()), here(meaning)) for names, meaning in ELSEWHERE.items()]
    return "\n".join([HEAD, "| there | here |", "|---|---|", *(f"| {left} | {right} |" for left, right in rows), ""])


def here(meaning: str) -> str:
    """Return a hint as a cell: the settings in it are code, the explanation is text."""
    return meaning if meaning.startswith("nothing") else f"`{meaning}`"


if __name__ == "__main__":
    run_main(lambda: FILE.write_text(text(), encoding="utf-8"))
