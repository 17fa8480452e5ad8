"""Numbers of each held-out example: what an evaluation writes, what a report makes of it. Real runs of tiny models."""

import itertools
import json
import math
import random
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import read_jsonl, tiny_overrides, train_here

import compare
import report
from dpo.judging.statistics import exact_interval
from dpo.model.loading import load_tokenizer
from dpo.utils import UserError
from evaluations import (
    Estimate,
    Evaluation,
    Ranked,
    conclude,
    estimate,
    flip_p,
    holm,
    length_bins,
    paired,
    read_evaluations,
)
from results import load_runs, results_of
from score import load_items, opened, rows_of

ACCURACY, MARGIN = "rewards_eval/accuracies", "rewards_eval/margins"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, cache_dir: Path) -> Path:
    """Three runs of DPO on two data sets; some prompts have two pairs. The last run had an interruption."""
    folder, draw = tmp_path_factory.mktemp("sweep"), random.Random(0)
    words = "the film was a dull slow clumsy affair I loved acting though plot made no sense rivers boats".split()
    for name in ("plain", "other"):
        (folder / name).mkdir()
        for split, n in (("train", 24), ("test", 9)):
            rows = []
            for i in range(n):
                texts = [" " + " ".join(draw.choices(words, k=draw.randint(1, 6))) + f" {k}" for k in range(3)]
                scores = [0, 1, 2] if i % 3 == 0 else [0, 1, 1]
                rows.append({"prompt": f"{split} {name} {i}:", "responses": texts, "scores": scores})
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for beta in (0.1, 0.5, 2):
        given = [
            "loss=dpo",
            f"loss.beta={beta}",
            "lr=1e-2",
            "sample_during_eval=false",
            "batch_size=8",
            "n_examples=24",
            "eval_every=8",
        ]
        given += [f"datasets=[{folder / 'plain'},{folder / 'other'}]", "n_eval_examples=42", "max_pairs_per_prompt=10"]
        train_here(tiny_overrides(tiny_model_dir, folder, cache_dir, folder / "runs" / f"beta-{beta}", *given))
    return folder / "runs"


def by_hand(values: list[float], prompts: list[str]) -> float:
    """The standard error of a mean over prompts, as text books write it."""
    mean, n = statistics.fmean(values), len(set(prompts))
    sums = [sum(v - mean for v, p in zip(values, prompts) if p == prompt) for prompt in dict.fromkeys(prompts)]
    return math.sqrt(n / (n - 1) * sum(s * s for s in sums)) / len(values)


def test_what_an_evaluation_writes_is_what_it_measured(sweep: Path) -> None:
    run = sweep / "beta-0.5"
    rows, logged = (
        read_jsonl(run / "eval_examples.jsonl"),
        [r for r in read_jsonl(run / "metrics.jsonl") if "loss/eval" in r],
    )
    assert [row["counters/examples"] for row in rows] == [row["counters/examples"] for row in logged] == [0, 8, 16, 24]
    known = ("counters/examples", "example", "prompt", "data set", "tokens")
    for row, means in zip(rows, logged, strict=True):
        whole = ("counters/eval_examples", "logps_per_token_eval/")  # of all examples together
        assert {*row} - {*known} == {name for name in means if "eval" in name and not name.startswith(whole)}
        for name in {*row} - {*known}:
            assert statistics.fmean(row[name]) == pytest.approx(means[name], rel=1e-5, abs=1e-7)
    last = rows[-1]
    assert len(set(last["example"])) == len(last["example"]) == 42 and {*last["data set"]} == {"plain", "other"}
    assert len(set(last["prompt"])) == 18  # some prompts have two pairs
    # The same by score.py, which reads the checkpoint and goes through the held-out data in their order.
    policy, reference = opened(str(run), None, None, ["device=cpu"])
    tokenizer = load_tokenizer(policy.config)
    items = load_items(policy, tokenizer, "test", True, None)
    scored = [*rows_of(items, policy, reference, policy.config.loss, tokenizer)]
    tokens = [[len(row["responses"][i]["tokens"]) for i in pair] for row in scored for pair in row["pairs"]]
    rewards = compare.rewards_of(scored)
    found = sorted(zip(tokens, (rewards[:, 0] - rewards[:, 1]).tolist(), strict=True))
    for (n, margin), (expected_n, expected) in zip(sorted(zip(last["tokens"], last[MARGIN])), found, strict=True):
        assert n == expected_n and margin == pytest.approx(expected, abs=1e-4)


