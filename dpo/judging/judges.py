"""Judges say which of two responses to a prompt is better: by a score of each, here, or by an endpoint's answer."""

import importlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo.utils import UserError, progress

if TYPE_CHECKING:
    import torch

Pair = tuple[str, str, str]
"""A prompt and two responses, a and b."""
ANSWERS = A, B, TIE, REFUSED, UNPARSABLE = "a", "b", "tie", "refused", "unparsable"


class Verdict(NamedTuple):
    """A judge's answer with response a shown first, and with b shown first: each one of ANSWERS."""

    forward: str
    backward: str

    @property
    def win(self) -> float:
        """1 if a is better in both orders, 0 if b is, else a tie: 0.5."""
        return {(A, A): 1.0, (B, B): 0.0}.get(self, 0.5)


class Judge(ABC):
    """Compares responses in batches. `name` tells it from other judges."""

    name: str

    @abstractmethod
    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Return a verdict on each pair. Raise UserError if the judge cannot be used."""

    def scores(self, groups: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Return a score of each response to each prompt of `groups`, to be compared within the prompt only.

        Unless a judge has scores of its own: the mean win over the prompt's other responses; 0.5 of a single response.
        """
        pairs = [(prompt, a, b) for prompt, group in groups for a, b in itertools.combinations(group, 2)]
        verdicts = iter(self.compare(pairs))
        means = []
        for _, group in groups:
            wins: list[list[float]] = [[] for _ in group]
            for i, j in itertools.combinations(range(len(group)), 2):
                win = next(verdicts).win
                wins[i].append(win)
                wins[j].append(1 - win)
            means.append([sum(each) / len(each) if each else 0.5 for each in wins])
        return means


class ScoreJudge(Judge):
    """A judge by `score`, a function of all (prompt, response): the higher score wins, equal ones tie."""

    def __init__(self, name: str, score: Callable[[Sequence[tuple[str, str]]], Sequence[float]]):
        self.name, self._score = name, score

    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]:
        scores = self.scores([(prompt, (a, b)) for prompt, a, b in pairs])
        return [Verdict(*2 * [A if a > b else B if b > a else TIE]) for a, b in scores]

    def scores(self, groups: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        items = list(dict.fromkeys((prompt, response) for prompt, group in groups for response in group))
        scores = dict(zip(items, map(float, self._score(items)), strict=True))
        for (prompt, response), score in scores.items():
            if not math.isfinite(score):
                raise UserError(f"judge {self.name}: the score of {response[:60]!r} to {prompt[:60]!r} is {score}")
        return [[scores[prompt, response] for response in group] for prompt, group in groups]


def function_judge(path: str) -> ScoreJudge:
    """Return the judge by the function `module:name` of (prompt, response), which returns a number. Raise UserError."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        advice = "give module:function of a module in this folder or on PYTHONPATH"
        raise UserError(f"--function {path} cannot be imported ({error}); {advice}") from error

    def score(items: Sequence[tuple[str, str]]) -> list[float]:
        values = [function(prompt, response) for prompt, response in items]
        for (_, response), value in zip(items, values, strict=True):
            if isinstance(value, bool | str) or not hasattr(value, "__float__"):
                raise UserError(f"--function {path} returned {value!r} for {response[:60]!r}; it must return a number")
        return values

    return ScoreJudge(path, score)


def reward_model_judge(name: str, device: "torch.device", batch_size: int) -> ScoreJudge:
    """Return the judge by a reward model: a sequence classifier with one label, a folder or hub id. Raise UserError.

    It reads prompt and response as its tokenizer's chat template renders them, or as plain text without one.
    """
    import torch  # here, so that the options of a command can be read without
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from dpo.data.rows import ASSISTANT, HUMAN, ParsedRow, to_messages
    from dpo.model.checks import positions

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
        options = {"use_safetensors": True, "output_loading_info": True, "dtype": torch.float32}
        model, info = AutoModelForSequenceClassification.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--reward-model {name} cannot be read ({reason}); give a folder or a hub id") from error
    if model.config.num_labels != 1 or info["missing_keys"]:
        n, missing = model.config.num_labels, sorted(info["missing_keys"])
        raise UserError(f"--reward-model {name} is none: {n} labels (one is needed), weights that lack: {missing}")
    model.to(device).eval()
    pad = model.config.pad_token_id  # by which the model finds a row's last token
    if pad is not None:
        tokenizer.pad_token_id, tokenizer.padding_side = pad, "right"
    most = positions(model.config)[0]

    def ids(prompt: str, response: str) -> list[int]:
        if tokenizer.chat_template is None:
            return tokenizer(prompt + response)["input_ids"]
        system, mark, rest = prompt.partition(HUMAN)  # a dialogue may begin with a system message's text
        before = [{"role": "system", "content": system}] if system and mark and prompt.endswith(ASSISTANT) else []
        row: Any = to_messages(ParsedRow(mark + rest if before else prompt, [response], []))
        try:
            return tokenizer.apply_chat_template([*before, *row.prompt, *row.responses[0]], return_dict=True)[
                "input_ids"
            ]
        except Exception as error:  # a template may raise anything
            raise UserError(f"--reward-model {name}: its chat template refuses {prompt[:60]!r}: {error}") from error

    @torch.no_grad()
    def score(items: Sequence[tuple[str, str]]) -> list[float]:
        rows = [ids(*item) for item in items]
        if most and (longest := max(map(len, rows))) > most:
            raise UserError(f"--reward-model {name} has {most} positions, but a prompt and response need {longest}")
        order, size = sorted(range(len(rows)), key=lambda i: len(rows[i])), batch_size if pad is not None else 1
        scores: dict[int, float] = {}
        for start in progress(range(0, len(rows), size), desc="reward model", leave=False):
            some = order[start : start + size]
            batch = tokenizer.pad({"input_ids": [rows[i] for i in some]}, return_tensors="pt", padding=len(some) > 1)
            inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
            scores |= dict(zip(some, model(**inputs).logits[:, 0].float().tolist(), strict=True))
        return [scores[i] for i in range(len(rows))]

    return ScoreJudge(name, score)
