"""The text of `python train.py --help`: the keys that matter most, with their comments in config/*.yaml."""

import re
import textwrap
from pathlib import Path

GROUPS = {
    "What": ("exp_name", "model", "model.archive", "datasets", "loss", "loss.beta", "adapter"),
    "How much": ("n_epochs", "n_examples", "batch_size", "microbatch_tokens", "max_length"),
    "Steps": ("lr", "warmup_steps", "optimizer"),
    "Where": ("trainer", "mixed_precision"),
    "Evaluations and checkpoints": ("eval_every", "n_eval_examples", "resume"),
}
FILES = {"model": "model/blank_model.yaml", "loss": "loss/pairs.yaml"}  # which explain the keys of a group
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


def comments(file: Path) -> dict[str, tuple[str, str]]:
    """Return key -> (value as written, "" if it is long or computed; comment) of a file's keys that are not nested.

    Keys that stand together without a blank line share the comment above the first.
    """
    found: dict[str, tuple[str, str]] = {}
    for paragraph in file.read_text(encoding="utf-8").split("\n\n"):
        comment = ""
        for line in paragraph.splitlines():
            if line.startswith("#"):
                comment += line.lstrip("#") if not comment or comment.startswith(" ") else ""
            elif match := re.match(r"(\w+): ?(.*)", line):
                found[match[1]] = (match[2] if "${" not in match[2] else "", comment.strip().removeprefix("(new) "))
            elif found and line.startswith("- "):  # a list's entry
                key, (value, comment) = list(found.items())[-1]
                found[key] = (f"{value[:-1]},{line[2:]}]" if value else f"[{line[2:]}]", comment)
    return found


def help_text(folder: Path) -> str:
    """Return the explanation of the most important keys, from the configuration files in `folder`."""
    main = comments(folder / "config.yaml")
    groups = {group: comments(folder / file) for group, file in FILES.items()}
    defaults = dict(re.findall(r"^- (\w+): (\w+)", (folder / "config.yaml").read_text(encoding="utf-8"), re.M))
    lines, last = [USAGE], ""
    for title, keys in GROUPS.items():
        lines.append(f"{title}\n")
        for key in keys:
            group, _, name = key.rpartition(".")
            value, comment = (groups[group] if group else main).get(name, ("", ""))
            if key in defaults:
                value, files = defaults[key], sorted((folder / key).glob("*.yaml"))
                comment = f"A file of config/{key}: {', '.join(file.stem for file in files)}."
            shown = f"{key}={value}" if value not in ("", "???") else key
            if comment == last:
                lines[-2] += f", {shown}"
                continue
            text = textwrap.fill(comment, 112, initial_indent=" " * 6, subsequent_indent=" " * 6)
            lines, last = [*lines, f"  {shown}", text], comment
        lines.append("")
    return "\n".join([*lines, REST.strip()])
