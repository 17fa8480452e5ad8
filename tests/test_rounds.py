"""scripts/rounds.py: sample, judge, train, in rounds that can be killed at any time."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import rounds
from dpo.judging.judges import ScoreJudge
from dpo.sampling import Sampling
from dpo.serving import serving
from dpo.utils import UserError

JUDGE = "def letters(prompt, response):\n    return response.count('e') / (len(response) + 1)\n"
PROMPTS = {f"prompt {i}": f"prompt {i}" for i in range(10)}
GOOD = ScoreJudge("length", lambda items: [len(response) for _, response in items])


def given(**changed: Any) -> Namespace:
    settings = {"seed": 0, "prompts": 4, "repeat": False, "k": 3, "pairs": "best-worst", "keep_cut": False}
    return Namespace(**settings | changed)


def test_rounds_have_fresh_prompts_until_all_were_there() -> None:
    turns = [rounds.prompts_of_round(PROMPTS, number, given()) for number in (1, 2, 3)]
    assert [len(turn) for turn in turns] == [4, 4, 4]
    assert len({*turns[0], *turns[1]}) == 8 and {*turns[0], *turns[1], *turns[2]} == {*PROMPTS}
    assert (
        turns[0] == rounds.prompts_of_round(PROMPTS, 1, given()) != rounds.prompts_of_round(PROMPTS, 1, given(seed=1))
    )
    again = [rounds.prompts_of_round(PROMPTS, number, given(repeat=True)) for number in (1, 2)]
    assert again[0] == again[1] == turns[0]


@pytest.mark.parametrize(("changed", "expected"), [
    ({}, [["ccc", "a"]]),
    ({"pairs": "all"}, [["ccc", "bb", "a"]]),
    ({"keep_cut": True}, [["ccc", "a"], ["zzzz", "y"]]),
])  # fmt: skip
def test_pairs_of_samples(changed: dict[str, Any], expected: list[list[str]], capsys: Any) -> None:
    prompts = dict(list(PROMPTS.items())[:3])
    said = [["a", "ccc", "bb", " "], ["dd", "ee", "dd", ""], ["x", "y", "zzzz", ""]]  # of the second all are as good
    rows = [{"policy": text, "ended": text != "zzzz"} for texts in said for text in texts]
    found = rounds.paired(prompts, rows, GOOD, given(k=4, **changed))
    assert [row["responses"] for row in found] == expected
    assert all(row["scores"] == [len(text) for text in row["responses"]] for row in found)
    assert f"12 responses, 11 of them ended; {len(expected)} of 3 prompts have a better" in capsys.readouterr().out


def test_no_pair_at_all() -> None:
    rows = [{"policy": "a", "ended": False}] * 3
    with pytest.raises(UserError, match=r"no prompt has two responses of different score: raise --k .* --keep-cut"):
        rounds.paired({"prompt 0": "prompt 0"}, rows, GOOD, given())


def test_what_is_measured() -> None:
    first = [{"policy": "a", "tokens_policy": 1, "ended": True}] * 4
    alike = {"tokens_policy": 2, "ended": False, rounds.KL_COLUMN: 1.0}
    now = [{"policy": text} | alike for text in ("aa", "a", "aa", "aa")]
    found = rounds.measured(now, first, ["p", "q"], GOOD)
    assert found["win_rate"]["rate"] == pytest.approx(3.5 / 4) and found["reward"]["mean"] == pytest.approx(1.75)
    assert (found["kl"], found["tokens"], found["ended"]) == (1.0, 2.0, 0.0)
    text = rounds.table([rounds.measured(first, first, ["p", "q"], GOOD), {"pairs": 3} | found], "length")
    assert (
        "| 0 | - | 1.000 [1.000, 1.000] | 0 | - |" in text and "| 1 | 3 | 1.750 [1.500, 2.000] | 1.00 ± 0.00 |" in text
    )


@pytest.mark.parametrize(("arguments", "message"), [
    (["--k", "1"], "--k 1 must be at least 2"),
    (["--rounds", "0", "--top-p", "2"], "--rounds 0 must be at least 1\n--top-p 2.0 must be above 0"),
    (["--engine", "vllm"], "--engine vllm must be installed in this environment"),
    (["exp_name=mine"], "exp_name=... is set by each round itself"),
    (["loss=sft"], "loss=sft learns from no pairs"),
    (["batch_sise=3"], "batch_sise"),
])  # fmt: skip
def test_misuse(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = ["rounds.py", "--sentiment", "--out", str(tmp_path / "out"), "model.archive=/nowhere", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(UserError, match=re.escape(message)):
        rounds.main()
    assert not (tmp_path / "out").exists()


# A server of completions, in a process of its own: python server.py MODEL PORT
SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"data": []})

    def do_POST(self):
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/completions" and given["model"] == sys.argv[1], given
        ids = torch.tensor([given["prompt"]])
        torch.manual_seed(given["seed"])
        out = model.generate(ids, do_sample=True, max_new_tokens=given["max_tokens"], temperature=given["temperature"])
        new = out[0, ids.shape[1]:]
        ended = new[-1] == tokenizer.eos_token_id
        choice = {"index": 0, "text": tokenizer.decode(new, skip_special_tokens=True)}
        choice["finish_reason"] = "stop" if ended else "length"
        usage = {"prompt_tokens": ids.numel(), "completion_tokens": len(new), "total_tokens": out.numel()}
        self.answer({"id": "1", "object": "text_completion", "created": 1, "model": given["model"],
                     "choices": [choice], "usage": usage})

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

torch.set_num_threads(1)
import threading
lock, post = threading.Lock(), Handler.do_POST
def one_at_a_time(self):
    with lock:  # seeds are the process's
        post(self)
Handler.do_POST = one_at_a_time
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


@pytest.mark.full
def test_samples_of_a_server(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    how = Sampling(max_new_tokens=8, batch_size=4, seed=1, dtype=torch.float32)
    command = f"{sys.executable} {tmp_path / 'server.py'} {{model}} {{port}}"
    with serving(command, str(tiny_model_dir), tmp_path / "server.log") as server:
        prompts = [[5, 6], [7], [8, 9, 10], [11, 12]]
        four = server.sample(prompts, 0, how)
        assert server.sample(prompts[2:], 2, how) == four[2:]  # as if it had been interrupted
        assert server.sample(prompts[2:], 2, replace(how, seed=2)) != four[2:]
        assert all(0 < row["tokens_policy"] <= 8 and isinstance(row["policy"], str) for row in four)
        assert [row["ended"] for row in four] == [row["tokens_policy"] < 8 for row in four]
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{server.url}/models")


@pytest.mark.parametrize(("command", "message"), [
    ("no-such-program {model}", "--serve: no-such-program cannot be started"),
    (f"{sys.executable} -c 'import sys; sys.exit(\"no room for {{model}}\")'", "ended with code 1: no room for tiny"),
])  # fmt: skip
def test_a_server_that_does_not_start(command: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)), serving(command, "tiny", tmp_path / "log"):
        pass


def test_an_engine_is_a_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rounds.py", "--sentiment", "--engine", "vllm"])
    assert rounds.read_arguments().serve == "vllm serve {model} --port {port} --generation-config vllm"


@pytest.fixture
def start(tiny_model_dir: Path, pairs_dir: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start two tiny rounds in `folder`, with further arguments."""
    (tmp_path / "own.py").write_text(JUDGE)
    training = ["model=blank_model", f"model.name_or_path={tiny_model_dir}", f"datasets=[{pairs_dir}]", "loss=dpo"]
    training += ["loss.beta=0.1", "batch_size=4", "max_length=64", "max_prompt_length=48", "wandb.enabled=false"]
    training += [f"cache_dir={tmp_path / 'cache'}", "device=cpu", "lr=1e-3"]

    def run(folder: Path, *more: str) -> subprocess.Popen[str]:
        options = [
            "--function",
            "own:letters",
            "--k",
            "3",
            "--keep-cut",
            "--max-new-tokens",
            "12",
            "--out",
            str(folder),
        ]
        command = [sys.executable, str(ROOT / "scripts" / "rounds.py"), *options, "--batch-size", "4", *training, *more]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **pipes)

    return run


