"""The report on runs, on small folders of them."""

import base64
import csv
import hashlib
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import report
from dpo.utils import UserError
from results import differences
from utils import loss_values

PROMPTS = ["The film was", "I found the plot", "Its music"]
TEXTS = [" a great joy.", " terrible and dull.", " fine, I loved it!", ""]
HOSTILE = "<script>alert(1)</script> \u202eevil\x07 \ud800"
CONFIG: dict[str, Any] = {"seed": 0, "exp_name": "x", "datasets": ["sentiment"], "lr": 5e-7, "batch_size": 32}
CONFIG |= {"local_run_dir": "/somewhere/x", "wandb": {"enabled": False}, "model": {"name_or_path": "/models/org/tiny"}}


def evaluation(n: int, kl: float) -> dict[str, Any]:
    values = {"loss/eval": 0.7 - n / 1000, "rewards_eval/accuracies": 0.5 + n / 1000, "rewards_eval/margins": n / 100}
    return {"counters/examples": n, **values, "kl_eval/rao_blackwell": kl, "kl_eval/rao_blackwell_error": 0.25}


def make_run(folder: Path, beta: float = 0.1, examples: int = 200, total: int = 200, **config: Any) -> Path:
    """A run of DPO with an evaluation after 100 and 200 examples, if it got there, and two samples of each prompt."""
    metrics, samples = [], []
    for n in range(10, examples + 1, 10):
        metrics.append({"counters/examples": n, "loss/train": 0.7 - n / 1000, "rewards_train/margins": n / 100})
        if n % 100 == 0:
            metrics.append(evaluation(n, n / 50 * beta))
            texts = [TEXTS[(n // 100 + i) % 4] for i in range(6)]
            rows = [{"prompt": PROMPTS[i // 2], "policy": text, "reference": TEXTS[1]} for i, text in enumerate(texts)]
            samples += [{"counters/examples": n, **row} for row in rows]
    (folder / "LATEST").mkdir(parents=True)
    loss = {"name": "dpo", "beta": beta}
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "exp_name": folder.name, "loss": loss, **config}))
    write(folder / "metrics.jsonl", metrics)
    write(folder / "samples.jsonl", samples)
    state = {"examples": examples, "total_examples": total}
    (folder / "LATEST" / "trainer_state.json").write_text(json.dumps(state))
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make(monkeypatch: pytest.MonkeyPatch, *arguments: Path | str) -> tuple[str, list[dict[str, str]]]:
    """Runs the command; returns the page, and the lines of the table."""
    out = Path(arguments[0]).parent / "out"
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments), "--out", str(out)])
    report.main()
    with open(out / "report.csv", newline="") as file:
        return (out / "report.html").read_text(), list(csv.DictReader(file))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    make_run(tmp_path / "sweep" / "beta=0.1")
    make_run(tmp_path / "sweep" / "beta=0.5", beta=0.5, examples=150)
    return tmp_path / "sweep"


def test_the_table(sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    page, rows = make(monkeypatch, sweep)
    assert [row["run"] for row in rows] == ["beta=0.1", "beta=0.5"]
    assert [row["loss.beta"] for row in rows] == ["0.1", "0.5"]
    assert [float(row["loss/eval"]) for row in rows] == pytest.approx([0.5, 0.6])
    assert [row["evaluated_after"] for row in rows] == ["200", "100"]
    assert [row["status"] for row in rows] == ["finished", "unfinished, 150 examples"]
    assert page.count("unfinished, 150 examples") == 1
    assert "[-0.090, 0.890]" in page  # the KL, 0.4, and 1.96 times its standard error
    printed = capsys.readouterr().out
    assert re.search(r"beta=0\.5 +0\.600 +1\.000 +0\.600 +0\.5 +1\.000 \[0\.510, 1\.490\] +", printed)
    monkeypatch.setenv("COLUMNS", "60")
    make(monkeypatch, sweep)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:3])) <= 60
    assert "no room for KL, reward, status, examples: see report.csv" in printed


