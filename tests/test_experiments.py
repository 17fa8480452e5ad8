"""The recipes of config/experiment: each is valid, and so are the commands on top of it."""

import re
import shlex

import pytest
from conftest import ROOT

from dpo.utils import UserError
from settings import check_command, load_config

RECIPES = sorted((ROOT / "config" / "experiment").glob("*.yaml"), key=lambda path: path.stem)
NAMES = [path.stem for path in RECIPES]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_valid_by_itself(name: str) -> None:
    check_command([f"+experiment={name}"])
    assert load_config([f"+experiment={name}"]).exp_name == name


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_begins_with_its_command_hardware_and_result(path) -> None:
    package, *comments = path.read_text(encoding="utf-8").split("\ndefaults:")[0].splitlines()
    assert package == "# @package _global_" and all(line.startswith("#") for line in comments)
    header = "\n".join(line.removeprefix("# ") for line in comments)
    assert "Hardware: " in header and "Expected" in header
    commands = [shlex.split(re.sub("<[^>]*>", "folder", line)) for line in re.findall(r"python train\.py (.*)", header)]
    assert any(f"+experiment={path.stem}" in overrides for overrides in commands)
    for overrides in commands:
        check_command(overrides)
        assert load_config(overrides)


def test_the_command_line_wins_over_a_recipe() -> None:
    given = ["+experiment=sentiment_dpo", "loss=ipo", "loss.beta=0.5", "lr=1e-3", "exp_name=mine"]
    check_command(given)
    config = load_config(given)
    assert (config.loss.name, config.loss.beta, config.lr, config.exp_name) == ("ipo", 0.5, 1e-3, "mine")
    assert (config.batch_size, config.max_length) == (32, 32)


def test_a_loss_key_fits_the_recipes_loss() -> None:
    check_command(["+experiment=sentiment_dpo", "loss.beta=0.3"])
    assert load_config(["+experiment=sentiment_dpo", "loss.beta=0.3"]).loss.beta == 0.3


@pytest.mark.parametrize(("override", "message"), [
    ("+experiment=sentiment", r"\+experiment=sentiment is none of .*sentiment_dpo, sentiment_sft"),
    ("experiment=sentiment_dpo", r"no key 'experiment'; here that is \+experiment="),
])  # fmt: skip
def test_a_misspelt_recipe_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_command([override])
