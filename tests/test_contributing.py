"""The examples in CONTRIBUTING.md work."""

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT

import dpo.run.config
import dpo.scoring
import losses
import preference_datasets
from dpo.loss import Examples, Responses

TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def example(topic: str, language: str) -> str:
    """Return the code block in `language` below the paragraph that begins with `topic`."""
    return re.split(rf"```{language}\n", TEXT.split(f"**{topic}**")[1], maxsplit=1)[1].split("```")[0]


def sides() -> Examples:
    chosen, rejected = torch.tensor([-3.0, -70.0]), torch.tensor([-5.0, -40.0])
    length = torch.tensor([2.0, 9.0])
    return Examples(Responses(chosen, length, chosen - 1), Responses(rejected, length, rejected + 2))


def test_the_loss() -> None:
    names: dict[str, Any] = {**vars(losses), "__name__": "contributing"}
    exec(example("A loss", "python"), names)
    keys = yaml.safe_load(example("A loss", "yaml"))
    loss = names["Exponential"](beta=0.1)
    assert keys.keys() == {"name", *(field.name for field in dataclasses.fields(loss))} and keys["name"] == loss.name
    examples = sides()
    assert loss(examples).tolist() == pytest.approx([math.exp(-0.3)] * 2)  # the log-ratios differ by 1 + 2
    assert loss.rewards(examples.chosen).tolist() == pytest.approx([0.1, 0.1])


def test_the_data_set() -> None:
    names: dict[str, Any] = {**vars(preference_datasets), "REGISTRY": {}}
    exec(example("A data set", "python"), names)
    parsed = names["REGISTRY"]["jokes"].parse({"opener": "Knock, knock.", "a": "No.", "b": "Who's there?", "better": 1})
    assert parsed.prompt == "\n\nHuman: Knock, knock.\n\nAssistant:"
    assert [parsed.responses[i] for i in parsed.pairs[0]] == [" Who's there?", " No."]


def test_the_metric() -> None:
    names: dict[str, Any] = {**vars(dpo.scoring)}
    exec(f"METRICS = {{{example('A metric', 'python')}}}", names)
    (metric,) = names["METRICS"].values()
    examples = sides()
    zero = torch.zeros(2)
    scored = dpo.scoring.Scored(zero, examples.chosen, examples.losers, *[zero] * 5)
    assert metric.value(scored).tolist() == [2.0, -30.0]


def test_the_key() -> None:
    names: dict[str, Any] = {**vars(dpo.run.config)}
    exec(f"@dataclass(kw_only=True)\nclass Example(Component):\n    {example('A key', 'python')}", names)
    (field,) = dataclasses.fields(names["Example"])
    assert yaml.safe_load(example("A key", "yaml")).keys() == {field.name}
