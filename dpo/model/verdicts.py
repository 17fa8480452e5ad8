"""Verdicts of checks at the start, kept in cache_dir/verdicts: what has passed once need not be computed again.

A verdict is a small file. Its name is a hash of all that the verdict depends on, so a change of any part is checked
anew. Only checks that passed are kept. To have everything checked again, delete the folder.
"""

import contextlib
import dataclasses
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dpo import parallel
from dpo.data.cache import digest
from dpo.files import atomic_write
from dpo.model.config import ParallelConfig
from dpo.model.logps import input_device
from dpo.run.config import Config
from dpo.utils import ROOT, file_hash_once

FOLDER = "verdicts"
# Code that computes log-probabilities: of libraries the version counts, of this project the content of the package.
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "flash_attn", "kernels", "triton")
# Keys of ParallelConfig that say nothing about how a given model computes.
NOT_COMPUTED = ("cache_dir", "reference", "microbatch_tokens", "fsdp_port")
NAMES = ("name_or_path", "archive", "tokenizer_name_or_path", "hub_id", "license")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a check found, or where to keep it. `path` is None if it cannot be known what it depends on."""

    path: Path | None

    @classmethod
    def of(cls, cache: Path, kind: str, *parts: Any) -> "Verdict":
        """Return the verdict that depends on `parts` of every process, JSON values; None stands for what is not known.

        A collective.
        """
        every = parallel.gather([part if part is None else digest(part) for part in parts])
        if any(part is None for theirs in every for part in theirs):
            return cls(None)
        return cls(cache / FOLDER / f"{kind}-{digest(every)}.json")

    def read(self) -> Any:
        """Return what was found; None if it is not known, or its file is damaged. A collective."""
        return parallel.from_main(self._read() if parallel.is_main() else None)

    def _read(self) -> Any:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(self.path.read_text(encoding="utf-8")) if self.path is not None else {}
            if content["digest"] == self._digest(content["found"]):
                return content["found"]
        return None

    def keep(self, found: Any) -> None:
        """Write what was found. If the disk refuses, it will be found again."""
        if self.path is not None and parallel.is_main():
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(self.path, json.dumps({"found": found, "digest": self._digest(found)}))

    def _digest(self, found: Any) -> str:
        return digest(self.path and self.path.name, found)


def structure(model: PreTrainedModel, config: Config) -> dict[str, Any] | None:
    """Return all that decides how `model` computes, except for the values of its weights; None if it has code without
    a file.

    Its configuration, modules, tensors and devices; its code, and this project's; versions; the settings.
    """
    code = _code(model)
    if code is None:
        return None
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(ParallelConfig)}
    settings = {name: value for name, value in settings.items() if name not in NOT_COMPUTED}
    settings["model"] = {name: v for name, v in vars(config.model).items() if name not in NAMES}
    settings["adapter"] = vars(config.adapter)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    own = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    return {
        "config": json.dumps(own, sort_keys=True, default=_plain),
        "attention": model.config._attn_implementation,
        "modules": [f"{name} {type(m).__module__}.{type(m).__name__}" for name, m in model.named_modules()],
        "tensors": [f"{name} {tuple(t.shape)} {t.dtype} {t.device} {t.requires_grad}" for name, t in tensors],
        "code": code,
        "versions": {name: _version(name) for name in LIBRARIES},
        "machine": _machine(input_device(model)),
        "settings": settings,
        "lengths": [config.max_prompt_length, config.max_length],
    }


def _plain(value: Any) -> Any:
    """Return a value that JSON lacks as one that it has; the same in every process."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _code(model: PreTrainedModel) -> dict[str, str] | None:
    """Return a hash of each file of code that is no library's: this project's, and of the packages that the model's
    classes come from, as far as they are loaded. None if a class has no file."""
    parts = [model.config, *model.modules()]
    classes = {base for part in parts for base in type(part).__mro__}
    packages = {cls.__module__.partition(".")[0] for cls in classes} - {*LIBRARIES, *sys.stdlib_module_names}
    files = {str(path.relative_to(ROOT)): path for path in (ROOT / "dpo").rglob("*.py")}
    for package in packages:
        modules = {n: m for n, m in list(sys.modules.items()) if n.partition(".")[0] == package}
        found = {name: getattr(module, "__file__", None) for name, module in modules.items()}
        if not any(found.values()):
            return None
        files |= {name: Path(file) for name, file in found.items() if file is not None}
    try:
        return {name: file_hash_once(path) for name, path in sorted(files.items())}
    except OSError:
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _machine(device: torch.device) -> list[str]:
    """Return the device's kind and name. Of CPUs, the instructions that torch takes decide."""
    if device.type == "cuda":
        return ["cuda", torch.cuda.get_device_name(device)]
    return [device.type, platform.machine(), torch.backends.cpu.get_cpu_capability()]
