"""The text of `python train.py --help`: the keys that matter most, with their comments in config/*.yaml."""

import re
import textwrap
from pathlib import Path
from typing import Any

import yaml

GROUPS = {
    "What": ("exp_name", "model", "model.archive", "datasets", "loss", "loss.beta", "adapter"),
    "How much": ("n_epochs", "n_examples", "batch_size", "microbatch_tokens", "max_length"),
    "Steps": ("lr", "warmup_steps", "optimizer"),
    "Where": ("trainer", "mixed_precision"),
    "Evaluations and checkpoints": ("eval_every", "n_eval_examples", "resume"),
}
FILES = {"": "config.yaml", "model": "model/blank_model.yaml", "loss": "loss/pairs.yaml"}  # with the keys of a group
USAGE = """\
python train.py KEY=VALUE ...

  SFT=runs/hh_sft
  python train.py loss=sft 'datasets=[hh]' exp_name=hh_sft local_run_dir=$SFT
  python train.py loss=dpo loss.beta=0.1 'datasets=[hh]' exp_name=hh_dpo model.archive=$SFT
  python train.py +experiment=hh_dpo model.archive=$SFT       # a recipe of config/experiment
  python train.py -m loss=dpo loss.beta=0.05,0.1,0.5 'datasets=[hh]' exp_name=betas model.archive=$SFT    # a sweep

The keys that matter most, with their defaults:
"""
REST = """
All keys, with comments: config/config.yaml, config/model/blank_model.yaml, config/adapter/none.yaml, config/loss.
Losses: docs/losses.md. Your own data: docs/data.md. Everything else: README.md, docs/. (new): not in the original.
Options: -m sweeps over values with commas; --cfg job prints the configuration instead of training; --hydra-help."""


def comments(file: Path) -> dict[str, tuple[Any, str]]:
    """Return key -> (value, comment) of a configuration file, and of keys inside a key as "a.b".

    Keys that stand together without a blank line share the comment above the first.
    """
    text = file.read_text(encoding="utf-8").split("\ndefaults:\n")[0]
    values, found = yaml.safe_load(text), {}
    comment = parent = told = ""
    for line in text.splitlines():
        if match := re.match(r"( *)(\w+):", line):
            comment, told = told.strip() or comment, ""
            parent = parent if match[1] else match[2]
            value = values[parent]
            name, value = (f"{parent}.{match[2]}", value[match[2]]) if match[1] else (parent, value)
            found[name] = value, comment.removeprefix("(new) ")
        elif line.lstrip().startswith("#"):
            told += " " + line.strip().lstrip("# ")
        elif not line:
            comment = told = ""
    return found


def help_text(folder: Path) -> str:
    """Return the explanation of the most important keys, from the configuration files in `folder`."""
    known = {group: comments(folder / file) for group, file in FILES.items()}
    defaults = dict(re.findall(r"^- (\w+): (\w+)", (folder / "config.yaml").read_text(encoding="utf-8"), re.M))
    lines, last = [USAGE], ""
    for title, keys in GROUPS.items():
        lines.append(f"{title}\n")
        for key in keys:
            group, _, name = key.rpartition(".")
            value, comment = known[group].get(name, ("", ""))
            value = yaml.safe_dump(value, default_flow_style=True).split("\n")[0].replace(", ", ",")
            if key in defaults:
                value, files = defaults[key], sorted((folder / key).glob("*.yaml"))
                comment = f"A file of config/{key}: {', '.join(file.stem for file in files)}."
            shown = f"{key}={value}" if value not in ("''", "???") and "${" not in value else key
            if comment == last:
                lines[-2] += f", {shown}"
                continue
            text = textwrap.fill(comment, 112, initial_indent=" " * 6, subsequent_indent=" " * 6)
            lines, last = [*lines, f"  {shown}", text], comment
        lines.append("")
    return "\n".join([*lines, REST.strip()])
