"""Rows of other kinds than pairs: labelled completions (KTO) and rankings (listwise)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tokenizer, read_jsonl, train_here
from test_trl import FOLDER, overrides_of, updates_in
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.data.batching import Mismatched, Plan, make_batch
from dpo.data.records import PreferenceData, load
from dpo.data.rows import ParsedRow
from dpo.data.sources import DataSet, DataSettings
from dpo.utils import UserError

LABELLED = [
    {"prompt": "Capital of France?", "completion": " Paris.", "label": True},
    {"prompt": "Capital of France?", "completion": " A silly question.", "label": False},
    {"prompt": "Capital of Spain?", "completion": " Who cares?", "label": False},
    {"prompt": "Capital of Italy?", "completion": " Rome.", "label": True},
]


def read(folder: Path, rows: list[dict[str, Any]], kind: str, **changes: Any) -> PreferenceData:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"pair_columns": ("label",)} if kind == "labelled" else {}
    more: dict[str, Any] = {
        "holdout_fraction": 0.0,
        "num_proc": 1,
        "cache_dir": str(folder / "cache"),
        **columns,
        **changes,
    }
    return load(DataSettings((str(path),), rows=kind, **more), make_tokenizer(), "train")


def texts(ids: list[list[int]]) -> list[str]:
    return make_tokenizer().batch_decode(ids, skip_special_tokens=True)


def test_labelled_completions_are_all_used(tmp_path: Path) -> None:
    data = read(tmp_path, LABELLED, "labelled")
    batch = make_batch(data, [(i, 0) for i in range(4)])
    assert batch.columns == {"label": [1.0, 0.0, 0.0, 1.0]} and batch.rejected is None
    assert texts([r for tree in batch.trees for r in tree.responses]) == [row["completion"] for row in LABELLED]
    assert data.notes == {data.names[0]: {}}
    funnel = data.funnel[data.names[0]]
    assert funnel["completions"] == 4 and "prompts" not in funnel  # of 3 prompts


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        (
            {"prompt": "Q", "chosen": " a", "rejected": " b"},
            "labelled",
            "no completion with a label. This loss needs columns prompt",
        ),
        ({"prompt": "Q", "completion": " a"}, "labelled", "loss=sft from completions without a label"),
        (LABELLED[0] | {"label": "yes"}, "labelled", "wrong type: 'label' is str"),
        (LABELLED[1], "pairs", "which state no preferences: loss=kto learns from them"),
        (LABELLED[0], "ranked", "The rows state no preferences. This loss needs columns prompt, responses, and scores"),
        (
            {"prompt": "Q", "responses": [" a", " b"], "ranking": [1]},
            "ranked",
            "scores do not match responses: 2 responses, 1",
        ),
        ({"prompt": "Q", "responses": [" a", " b"], "ranking": [1, 1]}, "ranked", "prompts dropped: no ranking"),
        (LABELLED[1], "targets", "or take loss=kto"),
    ],
)
def test_rows_of_another_kind_say_which_losses_fit(
    row: dict[str, Any], kind: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, [row], kind)
    assert message in str(error.value)


def test_completions_of_one_label_alone_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read(tmp_path, [row for row in LABELLED if not row["label"]], "labelled")
    assert "all completions have label False; this loss learns from both kinds" in capsys.readouterr().out


def test_rankings_are_by_score_or_place_and_pairs_are_rankings_of_two(tmp_path: Path) -> None:
    responses = [" worst", " best", " middle", " also middle", " best"]
    rows = [
        {"prompt": "A", "responses": responses, "scores": [1, 9.5, 3, 3, 9]},
        {"prompt": "B", "responses": responses, "ranking": [4, 1, 3, 3, 2]},
        {"prompt": "C", "chosen": " yes", "rejected": " no"},
        {"prompt": "A", "responses": [" x", " y"], "scores": [0, 1]},
    ]
    data = read(tmp_path, rows, "ranked")
    assert [texts(data[i].responses) for i in range(3)] == [[" best", " middle", " worst"]] * 2 + [[" yes", " no"]]
    assert [data[i].pairs for i in range(3)] == [[(0, 2)], [(0, 2)], [(0, 1)]] and data.n_examples.tolist() == [1, 1, 1]
    funnel = data.funnel[data.names[0]]
    assert funnel["responses dropped: equal scores"] == 2 and funnel["responses dropped: identical"] == 2
    assert funnel["rankings dropped: another of the same prompt"] == 1 and funnel["rankings"] == 3
    batch = make_batch(data, [(2, 0), (0, 0)])
    assert batch.ranked == [[0, 1], [2, 3, 4]] and batch.chosen == [0, 2] and batch.rejected == [1, 4]


def test_the_cache_of_labelled_rows_is_not_that_of_targets(tmp_path: Path) -> None:
    assert len(read(tmp_path, LABELLED[:2], "labelled", pair_columns=())) == 2
    with pytest.raises(UserError, match="loss=sft would learn it"):
        read(tmp_path, LABELLED[:2], "targets")


def test_one_explicit_pair_is_a_ranking_and_several_may_be_none(tmp_path: Path) -> None:
    def parse(row: dict[str, Any]) -> ParsedRow:
        return ParsedRow(row["prompt"], [" zero", " one", " two"], [tuple(pair) for pair in row["pairs"]])

    for pairs, expected in (([[2, 0]], [" two", " zero"]), ([[2, 0], [2, 1]], None)):
        path = tmp_path / f"{len(pairs)}.jsonl"
        path.write_text(json.dumps({"prompt": "Q", "pairs": pairs}) + "\n")
        more: dict[str, Any] = {"holdout_fraction": 0.0, "num_proc": 1, "cache_dir": str(tmp_path / "cache")}
        settings = DataSettings(("own",), rows="ranked", **more)
        registry = {"own": DataSet(parse, local=path)}
        if expected is None:
            with pytest.raises(UserError, match="no example left"):
                load(settings, make_tokenizer(), "train", registry)
        else:
            assert texts(load(settings, make_tokenizer(), "train", registry)[0].responses) == expected


def test_mismatched_examples_have_the_response_of_another_prompt(tmp_path: Path) -> None:
    data = read(tmp_path, LABELLED, "labelled", max_length=20, max_prompt_length=19)
    view = Mismatched(data, [(0, 0), (1, 0), (2, 0), (3, 0)])
    pairs = [(texts([view[i].prompt])[0], view[i].responses[0]) for i, _ in view.examples]
    assert [prompt for prompt, _ in pairs] == [row["prompt"] for row in LABELLED]
    own = [data[i].responses[0] for i in range(4)]
    for i, partner in enumerate((3, 3, 1, 2)):  # the first look back to the last; 1 has the prompt of 0
        assert pairs[i][1] == own[partner][: 20 - len(view[i].prompt)]
    assert Mismatched(data, [(0, 0), (1, 0)]).examples == []  # one prompt
    batches = [[(2, 0), (0, 0), (1, 0)], [(1, 0), (0, 0)], [(3, 0), (2, 0)]]
    both = Mismatched(data, *batches)  # each batch looks back to its own last
    assert both.partners.tolist() == [[2, 1], [0, 2], [1, 2], [3, 2], [2, 3]]
    assert both.examples == [(i, 0) for i in range(5)]
    assert np.concatenate([Mismatched(data, batch).partners for batch in batches]).tolist() == both.partners.tolist()


def test_kto_measures_its_baseline_on_the_whole_batch(tmp_path: Path) -> None:
    """Against a loop over the rows, with a reference that differs, so that z0 is not 0; for three cuts."""
    policy, tokenizer = (
        AutoModelForCausalLM.from_pretrained(FOLDER / "model"),
        AutoTokenizer.from_pretrained(FOLDER / "model"),
    )
    reference = AutoModelForCausalLM.from_pretrained(FOLDER / "model")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    reference.save_pretrained(tmp_path / "reference")
    tokenizer.save_pretrained(tmp_path / "reference")
    pairs = read_jsonl(FOLDER / "rows.jsonl")
    rows = [{"prompt": p["prompt"], "completion": p["chosen"], "label": bool(i % 2)} for i, p in enumerate(pairs)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["loss=kto", "loss.beta=0.1", "loss.undesirable_weight=0.5", f"reference.archive={tmp_path / 'reference'}"]
    common += [f"datasets=[{tmp_path / 'rows.jsonl'}]", "n_epochs=1", "lr=1e-3"]
    found = []
    for cut in (1, 2, 8):
        folder = tmp_path / str(cut)
        train_here([*overrides_of(folder), *common, f"gradient_accumulation_steps={cut}"])
        found.append(updates_in(folder)[0])

    def ratio(prompt: str, completion: str) -> float:
        start = tokenizer(prompt)["input_ids"]
        ids = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        total = 0.0
        for model, sign in ((policy, 1), (reference, -1)):
            with torch.no_grad():
                logps = model.double()(torch.tensor([start + ids])).logits[0].log_softmax(-1)
            total += sign * sum(float(logps[len(start) + i - 1, token]) for i, token in enumerate(ids))
        return total

    data = load_rows(tmp_path)
    (order,) = Plan(0, 8, 1, None).batches(data)
    ordered = [rows[record] for record, _ in order]
    z0 = sum(ratio(row["prompt"], ordered[i - 1]["completion"]) for i, row in enumerate(ordered)) / 8
    z0 = max(z0, 0.0)
    losses = []
    for row in rows:
        h = 0.1 * (ratio(row["prompt"], row["completion"]) - z0)
        value = torch.sigmoid(torch.tensor(h if row["label"] else -h)).item()
        losses.append((1.0 if row["label"] else 0.5) * (1 - value))
    for update in found:
        assert update["loss/train"] == pytest.approx(sum(losses) / 8, rel=1e-5)
        assert update["grad_norm"] == pytest.approx(found[0]["grad_norm"], rel=1e-5)
    assert z0 > 0


def load_rows(folder: Path) -> PreferenceData:
    lengths = {"max_length": 256, "max_prompt_length": 128, "holdout_fraction": 0.0}
    more: dict[str, Any] = {"pair_columns": ("label",), "num_proc": 1, "cache_dir": str(folder / "cache"), **lengths}
    settings = DataSettings((str(folder / "rows.jsonl"),), rows="labelled", **more)
    return load(settings, AutoTokenizer.from_pretrained(FOLDER / "model"), "train")
