"""scripts/score.py: rewards against a slow computation in float64, what they do not depend on, and misuse."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model, make_tokenizer, read_jsonl, tiny_overrides, train_here, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

import score
from dpo.data.tokenise import own_bos
from dpo.judging.statistics import interval
from dpo.utils import UserError
from opening import find_saved

Score = Callable[..., list[dict]]


@pytest.fixture
def scored(run_dir: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Score:
    """Call the script on the run, in this process; returns its rows."""

    def call(*arguments: object, run: Path = run_dir) -> list[dict]:
        out = tmp_path / "out" / "scores.jsonl"
        given = [run, f"cache_dir={cache_dir}", "device=cpu", "num_proc=1", "--out", out, *arguments]
        monkeypatch.setattr(sys, "argv", ["score.py", *map(str, given)])
        score.main()
        assert [path.name for path in out.parent.iterdir()] == ["scores.jsonl"]
        return read_jsonl(out)

    return call


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


RANKED = [
    {
        "prompt": "Rivers are",
        "responses": [" wide", " 17 green birds; boats", " a poem \u00e9\U0001f600"],
        "scores": [1, 2, 2],
    },
    {"prompt": "It", "responses": [" is Mount Everest, of course.", " is"], "scores": [0.5, 0.25]},
    {"prompt": "Tell me about the film, please", "responses": [" No\n", " It was dull"], "scores": [1, 0]},
]


@torch.no_grad()
def slow(folder: Path, prompt: str, response: dict) -> torch.Tensor:
    """log p of each token of a response and EOS, float64."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()
    before = own_bos(tokenizer) + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    parts = response.get("parts") or [response["text"]]
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    after = [*(i for part in ids for i in part), tokenizer.eos_token_id]
    logps = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    return logps[torch.arange(len(after)), torch.tensor(after)]


def off(rows: list[dict], run_dir: Path, reference: Path, beta: float, average: bool = False) -> float:
    """By how much the rewards, of responses and of tokens, are off at most."""
    worst = 0.0
    for row in rows:
        for response in row["responses"]:
            ours, theirs = (slow(folder, row["prompt"], response) for folder in (run_dir / "LATEST", reference))
            tokens = beta * (ours - theirs) / (len(ours) if average else 1)
            assert len(response["tokens"]) == len(response["token_rewards"]) == len(tokens)
            found = [*response["token_rewards"], *(response[k] for k in ("reward", "logp_policy", "logp_reference"))]
            expected = [*tokens.tolist(), *(float(values.sum()) for values in (tokens, ours, theirs))]
            worst = max(worst, float(np.abs(np.array(found) - expected).max()))
            assert sum(response["token_rewards"]) == pytest.approx(response["reward"], abs=1e-9)
    return worst


def test_rewards_are_those_of_a_slow_computation(
    scored: Score, run_dir: Path, tiny_model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    rows = scored("--data", write_rows(tmp_path / "ranked.jsonl", RANKED))
    assert off(rows, run_dir, tiny_model_dir, 0.3) < 1e-4
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in RANKED]
    assert [row["record"] for row in rows] == [0, 1, 2]
    texts = [{(a, b) for a, b in ((row["responses"][a]["text"], row["responses"][b]["text"]) for a, b in row["pairs"])}
             for row in rows]  # fmt: skip
    wide, birds, poem = RANKED[0]["responses"]
    assert texts[0] == {(birds, wide), (poem, wide)} and [len(found) for found in texts] == [2, 1, 1]
    assert max(abs(r["reward"]) for row in rows for r in row["responses"]) > 0.1
    tokens = next(r["tokens"] for r in rows[0]["responses"] if r["text"] == poem)
    assert "".join(tokens).replace("·", "") == f"{poem}<|eos|>"
    output = capfd.readouterr().out
    assert "beta=0.3" in output and "all rows: 3 records, pairs dropped: equal scores: 1" in output
    margins = [row["responses"][a]["reward"] - row["responses"][b]["reward"] for row in rows for a, b in row["pairs"]]
    line = next(line for line in output.splitlines() if line.startswith("all ")).split()
    assert line[:4] == ["all", "4", "3", f"{np.mean(np.array(margins) > 0):.3f}"]
    assert float(line[-1]) == pytest.approx(np.mean(margins), abs=1e-4)


