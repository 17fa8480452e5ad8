"""Declaring configuration keys: a component's config class states type, bounds and marks of each key, once.

A config class is a keyword-only dataclass. Bounds are pydantic's (`Annotated[int, Field(ge=1)]`), and so are choices
(`Literal`). Values and comments stand in config/*.yaml: no key has a default here. What several keys must satisfy
together is checked by the class's `problems`. settings.py composes the classes.
"""

import dataclasses
import difflib
import json
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError


@dataclasses.dataclass(frozen=True)
class Mark:
    """A fact about a key besides type and bounds."""

    fact: str


MayChange = Mark("may change when a run is resumed: it does not change what an update computes")
Inherited = Mark("scripts that open a checkpoint take it from the checkpoint's run")

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=True)]  # infinity is allowed: no limit
Share = Annotated[float, Field(ge=0, le=1)]


class Component:
    """Base of all config classes."""

    __pydantic_config__ = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)

    def problems(self) -> Iterator[str]:
        """Yield what keys of this component contradict, one message each."""
        yield from ()


def keys(component: type, mark: Mark | None = None, prefix: str = "") -> list[str]:
    """Return the dotted names of a config class's keys, or of those with `mark`. A group's mark counts for its keys."""
    found = []
    for name, annotation in get_type_hints(component, include_extras=True).items():
        if get_origin(annotation) is typing.ClassVar:
            continue
        group = component_in(annotation)
        marked = mark is None or mark in marks(annotation)
        if marked and (group is None or mark is not None):
            found.append(prefix + name)
        elif group is not None:
            found += keys(group, mark, f"{prefix}{name}.")
    return found


def marks(annotation: Any) -> list[Any]:
    """Return the extras of an annotation at any depth of Annotated and unions."""
    extras = list(getattr(annotation, "__metadata__", ()))
    return extras + [extra for part in get_args(annotation) if get_origin(annotation) for extra in marks(part)]


def component_in(annotation: Any) -> type | None:
    """Return the config class that an annotation names, if it is one: the key is a group of keys."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, Component) else None


def build(kind: type, values: Mapping[str, Any], prefix: str = "") -> tuple[Any, list[str]]:
    """Return an object of dataclass `kind` with these values, and what is wrong with them: one of both is empty."""
    problems = [f"{prefix}{problem}" for problem in _refused(kind, values)]
    try:
        built: Any = TypeAdapter(kind).validate_python(dict(values))
        return (None, problems) if problems else (built, [])
    except ValidationError as error:
        return None, problems + [_said(entry, prefix) for entry in error.errors()]


def _refused(kind: type, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each value that pydantic would take: a truth value or a fraction for a number, and an empty
    text, which `model.archive=$SFT` is in a terminal that has no such variable."""
    for name, annotation in get_type_hints(kind).items():
        group, value = component_in(annotation), values.get(name)
        if group is not None and isinstance(value, Mapping):
            yield from (f"{name}.{problem}" for problem in _refused(group, value))
            continue
        types, entries = set(_leaves(annotation)), value if isinstance(value, list | tuple) else [value]
        found = (_refusal(entry, types) for entry in entries)
        yield from (f"{name}{said.format(json.dumps(value))}" for said in found if said)


def _refusal(entry: Any, types: set[Any]) -> str:
    """Return what is wrong with a value of a key of these types, with {} for all of the key's value, or ""."""
    if isinstance(entry, bool) and bool not in types and types & {int, float}:
        return "={}: input should be a number"
    if isinstance(entry, float) and int in types and float not in types:
        return "={}: input should be a whole number"
    return " is empty: was a variable of the shell unset? Give a value, or null" if entry == "" else ""


def _leaves(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation is made of."""
    parts = get_args(annotation)
    yield from (leaf for part in parts for leaf in _leaves(part)) if parts else [annotation]


def _said(error: Any, prefix: str) -> str:
    """Return one of pydantic's errors in the words of a command line."""
    place = [str(part) for part in error["loc"] if not str(part).startswith(("function-", "constrained"))]
    place = [part for part in place if part not in ("str", "int", "float", "bool", "literal")]
    name, context = prefix + ".".join(place), error.get("ctx", {})
    value = json.dumps(error["input"]) if error["input"] in (None, True, False) else error["input"]
    bounds = {"greater_than_equal": ("at least", "ge"), "greater_than": ("more than", "gt")}
    bounds |= {"less_than_equal": ("at most", "le"), "less_than": ("less than", "lt")}
    if error["type"] in bounds:
        words, bound = bounds[error["type"]]
        return f"{name}={value} must be {words} {context[bound]:g}"
    if error["type"] == "literal_error":
        listed = context["expected"].replace("'", "").replace(" or ", ", ")
        options = {option.lower(): option for option in listed.split(", ")}
        close = difflib.get_close_matches(str(value).lower(), options, 1)
        near = f"; did you mean '{options[close[0]]}'?" if close else ""
        return f"{name}={value} is not known; choose from: {listed}{near}"
    if error["type"] == "value_error":
        return str(context["error"])
    if error["type"] in ("list_type", "tuple_type"):
        return f"{name}={value} is no list: write '{name}=[{value}]'"
    if error["type"] == "finite_number":
        return f"{name}={value} must be a finite number"
    if error["type"] in ("missing", "missing_argument"):
        return f"{name} is missing: pass {name}=<value>"
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{name}: no such key"
    return f"{name}={value}: {error['msg'][0].lower()}{error['msg'][1:]}"