def test_only_what_differs(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(sweep / "deeper" / "other", seed=1, local_run_dir="/elsewhere", wandb={"enabled": True})
    _, rows = make(monkeypatch, sweep)
    assert differences(report.load_runs([sweep])) == ["loss.beta", "seed"]
    assert {"lr", "exp_name", "local_run_dir", "wandb.enabled"}.isdisjoint(rows[0])
    assert rows[2]["run"] == "deeper/other" and rows[2]["seed"] == "1"


def test_of_different_losses_their_names_and_what_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed: dict[str, dict[str, Any]] = {"dpo": {"beta": 0.1, "dpop_weight": 5}, "hinge": {"beta": 0.1}, "simpo": {}}
    for name, own in (changed | {"kto": {"beta": 0.1}, "mpo": {"beta": 0.1}, "../x": {}, "sft": {}}).items():
        make_run(tmp_path / "losses" / name.strip("./"), loss=loss_values(name) | {"name": name} | own)
    assert differences(report.load_runs([tmp_path / "losses"])) == ["loss.beta", "loss.dpop_weight", "loss.name"]
    monkeypatch.setenv("COLUMNS", "40")
    page, rows = make(monkeypatch, tmp_path / "losses")
    assert {row["run"]: row["loss.beta"] for row in rows}["simpo"] == "2.0" and "loss.beta: " not in page
    printed = capsys.readouterr().out
    assert re.search(r"^run +loss\.name +accuracy +margin +loss$", printed, re.M) and "; margins are of" in printed
    assert re.search(r"^simpo +simpo +0\.700 +2\.000 +0\.500$", printed, re.M)


def test_one_run_shows_its_settings(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, _ = make(monkeypatch, sweep / "beta=0.1", sweep / "beta=0.1")
    assert "Settings: model.name_or_path: …/org/tiny; datasets: sentiment; loss.name: dpo; loss.beta: 0.1;" in page
    assert "lr: 5e-07; batch_size: 32; seed: 0" in page and "Report of 1 run<" in page


def taken_apart(page: str) -> tuple[dict[str, Any], str]:
    """Return the page's JSON, and the page without its three script elements: JSON, and the two programs that its
    policy names by their hashes."""
    (kind, data), *programs = re.findall("<script([^>]*)>(.*?)</script>", page, re.DOTALL)
    assert kind == ' type="application/json" id="data"' and [kind for kind, _ in programs] == ["", ""]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for _, text in programs]
    assert page.index("Content-Security-Policy") < page.index("<style")
    allowed = re.search(r"content=\"default-src 'none'; style-src 'unsafe-inline'; script-src ([^;\"]*)\"", page)
    assert allowed and allowed[1] == " ".join(f"'sha256-{digest}'" for digest in digests)
    return json.loads(data), re.sub("<script[^>]*>.*?</script>", "", page, flags=re.DOTALL)


def test_the_page_stands_alone(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, page = taken_apart(make(monkeypatch, sweep)[0])
    assert not re.search("https?://|<script|<link|@import|url\\(|src=|<iframe|<img", page)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    figures = [int(i) for i in re.findall('data-chart="([0-9]+)"', page)]
    assert figures == [*range(len(data["charts"]))] and len(figures) == 5


def test_what_models_write_is_text(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = sweep / "beta=0.1" / "samples.jsonl"
    write(file, [{**row, "policy": HOSTILE, "prompt": f"<b>\u2028{row['prompt']}"} for row in read(file)])
    make_run(sweep / "x<i>\u202e", examples=100, exp_name=HOSTILE, lr="<script>")
    page, rows = make(monkeypatch, sweep, "--samples", "9")
    data, page = taken_apart(page)
    shown = re.sub('<i class="range".*?</i></b></i>|<td data-v="[^"]*"><b>', "", page)
    assert not re.search("<script|<b>(?!<)|<i>|[\u202e\u2028\x07]", shown)
    assert data["runs"][2]["name"] == "x<i>\\u202e"
    assert "&lt;script&gt;alert(1)&lt;/script&gt; \\u202eevil\\x07 \\ud800" in re.sub("</?mark>", "", page)
    assert "&lt;b&gt;\\u2028The film was" in page and "x&lt;i&gt;\\u202e" in page
    assert rows[2]["run"] == "x<i>\\u202e"


def test_samples_side_by_side(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, _ = make(monkeypatch, sweep, "--samples", "2")
    articles = re.findall("<article>(.*?)</article>", page, re.DOTALL)
    assert [PROMPTS[i] in article for i, article in enumerate(articles)] == [True, True]
    first = re.findall("<h4>(.*?)</h4><p>(.*?)</p>", articles[0])
    marked = f"<mark>{TEXTS[2]}</mark>"
    assert [text for _, text in first] == [TEXTS[1], marked, TEXTS[1]]  # reference, after 200, after 100
    assert "after 200 examples, first of 2 samples</small>" in first[1][0]
    score = SentimentIntensityAnalyzer().polarity_scores(PROMPTS[0] + TEXTS[2])["compound"]
    assert f"reward {score:+.2f}" in first[1][0]
    assert "<em>(empty)</em>" in articles[1]
    assert report.samples_of(report.load_runs([sweep]), 0) == []


def test_the_frontier(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sweep / "beta=0.1"
    run = report.load_runs([folder])[0]
    score = SentimentIntensityAnalyzer().polarity_scores
    for point, n in zip(report.frontier(run), (100, 200), strict=True):
        rows = [row for row in read(folder / "samples.jsonl") if row["counters/examples"] == n]
        means = []
        for prompt in PROMPTS:
            scores = [score(prompt + row["policy"])["compound"] for row in rows if row["prompt"] == prompt]
            means.append(sum(scores) / len(scores))
        width = 1.96 * statistics.stdev(means) / math.sqrt(3)
        assert point[:3] == (n, n / 50 * 0.1, 0.25)
        assert point.reward.value == pytest.approx(statistics.mean(means))
        assert point.reward.half_width == pytest.approx(width) and point.reward.prompts == 3
    references = [score(prompt + TEXTS[1])["compound"] for prompt in PROMPTS]
    assert [r.value for r in report.reference_rewards([run])] == [pytest.approx(statistics.mean(references))]
    page, rows = make(monkeypatch, sweep)
    assert "mean over 3 held-out prompts" in page
    assert float(rows[0]["true_reward"]) == pytest.approx(point.reward.value)


def test_no_reward_for_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, rows = make(monkeypatch, make_run(tmp_path / "run", datasets=["hh"]))
    assert "true_reward" not in rows[0] and "Reward against KL" not in page and ", reward " not in page


def test_the_plain_estimate_where_there_is_no_other(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", examples=100)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace("rao_blackwell", "plain"))
    assert [point[:3] for point in report.frontier(report.load_runs([folder])[0])] == [(100, 0.2, 0.25)]


def test_nan_is_shown(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = sweep / "beta=0.1" / "metrics.jsonl"
    rows = read(file)
    write(file, [*rows[:-1], rows[-1] | {"kl_eval/rao_blackwell": math.nan, "rewards_eval/margins": math.inf}])
    page, table = make(monkeypatch, sweep)
    assert table[0]["kl_eval/rao_blackwell"] == "nan" and "<b>nan</b>" in page and "<b>inf</b>" in page
    assert "Evaluations without a KL or a known reward are left out: of beta=0.1." in page


def test_a_cut_last_line(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = sweep / "beta=0.1" / "metrics.jsonl"
    with open(file, "ab") as end:
        end.write(b'{"counters/examples": 210, "lo\xe2')
    assert make(monkeypatch, sweep)[1][0]["examples"] == "200"
    with open(file, "a") as end:
        end.write("\n" + json.dumps({"counters/examples": 220}) + "\n")
    with pytest.raises(UserError, match=r"beta=0\.1/metrics\.jsonl, line 23 is no JSON object with counters/examples"):
        make(monkeypatch, sweep)


def test_runs_that_are_not_there_yet(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(sweep / "early", examples=50)
    (make_run(sweep / "empty", examples=0) / "metrics.jsonl").unlink()
    page, rows = make(monkeypatch, sweep)
    assert rows[2]["status"] == "unfinished, 50 examples, no evaluation" and rows[2]["loss/eval"] == ""
    assert rows[3]["status"] == "nothing logged" and page.count("nothing logged") == 1
    assert "Evaluations without a KL or a known reward are left out: of early, empty." in page


def test_sft_and_dpo_have_a_loss_panel_each(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(sweep / "sft", loss={"name": "sft"})
    write(folder / "metrics.jsonl", [{"counters/examples": 200, "loss/eval": 80.0}])
    page, rows = make(monkeypatch, sweep)
    assert re.findall("<h3>(Loss.*?)</h3>", page) == ["Loss: dpo", "Loss: sft"]
    assert "1 of these runs is unfinished" in page
    assert rows[2]["loss.beta"] == "–" and rows[2]["rewards_eval/margins"] == ""


@pytest.mark.parametrize("n", [1, 399, 400, 401, 12345])
def test_thinning_keeps_both_ends(n: int) -> None:
    thin = report.thin_out(range(n))
    assert len(thin) == min(n, 400) and (thin[0], thin[-1]) == (0, n - 1) and thin == sorted(set(thin))


def test_an_axis_is_not_ruled_by_a_first_spike() -> None:
    train = {"kind": "train", "x": [*range(100)], "y": [1e6, math.nan, *(1 + i / 100 for i in range(98))]}
    final = {"kind": "eval", "x": [9, 99], "y": [3.0, 2.0], "low": [2.5, None], "high": [3.5, None]}
    low, high = report.limits([train, final]) or (0, 0)
    assert 0.8 < low < 1.1 and 3.5 < high < 3.8  # every evaluation with its interval, and not the spike
    assert report.limits([train | {"y": [math.nan]}]) is None
    assert report.limits([{"kind": "train", "x": [1], "y": [0.0]}]) == [-1, 1]


def test_the_baseline(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "<h2>Differences from beta=0.1</h2>" in make(monkeypatch, sweep)[0]
    page = make(monkeypatch, sweep, "--baseline", "beta=0.5")[0]
    assert "<h2>Differences from beta=0.5</h2>" in page and f"compare.py {sweep}/beta=0.1 {sweep}/beta=0.5" in page
    with pytest.raises(UserError, match=r"--baseline beta names no run; give one of: beta=0\.1, beta=0\.5"):
        make(monkeypatch, sweep, "--baseline", "beta")
    runs = report.load_runs([sweep])
    found = report.reward_difference(runs[0], runs[1])
    means = [[statistics.mean(s) for s in by_prompt(sweep / run.name, PROMPTS)] for run in runs]
    assert found and found.value == pytest.approx(statistics.mean(a - b for a, b in zip(*means)))


def by_prompt(run: Path, prompts: list[str]) -> list[list[float]]:
    """The rewards of the last samples of each prompt."""
    rows = read(run / "samples.jsonl")
    rows = [row for row in rows if row["counters/examples"] == rows[-1]["counters/examples"]]
    score = SentimentIntensityAnalyzer().polarity_scores
    return [[score(p + row["policy"])["compound"] for row in rows if row["prompt"] == p] for p in prompts]


def test_win_rates(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rate = {"rate": 0.75, "interval": [0.35, 0.97], "method": "exact binomial"}
    told = {"settings": {"a": str(sweep / "beta=0.5"), "b": "chosen"}, "results": {"1": {"win_rate": rate}}}
    told["results"]["1"] |= {"pairs": 8, "prompts": 8}
    (sweep.parent / "results.json").write_text(json.dumps(told))
    page, rows = make(monkeypatch, sweep, "--win-rates", sweep.parent / "results.json")
    assert [row["win_rate"] for row in rows] == ["", "0.75"] and rows[1]["win_rate_n"] == "8"
    assert "[0.350, 0.970]" in page and "win rate" in page
    other = told | {"settings": {"a": str(sweep / "beta=0.1"), "b": "another"}}
    (sweep.parent / "other.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"other\.json differs from .*results\.json in b: win rates cannot be compared"):
        make(monkeypatch, sweep, "--win-rates", sweep.parent / "results.json", sweep.parent / "other.json")
    several = told | {"results": told["results"] | {"0": told["results"]["1"]}}
    (sweep.parent / "other.json").write_text(json.dumps(several))
    with pytest.raises(UserError, match="several temperatures"):
        make(monkeypatch, sweep, "--win-rates", sweep.parent / "other.json")
    (sweep.parent / "results.json").write_text(json.dumps(told | {"settings": {"a": "elsewhere"}}))
    with pytest.raises(UserError, match=r"--win-rates .*results\.json is no results\.json of scripts/judge\.py"):
        make(monkeypatch, sweep, "--win-rates", sweep.parent / "results.json")


def test_watching(sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It writes what is new, waits for a file that cannot be read, and nothing if nothing happened."""
    file = sweep / "beta=0.5" / "metrics.jsonl"
    whole, waits, out = file.read_text(), [], sweep.parent / "out" / "report.html"

    def sleep(seconds: float) -> None:
        waits.append((seconds, out.stat().st_mtime_ns))
        if len(waits) == 2:
            file.write_text(whole + "broken\n")
        if len(waits) == 3:
            file.write_text(whole + json.dumps(evaluation(200, 1)) + "\n")
        if len(waits) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        make(monkeypatch, sweep, "--watch", "5")
    (first, second, third, fourth) = [when for _, when in waits]
    assert first == second == third < fourth and {seconds for seconds, _ in waits} == {5}
    printed = capsys.readouterr().out
    assert printed.count("written: ") == 2 and "trying again in 5 s" in printed
    assert '<meta http-equiv="refresh" content="5">' in out.read_text()
    with pytest.raises(UserError, match="--watch 0 must be at least 1 second"):
        make(monkeypatch, sweep, "--watch", "0")


def test_what_differs_between_texts_is_marked() -> None:
    for text, first in [
        ("a good film", "a bad film"),
        ("", "x"),
        ("same", "same"),
        (" a  b ", "b"),
        ("x\n\ny z", "x y"),
    ]:
        parts = report.marked(text, first)
        assert "".join(part for part, _ in parts) == text
    assert report.marked(" a good film", " a bad film") == [(" a", False), (" good", True), (" film", False)]


@pytest.mark.full
def test_in_a_browser(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs run under the page's policy, draw every chart, and nothing that a run wrote is run."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium")
    attack = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    file = sweep / "beta=0.1" / "samples.jsonl"
    write(file, [{**row, "policy": attack, "prompt": attack} for row in read(file)])
    make_run(sweep / "x<img src=x onerror=document.title=1>", loss={"name": attack})
    page, _ = make(monkeypatch, sweep)
    data, _ = taken_apart(page)
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    command += [f"--user-data-dir={sweep.parent / 'browser'}", f"file://{sweep.parent / 'out' / 'report.html'}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "<title>Report of 3 runs</title>" in dom and "<img" not in dom
    assert dom.count("<canvas") == len(data["charts"]) > 5
    assert not re.search('class="controls" hidden', dom)  # the second program ran to its end
    assert re.search(r'<span class="value">0\.7', dom)


def test_misuse(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sweep.parent / "nothing").mkdir()
    (sweep.parent / "file").touch()
    for arguments, message in [
        ([sweep.parent / "missing"], "missing does not exist"),
        ([sweep.parent / "nothing"], "nothing holds no run"),
        ([sweep, "--samples", "-1"], "--samples -1 must be"),
        ([sweep, "--out", sweep.parent / "file"], "--out: cannot create the folder"),
    ]:
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        with pytest.raises(UserError, match=message) as error:
            report.main()
        assert "\n" not in str(error.value)
    monkeypatch.chdir(sweep.parent)
    with pytest.raises(UserError, match="holds no run"):
        monkeypatch.setattr(sys, "argv", ["report.py", "nothing", "--out", "refused"])
        report.main()
    assert not Path("refused").exists()
    assert (report.number(0.0), report.number(0.0002145), report.number(-12.34567)) == ("0.000", "0.0002145", "-12.35")
    (sweep.parent / "out" / "report.html").mkdir(parents=True)
    with pytest.raises(UserError, match=r"report\.html cannot be written"):
        make(monkeypatch, sweep)


def test_a_broken_config(sweep: Path) -> None:
    (sweep / "beta=0.5" / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"beta=0\.5/config\.yaml cannot be read"):
        report.load_runs([sweep])


def test_cells_are_no_formulas() -> None:
    for text in ("=1+1", "+cmd", "-x", "@SUM(A1)", " =1", "\t=1", "-1, 2", "--1", "=\x1b"):
        assert report.csv_cell(text).startswith("'"), text
    for value in ("-0.5", "+1e-5", "1e-7", "text", "a=b", "–", "", -0.5, None, 3):
        assert report.csv_cell(value) == value
    assert "\x1b" not in report.csv_cell("a\x1b")


@pytest.mark.parametrize(
    "line",
    [
        '{"counters/examples": 1, "loss/eval": "<b>"}',
        '{"counters/examples": -1, "loss/eval": 1}',
        '{"counters/examples": true}',
        '{"counters/examples": 1, "loss/eval": null}',
        '{"counters/examples": 1, "loss/eval": [1]}',
        '{"counters/examples": 1, "loss/eval": 1' + "0" * 400 + "}",
        '{"counters/examples": ' + "9" * 30 + "}",
        "[" * 100_000,
    ],
)
def test_metrics_that_are_none_are_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1"):
        report.load_runs([tmp_path])


def test_names_of_others_do_nothing_in_a_report(tmp_path: Path) -> None:
    evil = "=cmd|' /C calc'!A0<script>\x1b[2J"
    for name in (evil.replace("/", ""), "other"):
        (folder := tmp_path / name).mkdir()
        (folder / "config.yaml").write_text(
            json.dumps({"loss": {"name": [evil]}, "seed": evil if name != "other" else 1})
        )
        (folder / "metrics.jsonl").write_text(
            json.dumps({"counters/examples": 1, f"{evil}eval": 1, "loss/eval": 2}) + "\n"
        )
        (folder / "samples.jsonl").write_text(
            json.dumps({"counters/examples": 1, "prompt": evil, "policy": evil, "reference": evil}) + "\n"
        )
    report.write_report(report.load_runs([tmp_path]), tmp_path, 8, "python report.py")
    rows = list(csv.reader((tmp_path / "report.csv").open(encoding="utf-8", newline="")))
    assert len(rows) == 3 and not any(cell.startswith(tuple("=+-@")) for row in rows for cell in row)
    data, page = taken_apart((tmp_path / "report.html").read_text())
    assert "<script" not in page and "\x1b" not in page and "&lt;script&gt;" in page
    assert "\x1b" not in json.dumps(data, ensure_ascii=False)
