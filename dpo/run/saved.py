"""Open a trained policy, and the reference it was trained against, from what a run left behind."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpo import parallel
from dpo.data.batching import Cut
from dpo.data.records import PreferenceData
from dpo.model.checks import check_fits, checked_computation, refusing
from dpo.model.loading import load_policy, load_tokenizer, pick_device, stored_quantization, whole_model
from dpo.model.logps import Computation
from dpo.reference import Wanted, WantedTree, tree_logps
from dpo.run.checkpoint import REFERENCE, START, STATE_FILE, read_state
from dpo.run.config import Config
from dpo.run.weights import weights_identity
from dpo.utils import UserError, progress

CHANGED = "it is not what the policy was trained against: its weights have changed since"


@dataclass(frozen=True)
class Saved:
    """A model that can be opened. `state`: trainer_state.json of the run that made it, {} if that is not known;
    `identity`: the weights_identity that its own weights must have."""

    config: Config
    state: dict[str, Any]
    identity: str | None = None

    @property
    def trained(self) -> dict[str, Any]:
        """The configuration of the run that made it, {} if that is not known."""
        return self.state.get("config", {})

    def architecture(self) -> Any:
        """Return the model's configuration, as transformers has it. Raise UserError if there is no such model."""
        name, own_code = self.config.model.name_or_path, self.config.model.trust_remote_code
        with refusing(f"no model could be read from {name}"):
            return AutoConfig.from_pretrained(whole_model(name, self.config), trust_remote_code=own_code)

    def open(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Computation]:
        """Return the model, frozen, its tokenizer, and how its log-probabilities are computed."""
        config = self.config
        tokenizer = load_tokenizer(config)
        model = load_policy(config, pick_device(config), archive=config.model.archive, trains=False, compiled=False)
        model.requires_grad_(False).eval()
        check_fits(model, tokenizer, config)
        if self.identity not in (None, weights_identity(config.model.start)):
            raise UserError(f"reference {config.model.start}: {CHANGED}")
        return model, tokenizer, checked_computation(model, replace(config, compile=False), trains=False)


def token_logps(
    config: Config, model: PreTrainedModel, how: Computation, wanted: Sequence[WantedTree], desc: str
) -> list[list[np.ndarray]]:
    """Return log p(token | all before it) of the responses of each entry of `wanted`, float32, in nats; NaN for tokens
    that do not count, such as a user's between two answers. Raise UserError if one that counts is not finite."""
    n = sum(len(responses) for *_, responses in wanted)
    passes = 1 if config.token_limit else max(-(-n // (2 * config.eval_batch_size)), 1)
    cut = Cut(how.layout, 1, passes, config.token_limit)
    found: dict[tuple[int, int, int], np.ndarray] = {}
    with progress(total=n, desc=desc, unit="responses") as bar:
        for (data, record, responses), _, rows in tree_logps(model, how, Wanted.of(wanted), cut):
            for response, (logps, counts) in zip(responses, rows, strict=True):
                if not np.isfinite(logps[counts]).all():
                    name = data.names[int(data.source[record])] if isinstance(data, PreferenceData) else "data"
                    raise UserError(f"{desc}: log-probabilities of {name}, record {record} are not finite")
                found[id(data), record, response] = np.where(counts, logps, np.float32(np.nan))
            bar.update(len(responses))
    return [[found[id(data), record, i] for i in responses] for data, record, responses in wanted]


def reference_of(state: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return which model the policy of `state` was trained against, and its weights_identity; None if unknown."""
    config = state.get("config", {})
    model, other = config.get("model", {}), config.get("reference", {}).get("archive")
    return other or model.get("archive") or model.get("name_or_path"), state.get(REFERENCE if other else START)


def load_reference(
    config: Config, device: torch.device, sharding: parallel.Sharding | None, compiled: bool
) -> PreTrainedModel:
    """Return the model of reference.archive, or else of the weights that training starts from.

    Raise UserError if it cannot be read, or if its tokenizer is another than the policy's.
    """
    if config.reference.archive is None:
        return load_policy(config, device, sharding, config.model.archive, trains=False, compiled=compiled)
    name = config.reference.archive
    if name.endswith(".pt"):  # of the original code, of the policy's architecture
        return load_policy(config, device, sharding, name, trains=False, compiled=compiled)
    ours = theirs = load_tokenizer(config)
    config = replace(config, model=replace(config.model, name_or_path=name, archive=None, tokenizer_name_or_path=None))
    quantization = stored_quantization(Path(name).expanduser())[1]  # of the other model, not of this run
    config = replace(config, adapter=replace(config.adapter, quantization=quantization))
    with contextlib.suppress(UserError):  # it may have no tokenizer of its own; its embeddings are checked below
        theirs = load_tokenizer(config)
    if theirs.get_vocab() != ours.get_vocab():
        raise UserError(f"reference.archive={name} has another vocabulary than the policy; give one that shares it")
    try:
        model = load_policy(config, device, sharding, trains=False, compiled=compiled)
        check_fits(model, ours, config)
    except UserError as error:
        text = str(error).replace("model.name_or_path", "reference.archive")
        raise UserError(text if "reference.archive" in text else f"reference.archive={name}: {text}") from error
    return model


def formats_of(archive: Path | None) -> list[str]:
    """Return how the rows were rendered that `archive` was trained on; [] if that is not known."""
    if archive is not None and (archive / STATE_FILE).is_file():
        with contextlib.suppress(UserError):  # the weights can be used without it
            return read_state(archive).get("formats") or []
    return []
