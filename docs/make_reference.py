"""Write the generated parts of docs/keys.md and docs/python.md: python docs/make_reference.py

Both pages end with a part that comes from the code: recipes, keys and their comments from config/; docstrings. A test
compares the files with what this returns.
"""

import dataclasses
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import yaml
from make_losses import ROOT, table  # it puts the project's folder on the path

import dpo.api
import dpo.data.records
import dpo.data.sources
import dpo.loss
import settings
import trainers
from dpo.explained import comments
from utils import CONFIG_DIR, run_main

MARK = "<!-- What follows is written by `python docs/make_reference.py`. -->"
SPLIT = 3  # a group of more keys than this is one row


def commented(name: str, prefix: str = "") -> Iterator[list[str]]:
    """Yield a row (keys, defaults, comment) for the keys of a file of config/ that share a comment, in its order."""
    known, rows = comments(CONFIG_DIR / f"{name}.yaml"), []
    inside = Counter(key.partition(".")[0] for key in known if "." in key)
    for key, (value, comment) in known.items():
        if inside[key] > SPLIT:
            names = ", ".join(f"`{inner}`" for inner in value)
            rows.append((f"`{prefix}{key}.<name>`", "", f"{clean(comment)} Names: {names}."))
        elif not inside[key] and inside[key.partition(".")[0]] <= SPLIT:
            rows.append((f"`{prefix}{key}`", shown(value), clean(comment)))
    for comment, alike in groupby(rows, lambda row: row[2]):
        keys, defaults, _ = zip(*alike)
        yield ["<br>".join(keys), "<br>".join(defaults), comment]


def shown(value: Any) -> str:
    text = "" if value == "???" else yaml.safe_dump(value, default_flow_style=True, width=10_000).split("\n")[0]
    return f"`{text}`" if text else "required"


def clean(comment: str) -> str:
    """Return a comment as Markdown."""
    return comment.replace("(new) ", "").replace("<", "&lt;").replace("*", "\\*")


def recipes() -> Iterator[list[str]]:
    """Yield a row (name, what it is, hardware and expected result) for each recipe, from the comment at its head."""
    for path in sorted((CONFIG_DIR / "experiment").glob("*.yaml")):
        lines = re.match(r"(?:#.*\n)*", path.read_text(encoding="utf-8"))[0].splitlines()[1:]  # type: ignore[index]
        told = [line.removeprefix("#").strip() for line in lines if "#   python" not in line]
        what, _, result = " ".join(told).partition("Hardware: ")
        yield [f"`{path.stem}`", clean(" ".join(what.split())), clean(result)]


def keys() -> str:
    head = ["key", "default", "meaning"]
    intro = "`python train.py +experiment=<name>`. The head of each file in `config/experiment` has its commands."
    parts = ["## Recipes", intro, table(["recipe", "what it trains", "hardware; expected result"], list(recipes()))]
    parts += ["## All keys", table(head, list(commented("config")))]
    parts += ["## Keys of `model`", table(head, list(commented("model/blank_model", "model.")))]
    parts += ["## Keys of `adapter`", table(head, list(commented("adapter/none", "adapter.")))]
    return "\n\n".join(part.strip() for part in parts)


API: list[tuple[str, Any]] = [
    ("dpo.load_run", dpo.api.load_run),
    ("dpo.Run", dpo.api.Run),
    ("dpo.data.load", dpo.data.records.load),
    ("dpo.data.DataSettings", dpo.data.sources.DataSettings),
    ("dpo.data.Record", dpo.data.records.Record),
    ("dpo.loss.Loss", dpo.loss.Loss),
    ("dpo.loss.Examples", dpo.loss.Examples),
    ("dpo.loss.Responses", dpo.loss.Responses),
    ("settings.load_config", settings.load_config),
    ("trainers.train", trainers.train),
]


def api() -> str:
    parts = []
    for name, thing in API:
        parts += [f"## {name}", *described(name.rpartition(".")[2], thing)]
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                function = value.fget if isinstance(value, property) else value
                if not member.startswith("_") and inspect.isfunction(function) and function.__doc__:
                    name = member if isinstance(value, property) else f"{member}{signature(function)}"
                    parts += [f"- `{name}`: {paragraphs(function)[0]}", *indented(paragraphs(function)[1:])]
    return "\n\n".join(parts)


def described(name: str, thing: Any) -> list[str]:
    if inspect.isclass(thing) and dataclasses.is_dataclass(thing):
        lines = [f"    {field.name}: {inspect.formatannotation(field.type)}" for field in dataclasses.fields(thing)]
        code = "\n".join([f"class {name}:", *lines])
    else:
        code = f"class {name}" if inspect.isclass(thing) else f"{name}{signature(thing)}"
    return [f"```text\n{code}\n```", *paragraphs(thing)]


def signature(function: Callable[..., Any]) -> str:
    """Return a function's arguments and result as they are written in its source, on one line."""
    source = inspect.getsource(function)
    written = source[source.index("def ") :].split(":\n")[0].partition("(")[2]
    line = re.sub(r",? \)", ")", re.sub(r"\s+", " ", f"({written}")).replace("( ", "(")
    return re.sub(r"^\(self(, )?", "(", line)


def paragraphs(thing: Any) -> list[str]:
    """Return the paragraphs of a docstring as Markdown."""
    text = inspect.cleandoc(thing.__doc__ or "").replace("<", "&lt;").replace("*", "\\*")
    return [re.sub(r"\n(?! )", " ", part) for part in text.split("\n\n")]


def indented(parts: list[str]) -> list[str]:
    return ["    " + part for part in parts]


PAGES: dict[str, Callable[[], str]] = {"keys.md": keys, "python.md": api}


def written(page: str) -> str:
    """Return the content of a page of docs/ as it is."""
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def text(page: str) -> str:
    """Return the content of a page with its generated part made anew."""
    return f"{written(page).partition(MARK)[0]}{MARK}\n\n{PAGES[page]()}\n"


def main() -> None:
    for page in PAGES:
        (ROOT / "docs" / page).write_text(text(page), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