@pytest.mark.parametrize(
    ("given", "beta", "average", "said"),
    [
        (["loss=dpo", "loss.beta=0.2"], 0.2, False, "beta=0.2"),
        (
            ["loss=ipo", "loss.beta=0.5", "loss.average_log_prob=true"],
            0.5,
            True,
            "ipo(beta=0.5, average_log_prob=True)",
        ),
        (["loss=sft"], 1.0, False, "log policy / reference (loss=sft has none)"),
        (["loss=unlikelihood"], 1.0, False, "log policy / reference (loss=unlikelihood has none)"),
        (["layout=padded", "microbatch_tokens=20"], 0.3, False, "beta=0.3"),
    ],
)
def test_beta_and_average(
    given: list[str], beta: float, average: bool, said: str, scored: Score, run_dir: Path, tiny_model_dir: Path,
    tmp_path: Path, capfd: pytest.CaptureFixture,
) -> None:  # fmt: skip
    rows = scored("--data", write_rows(tmp_path / "ranked.jsonl", RANKED[:2]), *given)
    assert len(rows) == 2 and len(rows[0]["responses"]) == 3
    output = capfd.readouterr().out
    assert said in output
    assert off(rows, run_dir, tiny_model_dir, beta, average) < 1e-4


def test_a_score_does_not_depend_on_other_rows(scored: Score, pairs_dir: Path, tmp_path: Path) -> None:
    lines = (pairs_dir / "train.jsonl").read_text().splitlines()

    def of(some: list[str], *more: str) -> dict[str, list]:
        (tmp_path / "some.jsonl").write_text("\n".join(some) + "\n")
        rows = scored("--data", tmp_path / "some.jsonl", "--overwrite", *more)
        return {
            row["prompt"]: [x for r in row["responses"] for x in (r["reward"], *r["token_rewards"])] for row in rows
        }

    every = of(lines)
    assert len(every) == 24
    for other in (of(lines[7:8]), of(lines[::-1]), of(lines[::3], "microbatch_tokens=64")):
        for prompt, values in other.items():
            assert values == pytest.approx(every[prompt], abs=1e-5)
    assert list(of(lines[::-1])) == list(every)[::-1]


def test_single_responses(scored: Score, run_dir: Path, tiny_model_dir: Path, tmp_path: Path, capfd) -> None:
    rows = [{"prompt": "It is", "completion": f" green{' birds' * i}"} for i in range(4)]
    found = scored("--data", write_rows(tmp_path / "single.jsonl", rows), "--limit", "3")
    assert [(row["prompt"], row["responses"][0]["text"]) for row in found] == [
        (row["prompt"], row["completion"]) for row in rows[:3]
    ]
    assert off(found, run_dir, tiny_model_dir, 0.3) < 1e-4
    assert "no pairs: no accuracy" in capfd.readouterr().out


def test_the_runs_own_data_and_its_accuracy(scored: Score, run_dir: Path, capfd: pytest.CaptureFixture) -> None:
    """By default the test split, as in training, with the metrics of training."""
    rows = scored()
    metrics = next(event for event in reversed(read_jsonl(run_dir / "metrics.jsonl")) if "loss/eval" in event)
    margins = [row["responses"][a]["reward"] - row["responses"][b]["reward"] for row in rows for a, b in row["pairs"]]
    assert len(margins) == 8
    assert np.mean(margins) == pytest.approx(metrics["rewards_eval/margins"], abs=1e-5)
    assert np.mean(np.array(margins) > 0) == metrics["rewards_eval/accuracies"]
    assert "test split: 8 records" in capfd.readouterr().out
    assert len(scored("--split", "train", "--overwrite")) == 24


def copy_with_state(run_dir: Path, target: Path, **changes: object) -> Path:
    """A copy of a run whose trainer_state.json has other entries."""
    shutil.copytree(run_dir, target, symlinks=True)
    file = target / os.readlink(target / "LATEST") / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    (file.parent / "manifest.json").unlink()
    return target


