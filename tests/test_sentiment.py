"""The embedded sentiment data: the committed files, their card, and the script that builds them."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import build_sentiment as script
from dpo.utils import UserError

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data" / "sentiment"
PAIRS = ROOT / "data" / "sentiment_pairs"
OPENERS = (DATA / "openers.txt").read_text(encoding="utf-8").splitlines()


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


TRAIN, TEST = read(DATA, "train"), read(DATA, "test")


def test_openers_are_short_and_distinct() -> None:
    assert all(line == line.strip() and 3 <= len(line.split()) <= 9 for line in OPENERS)
    assert len({line.lower() for line in OPENERS}) == len(OPENERS)


def test_most_openers_are_neutral() -> None:
    vader = SentimentIntensityAnalyzer()
    charged = [line for line in OPENERS if vader.polarity_scores(line)["compound"] != 0]
    assert len(charged) < 0.05 * len(OPENERS), charged


def test_rows_are_clean() -> None:
    for row in TRAIN + TEST:
        assert list(row) == ["prompt", "responses", "scores"]
        assert 2 <= len(row["responses"]) == len(row["scores"]) <= 4
        assert len(set(row["responses"])) == len(row["responses"])
        for response in row["responses"]:
            assert response.startswith(" ") and response == response.rstrip(), response
            assert len(response.split()) >= 3 and len(response.splitlines()) == 1, response


def test_splits_part_the_openers() -> None:
    prompts = [[row["prompt"] for row in rows] for rows in (TRAIN, TEST)]
    assert not set(prompts[0]) & set(prompts[1])
    assert set(prompts[0] + prompts[1]) <= set(OPENERS)
    assert len(set(prompts[0] + prompts[1])) == len(TRAIN) + len(TEST)
    assert len(TEST) >= 70


def test_scores_are_vaders() -> None:
    vader = SentimentIntensityAnalyzer()
    for row in TRAIN + TEST:
        assert row["scores"] == [vader.polarity_scores(row["prompt"] + r)["compound"] for r in row["responses"]]


def test_card_matches_the_data() -> None:
    table = re.findall(r"^\| ([^|]+) \| (-?[\d.]+) \|$", (DATA / "README.md").read_text(encoding="utf-8"), re.M)
    card = {name: float(value) for name, value in table}
    for name, value in (script.describe("train", TRAIN) | script.describe("test", TEST)).items():
        assert card.pop(name) == value, name
    assert card.pop("openers") == len(OPENERS)
    assert card.pop("prompts dropped") == len(OPENERS) - len(TRAIN) - len(TEST)
    assert card["sampled responses kept"] >= sum(len(row["responses"]) for row in TRAIN + TEST)
    assert sum(card.values()) == script.N_SAMPLED * len(OPENERS), card  # every sampled response has one fate


def test_data_stays_small() -> None:
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 1_000_000


@pytest.mark.parametrize(
    ("text", "line", "fate"),
    [
        (" was long and dull.\n\nNext", " was long and dull.", "kept"),
        (" was long and\u2028dull", " was long and", "kept"),
        (" was a caf\ufffd", " was a caf", "kept"),
        (" was\nlong and dull", " was", "under 3 words"),
        ("\n\nwas long and dull", "", "under 3 words"),
        ("", "", "under 3 words"),
        ("'s long and dull", "'s long and dull", "without leading space"),
        (" is already here ", " is already here", "duplicate"),
    ],
)
def test_first_line_and_fate(text: str, line: str, fate: str) -> None:
    assert script.first_line(text) == line
    assert script.fate(line, [" is already here"]) == fate


def test_four_responses_are_enough() -> None:
    texts = [f" number {i} is here" for i in range(6)]
    rows, funnel = script.build_rows(["This film", "That film"], iter([texts, texts[:1]]))
    assert [row["responses"] for row in rows] == [texts[:4]]
    assert (funnel["sampled responses spare"], funnel["prompts dropped"]) == (2, 1)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokens are pieces of the openers, so that most of what it says has words in it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(OPENERS, trainers.BpeTrainer(vocab_size=500, special_tokens=["<eos>"], show_progress=False))
    config = LlamaConfig(
        vocab_size=bpe.get_vocab_size(),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture
def build(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    openers = tmp_path / "openers.txt"
    openers.write_text("\n".join(OPENERS[:6]) + "\n", encoding="utf-8")

    def run(name: str, *more: str) -> Path:
        out = tmp_path / name
        script.main(["--model", str(tiny_model), "--openers", str(openers), "--out", str(out), *more])
        return out

    return run


def test_build_gives_the_same_bytes_twice(build: Callable[..., Path]) -> None:
    first, second, other = build("first"), build("second"), build("other", "--seed", "1")
    for name in ("train.jsonl.gz", "test.jsonl.gz"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert (first / "train.jsonl.gz").read_bytes() != (other / "train.jsonl.gz").read_bytes()


def test_build_prints_the_counts(build: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = build("out", "--batch-size", "4")
    train, test = read(out, "train"), read(out, "test")
    assert len(train) > len(test) > 0
    printed = capsys.readouterr().out
    assert "| openers | 6 |" in printed
    assert f"| train prompts | {len(train)} |" in printed
    assert f"| test prompts | {len(test)} |" in printed


def test_pairs_are_the_extremes_of_a_prompts_samples() -> None:
    row = {"prompt": "p", "responses": [" a", " b", " c", " d", " e"], "scores": [0.1, 0.9, -0.5, 0.0, 0.3]}
    best, second = script.extremes(row, 2)
    assert best == {"prompt": "p", "responses": [" b", " c"], "scores": [0.9, -0.5]}
    assert second == {"prompt": "p", "responses": [" e", " d"], "scores": [0.3, 0.0]}
    assert len(script.extremes(row, 8)) == 2  # the fifth response has no partner
    assert script.extremes(row | {"scores": [0.1] * 5}, 2) == []  # ties


def test_committed_pairs_fit_the_data_and_their_card() -> None:
    train, test = read(PAIRS, "train"), read(PAIRS, "test")
    vader = SentimentIntensityAnalyzer()
    assert {row["prompt"] for row in train} <= {row["prompt"] for row in TRAIN} and test == TEST
    for row in train:
        assert row["scores"] == [vader.polarity_scores(row["prompt"] + r)["compound"] for r in row["responses"]]
        assert all(r.startswith(" ") and r == r.rstrip() and len(r.split()) >= 3 for r in row["responses"])
    assert all(row["scores"][0] > row["scores"][1] and len(row["scores"]) == 2 for row in train)
    used = Counter((row["prompt"], response) for row in train for response in row["responses"])
    assert max(used.values()) == 1  # no response stands in two pairs
    card = (PAIRS / "README.md").read_text(encoding="utf-8")
    for name, value in script.describe("train", train).items():
        assert f"| {name} | {value} |" in card
    assert sum(path.stat().st_size for path in PAIRS.iterdir()) < 500_000


def test_build_of_pairs_keeps_the_split(
    build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = build("rows")
    monkeypatch.setattr(script, "DATA", rows)
    monkeypatch.setattr(script, "N_PAIRED", 8)
    monkeypatch.setattr(script, "sentiment", lambda text: len(text) / 1000)
    capsys.readouterr()
    out, again = build("pairs", "--pairs", "2"), build("again", "--pairs", "2", "--batch-size", "8")
    train, test = read(out, "train"), read(out, "test")
    assert (out / "train.jsonl.gz").read_bytes() == (again / "train.jsonl.gz").read_bytes()
    assert {row["prompt"] for row in train} <= {row["prompt"] for row in read(rows, "train")}
    assert test == read(rows, "test")
    assert train and all(len(row["responses"]) == 2 and row["scores"][0] > row["scores"][1] for row in train)
    assert max(Counter(row["prompt"] for row in train).values()) <= 2
    printed = capsys.readouterr().out
    assert f"| train pairs | {len(train)} |" in printed and "sampled responses spare | 0 |" in printed


@pytest.mark.parametrize(
    ("given", "message"), [(["--pairs", "9"], "must be between 1 and 8"), (["--pairs", "2"], "give another --out")]
)
def test_misuse_of_pairs_is_named(given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        script.main(given)
