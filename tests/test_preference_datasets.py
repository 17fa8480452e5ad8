"""Rows -> records: every data set's rules, truncation, BOS and EOS, bad input, and the Arrow cache."""

import gzip
import importlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, make_tokenizer, real_data, train_here, write_pairs
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

import trainers
from dpo.data import cache as arrow_cache
from dpo.data import files as data_files
from dpo.data import parse, records, tokenise
from dpo.data.batching import make_batch
from dpo.data.records import PreferenceData, format_funnel
from dpo.data.rows import BadRow, generic
from dpo.data.sources import DataSet, DataSettings
from dpo.data.tokenise import truncate
from dpo.utils import UserError
from preference_datasets import REGISTRY, html_to_text, load_data

FIXTURES = Path(__file__).parent / "fixtures"
EOS = "<|eos|>"
TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}<|bos|>{% endif %}[{{ m['role'] }}] {{ m['content'] }}<|eos|>\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
TURNS = [{"role": "user", "content": "What is two plus two?"}]


def reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a BOS token that it puts before each text by itself."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    bos = ("<|bos|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[bos]
    )
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


@pytest.fixture
def settings(tmp_path: Path) -> DataSettings:
    cache = str(tmp_path / "cache")
    return DataSettings(("?",), {}, max_length=4096, max_prompt_length=2048, cache_dir=cache, num_proc=1)


def built_in(settings: DataSettings, name: str, source: Path, **changes: Any) -> DataSettings:
    return replace(settings, names=(name,), sources={name: str(source)}, **changes)


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def load_file(
    settings: DataSettings, path: Path, tokenizer: Any, split: str = "train", **changes: Any
) -> PreferenceData:
    """All rows of one file, none held out unless told."""
    changes = {"holdout_fraction": 0.0, **changes}
    return load_data(replace(settings, names=(str(path),), **changes), tokenizer, split)


def texts(data: PreferenceData, tokenizer: Any) -> list[tuple[str, list[str], list[tuple[int, int]]]]:
    decode = tokenizer.decode
    return [(decode(r.prompt), [decode(response) for response in r.responses], r.pairs) for r in data]


def check_funnel(data: PreferenceData) -> None:
    """Every row, prompt and pair is kept or counted under the reason why not."""
    for number, name in enumerate(data.names):
        funnel = data.funnel[name]
        dropped = {kind: sum(n for key, n in funnel.items() if key.startswith(f"{kind} dropped"))
                   for kind in ("rows", "prompts", "pairs")}  # fmt: skip
        assert funnel["rows"] == funnel["rows kept"] + dropped["rows"]
        assert funnel["prompts"] == funnel["records"] + dropped["prompts"]
        unused = funnel.get(tokenise.MERGED, 0)
        assert unused <= funnel["rows kept"] - funnel["prompts"]
        if "pairs" not in funnel and not any(key.startswith("prompts dropped") for key in funnel):
            assert funnel["rows kept"] == funnel["records"] + unused
        if "pairs" in funnel:
            assert funnel["pairs"] == funnel["examples"] + dropped["pairs"]
        assert funnel["records"] == (data.source == number).sum()
        assert funnel["examples"] == data.n_examples[data.source == number].sum()
    assert len(data) == len(data.source) == len(data.n_examples)


# The data sets


def test_hh_is_split_where_the_sides_part(settings: DataSettings, tokenizer: Any) -> None:
    shared = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And?\n\nAssistant:"
    rows = [
        {"chosen": shared + " Fine.", "rejected": shared + " Bad."},
        {"chosen": shared + " A\n\nHuman: x\n\nAssistant: B", "rejected": shared + " C\n\nHuman: y\n\nAssistant: D"},
        {"chosen": shared + " ok", "rejected": shared + " "},
    ]
    path = write_rows(settings_path(settings, "hh/train.jsonl.gz"), rows)
    data = load_data(built_in(settings, "hh", path, holdout_fraction=0.0), tokenizer, "train")
    (prompt, responses, pairs) = texts(data, tokenizer)[0]
    assert prompt == shared  # both rows have this prompt, so they are one record
    ends = [" Fine.", " Bad.", " A\n\nHuman: x\n\nAssistant: B", " C\n\nHuman: y\n\nAssistant: D"]
    assert responses == [end + EOS for end in ends]
    assert pairs == [(0, 1), (2, 3)]
    assert data.funnel["hh"]["rows dropped: empty response"] == 1
    check_funnel(data)


def settings_path(settings: DataSettings, name: str) -> Path:
    return Path(settings.cache_dir).parent / name


def test_shp_merges_a_posts_rows_and_keeps_clear_ratios(settings: DataSettings, tokenizer: Any) -> None:
    data = load_data(built_in(settings, "shp", FIXTURES / "shp"), tokenizer, "train")
    records = texts(data, tokenizer)
    assert [prompt for prompt, _, _ in records] == [
        "\n\nHuman: How do I keep pasta from sticking?\n\nAssistant:",
        "\n\nHuman: Can I freeze cream soup?\n\nAssistant:",
    ]
    _, responses, pairs = records[0]
    stir, oil, rinse = (next(i for i, r in enumerate(responses) if word in r) for word in ("stir", "oil", "Rinse"))
    assert len(responses) == 3 and pairs == [(stir, oil), (stir, rinse), (oil, rinse)]
    assert all(response.startswith(" ") and response.endswith(EOS) for response in responses)
    assert records[1][2] == [(0, 1)] and records[1][1][0].startswith(" Yes")  # label 0: B is preferred
    assert data.funnel["shp"]["rows dropped: score ratio below 2"] == 1
    check_funnel(data)
    assert len(load_data(built_in(settings, "shp", FIXTURES / "shp"), tokenizer, "test")) == 1
    sft = load_data(built_in(settings, "shp", FIXTURES / "shp", rows="targets"), tokenizer, "train")
    assert [r[1][0].split()[0] for r in texts(sft, tokenizer)] == ["Use", "Yes,"]


def test_ultrafeedback_drops_ties_and_empty_answers(settings: DataSettings, tokenizer: Any) -> None:
    data = load_data(built_in(settings, "ultrafeedback", FIXTURES / "ultrafeedback"), tokenizer, "train")
    assert texts(data, tokenizer) == [
        (
            "\n\nHuman: Translate 'good morning' into French.\n\nAssistant:",
            [" Bonjour." + EOS, " Bonsoir." + EOS],
            [(0, 1)],
        ),
        ("One word.\n\nHuman: Capital of Peru?\n\nAssistant:", [" Lima." + EOS, " Cusco." + EOS], [(0, 1)]),
    ]
    funnel = data.funnel["ultrafeedback"]
    assert funnel["pairs dropped: equal scores"] == 1 and funnel["rows dropped: empty response"] == 1
    check_funnel(data)
    sft = load_data(built_in(settings, "ultrafeedback", FIXTURES / "ultrafeedback", rows="targets"), tokenizer, "train")
    assert len(sft) == 3  # a tie still has an answer to learn from


