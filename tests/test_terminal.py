"""What a run shows on a terminal and in a pipe: evaluations as tables, bars that give way, the block at the end."""

import math
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, RunTrain, read_jsonl, train_here

from dpo.run.terminal import evaluation_table
from dpo.scoring import LOW_IS_BEST, Metrics, choices, mean_metrics
from dpo.utils import UserError
from settings import load_config

BAR = """
import time
from dpo.utils import log, progress
with progress(total=4, unit="ex", desc="run") as bar:
    for i in range(4):
        bar.update(1)
        if i == 1:
            log("a message")
            for _ in progress(range(2), desc="inside", leave=False): pass
"""


def test_an_evaluation_is_a_table() -> None:
    metrics = {"logps_eval/chosen": -50.0, "loss/eval": 0.5, "tokens_eval/chosen": 9.0, "rewards_eval/accuracies": 0.75}
    metrics |= {"kl_eval/plain": 1.0, "kl_eval/rao_blackwell": 1.25, "kl_eval/rao_blackwell_error": 0.25}
    sizes = dict.fromkeys(metrics, 8) | {"kl_eval/rao_blackwell": 2}
    table = evaluation_table(metrics, {"loss/eval": 0.75}, sizes)
    assert table.splitlines() == [
        "                                           now (± standard error)  change  n",
        "  loss/eval                                                   0.5   -0.25  8",
        "  logps_eval/chosen (nats a response)                         -50       -  8",
        "  rewards_eval/accuracies                                    0.75       -  8",
        "  kl_eval/rao_blackwell (nats a response)             1.25 ± 0.25       -  2",
    ]


def test_a_pipe_gets_lines_and_a_terminal_a_bar_that_gives_way() -> None:
    done = subprocess.run([sys.executable, "-c", BAR], cwd=ROOT, text=True, capture_output=True, timeout=60)
    lines = done.stderr.splitlines()
    assert "\r" not in done.stderr and "\x1b" not in done.stderr and done.stdout == "a message\n"
    assert [line.partition(",")[0] for line in lines] == ["run: 0/4 ex", "run: 4/4 ex"]
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    subprocess.run([sys.executable, "-c", BAR], cwd=ROOT, stdout=follower, stderr=follower, timeout=60)
    os.close(follower)
    shown = b""
    with pytest.raises(OSError):  # the end of a terminal
        while True:
            shown += os.read(leader, 4096)
    os.close(leader)
    assert re.search(rb"\r *\ra message\r\n", shown) and b"run: 100%" in shown


def test_nats_per_token_and_perplexity(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    given = ("n_eval_examples=8", "sample_during_eval=false", "n_examples=8")
    train_here(overrides("loss=sft", *given, f"local_run_dir={tmp_path / 'sft'}"))
    train_here(overrides("loss=dpo", "loss.beta=0.1", *given, f"local_run_dir={tmp_path / 'dpo'}"))
    sft, dpo = (read_jsonl(tmp_path / name / "metrics.jsonl")[-1] for name in ("sft", "dpo"))
    per_token = sft["loss/eval"] / sft["tokens_eval/chosen"]
    assert sft["logps_per_token_eval/chosen"] == pytest.approx(-per_token) and 5 < per_token < 6.5  # of 320 tokens: 5.8
    assert sft["perplexity/eval"] == pytest.approx(math.exp(per_token))
    assert "perplexity/eval" not in dpo
    for side in ("chosen", "rejected"):
        mean = dpo[f"logps_eval/{side}"] / dpo[f"tokens_eval/{side}"]
        assert dpo[f"logps_per_token_eval/{side}"] == pytest.approx(mean) and -6.5 < mean < -5
    assert dpo["tokens_eval/chosen"] == sft["tokens_eval/chosen"]


def test_perplexity_does_not_depend_on_how_a_loss_counts() -> None:
    """Of two targets of 10 tokens with -20 nats, under a loss that is a mean, not a sum."""
    each: Metrics = {"logps_eval/chosen": [-20.0, -20.0], "tokens_eval/chosen": [10.0, 10.0], "loss/eval": [2.0, 2.0]}
    means = mean_metrics(each)
    assert means["perplexity/eval"] == pytest.approx(math.exp(2)) and means["logps_per_token_eval/chosen"] == -2
    assert means.keys() == each.keys() | {"perplexity/eval", "logps_per_token_eval/chosen"}


@pytest.mark.parametrize("loss", ["loss=sft", "loss=dpo"])
def test_the_best_checkpoint_may_be_chosen_by_what_a_table_shows(
    loss: str, overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    given = overrides(loss, *(["loss.beta=0.1"] if loss == "loss=dpo" else []), "n_eval_examples=8", "n_examples=4")
    train_here([*given, "sample_during_eval=false"])
    measured = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
    names = choices(load_config(given).loss)
    assert {*names} == {n for n in measured if re.search("/eval|_eval", n) and not re.match("tokens_|counters/", n)}
    assert ("perplexity/eval" in names) == (loss == "loss=sft")
    assert "perplexity/eval".startswith(LOW_IS_BEST) and not "logps_per_token_eval/chosen".startswith(LOW_IS_BEST)
    assert load_config([*given, "keep_best=logps_per_token_eval/chosen"])
    with pytest.raises(UserError, match="keep_best=tokens_eval/chosen is the same at every evaluation; choose from"):
        load_config([*given, "keep_best=tokens_eval/chosen"])


@pytest.mark.full
def test_a_run_in_a_pipe(train_process: RunTrain, tmp_path: Path) -> None:
    given = ("loss=dpo", "loss.beta=0.1", "n_eval_examples=8", "eval_every=12", "lr=1e-2")
    done = train_process(*given)
    assert done.returncode == 0 and "\r" not in done.stdout + done.stderr, done.stderr
    tables = re.findall(
        r"evaluation after (\d+) examples\n +now \(± standard error\) +change +n\n((?:  .*\n)+)", done.stdout
    )
    assert [seen for seen, _ in tables] == ["0", "12", "24"]
    events = [event for event in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss/eval" in event]
    for (_, table), event, before in zip(tables, events, [{}, *events]):
        rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
        change = f"{event['loss/eval'] - before['loss/eval']:+.3g}" if before else "-"
        assert rows["loss/eval"] == [f"{event['loss/eval']:.4g}", change, "8"]
        assert rows["samples_eval/policy_eos_rate"][-1] == "2"
    best = min(events, key=lambda event: event["loss/eval"])
    assert f"done: {tmp_path / 'run'}\n  last evaluation, after 24 examples, n=8: loss/eval" in done.stdout
    assert (
        f"  best loss/eval: {best['loss/eval']:.4g}, after {best['counters/examples']} examples\nnext:" in done.stdout
    )
