"""Files of others run no code and name no paths."""

import contextlib
import functools
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer, read_jsonl, train_here, write_pairs

from dpo.run.checkpoint import read_state
from dpo.run.tensors import load_random_state
from dpo.utils import UserError, log, open_log, progress
from opening import find_reference, find_saved
from settings import load_config, quoted
from utils import run_main

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


# --- Folders of others ---

NAMES = ["${oc.env:HOME}", "run${exp_name}", "it's", 'a "quote"', "back\\slash", "a=b", "[x]", "{y}", "a, b", " ", "~",
         "$(x)", "\\${z}", "ends\\", "\u00e9", "#", "!", "%s", "*"]  # fmt: skip


def test_values_of_overrides_stand_for_themselves() -> None:
    texts = [*NAMES, *(f"/a/{name}/b" for name in NAMES), "null", "1", "true", "a\nb", "a\tb", "'\"\\\"'", "???x"]
    assert load_config(["exp_name=x", f"datasets={quoted(texts)}"]).datasets == texts
    assert load_config(["exp_name=x"], {"datasets": texts}).datasets == texts
    for text in texts[:6]:
        assert load_config(["exp_name=x", f"model.archive={quoted(text)}"]).model.archive == text


@pytest.mark.parametrize("name", NAMES)
def test_run_folders_may_have_any_name(
    name: str, run_dir: Path, overrides: Overrides, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / name
    shutil.copytree(run_dir, run, symlinks=True)
    saved = find_saved(str(run), [f"cache_dir={cache_dir}"])
    assert saved.config.model.name_or_path == str(run.resolve() / os.readlink(run / "LATEST"))
    assert saved.config.loss.beta == 0.3
    if "${" in name or "\\" in name:
        given = [f"model.archive={quoted(run)}", f"local_run_dir={quoted(tmp_path / ('new' + name))}"]
        train_here(overrides(*given, "n_examples=4", "n_eval_examples=0"))
        train_here(overrides(*given, "n_examples=8", "n_eval_examples=0", "resume=auto"))
        assert (tmp_path / f"new{name}" / "step-8").is_dir()


def with_state(run_dir: Path, target: Path, edit: Callable[[dict], object]) -> Path:
    """A copy of a run with another trainer_state.json, and its checkpoint."""
    shutil.copytree(run_dir, target, symlinks=True)
    checkpoint = target / os.readlink(target / "LATEST")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    edited = edit(state)
    content = edited if isinstance(edited, str) else json.dumps(state)
    (checkpoint / "trainer_state.json").write_text(content)
    (checkpoint / "manifest.json").unlink()
    return checkpoint


def put(name: str, value: object) -> Callable[[dict], object]:
    def edit(state: dict) -> None:
        *path, last = name.split(".")
        for key in path:
            state = state[key]
        state[last] = value

    return edit


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config.model.name_or_path", "${oc.env:SECRET}"),
        ("config.chat_format", "${oc.env:SECRET}"),
        ("config.datasets", ["${oc.env:SECRET}"]),
        ("config.dataset_sources", {"hh": "${get_local_run_dir:x,[made]}"}),
        ("config.mixed_precision", "${package_file:antigravity,x}"),
        ("config.loss", {"name": "dpo", "beta": "${oc.env:SECRET}"}),
        ("config.layout", "${get_local_run_dir:x,[made]}"),
    ],
)
def test_nothing_of_a_state_is_interpolated(
    name: str, value: object, run_dir: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "shibboleth")
    with_state(run_dir, tmp_path / "run", put(name, value))
    said = ""
    try:
        policy = find_saved(str(tmp_path / "run"), [f"cache_dir={cache_dir}"])
        said = repr(policy)
        find_reference(policy, None, [f"cache_dir={cache_dir}"])
    except UserError as error:
        said += str(error)
    assert "shibboleth" not in said and not (tmp_path / "made").exists() and "antigravity" not in sys.modules