def test_tldr_comparisons(settings: DataSettings, tokenizer: Any) -> None:
    train = load_data(built_in(settings, "tldr", FIXTURES / "tldr"), tokenizer, "train")
    prompt, responses, pairs = texts(train, tokenizer)[0]
    assert prompt == "SUBREDDIT: r/cats\n\nTITLE: Cat thief\n\nPOST: My cat hides my socks under the sofa.\n\nTL;DR:"
    assert responses == [" cat steals my socks." + EOS, " cat is fine." + EOS, " socks gone, cat did it." + EOS]
    assert pairs == [(0, 1), (0, 2)]
    test = load_data(built_in(settings, "tldr", FIXTURES / "tldr"), tokenizer, "test")
    assert len(test) == 1 and test.funnel["tldr"]["rows dropped: CNN/DM article, not a post"] == 1
    check_funnel(train)
    check_funnel(test)


def test_tldr_truncation_keeps_the_instruction(settings: DataSettings, tokenizer: Any) -> None:
    short = built_in(settings, "tldr", FIXTURES / "tldr", max_length=40, max_prompt_length=20)
    data = load_data(short, tokenizer, "train")
    assert all(prompt.endswith("TL;DR:") for prompt, _, _ in texts(data, tokenizer))


def test_imdb_is_for_sft_only(settings: DataSettings, tokenizer: Any) -> None:
    imdb = built_in(settings, "imdb", FIXTURES / "imdb")
    with pytest.raises(UserError, match=r"'imdb' has no preferences.*loss=sft"):
        load_data(imdb, tokenizer, "train")
    data = load_data(replace(imdb, rows="targets"), tokenizer, "train")
    whole = [prompt + responses[0] for prompt, responses, _ in texts(data, tokenizer)]
    assert whole == ["A warm, funny film. I would see it again." + EOS, "Dull from start to end." + EOS]


def test_stack_exchange_text_and_ties(settings: DataSettings, tokenizer: Any) -> None:
    answers = [("<p>One</p>", 3), ("<p>Two</p>", 3), ("<p>Three</p>", 1)]
    row = {"question": "<p>How?</p>", "answers": [{"text": text, "pm_score": score} for text, score in answers]}
    path = write_rows(settings_path(settings, "se.jsonl"), [row])
    data = load_data(built_in(settings, "se", path, holdout_fraction=0.0), tokenizer, "train")
    expected = [" One" + EOS, " Three" + EOS, " Two" + EOS]
    assert texts(data, tokenizer) == [("\n\nHuman: How?\n\nAssistant:", expected, [(0, 1), (2, 1)])]
    assert data.funnel["se"]["pairs dropped: equal scores"] == 1
    check_funnel(data)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("<p>Use <a href='x'>this <em>one</em></a>, not <code>that</code>.</p>", "Use this one, not that."),
        ("<p>a</p>\n\n<ul>\n<li>b</li>\n<li><p>c</p></li></ul>", "a\n\n- b\n\n- c"),
        ("<blockquote>\n  <p>said\n  so</p>\n</blockquote><p>yes</p>", "said so\n\nyes"),
        ("<pre><code>if x:\n    y &lt; 1\n</code></pre>", "<code>if x:\n    y < 1</code>"),
        ("line<br/>break &amp; more", "line\nbreak & more"),
        ("no tags", "no tags"),
        ("<p>open <b>tags", "open tags"),
    ],
)
def test_html_to_text_keeps_all_words(source: str, text: str) -> None:
    assert html_to_text(source) == text


def test_embedded_sentiment(settings: DataSettings, tokenizer: Any) -> None:
    if not (ROOT / "data/sentiment/train.jsonl.gz").exists():
        pytest.skip("the embedded data is not built: experiments/build_sentiment.py")
    for split in ("train", "test"):
        data = load_data(replace(settings, names=("sentiment",)), tokenizer, split)
        check_funnel(data)
        assert len(data) > 10


@pytest.mark.parametrize("padded", [False, True])
def test_the_tokens_of_each_prompt_with_all_its_responses(
    settings: DataSettings, tokenizer: Any, capsys: Any, padded: bool
) -> None:
    data = load_data(replace(settings, names=("sentiment",)), tokenizer, "train")
    trees = [
        (len(record.prompt), [len(r) - 1 for r in record.responses]) for record in (data[i] for i in range(len(data)))
    ]
    slow = [len(rest) * (prompt + max(rest)) if padded else prompt + sum(rest) for prompt, rest in trees]
    assert data.row_tokens(padded).tolist() == slow
    limit = sorted(slow)[-3]
    config: Any = SimpleNamespace(token_limit=limit, layout="padded" if padded else "tree")
    trainers.note_split_prompts(data, config)
    above = [tokens for tokens in slow if tokens > limit]
    assert f"microbatch_tokens={limit}: the responses of {len(above)} of {len(data)} prompts" in capsys.readouterr().out
    config.token_limit = max(slow)
    trainers.note_split_prompts(data, config)
    assert not capsys.readouterr().out


# Real rows


@pytest.mark.parametrize(
    ("name", "path", "sft"),
    [
        ("hh", "hh", False),
        ("hh", "hh", True),
        ("se", "stack_exchange", False),
        ("se", "stack_exchange/beer.jsonl.gz", True),
        ("tldr", "tldr/preference_gpt4judged.jsonl.gz", False),
        ("tldr", "tldr/sft.jsonl.gz", True),
        ("imdb", "movie_reviews/movie_reviews.jsonl.gz", True),
    ],
)
def test_real_rows(settings: DataSettings, tokenizer: Any, name: str, path: str, sft: bool) -> None:
    source = real_data(path)
    if name == "imdb":  # long reviews are slow to tokenise: a part will do
        with gzip.open(source, "rt") as file:
            rows = [json.loads(line) for line in itertools.islice(file, 200)]
        source = write_rows(settings_path(settings, "reviews.jsonl"), rows)
    short = built_in(
        settings, name, source, rows="targets" if sft else "pairs", max_length=512, max_prompt_length=256, num_proc=2
    )
    prompts = set()
    for split in ("train", "test"):
        data = load_data(short, tokenizer, split)
        check_funnel(data)
        for record in data:
            assert all(0 < len(record.prompt) + len(response) <= 512 for response in record.responses)
            assert len(record.responses) == 1 if sft else record.pairs
        new = {tuple(record.prompt) for record in data}
        assert not prompts & new or name in ("hh", "se")  # cut prompts of different rows may be alike
        prompts |= new


def test_real_tldr_row_of_the_comparisons(settings: DataSettings, tokenizer: Any) -> None:
    path = real_data("tldr/openai_comparisons_readme_example.jsonl")
    data = load_data(built_in(settings, "tldr", path, holdout_fraction=0.0), tokenizer, "train")
    ((prompt, responses, pairs),) = texts(data, tokenizer)
    assert prompt.startswith("SUBREDDIT: r/legaladvice\n\nTITLE: Anybody") and prompt.endswith("\n\nTL;DR:")
    assert responses[pairs[0][0]].startswith(" we suspect") and pairs == [(0, 1)]


