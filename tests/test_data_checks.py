"""What a run says of its data: test rows among training rows, its own and those of its archive, and other formats."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import tokenizer_of
from conftest import make_model, tiny_overrides, train_here

from dpo.data.checks import format_warning


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("chat_model")
    tokenizer, model = tokenizer_of("chatml"), make_model()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(folder: Path, train: range, test: range, chat: bool) -> Path:
    folder.mkdir()
    for split, numbers in (("train", train), ("test", test)):
        with open(folder / f"{split}.jsonl", "w") as file:
            for i in numbers:
                sides = (f" yes {i}", f" no {i}")
                turns = [[{"role": "assistant", "content": side.strip()}] for side in sides] if chat else sides
                prompt: Any = [{"role": "user", "content": f"Q{i}?"}] if chat else f"Q{i}?"
                print(json.dumps({"prompt": prompt, "chosen": turns[0], "rejected": turns[1]}), file=file)
    return folder


def test_overlap_and_formats_are_said(chat_model: Path, cache_dir: Path, tmp_path: Path, capsys: Any) -> None:
    chat = write(tmp_path / "chat", range(8), range(6, 12), chat=True)
    text = write(tmp_path / "text", range(100, 108), range(4, 10), chat=False)

    def run(name: str, data: Path, *given: str) -> tuple[str, dict[str, Any]]:
        less = ("n_eval_examples=8", "sample_during_eval=false", "do_first_eval=false", "batch_size=8")
        train_here(tiny_overrides(chat_model, data, cache_dir, tmp_path / name, *less, *given))
        return capsys.readouterr().out, json.loads((tmp_path / name / "data_funnel.json").read_text())

    said, funnel = run("sft", chat)
    assert "2 of the 6 prompts held for evaluation, and 2 of their 6 examples, are in the training data" in said
    assert funnel["overlap"] == {"training data": {"prompts": 2, "pairs": 2}}
    assert funnel["sources"]["train"][0]["files"] == ["train.jsonl"] and "chat_format" not in said
    dpo = ("loss=dpo", "loss.beta=0.1", f"model.archive={tmp_path / 'sft'}")
    said, funnel = run("dpo", text, *dpo)
    assert "4 of the 6 prompts held for evaluation" in said and "training data of model.archive" in said
    assert funnel["overlap"]["training data"]["prompts"] == 0
    assert "warning: these rows are plain text, and the model was trained on a chat template" in said
    said, funnel = run("wrapped", text, *dpo, "chat_format=template")
    assert "these rows are" not in said and funnel["overlap"]["training data of model.archive"] == {"prompts": 4}
    from report import load_runs

    (run_,) = load_runs([tmp_path / "dpo"])
    assert run_.status.startswith("finished, 4 test prompts seen in training")
    said, _ = run("third", text, *dpo[:2], f"model.archive={tmp_path / 'dpo'}", "chat_format=template")
    assert "training data of model.archive" in said  # what the archive's own archive saw is known, too
    said, _ = run("from the base", text, *dpo[:2])
    assert "note: the rows are text and the tokenizer has a chat template" in said


def test_format_warning() -> None:
    assert format_warning(["text"], []) == "" == format_warning(["text"], ["hh", "text"])
    assert "these rows are the style of HH" in format_warning(["hh"], ["template:12ab"])
    assert "a chat template (12ab)" in format_warning(["hh"], ["template:12ab"])
