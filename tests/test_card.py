"""Model cards: valid for the hub, and without a path of this machine."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer, train_here
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from omegaconf import OmegaConf

from dpo.run.card import base_of, card, license_of, without_paths
from settings import CONFIG_DIR

Overrides = Callable[..., list[str]]
# Those of https://huggingface.co/docs/hub/repositories-licenses that config/model uses.
LICENSES = {"apache-2.0", "mit", "llama3.1", "llama3.2", "other"}
STATE: dict[str, Any] = {
    "examples": 24,
    "updates": 6,
    "metrics": {"loss/eval": 0.6931471, "samples_eval/policy_length": 31.5, "kl_eval/plain": 0.25},
    "metric_sizes": {"loss/eval": 8, "samples_eval/policy_length": 4, "kl_eval/plain": 4},
    "command": "python train.py",
    "formats": ["hh"],
    "adapter": None,
    "sources": {"train": [{"name": "hh", "hub": "Anthropic/hh-rlhf"}, {"name": "/mine/own.jsonl"}]},
    "config": {
        "model": {
            "name_or_path": "EleutherAI/pythia-2.8b",
            "archive": "/mine/runs/hh_sft/step-24",
            "license": "apache-2.0",
        },
        "loss": {"name": "dpo"},
        "datasets": ["hh", "/mine/own.jsonl"],
        "seed": 0,
    },
}


def changed(**model: Any) -> dict[str, Any]:
    return STATE | {"config": STATE["config"] | {"model": STATE["config"]["model"] | model}}


def check_front(text: str) -> dict[str, Any]:
    """Check a card's front matter by what the hub asks of it. `ModelCard.validate` itself would ask the hub."""
    found = ModelCard(text).data
    assert isinstance(found, ModelCardData)
    values: dict[str, Any] = found.to_dict()
    assert ModelCardData(**values).to_dict() == values
    assert values["library_name"] in ("transformers", "peft") and values["pipeline_tag"] == "text-generation"
    assert values.get("license", "mit") in LICENSES and all(isinstance(tag, str) for tag in values["tags"])
    for name in (*values.get("datasets", ()), *([values["base_model"]] if "base_model" in values else [])):
        validate_repo_id(name)
    assert values.get("base_model_relation") in (("finetune", "adapter") if "base_model" in values else (None,))
    return values


def test_a_card_has_base_data_licence_and_metrics_with_n() -> None:
    text = card(STATE)
    front = check_front(text)
    assert front["base_model"] == "EleutherAI/pythia-2.8b" and front["base_model_relation"] == "finetune"
    assert front["datasets"] == ["Anthropic/hh-rlhf"] and front["license"] == "apache-2.0" and front["tags"] == ["dpo"]
    for line in (
        "# pythia-2.8b after dpo",
        "- base model: [`EleutherAI/pythia-2.8b`](https://huggingface.co/EleutherAI/pythia-2.8b), from the weights of "
        "`hh_sft/step-24`",
        "- data: [`Anthropic/hh-rlhf`](https://huggingface.co/datasets/Anthropic/hh-rlhf), `own.jsonl`; seed 0",
        "- licence: `apache-2.0`, the base model's",
        "| loss/eval | 0.69315 | 8 |",
        "| kl_eval/plain | 0.25 | 4 |",
    ):
        assert line in text.splitlines(), line
    assert "/mine" not in text


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    old = {name: value for name, value in STATE.items() if name not in ("sources", "metric_sizes", "formats")}
    old["config"] = STATE["config"] | {"model": {"name_or_path": str(tmp_path / "base"), "archive": None}}
    text = card(old | {"metrics": {}})
    front = check_front(text)
    assert {"license", "base_model", "datasets"}.isdisjoint(front) and "licence" not in text
    assert "- base model: `base`\n- data: `hh`, `own.jsonl`; seed 0" in text and "| none measured | - | - |" in text
    assert "| kl_eval/plain | 0.25 | not known |" in card(old)
    broken = STATE | {"sources": {"train": [{"name": "hh", "hub": "a b: [c"}, {"hub": ["x"]}]}}
    assert "datasets" not in check_front(card(broken))


def test_an_adapter_and_a_local_base() -> None:
    state = changed(name_or_path="/mine/SmolLM2.Q4_1.gguf", hub_id="HuggingFaceTB/SmolLM2-135M-Instruct", archive=None)
    state["config"]["adapter"] = {"peft_type": "LORA", "quantization": "nf4"}
    state["adapter"] = "LORA of rank 8"
    front = check_front(card(state))
    assert front["library_name"] == "peft" and front["base_model_relation"] == "adapter"
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and front["tags"] == ["dpo", "lora"]
    assert "AutoPeftModelForCausalLM" in card(state)
    merged = card(state, merged=True)
    assert check_front(merged)["base_model_relation"] == "finetune" and "nf4, merged into the weights" in merged
    assert "AutoModelForCausalLM" in merged