def test_real_hh_rows_are_split_where_they_part() -> None:
    marker, odd, empty = "\n\nAssistant:", 0, 0
    for split in ("train", "test"):
        with gzip.open(real_data("hh/harmless-base", f"{split}.jsonl.gz"), "rt") as file:
            for row in map(json.loads, file):
                example = REGISTRY["hh"].parse(row)
                assert isinstance(example.prompt, str) and example.prompt.endswith(marker)
                assert [example.prompt + str(side) for side in example.responses] == [row["chosen"], row["rejected"]]
                chosens_own = row["chosen"][: row["chosen"].rfind(marker) + len(marker)]
                assert example.prompt == chosens_own or not row["rejected"].startswith(chosens_own)
                odd += example.prompt != chosens_own
                empty += not all(str(side).strip() for side in example.responses)
    assert (odd, empty) == (4, 4)


# Forms of rows


PAIR = [(0, 1)]
FORMS = {
    "dialogues": ({"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"}, " A"),
    "prompt and texts": ({"prompt": "Q", "chosen": " A", "rejected": " B"}, " A"),
    "scores": ({"prompt": "Q", "responses": [" B", " A"], "scores": [0, 1.5]}, " A"),
    "prompt messages": ({"prompt": TURNS, "chosen": reply("A"), "rejected": reply("B")}, " A"),
    "prompt messages and texts": ({"prompt": TURNS, "chosen": "A", "rejected": "B"}, " A"),
    "text prompt and messages": ({"prompt": "Q", "chosen": reply("A"), "rejected": reply("B")}, " A"),
    "whole conversations": ({"chosen": TURNS + reply("A"), "rejected": TURNS + reply("B")}, " A"),
    "whole conversations and prompt": (
        {"prompt": "Q", "chosen": TURNS + reply("A"), "rejected": TURNS + reply("B")},
        " A",
    ),
    "scored messages": ({"prompt": TURNS, "responses": [reply("A"), "B"], "scores": [2, 1]}, " A"),
    "completion": ({"prompt": "Q", "completion": " A"}, " A"),
    "completion messages": ({"prompt": TURNS, "completion": reply("A")}, " A"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_and_files(settings: DataSettings, tokenizer: Any, tmp_path: Path, form: str, suffix: str) -> None:
    row, preferred = FORMS[form]
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet" and form == "scored messages":
        pytest.skip("a parquet column has one type")
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    elif suffix == ".json":
        path.write_text(json.dumps([row], indent=1))
    else:
        write_rows(path, [row])
    sft = "completion" in form
    ((prompt, responses, pairs),) = texts(
        load_file(settings, path, tokenizer, rows="targets" if sft else "pairs"), tokenizer
    )
    assert responses[0] == preferred + EOS
    assert pairs == ([] if sft else PAIR)
    assert prompt.endswith("Q") or prompt.endswith("\n\nAssistant:")


def test_json_list_is_read_in_parts(settings: DataSettings, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(data_files, "PIECE", 16)
    rows = [{"prompt": f'Q{i} [é}}] \\ "', "chosen": "A", "rejected": "B"} for i in range(20)]
    (tmp_path / "x.json").write_text(json.dumps(rows, ensure_ascii=False))
    assert len(load_file(settings, tmp_path / "x.json", tokenizer)) == 20


@pytest.mark.parametrize("tail", ['{"prompt": "a"}]', "] more", ""])
def test_json_list_must_be_whole(settings: DataSettings, tokenizer: Any, tmp_path: Path, tail: str) -> None:
    row = '{"prompt": "q", "chosen": " a", "rejected": " b"}'
    (tmp_path / "list.json").write_text(f"[{row}, {row} {tail}")
    with pytest.raises(UserError, match=r"list\.json: (invalid JSON after row 2|something follows)"):
        load_file(settings, tmp_path / "list.json", tokenizer)


def test_folder_splits(settings: DataSettings, tokenizer: Any, tmp_path: Path) -> None:
    def rows(*names: str) -> list[dict[str, str]]:
        return [{"prompt": f"Q {name}", "chosen": "A", "rejected": "B"} for name in names]

    write_rows(tmp_path / "set/one/train.jsonl", rows("a", "b"))
    write_rows(tmp_path / "set/two/train-00001.jsonl.gz", rows("c"))
    write_rows(tmp_path / "set/one/validation.jsonl", rows("d"))
    write_rows(tmp_path / "set/notes/trainer.jsonl", [{"x": 1}])
    with pytest.raises(UserError, match=r"Not clear from the names of 1 files:\n  notes/trainer.jsonl"):
        load_data(replace(settings, names=(str(tmp_path / "set"),)), tokenizer, "train")
    (tmp_path / "set/notes/trainer.jsonl").unlink()
    for split, size in (("train", 3), ("test", 1)):
        data = load_data(replace(settings, names=(str(tmp_path / "set"),)), tokenizer, split)
        assert len(data) == size


def test_holdout_is_by_prompt_and_the_same_for_every_loss(
    settings: DataSettings, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Q{i % 50}", "chosen": f"A{i}", "rejected": "B"} for i in range(100)]
    path = write_rows(tmp_path / "x.jsonl", rows)
    seen = {}
    for split in ("train", "test"):
        for sft in (False, True):
            data = load_file(settings, path, tokenizer, split, holdout_fraction=0.2, rows="targets" if sft else "pairs")
            check_funnel(data)
            seen[split, sft] = {prompt for prompt, _, _ in texts(data, tokenizer)}
    assert seen["train", True] == seen["train", False] and seen["test", True] == seen["test", False]
    assert not seen["train", True] & seen["test", True] and len(seen["train", True] | seen["test", True]) == 50
    assert 2 < len(seen["test", True]) < 20
    with pytest.raises(UserError, match=r"no test split and holdout_fraction=0"):
        load_file(settings, path, tokenizer, "test")
    assert len(load_file(settings, path, tokenizer, "test", holdout_fraction=1e-9)) == 1  # at least one


def test_a_folder_without_test_files_holds_out_disjoint_prompts(
    settings: DataSettings, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": f"question {i}", "chosen": " yes", "rejected": " no"} for i in range(50)]
    write_rows(tmp_path / "set" / "train.jsonl", rows)
    sides = [
        {prompt for prompt, *_ in texts(load_data(here, tokenizer, split), tokenizer)}
        for here in [replace(settings, names=(str(tmp_path / "set"),), holdout_fraction=0.3)]
        for split in ("train", "test")
    ]
    assert len(sides[0]) + len(sides[1]) == 50 and sides[1] and not sides[0] & sides[1]


def test_a_score_of_zero_beats_a_later_negative_one(settings: DataSettings, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "q", "responses": [f" {score}", " bad"], "scores": [score, -9]} for score in (0, -1)]
    path = write_rows(tmp_path / "scores.jsonl", rows)
    data = load_file(settings, path, tokenizer, rows="targets", holdout_fraction=0.0)
    assert texts(data, tokenizer)[0][1] == [" 0" + EOS]


def test_rows_of_one_prompt_are_one_record(settings: DataSettings, tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": "R", "chosen": "A", "rejected": "A"},
        {"prompt": "Q", "chosen": "C", "rejected": "A"},
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
    ]
    data = load_file(settings, write_rows(tmp_path / "x.jsonl", rows), tokenizer)
    assert texts(data, tokenizer) == [("Q", ["A" + EOS, "B" + EOS, "C" + EOS], [(0, 1), (2, 0), (0, 1)])]
    funnel = data.funnel[data.names[0]]
    assert funnel["pairs dropped: identical responses"] == 1 and funnel["prompts dropped: no pair"] == 1
    check_funnel(data)
    sft = load_file(settings, tmp_path / "x.jsonl", tokenizer, rows="targets")
    assert texts(sft, tokenizer) == [("Q", ["A" + EOS], []), ("R", ["A" + EOS], [])]  # the last chosen


def test_demonstrations_of_one_prompt_stay_apart(settings: DataSettings, tokenizer: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": "Q", "completion": c} for c in ("A", "B")])
    sft = load_file(settings, path, tokenizer, rows="targets")
    assert texts(sft, tokenizer) == [("Q", ["A" + EOS], []), ("Q", ["B" + EOS], [])]
    with pytest.raises(UserError, match=r"no example left:\n(.*\n)+.*loss=sft"):
        load_file(settings, path, tokenizer)


def test_mixture(settings: DataSettings, tokenizer: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [{"prompt": f"Q{i}", "chosen": "A", "rejected": "B"} for i in range(3)])
    both = replace(built_in(settings, "shp", FIXTURES / "shp"), names=("shp", str(path)), holdout_fraction=0.0)
    data = load_data(both, tokenizer, "train")
    assert data.source.tolist() == [0, 0, 1, 1, 1] and data.n_examples.tolist() == [3, 1, 1, 1, 1]
    assert texts(data, tokenizer)[2][0] == "Q0" and data[-1] == data[4]
    with pytest.raises(IndexError):
        data[5]
    check_funnel(data)
    table = format_funnel(data).splitlines()
    assert table[0].split() == ["shp", "train.jsonl"]
    assert any(line.split() == ["rows", "dropped:", "score", "ratio", "below", "2", "1", "-"] for line in table)


def test_hub_ids_go_through_the_datasets_library(settings: DataSettings, tokenizer: Any, monkeypatch: Any) -> None:
    import datasets

    rows = [{"prompt": f"Q{i}", "chosen": "A", "rejected": "B"} for i in range(4)]
    calls = []

    def load(hub: str, split: str, **kwargs: Any) -> Any:
        calls.append((hub, split, kwargs))
        return datasets.Dataset.from_list(rows[:3] if split == "train" else rows[3:])

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda hub, **_: ["train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(load_data(replace(settings, names=("some-org/some.set",)), tokenizer, "train")) == 3
    assert len(load_data(replace(settings, names=("tldr",)), tokenizer, "test")) == 1
    assert len(load_data(replace(settings, names=("tldr",), rows="targets"), tokenizer, "train")) == 3
    comparisons = {"data_dir": "comparisons", "revision": "refs/convert/parquet"}
    assert calls == [
        ("some-org/some.set", "train", {}),
        ("openai/summarize_from_feedback", "validation", comparisons),
        ("trl-lib/tldr", "train", {}),
    ]

    def refuse(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    with pytest.raises(UserError, match=r"'Anthropic/hh-rlhf'.*no route to host\n.*dataset_sources.hh="):
        load_data(replace(settings, names=("hh",)), tokenizer, "train")


# Numeric columns for the loss


def test_pairs_keep_their_columns_through_merging_and_truncation(
    settings: DataSettings, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "Q", "chosen": "A", "rejected": "B", "weight": 1, "margin": 0.5},
        {"prompt": "Q", "chosen": "A", "rejected": "A", "weight": 2, "margin": 1.5},  # dropped: identical
        {"prompt": "R", "chosen": "A", "rejected": "B", "weight": 4, "margin": -1},
        {"prompt": "Q", "chosen": "a" * 99, "rejected": "a" * 100, "weight": 8, "margin": 2},  # dropped: truncation
        {"prompt": "Q", "responses": ["E", "F", "G"], "scores": [3, 2, 1], "weight": 16, "margin": 3},
    ]
    path = write_rows(tmp_path / "x.jsonl", rows)
    short = {"max_length": 20, "max_prompt_length": 10, "pair_columns": ("weight", "margin")}
    data = load_file(settings, path, tokenizer, **short)
    wanted = {"weight": [1.0, 16.0, 16.0, 16.0], "margin": [0.5, 3.0, 3.0, 3.0]}
    assert data[0].columns == wanted and data[1].columns == {"weight": [4.0], "margin": [-1.0]}
    batch = make_batch(data, [(0, 3), (1, 0), (0, 0)])
    assert batch.columns == {"weight": [16.0, 4.0, 1.0], "margin": [3.0, -1.0, 0.5]}
    assert not data.notes[str(path)]
    one = load_file(settings, path, tokenizer, **short | {"pair_columns": ("weight",)})
    assert list(one[0].columns) == ["weight"] and "column 'margin' is not used" in one.notes[str(path)]
    sft = load_file(settings, path, tokenizer, **short, rows="targets")
    assert [record.columns["weight"] for record in sft] == [[16.0], [4.0]]
    assert make_batch(sft, [(1, 0), (0, 0)]).columns["weight"] == [4.0, 16.0]
    most = load_file(settings, path, tokenizer, **short, max_pairs_per_prompt=2)
    assert len(most[0].columns["weight"]) == len(most[0].pairs)


def test_columns_of_csv_and_parquet(settings: DataSettings, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt,chosen,rejected,weight\nQ,A,B,0.25\n")
    table = pa.table({"prompt": ["Q"], "chosen": ["A"], "rejected": ["B"], "weight": pa.array([0.25], pa.float32())})
    pq.write_table(table, tmp_path / "x.parquet")
    for name in ("x.csv", "x.parquet"):
        data = load_file(settings, tmp_path / name, tokenizer, pair_columns=("weight",))
        assert data[0].columns == {"weight": [0.25]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, r"missing field: 'weight'; the row has .*\. loss\.weighting=none of losses of pairs does without it"),
        ({"weight": None}, r"null field: 'weight'\. loss\.weighting=none of losses of pairs does without it"),
        ({"weight": "1"}, "wrong type: 'weight' is str"),
        ({"weight": True}, "wrong type: 'weight' is bool"),
        ({"weight": math.inf}, "number not finite: 'weight' is inf"),
        ({"weight": 10**400}, "number not finite: 'weight'"),
    ],
)
def test_a_column_without_a_number_is_named(
    settings: DataSettings, tokenizer: Any, tmp_path: Path, value: dict, message: str
) -> None:
    good = {"prompt": "Q", "chosen": "A", "rejected": "B", "weight": 1}
    bad = {"prompt": "R", "chosen": "A", "rejected": "B"} | value
    path = write_rows(tmp_path / "x.jsonl", [good, bad])
    with pytest.raises(UserError, match=rf"x\.jsonl:2: {message}"):
        load_file(settings, path, tokenizer, pair_columns=("weight",))
    with pytest.raises(UserError, match=r"missing field: 'margin'; the row has .*\. loss\.margin=none of losses of"):
        load_file(settings, path, tokenizer, pair_columns=("margin",))
    data = load_file(settings, path, tokenizer, pair_columns=("weight",), drop_bad_rows=True)
    assert len(data) == 1 and data.funnel[str(path)][f"rows dropped: {message.partition(':')[0]}"] == 1


# Bad input. Each: file name, content, what the one message says.

GOOD = b'{"prompt": "Q", "chosen": "A", "rejected": "B"}\n'
DIALOGUE = "\n\nHuman: Q\n\nAssistant: A"


def line(**row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


BAD_INPUT = {
    "empty file": ("x.jsonl", b"", r"x.jsonl: the file is empty"),
    "empty list": ("x.json", b"[]", r"x.json: the file is empty"),
    "blank lines only": ("x.jsonl", b"\n \n", r"x.jsonl: the file is empty"),
    "invalid JSON": ("x.jsonl", GOOD + b"\n{'prompt': 1}\n", r"x.jsonl:3: invalid JSON: .*\n.*drop_bad_rows=true"),
    "cut off line": ("x.jsonl", GOOD + GOOD[:20], r"x.jsonl:2: invalid JSON"),
    "not UTF-8": ("x.jsonl", GOOD + '{"prompt": "é"}'.encode("latin-1"), r"x.jsonl:2: not UTF-8"),
    "list not UTF-8": ("x.json", '[{"prompt": "é"}]'.encode("latin-1"), r"x.json: not UTF-8"),
    "cut off list": ("x.json", b"[" + GOOD.strip() + b", {", r"x.json: invalid JSON after row 1"),
    "cut off gzip": ("x.jsonl.gz", gzip.compress(GOOD * 99)[:-12], r"x.jsonl.gz: gzip file cut off or damaged"),
    "damaged gzip": (
        "x.jsonl.gz",
        gzip.compress(GOOD * 99)[:20] + b"\0" * 30,
        r"x.jsonl.gz: gzip file cut off or damaged",
    ),
    "not parquet": ("x.parquet", b"PAR1 nothing else", r"x.parquet: not a readable parquet file"),
    "row not an object": ("x.jsonl", GOOD + b"[1, 2]\n", r"x.jsonl:2: not an object: .* list"),
    "unknown columns": (
        "x.jsonl",
        line(question="Q", reply="A"),
        r":1: columns fit no known form: 'question', 'reply'; accepted are",
    ),
    "no rejected": (
        "x.jsonl",
        GOOD + line(prompt="Q", chosen="A"),
        r"x.jsonl:2: missing field: 'rejected'; the row has 'prompt'",
    ),
    "null field": ("x.jsonl", line(prompt="Q", chosen="A", rejected=None), r"x.jsonl:1: null field: 'rejected'"),
    "null prompt": ("x.jsonl", line(prompt=None, completion="A"), r"x.jsonl:1: null field: 'prompt'"),
    "wrong type": (
        "x.jsonl",
        line(prompt="Q", chosen="A", rejected=3),
        r"x.jsonl:1: wrong type: 'rejected' is int \('3'\)",
    ),
    "empty response": ("x.jsonl", line(prompt="Q", chosen=" ", rejected="B"), r"x.jsonl:1: empty response"),
    "empty prompt": ("x.jsonl", line(prompt="", chosen="A", rejected="B"), r"x.jsonl:1: empty prompt"),
    "EOS in a response": (
        "x.jsonl",
        line(prompt="Q", chosen="A<|eos|>", rejected="B"),
        r"x.jsonl:1: text holds the EOS string",
    ),
    "EOS in a message": (
        "x.jsonl",
        line(prompt=[{"role": "user", "content": "<|eos|>Q"}], chosen="A", rejected="B"),
        r"'<\|eos\|>' in the prompt",
    ),
    "half a surrogate": ("x.jsonl", line(prompt="Q\ud800", chosen="A", rejected="B"), r"x.jsonl:1: broken Unicode"),
    "no dialogue": (
        "x.jsonl",
        line(chosen="A", rejected="B"),
        r"x.jsonl:1: no shared assistant turn.*a column 'prompt'",
    ),
    "sides share nothing": (
        "x.jsonl",
        line(chosen="\n\nHuman: X" + DIALOGUE, rejected=DIALOGUE),
        r"no shared assistant turn",
    ),
    "one side messages": ("x.jsonl", line(chosen=TURNS + reply("A"), rejected="B"), r"x.jsonl:1: wrong type: one of"),
    "no shared messages": (
        "x.jsonl",
        line(chosen=TURNS + reply("A"), rejected=reply("B")),
        r"x.jsonl:1: no shared prompt",
    ),
    "message without content": (
        "x.jsonl",
        line(prompt=[{"role": "user"}], completion="A"),
        r"missing field: 'content'",
    ),
    "message not an object": ("x.jsonl", line(prompt=["hello"], completion="A"), r"message 1 of 'prompt' is str"),
    "no messages": ("x.jsonl", line(prompt=[], completion="A"), r"x.jsonl:1: empty conversation: 'prompt'"),
    "unknown role": ("x.jsonl", line(prompt=[{"role": "tool", "content": "Q"}], completion="A"), r"wrong role: 'tool'"),
    "response of the user": ("x.jsonl", line(prompt=TURNS, completion=TURNS), r"wrong role: a response must begin"),
    "scores missing": ("x.jsonl", line(prompt="Q", responses=["A", "B"]), r"x.jsonl:1: missing field: 'scores'"),
    "fewer scores": ("x.jsonl", line(prompt="Q", responses=["A", "B"], scores=[1]), r"2 responses, 1 scores"),
    "score not a number": ("x.jsonl", line(prompt="Q", responses=["A", "B"], scores=[1, "2"]), r"'scores\[1\]' is str"),
    "score true": ("x.jsonl", line(prompt="Q", responses=["A", "B"], scores=[1, True]), r"'scores\[1\]' is bool"),
    "score NaN": (
        "x.jsonl",
        line(prompt="Q", responses=["A", "B"], scores=[1, math.nan]),
        r"number not finite: 'scores\[1\]'",
    ),
    "null response": (
        "x.jsonl",
        line(prompt="Q", responses=["A", None], scores=[1, 2]),
        r"null field: 'responses\[1\]'",
    ),
    "ties only": (
        "x.jsonl",
        line(prompt="Q", responses=["A", "B"], scores=[1, 1]),
        r"no example left:\n(.*\n)*.*equal scores +1",
    ),
    "other file type": ("x.txt", b"prompt,chosen\n", r"x.txt: not a data file; accepted are .jsonl"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(settings: DataSettings, tokenizer: Any, tmp_path: Path, case: str) -> None:
    name, content, message = BAD_INPUT[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_file(settings, tmp_path / name, tokenizer)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (("hhh",), {}, r"unknown data set 'hhh'. Did you mean 'hh'\? Known are hh, shp, se, tldr, ultrafeedback"),
        (("/nowhere/x.jsonl",), {}, r"/nowhere/x.jsonl: no such file or folder"),
        (("data/x.jsonl",), {}, r"data/x.jsonl: no such file or folder"),
        (("hh",), {"sources": {"hh": "/nowhere"}}, r"/nowhere: no such file or folder"),
        (("hh", "hh"), {}, r"datasets names 'hh' twice"),
        (
            ("hh",),
            {"max_prompt_length": 4096},
            r"max_prompt_length=4096 must hold a token and be less than max_length=4096",
        ),
        (("sentiment",), {"chat_format": "template"}, r"chat_format=template, but the tokenizer has no chat template"),
    ],
)
def test_bad_settings(settings: DataSettings, tokenizer: Any, names: tuple, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_data(replace(settings, names=names, **changes), tokenizer, "train")


def test_folders_without_usable_files(settings: DataSettings, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"holds no data file"):
        load_file(settings, tmp_path / "none", tokenizer)
    write_rows(tmp_path / "only/test.jsonl", [])
    with pytest.raises(UserError, match=r"has files named test\*, but none named train"):
        load_file(settings, tmp_path / "only", tokenizer)


def test_bad_rows_are_dropped_and_counted_on_request(settings: DataSettings, tokenizer: Any, tmp_path: Path) -> None:
    bad = [content for name, content, _ in BAD_INPUT.values() if name == "x.jsonl" and b"\n" in content[1:]]
    (tmp_path / "x.jsonl").write_bytes(GOOD + b"".join(bad))
    data = load_file(settings, tmp_path / "x.jsonl", tokenizer, drop_bad_rows=True)
    check_funnel(data)
    funnel = data.funnel[data.names[0]]
    assert funnel["rows dropped: invalid JSON"] == 2 and funnel["rows dropped: missing field"] == 3


def test_known_quirks_do_not_stop_but_others_do(settings: DataSettings, tokenizer: Any, tmp_path: Path) -> None:
    good = {"chosen": DIALOGUE, "rejected": DIALOGUE + "!"}
    path = write_rows(tmp_path / "x.jsonl", [good, {"chosen": DIALOGUE, "rejected": None}])
    with pytest.raises(UserError, match=r"x.jsonl:2: null field: 'rejected'"):
        load_data(built_in(settings, "hh", path), tokenizer, "train")


def test_an_error_in_a_worker_is_the_users_message(settings: DataSettings, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(GOOD * 3000 + b"{\n")
    with pytest.raises(UserError, match=r"x.jsonl:3001: invalid JSON"):
        load_file(settings, tmp_path / "x.jsonl", tokenizer, num_proc=2)
    assert not any(path.name.startswith("rows-") for path in Path(settings.cache_dir).iterdir())


def test_tokenizer_without_eos(settings: DataSettings, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"no EOS token"):
        load_data(replace(settings, names=("sentiment",)), tokenizer, "train")


# Truncation


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    n_bos = draw(st.integers(0, 1))
    max_length = draw(st.integers(n_bos + 2, 60))
    size = st.integers(1, 80)
    return {
        "prompt": list(range(n_bos + draw(size))),
        "responses": [list(range(1000, 1000 + n)) for n in draw(st.lists(size, min_size=1, max_size=4))],
        "n_bos": n_bos,
        "max_length": max_length,
        "max_prompt_length": draw(st.integers(n_bos + 1, max_length - 1)),
        "keep_end": draw(st.booleans()),
    }


@given(trees())
def test_truncation_never_cuts_more_than_it_must(tree: dict[str, Any]) -> None:
    prompt, responses = truncate(**tree)
    whole, limit, n_bos = tree["prompt"], tree["max_length"], tree["n_bos"]
    fits = len(whole) + max(map(len, tree["responses"])) <= limit
    assert len(prompt) == (len(whole) if fits else min(len(whole), tree["max_prompt_length"]))
    assert prompt[:n_bos] == whole[:n_bos]  # BOS survives
    body, whole_body = prompt[n_bos:], whole[n_bos:]
    assert body == (whole_body[len(whole_body) - len(body) :] if tree["keep_end"] else whole_body[: len(body)])
    for cut, response in zip(responses, tree["responses"], strict=True):
        assert cut == response[: min(len(response), limit - len(prompt))] and cut


def test_truncation_is_the_originals_for_a_pair_with_a_long_prompt() -> None:
    prompt, responses = truncate(list(range(50)), [[1] * 40, [2] * 5], 0, 64, 32, keep_end=True)
    assert prompt == list(range(18, 50)) and [len(r) for r in responses] == [32, 5]
    prompt, responses = truncate(list(range(10)), [[1] * 80], 0, 64, 32, keep_end=True)
    assert len(prompt) == 10 and len(responses[0]) == 54  # the original would leave 32


def test_what_is_cut_is_counted(settings: DataSettings, tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q" * 20, "chosen": "A" * 30, "rejected": "B"},
        {"prompt": "R", "chosen": "A" * 30 + "x", "rejected": "A" * 30 + "y"},
    ]
    data = load_file(settings, write_rows(tmp_path / "x.jsonl", rows), tokenizer, max_length=20, max_prompt_length=8)
    funnel = data.funnel[data.names[0]]
    assert funnel["prompts truncated"] == 1 and funnel["responses truncated (EOS lost)"] == 1
    assert funnel["pairs dropped: identical after truncation"] == 1 and len(data) == 1
    check_funnel(data)
    assert tokenizer.eos_token_id not in data[0].responses[0] and data[0].responses[1][-1] == tokenizer.eos_token_id


# BOS, EOS and chat templates


def test_bos_once_where_the_tokenizer_has_it(settings: DataSettings, bos_tokenizer: Any, tokenizer: Any) -> None:
    hh = settings_path(settings, "train.jsonl")
    write_rows(
        hh,
        [
            {
                "chosen": "\n\nHuman: " + "long " * 50 + DIALOGUE,
                "rejected": "\n\nHuman: " + "long " * 50 + DIALOGUE + "!",
            }
        ],
    )
    for limits in ({}, {"max_length": 24, "max_prompt_length": 12}):
        data = load_data(built_in(settings, "hh", hh, holdout_fraction=0.0, **limits), bos_tokenizer, "train")
        prompt = data[0].prompt
        assert prompt[0] == bos_tokenizer.bos_token_id and prompt.count(prompt[0]) == 1
        assert bos_tokenizer.decode(prompt).endswith("\n\nAssistant:")
        assert all(bos_tokenizer.bos_token_id not in response for response in data[0].responses)
        assert len(prompt) == 12 or not limits
    plain = load_data(built_in(settings, "hh", hh, holdout_fraction=0.0), tokenizer, "train")
    assert tokenizer.decode(plain[0].prompt).startswith("\n\nHuman: long")


def test_chat_template_is_applied_once(settings: DataSettings, bos_tokenizer: Any, tmp_path: Path) -> None:
    turns = TURNS + reply("4") + [{"role": "user", "content": "Sure?"}]
    row = {"chosen": turns + reply("Yes. "), "rejected": turns + reply("No.")}
    path = write_rows(tmp_path / "x.jsonl", [row])
    bos_tokenizer.chat_template = TEMPLATE
    try:
        data = load_file(settings, path, bos_tokenizer)
        hh = load_file(settings, path, bos_tokenizer, chat_format="hh")
    finally:
        bos_tokenizer.chat_template = None
    ((prompt, responses, _),) = texts(data, bos_tokenizer)
    assert (
        prompt == "<|bos|>[user] What is two plus two?<|eos|>\n[assistant] 4<|eos|>\n[user] Sure?<|eos|>\n[assistant] "
    )
    assert data[0].prompt.count(bos_tokenizer.bos_token_id) == 1
    assert responses == ["Yes. <|eos|>", "No.<|eos|>"]
    assert [r.count(bos_tokenizer.eos_token_id) for r in data[0].responses] == [1, 1]
    ((prompt, responses, _),) = texts(hh, bos_tokenizer)
    expected = "\n\nHuman: What is two plus two?\n\nAssistant: 4\n\nHuman: Sure?\n\nAssistant:"
    assert prompt == "<|bos|>" + expected and responses == [" Yes. <|eos|>", " No.<|eos|>"]


def test_chat_template_that_refuses(settings: DataSettings, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": TURNS, "completion": "A"}])
    with pytest.raises(UserError, match=r"x.jsonl:1: refused by the chat template: roles must alternate"):
        load_file(settings, path, tokenizer, rows="targets")
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(UserError, match=r"x.jsonl:1: unfit chat template"):
        load_file(settings, path, tokenizer, rows="targets")


# The cache


def count_calls(monkeypatch: Any) -> list[str]:
    """Record which of the two stages do any work."""
    calls: list[str] = []
    for stage in (parse.ParseRows, tokenise.TokeniseRecords):
        original = stage.__call__

        def counted(self: Any, chunk: Any, original: Any = original) -> Any:
            calls.append(type(self).__name__)
            return original(self, chunk)

        monkeypatch.setattr(stage, "__call__", counted)
    return calls


def test_cache_holds_what_it_depends_on(settings: DataSettings, tmp_path: Path, monkeypatch: Any) -> None:
    calls = count_calls(monkeypatch)
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": f"Q{i}", "chosen": "A", "rejected": "B"} for i in range(4)])

    def work(tokenizer: Any = None, **changes: Any) -> list[str]:
        calls.clear()
        load_file(settings, path, tokenizer or make_tokenizer(), **changes)
        return list(calls)

    both, tokens = ["ParseRows", "TokeniseRecords"], ["TokeniseRecords"]
    assert work() == both
    assert work() == []  # also with another tokenizer object of the same content
    padded = make_tokenizer()
    padded.pad_token = EOS
    padded(["a", "long text"], padding=True, truncation=True, max_length=4)
    assert work(padded) == []  # state of an earlier call is no part of the tokenizer
    assert work(max_length=100, max_prompt_length=50) == tokens
    assert work(rows="targets") == tokens
    assert work(holdout_fraction=0.5) == tokens
    other = make_tokenizer()
    other.add_tokens(["Q"])
    assert work(other) == tokens
    write_rows(path, [{"prompt": "Q", "chosen": "A", "rejected": "C"}])
    assert work() == both  # same name, other content
    (tmp_path / "moved").mkdir()
    path = path.rename(tmp_path / "moved/x.jsonl")
    assert work() == []  # other name, same content
    monkeypatch.setattr(records, "FORMAT", 0)
    assert work() == both


def test_a_parser_is_known_by_its_code_and_that_of_its_helpers(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))

    def identity(name: str, helper: str) -> list[Any]:
        code = f"def helper(x):\n    {helper}\n\ndef parse(row):\n    return helper(row)\n"
        (tmp_path / f"{name}.py").write_text(code)
        return records.parser_identity(importlib.import_module(name).parse)

    plain = identity("parser_a", "return x")
    assert identity("parser_d", '"""Say more."""\n    return x') == plain
    assert identity("parser_b", "return x  # a comment") == plain != identity("parser_c", "return x + 1")
    assert len(records.parser_identity(REGISTRY["se"].parse)[0]) == 4  # se, human, html_to_text, _HtmlText


COMMENTED = ("preference_datasets.py", "dpo/data/rows.py", "dpo/data/parse.py", "dpo/data/tokenise.py")


@pytest.mark.full
def test_a_comment_in_the_code_neither_stops_a_resume_nor_tokenises_again(overrides: Any, tmp_path: Path) -> None:
    project, cache = tmp_path / "project", tmp_path / "cache"
    for part in ("dpo", "config", "data", *(path.name for path in ROOT.glob("*.py")), "pyproject.toml"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        (project / part).parent.mkdir(exist_ok=True)
        copy(ROOT / part, project / part)
    rows = [{"history": f"Q{i}", "human_ref_A": "A", "human_ref_B": "B", "labels": 1, "score_A": 9, "score_B": 2}
            for i in range(30)]  # fmt: skip
    write_rows(tmp_path / "shp/train.jsonl", rows)
    given = overrides("loss=dpo", "loss.beta=0.1", "datasets=[shp]", f"dataset_sources.shp={tmp_path / 'shp'}")
    given += [f"cache_dir={cache}", "n_eval_examples=2", "sample_during_eval=false"]

    def train(*more: str) -> str:
        command = [sys.executable, str(project / "train.py"), *given, *more]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        return run.stdout

    train("n_examples=8")
    made = {path: path.stat().st_mtime_ns for path in cache.glob("*-*/*")}
    assert any(path.name == "records.arrow" for path in made)
    for name in COMMENTED:
        text = re.sub(r"^( +)return ", r"\1# a new comment\n\1return ", (project / name).read_text(), flags=re.M)
        (project / name).write_text(text)
    printed = train("n_examples=16", "resume=auto")
    assert "resum" in printed and '"counters/examples": 16' in (tmp_path / "run/metrics.jsonl").read_text()
    assert {path: path.stat().st_mtime_ns for path in cache.glob("*-*/*")} == made


def test_processes_give_what_one_gives(settings: DataSettings, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{i % 1500}", "chosen": f"A{i}", "rejected": "B"} for i in range(2000)]
    path = write_rows(tmp_path / "x.jsonl", rows)
    one = load_file(settings, path, tokenizer)
    two = load_file(settings, path, tokenizer, num_proc=2, cache_dir=str(tmp_path / "other"))
    assert one.funnel == two.funnel and all(a == b for a, b in zip(one, two, strict=True))
    assert [tokenizer.decode(one[i].prompt) for i in (0, 1, 1499)] == ["Q0", "Q1", "Q1499"]


def test_interrupted_write_is_not_taken_for_complete(settings: DataSettings, tokenizer: Any, monkeypatch: Any) -> None:
    shp = built_in(settings, "shp", FIXTURES / "shp")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(arrow_cache.os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            load_data(shp, tokenizer, "train")
    cache = Path(settings.cache_dir)
    assert not [path for path in cache.iterdir() if not path.name.startswith(".")]
    stale = cache / ".rows-left-by-a-killed-run"
    stale.mkdir()
    assert len(load_data(shp, tokenizer, "train")) == 2
    assert sorted(path.name.split("-")[0] for path in cache.iterdir()) == [".locks", ".rows", "rows", "tokens"]


def test_cache_that_cannot_be_written_or_read(settings: DataSettings, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*set cache_dir"):
        load_data(built_in(settings, "shp", FIXTURES / "shp", cache_dir=str(tmp_path / "file")), tokenizer, "train")
    shp = built_in(settings, "shp", FIXTURES / "shp")
    load_data(shp, tokenizer, "train")
    (records,) = Path(settings.cache_dir).glob("tokens-*/records.arrow")
    records.write_bytes(records.read_bytes()[:100])
    assert len(load_data(shp, tokenizer, "train")) == 2  # made anew


def test_no_torch_for_the_data() -> None:
    code = "import sys, preference_datasets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


NEW_SET = """
from dpo.data.rows import ParsedRow, get

def reviews(row):
    sides = [" " + get(row, side) for side in ("better", "worse")]
    return ParsedRow(f"Review {get(row, 'product')}:", sides, [(0, 1)])
"""


def test_a_data_set_is_one_function_and_one_entry(
    settings: DataSettings, tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "new_set.py").write_text(NEW_SET)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write_rows(tmp_path / "r.jsonl", [{"product": "tea", "better": "Good.", "worse": "Bad."}])
    import new_set  # type: ignore[import-not-found]

    monkeypatch.setitem(REGISTRY, "reviews", DataSet(new_set.reviews, local=path))
    data = load_data(replace(settings, names=("reviews",), holdout_fraction=0.0), tokenizer, "train")
    assert texts(data, tokenizer) == [("Review tea:", [" Good." + EOS, " Bad." + EOS], [(0, 1)])]
    copy = write_rows(tmp_path / "copy.jsonl", [{"product": "tea", "better": "Better.", "worse": "Bad."}])
    data = load_data(built_in(settings, "reviews", copy, holdout_fraction=0.0), tokenizer, "train")
    assert texts(data, tokenizer)[0][1][0] == " Better." + EOS
    write_rows(path, [{"product": "tea", "better": "Good."}])
    with pytest.raises(UserError, match=r"r.jsonl:1: missing field: 'worse'"):
        load_data(replace(settings, names=("reviews",), holdout_fraction=0.0), tokenizer, "train")


def test_a_new_data_set_trains(overrides: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(REGISTRY, "new", DataSet(generic, local=write_pairs(tmp_path / "new")))
    train_here(overrides("loss=dpo", "loss.beta=0.1", "datasets=[new]", "n_examples=4", "n_eval_examples=4"))
    assert '"new"' in (tmp_path / "run/data_funnel.json").read_text()
    monkeypatch.setitem(REGISTRY, "new", DataSet(generic, hub="nobody/nothing"))
    given = ("loss=sft", "datasets=[new]", f"+dataset_sources.new={tmp_path / 'new'}", f"local_run_dir={tmp_path}/two")
    train_here(overrides(*given, "n_examples=4", "n_eval_examples=4"))
    card = (tmp_path / "two" / "LATEST" / "README.md").read_text()
    assert "- data: `new` (a local copy); seed 0" in card and "nobody/nothing" not in card


NOTEBOOK = """
import sys, time
start = time.monotonic()
import dpo, dpo.data
assert not {"torch", "transformers", "datasets", "pyarrow", "numpy"} & sys.modules.keys()
from transformers import AutoTokenizer
settings = dpo.data.DataSettings(names=(sys.argv[1],), cache_dir="cache", num_proc=1)
data = dpo.data.load(settings, AutoTokenizer.from_pretrained(sys.argv[2]), "train")
assert "preference_datasets" not in sys.modules
print(len(data), len(dpo.data.make_batch(data, [(0, 0), (1, 0)])), type(data[0]).__name__)
"""


@pytest.mark.full
def test_a_notebook_loads_files_without_the_registry(tiny_model_dir: Path, pairs_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", NOTEBOOK, str(pairs_dir), str(tiny_model_dir)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert run.stdout.splitlines()[-1:] == ["24 2 Record"], run.stderr


def test_bad_row_is_short() -> None:
    assert str(BadRow("reason", "detail")) == "reason: detail" and str(BadRow("reason")) == "reason"


# scripts/inspect_data.py


def test_inspect_data_marks_what_the_loss_sees(settings: DataSettings, bos_tokenizer: Any, tmp_path: Path) -> None:
    import inspect_data

    path = write_rows(tmp_path / "x.jsonl", [{"prompt": "Qé", "chosen": " a\x1b[2J", "rejected": " b"}])
    data = load_file(settings, path, bos_tokenizer)
    plain = inspect_data.show_record(data[0], bos_tokenizer, colours=False)
    assert "[<|bos|>]|Q|·|é\n" in plain and "<< b|[<|eos|>]>>" in plain and "0 > 1" in plain
    assert "\x1b" not in plain and "\\x1b" in plain  # a control character of the data does not reach the terminal
    coloured = inspect_data.show_record(data[0], bos_tokenizer, colours=True)
    assert inspect_data.GREEN in coloured and inspect_data.DIM in coloured and "<<" not in coloured


def test_inspect_data_command(tiny_model_dir: Path, tmp_path: Path) -> None:
    if not (ROOT / "config").is_dir():
        pytest.skip("config/ is not there")
    command = [sys.executable, str(ROOT / "scripts/inspect_data.py"), "datasets=[shp]", "n=1", "num_proc=1"]
    command += [f"dataset_sources.shp={FIXTURES / 'shp'}", f"cache_dir={tmp_path}", "model=blank_model"]
    command += [f"model.name_or_path={tiny_model_dir}"]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "rows dropped: score ratio below 2" in run.stdout and "<<" in run.stdout and "\033" not in run.stdout


def test_inspect_data_refuses_a_number_that_is_none(monkeypatch: Any) -> None:
    import inspect_data

    monkeypatch.setattr(sys, "argv", ["inspect_data.py", "datasets=[hh]", "n=x"])
    with pytest.raises(UserError, match=r"n=x must be a whole number"):
        inspect_data.main()


def test_a_killed_worker_is_reported() -> None:
    with pytest.raises(UserError, match=r"a data worker was killed.*num_proc"):
        list(arrow_cache.parallel(os._exit, [1, 1, 1], num_proc=2))
