"""The README tells the truth: its commands are accepted, the files and keys it names exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hydra.core.override_parser.overrides_parser import OverridesParser

from settings import load_config

README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
COMMANDS = [line.split("#")[0].strip() for line in BLOCKS.splitlines() if line.strip() and not line.startswith("#")]
TRAINING = [command for command in COMMANDS if " train.py" in command]


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands_pass_validation(command: str) -> None:
    words = shlex.split(command.replace("<run folder of step 1>", "run"))
    words = words[words.index("train.py") + 1 :]
    sweep = "-m" in words
    words = [word for word in words if word != "-m" and not word.startswith("hydra")]
    assert load_config([first_of(word) for word in words] if sweep else words)


def first_of(word: str) -> str:
    """An override with the first value of a sweep, or the lower end of an interval."""
    (override,) = OverridesParser.create().parse_overrides([word])
    if override.is_interval_sweep():
        return f"{override.key_or_group}={override.value().start}"
    first = next(override.sweep_string_iterator()) if override.is_sweep_override() else None
    return word if first is None else f"{override.key_or_group}={first}"


def test_make_targets_exist() -> None:
    targets = {command.split()[1] for command in COMMANDS if command.startswith("make ")}
    assert {"demo", "test"} <= targets
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.full
def test_inspect_data_command(cache_dir: Path) -> None:
    (command,) = (c for c in COMMANDS if "inspect_data" in c)
    arguments = [*shlex.split(command)[1:], f"cache_dir={cache_dir}"]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "examples" in done.stdout, done.stderr


def test_named_files_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_named_keys_exist() -> None:
    config = load_config(["exp_name=x", "loss=dpo", "loss.beta=0.1"])
    table = README.split("| key | what it does |")[1].split("\n\n")[0]
    for key in re.findall(r"`([a-z_.]+)=?`", "\n".join(row.split("|")[1] for row in table.splitlines()[2:])):
        node: object = config
        for part in key.split("."):
            assert hasattr(node, part), key
            node = getattr(node, part)
