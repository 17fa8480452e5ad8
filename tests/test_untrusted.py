"""Files of others run no code and name no paths."""

import contextlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer, read_jsonl, train_here, write_pairs

from utils import UserError

Overrides = Callable[..., list[str]]


class Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_policy_pt_with_code_is_refused(protocol: str, overrides: Overrides, tmp_path: Path) -> None:
    mark, archive = tmp_path / "mark", tmp_path / "policy.pt"
    content = {"state": {"weight": torch.ones(1), "evil": Evil(mark)}}
    torch.save(content, archive) if protocol == "torch" else archive.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="not opened for safety"):
        train_here(overrides(f"model.archive={archive}"))
    assert not mark.exists()
    os.system(f"touch {mark}")
    assert mark.exists()  # what it would have done


def with_code(folder: Path, mark: Path) -> Path:
    """A model folder whose configuration, model and tokenizer come with code of their own."""
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    lines = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    classes = {"configuration_own": "OwnConfig", "modeling_own": "OwnModel", "tokenization_own": "OwnTokenizer"}
    for file, name in classes.items():
        (folder / f"{file}.py").write_text(f"{lines}class {name}:\n    pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {
        "AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel",
    }}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize("key", ["model.name_or_path", "model.tokenizer_name_or_path", "model.archive"])
def test_a_folder_with_code_is_refused(key: str, overrides: Overrides, tmp_path: Path) -> None:
    folder, mark = with_code(tmp_path / "own", tmp_path / "mark"), tmp_path / "mark"
    with pytest.raises(UserError, match=r"model\.trust_remote_code=true"):
        train_here(overrides(f"{key}={folder}"))
    assert not mark.exists()
    with contextlib.suppress(Exception):  # its classes are empty
        train_here(overrides(f"{key}={folder}", "model.trust_remote_code=true"))
    assert mark.exists()  # what it would have done


def test_texts_that_look_like_paths_and_commands_are_text(overrides: Overrides, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs")
    rows = read_jsonl(pairs / "train.jsonl")
    evil = [
        "../../evil",
        "/etc/passwd",
        "$(touch evil)",
        "`touch evil`",
        "{tmp_path}",
        "%s%n",
        "\x00",
        "${oc.env:HOME}",
    ]
    for i, text in enumerate(evil):
        rows[i] |= {"id": text, "prompt_id": text, "source": text}
        rows[i]["chosen"] += text
    (pairs / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = {path for path in tmp_path.rglob("*") if "run" not in path.parts}
    train_here(overrides(f"datasets=[{pairs}]", "n_eval_examples=8", "lr=1e-3"))
    assert {path for path in tmp_path.rglob("*") if "run" not in path.relative_to(tmp_path).parts} == before
    assert not (tmp_path / "evil").exists() and (tmp_path / "run" / "LATEST").is_dir()
