"""Open a trained policy, and the reference it was trained against, from what a run left behind."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from checkpoint import STATE_FILE, find_archive, read_state
from models import Computation, check_fits, load_policy, load_tokenizer, pick_computation, pick_device
from settings import Config, load_config
from utils import UserError

# What a checkpoint knows of its run that also matters for using its policy.
KEPT = ("datasets", "chat_format", "max_length", "max_prompt_length", "mixed_precision", "layout")


@dataclass(frozen=True)
class Saved:
    """A model that can be opened: its configuration, and the name or path of the reference it was trained against."""

    config: Config
    reference: str | None

    def open(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Computation]:
        """The model, frozen, its tokenizer, and how its log-probabilities are computed."""
        config = self.config
        tokenizer = load_tokenizer(config)
        model = load_policy(config, pick_device(config), archive=config.model.archive, trains=False, compiled=False)
        model.requires_grad_(False).eval()
        check_fits(model, tokenizer, config)
        return model, tokenizer, pick_computation(model, config)


def find_saved(name: str, overrides: list[str]) -> Saved:
    """What `name` means: a run's folder, a checkpoint, a policy.pt, any model folder, .gguf file or hub id.

    Settings are those of the run where that is known, then `overrides` as train.py takes them. Raises UserError.
    """
    given = {override.partition("=")[0].lstrip("+") for override in overrides}
    if not Path(name).expanduser().exists() or name.endswith(".gguf"):
        return Saved(_configure(["model=blank_model", f"model.name_or_path={name}"], {}, overrides), None)
    path = find_archive(name)
    if path.is_file():  # the original code's, which does not say what it is
        if not {"model", "model.name_or_path"} & given:
            raise UserError(f"{path} does not say which model it is of: add model=<name>, such as model=pythia28")
        return Saved(_configure([f"model.archive={_quoted(str(path))}"], {}, overrides), None)
    known = read_state(path)["config"] if (path / STATE_FILE).exists() else {}
    model = known.get("model", {})
    own = ["model=blank_model", f"model.name_or_path={_quoted(str(path))}"]
    own += [f"model.policy_dtype={model['policy_dtype']}"] if model else []
    return Saved(_configure(own, known, overrides), model.get("archive") or model.get("name_or_path"))


def _configure(own: list[str], known: dict[str, Any], overrides: list[str]) -> Config:
    given = {override.partition("=")[0].lstrip("+") for override in overrides}
    loss = {key: value for key, value in known.get("loss", {"name": "dpo", "beta": 1.0}).items() if value is not None}
    settings = {"exp_name": "saved", "loss": loss.pop("name"), **{f"loss.{key}": value for key, value in loss.items()}}
    settings |= {key: known[key] for key in KEPT if key in known}
    taken = [
        f"{key}={_quoted(value)}"
        for key, value in settings.items()
        if key not in given and not ("loss" in given and key.startswith("loss"))
    ]
    config = load_config([*own, *taken, *overrides])
    return dataclasses.replace(config, trainer="BasicTrainer")


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