def test_the_runs_own_data_is_that_of_the_run(
    scored: Score, tiny_model_dir: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the file of the same relative name in another folder, and not that file once it has changed."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        write_pairs(folder / "pairs", 8, 4)
    (there / "pairs" / "test.jsonl").write_text((there / "pairs" / "test.jsonl").read_text().replace(" No", " Never"))
    monkeypatch.chdir(here)
    given = ["datasets=[pairs]", "loss=dpo", "loss.beta=0.1", "sample_during_eval=false", "n_eval_examples=4"]
    train_here(tiny_overrides(tiny_model_dir, Path("pairs"), cache_dir, tmp_path / "run", *given))
    before = scored(run=tmp_path / "run")
    monkeypatch.chdir(there)
    assert scored("--overwrite", run=tmp_path / "run") == before and before[0]["dataset"] == "pairs"
    other = scored("--overwrite", "--data", "pairs", run=tmp_path / "run")
    assert [row["prompt"] for row in other] == [row["prompt"] for row in before] and other != before
    shutil.copy(there / "pairs" / "test.jsonl", here / "pairs" / "test.jsonl")
    with pytest.raises(UserError, match=r"here/pairs has changed since the run read it; .*--data"):
        scored("--overwrite", run=tmp_path / "run")
    assert len(scored("--overwrite", "--split", "train", run=tmp_path / "run")) == 8
    shutil.rmtree(here / "pairs")
    with pytest.raises(UserError, match="here/pairs: no such file or folder"):
        scored("--overwrite", run=tmp_path / "run")


@pytest.mark.parametrize(
    ("trained", "said"),
    [
        (
            ["template:0123abcd"],
            "these rows are plain text, and the model was trained on a chat template (0123abcd)",
        ),
        (["hh"], "these rows are plain text, and the model was trained on the style of HH"),
        (["template:0123abcd", "text"], ""),
        (["text"], ""),
        (None, ""),
    ],
)
def test_another_format_than_the_policys_is_said(
    trained: list[str] | None, said: str, scored: Score, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    run = copy_with_state(run_dir, tmp_path / "run", formats=trained)
    scored("--data", write_rows(tmp_path / "ranked.jsonl", RANKED[:1]), run=run)
    output = capfd.readouterr().out
    assert said in output and ("warning" in output) == bool(said)


def test_a_users_turn_in_a_response_does_not_count(
    scored: Score, run_dir: Path, tiny_model_dir: Path, tmp_path
) -> None:
    said = [" It is.", "\n\nHuman: Why?\n\nAssistant:", " Rivers are wide."]
    rows = [{"prompt": "\n\nHuman: Is it?\n\nAssistant:", "chosen": "".join(said), "rejected": " No."}]
    for given, average in (([], False), (["loss=ipo", "loss.beta=0.3", "loss.average_log_prob=true"], True)):
        [row] = scored("--overwrite", "--data", write_rows(tmp_path / "turns.jsonl", rows), *given)
        [response] = [r for r in row["responses"] if r["text"] == "".join(said)]
        ours, theirs = (slow(f, row["prompt"], {"parts": said}) for f in (run_dir / "LATEST", tiny_model_dir))
        n = [len(make_tokenizer()(part)["input_ids"]) for part in said]
        counted = torch.tensor([True] * n[0] + [False] * n[1] + [True] * (n[2] + 1))
        expected = torch.where(counted, 0.3 * (ours - theirs) / (counted.sum() if average else 1), 0)
        assert response["token_rewards"] == pytest.approx(expected.tolist(), abs=1e-4)
        assert response["reward"] == pytest.approx(float(expected.sum()), abs=1e-4)
        assert response["logp_policy"] == pytest.approx(float(ours[counted].sum()), abs=1e-3)


def test_the_policy_against_itself_is_right_half_of_the_time(scored: Score, run_dir: Path, capfd) -> None:
    rows = scored("--reference", run_dir, "--show", "0")
    assert all(response["reward"] == 0 for row in rows for response in row["responses"])
    assert re.search(r"^all +8 +8 +0\.500  \[0\.500, 0\.500\] +\+0\.0000", capfd.readouterr().out, re.M)


def test_intervals_resample_prompts_with_all_their_pairs() -> None:
    rng = np.random.default_rng(1)
    hits, prompts = np.repeat(rng.integers(2, size=300), 10).astype(float), np.repeat(np.arange(300), 10)
    low, high = interval(hits, prompts)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / np.sqrt(300), rel=0.1)  # 300 answers, not 3000
    assert interval(hits[:10], prompts[:10]) is None
    shown = score.table([(0, "a", 1.0, 3), (0, "b", -1.0, 0)])
    assert "unknown: 1 prompt" in shown and "preferred is shorter" not in shown
    assert [line.split()[0] for line in shown.splitlines()[1:4]] == ["all", "a", "b"]


def test_what_is_shown_is_coloured_and_holds_no_control_characters() -> None:
    response = {"reward": 0.2, "tokens": ["good", "\x1b[2J\n"], "token_rewards": [0.31, -0.11]}
    row = {"dataset": "a\x1b", "record": 0, "prompt": "\x07p\u202e", "responses": [response], "pairs": []}
    plain = score.show(row, colours=False)
    assert "good[+0.31]" in plain and "[-0.11]" in plain and all(c.isprintable() or c == "\n" for c in plain)
    coloured = score.show(row, colours=True)
    assert "\033[38;5;16;48;5;46mgood\033[0m" in coloured and ";48;5;88m" in coloured and "\033[2J" not in coloured
    zero = {**row, "responses": [{**response, "token_rewards": [0.0, 0.0]}]}
    assert "good\\x1b[2J" in score.show(zero, colours=True)


def test_a_half_written_file_is_not_left_behind(scored: Score, tmp_path: Path, monkeypatch) -> None:
    data = write_rows(tmp_path / "ranked.jsonl", RANKED)
    rows = scored("--data", data)
    monkeypatch.setattr(score, "pieces", lambda ids, tokenizer: 1 / (len(ids) > 5 or 0))
    with pytest.raises(ZeroDivisionError):
        scored("--data", data, "--overwrite")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scores.jsonl"]
    assert read_jsonl(tmp_path / "out" / "scores.jsonl") == rows


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "the file is empty"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": 3, "rejected": "c"}',
            ":2: wrong type",
        ),
        ('{"prompt": "a"', "invalid JSON"),
        ('{"text": "a"}', "columns fit no known form"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "completion": "b"}',
            "2 is a single response",
        ),
        ('{"prompt": "a", "responses": ["b", "c"], "scores": [1, 1]}', "no example left"),
    ],
)
def test_files_that_cannot_be_scored(lines: str, message: str, scored: Score, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(lines)
    with pytest.raises(UserError, match=message):
        scored("--data", tmp_path / "bad.jsonl")
    assert not (tmp_path / "out" / "scores.jsonl").exists()


def test_misuse(scored: Score, tiny_model_dir: Path, pairs_dir: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "ranked.jsonl", RANKED)
    for arguments, message in (
        (["--data", tmp_path / "none.jsonl"], "no such file"),
        (["--data", "sentimnt"], "Did you mean 'sentiment'"),
        (["--data", data, data], "twice"),
        (["--reference", tmp_path / "none"], "no such folder(.|\n)*--reference"),
        (["max_lenght=3"], "did you mean 'max_length'"),
        (["device=gpu"], "device=gpu is not known"),
        (["loss.alpha=1"], "alpha"),
        (["--limit", "0"], "--limit 0"),
        (
            ["--data", data, write_rows(tmp_path / "single.jsonl", [{"prompt": "a", "completion": "b"}])],
            "score them apart",
        ),
    ):
        with pytest.raises(UserError, match=message):
            scored(*arguments)
    with pytest.raises(UserError, match="there is no such folder"):
        scored("--data", data, run=tmp_path / "no run")
    with pytest.raises(UserError, match="give --data"):
        scored(run=tiny_model_dir)
    with pytest.raises(UserError, match="not known what the policy was trained against"):
        scored("--data", data, run=tiny_model_dir)
    (tmp_path / "out" / "scores.jsonl").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        scored("--data", data)
    assert (tmp_path / "out" / "scores.jsonl").read_text() == "mine"


def test_a_reference_with_another_vocabulary(scored: Score, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["mountain"])
    make_model().save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="another vocabulary"):
        scored("--reference", tmp_path / "other")