def finish(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    return text


STAGES = ("round-1/samples.jsonl", "round-1/pairs.jsonl", "round-1/run", "round-2/samples.jsonl", "round-2/run/LATEST")


@pytest.mark.full
def test_rounds_from_a_server(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    command = f"{sys.executable} {tmp_path / 'server.py'} {{model}} {{port}}"
    text = finish(start(tmp_path / "out", "--serve", command, "--rounds", "2"))
    assert f"serving {tmp_path / 'out' / 'round-1' / 'run'}" in text  # the newest policy, in the second round
    rows = [json.loads(line) for line in (tmp_path / "out" / "round-2" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 36 and len({row["policy"] for row in rows}) > 20


@pytest.mark.full
def test_killed_in_each_stage_it_comes_to_the_same(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    more = ["--reference", "fixed"]
    text = finish(start(tmp_path / "whole", *more))
    assert text.count("=== round") == 2
    draw = random.Random(0)
    for stage in STAGES:
        process = start(tmp_path / "killed", *more)
        while not (tmp_path / "killed" / stage).exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(draw.random())
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, stage  # neither finished nor failed
        if process.stdout:
            process.stdout.close()
    finish(start(tmp_path / "killed", *more))
    for number in (1, 2):
        whole, killed = (tmp_path / name / f"round-{number}" for name in ("whole", "killed"))
        assert (whole / "pairs.jsonl").read_text() == (killed / "pairs.jsonl").read_text()
        weights = [load_file(folder / "run" / "LATEST" / "model.safetensors") for folder in (whole, killed)]
        assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    results = [json.loads((tmp_path / name / "rounds.json").read_text())["rounds"] for name in ("whole", "killed")]
    assert results[0] == results[1] and len(results[0]) == 3
    state = json.loads((tmp_path / "whole" / "round-2" / "run" / "LATEST" / "trainer_state.json").read_text())
    assert state["config"]["reference"]["archive"] is not None
    done = start(tmp_path / "whole", "--k", "4", *more).communicate()[0]
    assert "was made with other settings (k was 3 and is 4)" in done
