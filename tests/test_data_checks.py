"""What a run says of its data: test rows among training rows, its own and those of its archive, and other formats."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from chat_templates import tokenizer_of
from conftest import make_model, make_tokenizer, tiny_overrides, train_here

from dpo.data.checks import format_warning
from dpo.data.diagnostics import describe, diagnose, facts_of, near_duplicates
from dpo.data.records import PreferenceData
from dpo.data.sources import DataSettings
from preference_datasets import load_data


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
    assert funnel["facts"]["near duplicates"] == 2 and "2 of 6 test prompts equal a training prompt, or nearly" in said
    dpo = ("loss=dpo", "loss.beta=0.1", f"model.archive={tmp_path / 'sft'}")
    said, funnel = run("dpo", text, *dpo)
    assert "4 of the 6 prompts held for evaluation" in said and "training data of model.archive" in said
    assert funnel["overlap"]["training data"]["prompts"] == 0
    assert "warning: these rows are plain text, and the model was trained on a chat template" in said
    said, funnel = run("wrapped", text, *dpo, "chat_format=template")
    assert "these rows are" not in said and funnel["overlap"]["training data of model.archive"] == {"prompts": 4}
    from report import load_runs, make_page

    (run_,) = load_runs([tmp_path / "dpo"])
    assert run_.status.startswith("finished, 4 test prompts seen in training")
    assert "the longer wins" in run_.facts and "the longer wins" in make_page([run_], 1, "x")
    said, _ = run("third", text, *dpo[:2], f"model.archive={tmp_path / 'dpo'}", "chat_format=template")
    assert "training data of model.archive" in said  # what the archive's own archive saw is known, too
    said, _ = run("from the base", text, *dpo[:2])
    assert "note: the rows are text and the tokenizer has a chat template" in said


def test_format_warning() -> None:
    assert format_warning(["text"], []) == "" == format_warning(["text"], ["hh", "text"])
    assert "these rows are the style of HH" in format_warning(["hh"], ["template:12ab"])
    assert "a chat template (12ab)" in format_warning(["hh"], ["template:12ab"])


def loaded(rows: dict[str, list[dict[str, Any]]], folder: Path, cache: Path) -> list[PreferenceData]:
    folder.mkdir()
    for split, some in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    settings = DataSettings(
        (str(folder),), max_length=700, max_prompt_length=600, cache_dir=str(cache), holdout_fraction=0
    )
    return [load_data(settings, make_tokenizer(), split) for split in rows]


def words(draw: random.Random, n: int) -> str:
    return " ".join("".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(n))


def test_facts_of_pairs_equal_a_loop(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [{"prompt": words(draw, 5), "chosen": words(draw, 8), "rejected": words(draw, 7)} for _ in range(40)]
    for row in rows[:5]:  # the opposite of 5, in which one side counts twice
        rows.append({"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]})
    rows.append({"prompt": rows[0]["prompt"], "chosen": rows[0]["chosen"], "rejected": words(draw, 3)})
    (data,) = loaded({"train": rows}, tmp_path / "data", tmp_path / "cache")
    found = facts_of(data)
    lengths = [
        (len(r.responses[a]), len(r.responses[b])) for r in (data[i] for i in range(len(data))) for a, b in r.pairs
    ]
    assert found["examples"] == len(lengths) == 46 and found["prompts"] == 40
    assert found["longer wins"] == pytest.approx(sum((a > b) + 0.5 * (a == b) for a, b in lengths) / len(lengths))
    assert found["chosen"]["sum"] == sum(a for a, _ in lengths) and found["rejected"]["max"] == max(
        b for _, b in lengths
    )
    assert found["tokens"]["prompt"]["sum"] == sum(len(data[i].prompt) for i in range(len(data)))
    assert found["contradictions"] == 10
    assert "10 pairs contradict each other" in describe({"train": found})


def test_near_duplicates(tmp_path: Path) -> None:
    draw = random.Random(1)
    prompts = [words(draw, 40) for _ in range(60)]
    phrase = words(draw, 12)  # of all of them
    train = [f"{phrase} {prompt}" for prompt in prompts]
    one_word = [prompt.replace(prompt.split()[-1], "new") for prompt in train[:6]]
    half = [" ".join([*prompt.split()[:30], words(draw, 25)]) for prompt in train[6:12]]
    test = [*one_word, *half, train[20], *(f"{phrase} {words(draw, 40)}" for _ in range(9)), "short"]
    sides = {"chosen": " yes", "rejected": " no"}
    splits = {"train": [*train, "short!"], "test": test}
    rows = {name: [{"prompt": p, **sides} for p in some] for name, some in splits.items()}
    data = loaded(rows, tmp_path / "data", tmp_path / "cache")
    near = near_duplicates(*data)
    texts = [make_tokenizer().decode(data[1][i].prompt) for i in range(len(data[1]))]
    assert {text for text, is_near in zip(texts, near) if is_near} == {*one_word, train[20]}
    facts = diagnose(*data, tmp_path / "cache")
    assert facts == diagnose(*data, tmp_path / "cache") and facts["near duplicates"] == 7
    assert "7 of 23 test prompts equal a training prompt, or nearly" in describe(facts)