def test_the_page_says_what_the_files_say(sweep: Path, tmp_path: Path) -> None:
    """Every number of the table, of the differences and of the curves, computed anew in the slowest way."""
    runs = load_runs([sweep])
    report.write_report(runs, tmp_path, 2, "python report.py", baseline=1)
    page = (tmp_path / "report.html").read_text()
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page)[0])
    tables = [
        re.findall("<tr data-run=.*?</tr>", table, re.DOTALL)
        for table in re.findall("<table.*?</table>", page, re.DOTALL)
    ]
    files = [read_jsonl(sweep / run["name"] / "eval_examples.jsonl") for run in data["runs"]]
    assert [run["name"] for run in data["runs"]] == ["beta-0.1", "beta-0.5", "beta-2"]
    for row, lines in zip(tables[0], files, strict=True):
        values = [float(v) for v in re.findall('<td data-v="([^"]*)"', row)]
        assert values[:2] == pytest.approx([statistics.fmean(lines[-1][name]) for name in (ACCURACY, MARGIN)], abs=1e-6)
        low, high = map(float, re.findall(r"\[([\d.-]+), ([\d.-]+)\]", row)[1])
        half = 1.96 * by_hand(lines[-1][MARGIN], lines[-1]["prompt"])
        assert (high - low) / 2 == pytest.approx(half, rel=0.25) and "n=42" in row  # the bootstrap's is about as wide
    base = files[1][-1]
    for row, lines in zip(tables[1], (files[0][-1], files[2][-1]), strict=True):
        place = {key: i for i, key in enumerate(base["example"])}
        mine = [(a, base[ACCURACY][place[key]]) for key, a in zip(lines["example"], lines[ACCURACY])]
        *_, p, gained, lost = (float(v) for v in re.findall('<td data-v="([^"]*)"', row))
        assert (gained, lost) == (sum(a > b for a, b in mine), sum(a < b for a, b in mine)) and 0 < p <= 1
        shown = float(re.findall('<td data-v="([^"]*)"', row)[0])
        assert shown == pytest.approx(statistics.fmean(a - b for a, b in mine), abs=1e-6)
    (curve,) = (chart for chart in data["charts"] if chart["title"] == "Reward margin")
    for line in (line for line in curve["lines"] if line["kind"] == "eval"):
        for x, y, high, row in zip(line["x"], line["y"], line["high"], files[line["run"]], strict=True):
            assert x == row["counters/examples"] and y == pytest.approx(statistics.fmean(row[MARGIN]), abs=1e-5)
            assert high - y == pytest.approx(1.96 * by_hand(row[MARGIN], row["prompt"]), rel=1e-3, abs=1e-6)
    (lengths,) = (chart for chart in data["charts"] if chart["title"] == "Accuracy by length")
    edges = length_bins(read_evaluations(sweep / data["runs"][0]["name"] / "eval_examples.jsonl")[-1])
    for line in lengths["lines"]:
        row = files[line["run"]][-1]
        longer = [a - b for a, b in row["tokens"]]
        assert len(line["x"]) >= 3 and line["x"] == sorted(line["x"])
        groups = [sum(n >= edge for edge in edges) for n in longer]
        for group, x, y in zip(sorted({*groups}), line["x"], line["y"], strict=True):
            hits = [h for h, g in zip(row[ACCURACY], groups) if g == group]
            assert y == pytest.approx(statistics.fmean(hits), abs=1e-5)
            assert x == pytest.approx(statistics.fmean(n for n, g in zip(longer, groups) if g == group), abs=1e-5)
    for row, lines in zip(tables[2], files, strict=True):
        for name, shown in zip(("plain", "other"), re.findall('<td data-v="([^"]*)"', row), strict=True):
            hits = [a for a, s in zip(lines[-1][ACCURACY], lines[-1]["data set"]) if s == name]
            assert float(shown) == pytest.approx(statistics.fmean(hits))


def test_runs_without_numbers_of_each_example(sweep: Path, tmp_path: Path) -> None:
    runs = load_runs([sweep])
    for run in runs[1:]:
        run.by_example = []  # as of a run of an earlier version
    n = round(42 * runs[1].evaluations[-1][ACCURACY])
    assert results_of(runs[1])[ACCURACY].interval == exact_interval(n, 42)
    report.write_report(runs, tmp_path, 0, "x")
    page = (tmp_path / "report.html").read_text()
    assert "No paired difference of accuracy for 2 runs" in page and "is not known" in page
    assert re.search("python scripts/compare.py [^ ]*beta-0.5 [^ ]*beta-0.1</code>", page)


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided p of McNemar's exact test."""
    n, least = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)


@pytest.mark.parametrize("seed", range(4))
def test_the_exact_test(seed: int) -> None:
    """By going through all signs; of one pair a prompt it is McNemar's."""
    draw = random.Random(seed)
    prompts = [draw.randrange(7) for _ in range(12)]
    differences = [draw.choice([-1, 0, 0, 1, 1]) for _ in prompts]
    sums = [sum(d for d, p in zip(differences, prompts) if p == prompt) for prompt in range(7)]
    totals = [sum(sign * s for sign, s in zip(signs, sums)) for signs in itertools.product((-1, 1), repeat=7)]
    expected = statistics.fmean(abs(total) >= abs(sum(sums)) for total in totals)
    assert flip_p(np.array(differences, float), np.array(prompts)) == pytest.approx(expected)
    alone = flip_p(np.array(differences, float), np.arange(12))
    assert alone == pytest.approx(mcnemar(differences.count(1), differences.count(-1)))
    assert flip_p(np.zeros(5), np.arange(5)) == 1
    assert flip_p(np.ones(3000), np.arange(3000)) < 1e-300