STATES: dict[str, Callable[[dict], object]] = {
    "no JSON": lambda state: "{",
    "no object": lambda state: "[1]",
    "deep": lambda state: "[" * 100_000,
    "not UTF-8": lambda state: "\udcff",
    **{f"{name} missing": functools.partial(lambda name, state: state.pop(name) and None, name)
       for name in ("examples", "total_examples", "config", "history", "metrics", "best", "evaluated", "saved")},
    **{f"examples {value}": put("examples", value) for value in (-1, 1.5, "8", None, True, [8], 2**70)},
    **{f"updates {value}": put("updates", value) for value in (-3, "x", {})},
    "skipped": put("skipped_in_a_row", -1),
    "history": put("history", {"metrics.jsonl": -5}),
    "history is a list": put("history", [1]),
    "metrics": put("metrics", {"loss/eval": "low"}),
    "best": put("best", ["loss/eval", "low"]),
    "best is a number": put("best", 3),
    "scaler": put("scaler", {"scale": "x"}),
    "config is a list": put("config", [1]),
    "model is text": put("config.model", "x"),
    "model is empty": put("config.model", {}),
    "name is a number": put("config.model.name_or_path", 3),
    "archive is a list": put("config.model.archive", ["x"]),
    "loss is null": put("config.loss", None),
    "loss is a path": put("config.loss.name", "../../x"),
    "datasets is text": put("config.datasets", "hh"),
    "datasets holds a number": put("config.datasets", [3]),
    "device": put("config.device", 3),
    "start": put("start content", 3),
    "sources": put("sources", {"train": [3]}),
    "formats": put("formats", "text"),
    "escapes": put("examples", "\x1b[2J"),
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_states_are_checked(state: str, run_dir: Path, overrides: Overrides, tmp_path: Path) -> None:
    checkpoint = with_state(run_dir, tmp_path / "other", lambda found: None)
    content = STATES[state](found := json.loads((checkpoint / "trainer_state.json").read_text()))
    text = content if isinstance(content, str) else json.dumps(found)
    (checkpoint / "trainer_state.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    for use in (
        lambda: find_saved(str(checkpoint), []),
        lambda: read_state(checkpoint),
        lambda: train_here(overrides(f"resume={checkpoint}", f"local_run_dir={tmp_path / 'new'}")),
    ):
        with pytest.raises(
            UserError, match=r"trainer_state\.json is damaged|holds no trainer_state|manifest"
        ) as refused:
            use()
        assert "\x1b" not in str(refused.value)
    train_here(overrides(f"model.archive={checkpoint}", "n_examples=4", "n_eval_examples=0"))  # its weights are sound


def test_what_comes_from_elsewhere_is_printed_with_escapes(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    evil = "a\x1b]0;title\x07b\u202ec\rd"
    open_log(tmp_path)
    log(f"read {evil}\nand more")
    shown = "a\\x1b]0;title\\x07b\\u202ec\\rd"
    with pytest.raises(SystemExit):
        run_main(lambda: (_ for _ in ()).throw(UserError(evil)))
    with pytest.raises(SystemExit):
        run_main(lambda: (_ for _ in ()).throw(KeyError(evil)))
    list(progress([1, 2], desc=evil, disable=False, leave=True))
    out, err = capfd.readouterr()
    assert f"read {shown}\nand more\n" == out
    assert err.startswith(f"error: {shown}\n") and not set("\x1b\x07\u202e") & set(out + err)
    assert not set("\x1b\x07\u202e\r") & set((tmp_path / "log.txt").read_text())


def test_a_random_state_of_others_is_refused(run_dir: Path, overrides: Overrides, tmp_path: Path) -> None:
    checkpoint = with_state(run_dir, tmp_path / "other", lambda state: None)
    for content in ("{", "[]", '{"python": [3, [1], null]}', '{"python": 1}'):
        (checkpoint / "random_state" / "0.json").write_text(content)
        with pytest.raises(UserError, match="holds no states of random generators"):
            load_random_state(checkpoint)