def test_a_presets_facts_are_about_its_own_model_only() -> None:
    preset = {"hub_id": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0", "archive": None}
    large = "HuggingFaceTB/SmolLM2-360M"
    front = check_front(card(changed(**preset, name_or_path=large)))  # as from Python, without a command
    assert front["base_model"] == large and "license" not in front
    state = changed(**preset, name_or_path="/mine/other.gguf")
    assert check_front(card(state))["base_model"] == preset["hub_id"]
    command = "python train.py model=smollm2 model.name_or_path=/mine/other.gguf"
    assert {"base_model", "license"}.isdisjoint(check_front(card(state | {"command": command})))
    front = check_front(card(state | {"command": f"{command} model.hub_id={large} model.license=mit"}))
    assert front["base_model"] == preset["hub_id"] and front["license"] == "apache-2.0"  # what the state says
    assert "license" not in check_front(card(STATE | {"command": "python train.py model=x model.name_or_path=a/b"}))


def test_a_local_copy_of_a_data_set_is_no_link() -> None:
    state = STATE | {"config": STATE["config"] | {"dataset_sources": {"hh": "/mine/filtered.jsonl", "shp": None}}}
    text = card(state)
    assert "datasets" not in check_front(text) and "- data: `hh` (a local copy), `own.jsonl`; seed 0" in text


def test_the_base_models_own_card_states_its_licence(tmp_path: Path) -> None:
    for content, expected in (
        ("---\nlicense: mit\n---\n# A model", "mit"),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\n{{{\n---\n", None),
        ("# No front matter", None),
    ):
        (tmp_path / "README.md").write_text(content)
        assert license_of(str(tmp_path)) == expected
    assert license_of("org/no-such-model") is None and license_of("/no/such/folder") is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert check_front(card(changed(name_or_path=str(tmp_path), license=None)))["license"] == "mit"


@pytest.mark.parametrize("file", sorted(path.stem for path in (CONFIG_DIR / "model").glob("*.yaml")))
def test_models_of_the_configuration_have_a_base_and_a_licence(file: str) -> None:
    values = OmegaConf.load(CONFIG_DIR / "model" / f"{file}.yaml")
    if file != "blank_model":
        name = values.get("hub_id") or values.name_or_path
        assert base_of({"name_or_path": name}) == name and values.license in LICENSES


def test_paths_in_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "me").mkdir(parents=True)
    for given, expected in {
        "model.archive=/home/me/runs/sft": "model.archive=...",
        "model.archive=~/runs/sft/step-24": "model.archive=...",
        "model.archive='/home/jane doe/secret/run'": "model.archive=...",
        "'dataset_sources={hh:/home/jane/data/hh.jsonl}'": "dataset_sources=...",
        "model.archive=runs/me": "model.archive=...",
        r"model.archive='C:\jane\run'": "model.archive=...",
        "'datasets=[/a/b.jsonl,org/set,../c.csv]'": "datasets=...",
        "'datasets=[hh,org/set]' '/home/jane'": "'datasets=[hh,org/set]' ...",
        "model.name_or_path=org/name lr=1e-6": "model.name_or_path=org/name lr=1e-6",
    }.items():
        assert without_paths(f"python train.py {given}") == f"python train.py {expected}"
    assert without_paths("trainers.train(config)") == "'trainers.train(config)'"


@pytest.mark.full
def test_the_program_of_a_card_runs(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """With a tokenizer that has a chat template, and without. The card names no path."""
    train_here(overrides("adapter=lora", "adapter.rank=2", "n_examples=4", "n_eval_examples=4"))
    folder = tmp_path / "run" / "LATEST"
    text = (folder / "README.md").read_text()
    check_front(text)
    assert str(tmp_path.parent) not in text and "| samples_eval/policy_length |" in text
    assert re.search(r"\| samples_eval/policy_length \| \S+ \| 2 \|", text)
    monkeypatch.chdir(folder)
    state = json.loads((folder / "trainer_state.json").read_text())
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    for formats in (["hh"], ["text"], ["template:1"]):
        (code,) = re.findall(r"```python\n(.*?)```", card(state | {"formats": formats}), re.DOTALL)
        if formats == ["template:1"]:
            tokenizer.save_pretrained(folder)
        capsys.readouterr()
        exec(code, {})
        assert len(capsys.readouterr().out) > 10