def test_holm() -> None:
    assert (
        holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06]) and holm([0.9, 0.8]) == [1, 1] and holm([]) == []
    )


def test_eight_of_eight_is_not_certain() -> None:
    found = estimate(np.ones(8), np.arange(8), share=True)
    assert found.interval == exact_interval(8, 8) and found.interval[0] < 0.7
    assert report.cells([found])[0]["ends"] == ["0.631", "1.000"]  # type: ignore[index]
    both = of([1] * 8), of([1] * 8)
    difference = paired(*both)
    assert difference and difference.difference.interval == pytest.approx(
        (-exact_interval(0, 8)[1], exact_interval(0, 8)[1])
    )
    quick = report.quick_estimate(np.ones(8), np.arange(8), share=True)
    assert quick.interval == found.interval


def of(hits: list[int], prompts: list[str] | None = None, first: int = 0) -> Evaluation:
    """An evaluation of which only the accuracies and the names of examples matter."""
    keys = [f"{first + i:x}" for i in range(len(hits))]
    values = {ACCURACY: np.array(hits, float), MARGIN: np.array(hits, float)}
    return Evaluation(1, keys, np.array(prompts or keys), ["x"] * len(hits), [[1, 1]] * len(hits), values)


def ranked(name: str, evaluation: Evaluation | None, value: float = 0.5) -> Ranked:
    found = Estimate(value, None, 8)
    if evaluation:
        found = estimate(evaluation.values[ACCURACY], evaluation.prompts, share=True)
    return Ranked(name, f"runs/{name}", found, evaluation)


def test_the_conclusion() -> None:
    good, same, bad = of([1] * 36 + [0] * 4), of([1] * 35 + [0] * 5), of([1, 0] * 20)
    said, how = conclude([ranked("a", bad), ranked("b", good), ranked("c", same)])
    assert said.startswith("b ranks the most held-out pairs right: 0.900, 95 % interval") and "(40 pairs)" in said
    assert "The data tell b from a (p = 0.0012)" in said and "The data do not tell b from c (p = 1)" in said
    assert "3 comparisons" in how and "another seed" in how
    said, how = conclude([ranked("a", bad), ranked("b", of([0, 1] * 19 + [1, 1]))])
    assert "b ranks the most" in said and "not told from chance" in said and "not tell b from a" in said
    few, many_more = of([1] * 45 + [0] * 19), of([1] * 60 + [0] * 4 + [1, 0] * 224)  # on the shared 64, b is better
    said, how = conclude([ranked("a", few), ranked("b", many_more)])
    assert said.startswith("a ranks the most") and "Whether a is better than b is not known" in said
    said, how = conclude([ranked("a", bad), ranked("b", good), ranked("old", None)])
    assert "The data tell b from a" in said and "Whether b is better than old is not known" in said
    assert "python scripts/compare.py runs/b runs/old" in how
    assert "not known" in conclude([ranked("a", good), ranked("b", of([1] * 8, first=100))])[0]  # other examples
    many = [ranked(f"run{i}", of([*map(int, f"{2**i:040b}"[-40:])])) for i in range(6)]
    said = conclude(many)[0]
    assert said.startswith("run0 and run1 and") and "do not tell run0 from any of the other 5 runs" in said
    assert conclude([ranked("a", good)])[0].startswith("a ranks held-out pairs right: 0.900")


def test_multiple_comparisons_are_paid_for() -> None:
    """Twenty runs of pure chance: without a correction some pair of them nearly always differs."""
    rng = np.random.default_rng(0)
    runs = [ranked(str(i), of(rng.integers(0, 2, 60).tolist())) for i in range(20)]
    plain = [
        paired(a.evaluation, b.evaluation) for a, b in itertools.combinations(runs, 2) if a.evaluation and b.evaluation
    ]
    assert min(each.p for each in plain if each) < 0.05 and "The data tell" not in conclude(runs)[0]


@pytest.mark.parametrize("change", [
    {"counters/examples": "1"}, {"prompt": ["x"]}, {"example": [1, 2]}, {"tokens": [["a"], [1]]},
    {ACCURACY: ["<b>", 1]}, {ACCURACY: 3}, {"tokens": 3}, {"data set": None},
])  # fmt: skip
def test_files_that_are_none_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    row = {"counters/examples": 1, "prompt": ["a", "b"], "example": ["c", "d"], "data set": ["x", "x"]}
    row |= {"tokens": [[1, 2], [3, 4]], ACCURACY: [1, None]}
    (tmp_path / "good").write_text(json.dumps(row) + "\n" + json.dumps(row)[:20])
    (found,) = read_evaluations(tmp_path / "good")
    assert found.values[ACCURACY][0] == 1 and math.isnan(found.values[ACCURACY][1])
    (tmp_path / "bad").write_text(json.dumps(row | change) + "\n")
    with pytest.raises(UserError, match="bad, line 1 is no evaluation"):
        read_evaluations(tmp_path / "bad")
