"""Use a trained run from Python, such as a notebook: `dpo.load_run(path)`."""

import functools
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo.config import build
from dpo.data.records import load
from dpo.data.sources import PAIRS, DataSettings
from dpo.data.tokenise import own_bos
from dpo.loss import Loss, Responses
from dpo.model.config import AdapterConfig
from dpo.model.logps import Computation
from dpo.model.patches import quiet_transformers
from dpo.reference import WantedTree
from dpo.run.checkpoint import read_state
from dpo.run.config import Config
from dpo.run.saved import Saved, reference_of, token_logps
from dpo.run.weights import find_archive
from dpo.sampling import Sampling, continuation, sample
from dpo.utils import LOGGER, UserError, be_quiet, log

NUMBER = "pair_number"  # column by which a row is found again
NO_PAIR = "has no two responses of its own: give prompt, chosen and rejected"
Opened = tuple[PreTrainedModel, PreTrainedTokenizerBase, Computation]


@dataclass(frozen=True)
class Run:
    """A trained policy and the reference it was trained against. Models are read when they are first used.

    `config` is the run's configuration; its `loss` is None, as losses belong to the training code: see `score`.
    """

    path: Path
    config: Config
    state: Mapping[str, Any]

    @functools.cached_property
    def _policy(self) -> Opened:
        return Saved(self.config, dict(self.state)).open()

    @functools.cached_property
    def _reference(self) -> Opened:
        (name, identity), base = reference_of(self.state), self.state["config"]["model"]["name_or_path"]
        assert name is not None
        file = name.endswith(".pt")  # of the original code, which does not say what it is
        place = {"name_or_path": base, "archive": name} if file else {"name_or_path": name, "archive": None}
        model = replace(self.config.model, **place, tokenizer_name_or_path=str(self.path))
        return Saved(replace(self.config, model=model), {}, identity).open()

    @property
    def policy(self) -> PreTrainedModel:
        """The trained model, frozen."""
        return self._policy[0]

    @property
    def reference(self) -> PreTrainedModel:
        """The model that the policy was trained against, frozen. Raise UserError if its weights have changed since."""
        return self._reference[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the run was trained with."""
        return self._policy[1]

    def sample(
        self,
        prompts: Sequence[str],
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Return one response of the policy to each prompt. Prompts are texts as the model sees them.

        `max_new_tokens`: by default what max_length leaves. One seed gives one result for the same prompts.
        """
        if isinstance(prompts, str):
            raise UserError("prompts is one text; give a list of texts")
        bos = own_bos(self.tokenizer)
        ids = [bos + self.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        if not ids or not all(ids):
            raise UserError("prompts holds no prompt, or an empty one; give texts of at least one token")
        room = max_new_tokens or max(self.config.max_length - max(map(len, ids)), 1)
        how = Sampling(room, self.config.eval_batch_size, seed, self._policy[2].dtype, temperature, top_p)
        responses = sample(self.policy, self.tokenizer, ids, how)
        return [continuation(self.tokenizer, *each) for each in zip(ids, responses, strict=True)]

    def score(self, pairs: Sequence[Mapping[str, Any]], loss: Loss | None = None) -> list[dict[str, Any]]:
        """Return, for each pair {prompt, chosen, rejected}, the log-probabilities of both responses in nats.

        Pairs have the forms of rows in files: texts, or messages for the chat template. Rendering and truncation are
        the run's. A result has `chosen` and `rejected`, each {policy, reference, log_ratio, n_tokens} and with `loss`
        also `reward`; and `margin`: the reward (or log-ratio) of the chosen response minus that of the rejected one.
        """
        if not isinstance(loss, Loss | None):
            raise UserError(f"loss={loss!r} is no loss; give an object, such as losses.DPO(beta=0.1), or None")
        if not pairs:
            return []
        wanted = self._pairs(pairs)
        sides = [self._responses(opened, wanted) for opened in (self._policy, self._reference)]
        results: list[dict[str, Any]] = []
        for policy, reference in zip(*sides, strict=True):
            chosen, rejected = (_score(*scores, loss) for scores in zip(policy, reference, strict=True))
            kind = "reward" if "reward" in chosen else "log_ratio"
            results.append({"chosen": chosen, "rejected": rejected, "margin": chosen[kind] - rejected[kind]})
        return results

    def _pairs(self, pairs: Sequence[Mapping[str, Any]]) -> list[WantedTree]:
        """Return each pair as the data, its record, and its chosen and rejected response.

        Rows go through a file, so that they are read as those of any data set are.
        """
        config = self.config
        rows = [json.dumps(dict(pair), sort_keys=True) for pair in pairs]
        numbers = {row: number for number, row in enumerate(dict.fromkeys(rows))}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "pairs.jsonl")
            lines = (json.dumps(json.loads(row) | {NUMBER: number}) + "\n" for row, number in numbers.items())
            file.write_text("".join(lines), "utf-8")
            own = DataSettings.of(config, cache_dir=folder, rows=PAIRS, pair_columns=(NUMBER,))
            settings = replace(own, names=(str(file),), holdout_fraction=0.0, num_proc=1)
            level = LOGGER.level
            be_quiet()  # about a file that no user knows
            try:
                data = load(settings, self.tokenizer, "train")  # stays readable when its files are gone
            except UserError as error:
                found = re.search(rf"{re.escape(str(file))}:(\d+)(.*)", str(error))
                text = f"pairs[{rows.index([*numbers][int(found[1]) - 1])}]{found[2]}" if found else str(error)
                text = text.replace(f", {NUMBER!r}; accepted are", "; give prompt, chosen and rejected")
                raise UserError(f"pairs[0] {NO_PAIR}" if str(file) in text else text) from None
            finally:
                LOGGER.setLevel(level)
        for note, n in data.notes[str(file)].items():
            log(f"warning: pairs: {note} ({n} rows)")
        data.names = ("pairs",)
        places = {
            int(number): (i, [*pair])
            for i, record in enumerate(data[i] for i in range(len(data)))
            for number, pair in zip(record.columns[NUMBER], record.pairs, strict=True)
        }
        for number, row in enumerate(rows):
            if numbers[row] not in places:
                raise UserError(f"pairs[{number}] {NO_PAIR}")
        return [(data, *places[numbers[row]]) for row in rows]

    def _responses(self, opened: Opened, wanted: Sequence[WantedTree]) -> list[list[tuple[float, int]]]:
        """Return (log-probability, number of tokens) of the wanted responses."""
        model, _, how = opened
        found = token_logps(self.config, model, how, wanted, "scoring")
        return [[(float(np.nansum(ls, dtype=np.float64)), int(np.sum(~np.isnan(ls)))) for ls in some] for some in found]


def _score(policy: tuple[float, int], reference: tuple[float, int], loss: Loss | None) -> dict[str, Any]:
    score: dict[str, Any] = {"policy": policy[0], "reference": reference[0], "log_ratio": policy[0] - reference[0]}
    response = Responses(*(torch.tensor([value], dtype=torch.float64) for value in (*policy, reference[0])))
    reward = loss.rewards(response) if loss is not None else None
    return score | {"n_tokens": policy[1]} | ({"reward": reward.item()} if reward is not None else {})


def load_run(path: str | Path, **changes: Any) -> Run:
    """Return the run whose folder, or checkpoint, is at `path` (a run's folder means its newest checkpoint).

    `changes` are keys of its configuration, such as device="cpu". Raise UserError for an unknown path or key.
    """
    quiet_transformers()
    folder = find_archive(str(path))
    state = read_state(folder)
    values: dict[str, Any] = {"adapter": asdict(AdapterConfig.none()), **state["config"], "loss": None}
    if unknown := sorted(changes.keys() - values.keys()):
        raise UserError(f"{unknown[0]} is no key of a configuration; see config/config.yaml")
    values["model"] = values["model"] | {"name_or_path": str(folder), "archive": None, "tokenizer_name_or_path": None}
    config, problems = build(Config, values | {"trainer": "BasicTrainer", "compile": False} | changes)
    if problems:
        raise UserError("\n".join(problems))
    return Run(folder, config, state)