def test_a_reference_whose_weights_have_changed_is_refused(
    scored: Score, run_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The same name is not the same model."""
    run, start = tmp_path / "run", tmp_path / "start"
    shutil.copytree(tiny_model_dir, start)
    shutil.copytree(run_dir, run, symlinks=True)
    state_file = run / os.readlink(run / "LATEST") / "trainer_state.json"
    state = json.loads(state_file.read_text())
    state["config"]["model"]["name_or_path"] = str(start)
    state_file.write_text(json.dumps(state))
    (state_file.parent / "manifest.json").unlink()
    before = scored(run=run)
    (start / "model.safetensors").unlink()
    model = make_model()
    model.lm_head.weight.data.mul_(1.5)
    model.save_pretrained(start)
    with pytest.raises(UserError, match="weights have changed since"):
        scored("--overwrite", run=run)
    rows = scored("--overwrite", "--reference", start, run=run)
    assert rows[0]["responses"][0]["reward"] != before[0]["responses"][0]["reward"]


def test_command(run_dir: Path, tiny_model_dir: Path, cache_dir: Path, pairs_dir: Path, tmp_path: Path) -> None:
    """As a process, where overrides may stand anywhere; and a plain model folder, of which nothing is known."""
    command = [sys.executable, str(ROOT / "scripts" / "score.py"), str(tiny_model_dir), "--data", str(pairs_dir)]
    command += [
        "device=cpu",
        f"cache_dir={cache_dir}",
        "max_length=64",
        "max_prompt_length=32",
        "--reference",
        str(run_dir),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "log policy / reference (the run's loss is not known)" in done.stdout and "[+" in done.stdout
    assert len(read_jsonl(tmp_path / "scores.jsonl")) == 8


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "orpo"},
        {"name": "dpo", "beta": 0.1, "divergence": "js"},
        {"name": "dpo", "beta": 0.1, "divergence": "chi2_kl"},
        {"name": "simpo"},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_token_rewards_add_up_to_the_reward_of_any_loss(keys: dict) -> None:
    import losses
    from dpo.loss import Responses

    policy, reference = np.array([-1.0, -2.0, -0.5]), np.array([-1.5, -1.0, -2.0])
    loss, problems = losses.make(keys)
    assert loss is not None, problems
    sums = [torch.tensor([values.sum()]) for values in (policy, reference)]
    reward = loss.rewards(Responses(sums[0], torch.tensor([3]), sums[1]))
    assert reward is not None
    assert score.token_rewards(loss, policy, reference).sum() == pytest.approx(reward.item(), rel=1e-12)


def test_a_run_whose_loss_needs_a_live_reference_is_opened(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    given = ["loss=tdpo", "loss.beta=0.1", "reference.mode=live", "n_examples=8", "batch_size=8", "n_eval_examples=0"]
    train_here(overrides(*given, "sample_during_eval=false"))
    assert find_saved(str(tmp_path / "run"), ["device=cpu"]).config.loss.name == "tdpo"


def test_several_runs_are_rows_of_one_table(
    scored: Score, run_dir: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = scored()
    said = capsys.readouterr().out
    copy = run_dir.with_name("copy")
    if not copy.exists():
        shutil.copytree(run_dir, copy, symlinks=True)
    rows = scored(copy, "--overwrite", "--show", 0)
    assert rows == [{"run": str(run), **row} for run in (run_dir, copy) for row in alone]
    *_, head, first, second = capsys.readouterr().out.splitlines()
    every = next(line for line in said.splitlines() if line.startswith("all "))
    assert head.split() == ["pairs", "prompts", "accuracy", "95", "%", "interval", "mean", "margin", "reward", "of"]
    for line, run in ((first, run_dir), (second, copy)):
        assert line.split()[0] == str(run) and line.split()[1:7] == every.split()[1:7] and "beta=0.3" in line
    with pytest.raises(UserError, match="names a run twice"):
        scored(run_dir, "--overwrite")
    with pytest.raises(UserError, match=r"no such folder; did you mean .*copy"):
        scored(run_dir.with_name("copyy"), "--overwrite")
