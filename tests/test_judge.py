"""scripts/judge.py: win rates of files and runs, swapping, resuming, the key, formats of the output, and misuse."""

import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, read_jsonl, train_here
from judge_server import SECRET, Server

import judge as script
from dpo.model.loading import load_tokenizer
from dpo.sampling import Sampling
from dpo.utils import UserError
from opening import find_saved
from preference_datasets import load_data
from results import sentiment
from settings import data_settings, load_config

WORDS = ("awful", "dull", "good", "wonderful")
Call = Callable[..., dict[str, Any]]


def write_responses(path: Path, n: int, offset: int, response: str = "response") -> Path:
    rows = [{"prompt": f"The film {i} was", response: f" {WORDS[(i * offset) % 4]}{'!' * (i % 3)}"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def call(cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call the script in this process; returns results.json."""

    def run(a: object, b: object, *arguments: object, out: str = "out") -> dict[str, Any]:
        given = [a, b, f"cache_dir={cache_dir}", "device=cpu", "num_proc=1", "--out", tmp_path / out, *arguments]
        monkeypatch.setattr(sys, "argv", ["judge.py", *map(str, given)])
        script.main()
        return json.loads((tmp_path / out / "results.json").read_text())

    return run


def test_files_are_compared(call: Call, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    a = write_responses(tmp_path / "a.jsonl", 40, 1)
    b = write_responses(tmp_path / "b.jsonl", 40, 3, "policy")
    (tmp_path / "b.jsonl").write_text("\n".join(reversed(b.read_text().splitlines())))
    outcome = call(a, b, "--sentiment")
    found, shown = outcome["results"]["-"], capfd.readouterr().out
    texts = [{row["prompt"]: row[key] for row in read_jsonl(path)} for path, key in ((a, "response"), (b, "policy"))]
    scores = [[sentiment(prompt + each[prompt]) for prompt in texts[0]] for each in texts]
    wins = Counter((x > y) - (x < y) for x, y in zip(*scores))
    assert (found["wins"], found["ties"], found["losses"]) == (wins[1], wins[0], wins[-1]) and min(wins.values()) > 0
    assert found["win_rate"]["rate"] == (wins[1] + wins[0] / 2) / 40 and "position_bias" not in found
    assert f"{found['win_rate']['rate']:.3f} [{found['win_rate']['interval'][0]:.3f}" in shown
    assert outcome["usage"] is None and outcome["settings"]["judge"] == "sentiment"
    outputs = {n: json.loads((tmp_path / "out" / f"{n}.json").read_text()) for n in ("model_outputs", "annotations")}
    assert outputs["model_outputs"][0] == {"instruction": "The film 0 was", "output": " awful", "generator": str(a)}
    row = outputs["annotations"][1]
    assert row == {
        "instruction": "The film 1 was", "output_1": texts[1]["The film 1 was"], "output_2": " dull!",
        "generator_1": str(b), "generator_2": str(a), "annotator": "sentiment", "preference": 1.0,
    }  # fmt: skip
    swapped = call(b, a, "--sentiment", out="swapped")["results"]["-"]
    assert swapped["win_rate"]["rate"] == 1 - found["win_rate"]["rate"]
    assert swapped["win_rate"]["interval"] == [1 - end for end in reversed(found["win_rate"]["interval"])]
    assert swapped["length_controlled"]["rate"] == pytest.approx(1 - found["length_controlled"]["rate"], abs=1e-9)
    outputs = [{"instruction": prompt, "output": text} for prompt, text in texts[1].items()]
    (tmp_path / "b.json").write_text(json.dumps(outputs))  # as AlpacaEval has them
    assert call(a, tmp_path / "b.json", "--sentiment")["results"]["-"] == found


def test_several_responses_and_prompts_of_a_set(call: Call, tmp_path: Path) -> None:
    rows = [("It", " a"), ("It", " bb"), ("He", " c"), ("He", " dd"), ("She", " e")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in rows))
    data = [
        {"prompt": [{"role": "user", "content": "It"}], "chosen": " x", "rejected": " y"},
        {"prompt": "He", "responses": [" w", " xx"], "scores": [0, 1]},
        {"prompt": "It", "chosen": " yyy", "rejected": "n"},
    ]  # fmt: skip
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    (tmp_path / "judge_lengths.py").write_text("def length(prompt, response): return len(response)\n")
    sys.path.append(str(tmp_path))
    try:
        judge = ["--function", "judge_lengths:length"]
        found = call(tmp_path / "a.jsonl", "chosen", "--prompts", tmp_path / "data.jsonl", *judge)["results"]["-"]
    finally:
        sys.path.remove(str(tmp_path))
    # " yyy" beats both of It, " xx" beats " c" and ties with " dd"
    assert (found["prompts"], found["wins"], found["ties"], found["losses"]) == (2, 0, 1, 3)
    assert found["characters"] == [1.5, 2.5]


def test_runs_are_sampled(call: Call, run_dir: Path, tiny_model_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    given = ["--sentiment", "--max-new-tokens", 6, "--n", 2, "--temperatures", "0,1"]
    found = call(run_dir, "chosen", *given)["results"]
    assert list(found) == ["0", "1"] and found["0"]["prompts"] == 8  # of the test split that the run knows
    assert (found["0"]["pairs"], found["1"]["pairs"]) == (8, 16)
    out = tmp_path / "out"
    assert (out / "win_rates.png").stat().st_size > 5000
    rows = json.loads((out / "temperature-1" / "model_outputs.json").read_text())
    saved = find_saved(str(run_dir), [f"cache_dir={cache_dir}", "device=cpu"])
    model, tokenizer, computation = saved.open()
    prompts = [row["instruction"] for row in rows]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    texts = script.write_samples.__globals__["sample"](model, tokenizer, ids, Sampling(6, 16, 0, computation.dtype))
    assert [row["output"] for row in rows] == tokenizer.batch_decode(texts, skip_special_tokens=True)
    chosen = json.loads((out / "temperature-1" / "reference_outputs.json").read_text())
    assert all(re.fullmatch(r" It is \d+\.", row["output"]) for row in chosen)
    assert len(list(out.glob("samples-*.jsonl"))) == 2
    # Two models on prompts of a file; the file's order and the side change nothing.
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in dict.fromkeys(prompts))
    )
    given = ["--prompts", tmp_path / "p.jsonl", "--sentiment", "--max-new-tokens", 6, "--limit", 5]
    rates = [
        call(*pair, *given)["results"]["1"]["win_rate"]["rate"]
        for pair in ((run_dir, tiny_model_dir), (tiny_model_dir, run_dir))
    ]
    assert rates[0] == 1 - rates[1] and call(run_dir, run_dir, *given)["results"]["1"]["ties"] == 5


def test_the_own_prompts_of_undivided_data_are_the_held_out_ones(
    call: Call, overrides: Callable[..., list[str]], pairs_dir: Path, cache_dir: Path, tmp_path: Path
) -> None:
    rows = [row for split in ("train", "test") for row in read_jsonl(pairs_dir / f"{split}.jsonl")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[:5]]))
    own = [f"datasets=[{tmp_path / 'rows.jsonl'}]", "loss=dpo", "loss.beta=0.1", "n_examples=4", "batch_size=4"]
    train_here(overrides(*own, "n_eval_examples=1", "sample_during_eval=false"))
    call(tmp_path / "run", "chosen", "--sentiment", "--max-new-tokens", 2)
    judged = {row["instruction"] for row in json.loads((tmp_path / "out" / "model_outputs.json").read_text())}
    saved = find_saved(str(tmp_path / "run"), [f"cache_dir={cache_dir}", "device=cpu", "num_proc=1"])
    test = load_data(data_settings(saved.config), tokenizer := load_tokenizer(saved.config), "test")
    assert judged == {tokenizer.decode(test[i].prompt) for i in range(len(test))} and 0 < len(judged) < len(rows)


def command(a: Path, b: Path, server: Server, out: Path, *arguments: str) -> list[str]:
    given = ["--endpoint", server.url, "--model", "m", "--parallel", "1", "--out", str(out)]
    return [sys.executable, str(ROOT / "scripts" / "judge.py"), str(a), str(b), *given, *arguments]


@pytest.mark.full
def test_a_killed_run_resumes_without_asking_twice(server: Server, tmp_path: Path) -> None:
    a, b = write_responses(tmp_path / "a.jsonl", 20, 1), write_responses(tmp_path / "b.jsonl", 20, 3)
    out, cache = tmp_path / "out", tmp_path / "out" / "answers.jsonl"
    server.faults = [""] * 7 + ["hang"]
    process = subprocess.Popen(command(a, b, server, out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until = time.monotonic() + 60
    while len(server.questions) < 8 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    answered, unanswered = server.questions[:7], server.questions[7]
    assert len(read_jsonl(cache)) == 7 and not (out / "results.json").exists()
    done = subprocess.run(command(a, b, server, out), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = Counter(server.questions)
    assert set(answered) < set(asked) and {q: n for q, n in asked.items() if n > 1} == {unanswered: 2}
    usage = json.loads((out / "results.json").read_text())["usage"]
    assert usage["answers"] == len(asked) and usage["asked"] == len(asked) - 7


@pytest.mark.full
def test_ctrl_c_does_not_wait_for_a_slow_endpoint(server: Server, tmp_path: Path) -> None:
    a, b = write_responses(tmp_path / "a.jsonl", 4, 1), write_responses(tmp_path / "b.jsonl", 4, 3)
    server.faults, server.hang_seconds = ["429", "hang"], 60
    process = subprocess.Popen(
        command(a, b, server, tmp_path / "out"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while len(server.questions) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors.endswith("interrupted\n") and time.monotonic() - began < 20


@pytest.mark.parametrize("key", [SECRET, "short"])
def test_the_key_is_in_no_file_and_no_output(
    key: str, call: Call, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    a, b = write_responses(tmp_path / "a.jsonl", 3, 1), write_responses(tmp_path / "b.jsonl", 3, 3)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server.judge = lambda question: f"Bearer {key}\nVerdict: A"
    judge = ["--endpoint", server.url, "--model", "m"]
    call(a, b, *judge)
    server.faults = ["401"] * 9
    with pytest.raises(UserError, match=r"HTTP 401, .* no: Bearer \*\*\*; set a valid key"):
        call(a, b, *judge, out="refused")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 7 and not [path for path in files if key.encode() in path.read_bytes()]
    assert key not in "".join(capfd.readouterr()) and server.keys == {f"Bearer {key}"}


@pytest.mark.full
def test_a_refused_key_is_one_line(server: Server, tmp_path: Path) -> None:
    a, b = write_responses(tmp_path / "a.jsonl", 3, 1), write_responses(tmp_path / "b.jsonl", 3, 3)
    server.faults = ["401"] * 9
    done = subprocess.run(command(a, b, server, tmp_path / "out"), capture_output=True, text=True)
    *bar, line = done.stderr.strip().splitlines()
    assert done.returncode == 1 and line.startswith("error: http") and "HTTP 401" in line and len(server.questions) == 1
    assert not [text for text in bar if text.strip() and not text.startswith("m:")] and SECRET not in done.stderr


def test_position_bias_and_cost_are_reported(call: Call, server: Server, tmp_path: Path, capfd: Any) -> None:
    a, b = write_responses(tmp_path / "a.jsonl", 8, 1), write_responses(tmp_path / "b.jsonl", 8, 3)
    judge = ["--endpoint", server.url, "--model", "m", "--criterion", "concise"]
    server.judge = lambda question: "Verdict: A"
    outcome = call(a, b, *judge, "--price-in", 1e6, "--price-out", 0)
    found = outcome["results"]["-"]
    assert found["win_rate"]["rate"] == 0.5 and found["position_bias"] == 1 and found["ties"] == 8
    asked = found["orders_disagree"]
    assert 0 < asked < 8 and outcome["usage"] == {
        "answers": 2 * asked, "asked": 2 * asked, "tokens_in": 20 * asked, "tokens_out": 4 * asked, "cost": 20 * asked,
    }  # fmt: skip
    assert "+1.00" in (shown := capfd.readouterr().out) and f"cost {20 * asked}" in shown
    assert "short" in server.questions[0]
    server.judge = lambda question: "I am sorry, I cannot say." if "film 1" in question else "What?"
    found = call(a, b, *judge, "--fields", "{}")["results"]["-"]
    assert found["refused"] == 2 and found["unparsable"] == 2 * asked - 2 and found["position_bias"] is None
    assert found["win_rate"]["rate"] == 0.5


def test_misuse(
    call: Call, run_dir: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    a, other = write_responses(tmp_path / "a.jsonl", 4, 1), write_responses(tmp_path / "more.jsonl", 6, 1)
    for name, text in {
        "empty.jsonl": "", "none.jsonl": '{"prompt": "x", "response": "y"}\n', "half.jsonl": '{"prompt": "x", "resp',
        "no.jsonl": '{"prompt": "x", "answer": "y"}\n', "list.jsonl": "[1]\n", "prompts.jsonl": '{"prompt": "x"}\n',
        "three.jsonl": '{"prompt": "x", "response": "y"}\n' * 3, "two.jsonl": '{"prompt": "x", "response": "y"}\n' * 2,
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    judge = ["--sentiment"]
    for arguments, message in (
        ((tmp_path / "no run", a, *judge), "there is no such"),
        (("runn.jsnl", a, *judge), "runn.jsnl: there is no such file or folder; files of responses end in .jsonl"),
        (("nowhere.jsonl", a, *judge), "nowhere.jsonl: no such file"),
        (("empty.jsonl", a, *judge), "empty.jsonl: the file is empty"),
        (("half.jsonl", a, *judge), "half.jsonl:1: invalid JSON"),
        (("no.jsonl", a, *judge), "no.jsonl:1: missing field: 'response'; the row has 'prompt', 'answer'"),
        (("list.jsonl", a, *judge), "list.jsonl:1: not an object"),
        ((a, "none.jsonl", *judge), "no prompts in common, the first are 'The film 0 was'; 'The film 0 was'; 'x'"),
        ((a, other, *judge), "the files have 4 and 6 prompts, 4 of them in common; say which with --prompts"),
        (("three.jsonl", "two.jsonl", *judge), "A has 3 responses to 'x' and B has 2"),
        ((a, "chosen", *judge), "chosen: the prompts come without preferred responses"),
        ((tiny_model_dir, tiny_model_dir, *judge), "not known which prompts"),
        ((run_dir, "chosen", *judge, "--prompts", "prompts.jsonl"), "without preferred responses"),
        ((run_dir, "chosen", *judge, "--prompts", "hhh"), "unknown data set 'hhh'. Did you mean 'hh'"),
        ((run_dir, "chosen", *judge, "--max-new-tokens", 99999), "no prompt is short enough"),
        ((a, a, "--endpoint", "http://x/v1"), "--endpoint and --model go together"),
        ((a, a, *judge, "--model", "m"), "--endpoint and --model go together"),
        ((a, a, *judge, "--price-in", 1), "--price-in and --price-out go together"),
        ((a, a, *judge, "--temperatures", "0,x"), "--temperatures 0,x must be numbers such as 0,0.5,1"),
        ((a, a, *judge, "--temperatures=-1"), "--temperatures -1 must be numbers"),
        ((a, a, *judge, "--temperatures", "0,1"), "neither A nor B is a model"),
        ((a, a, *judge, "--limit", 0, "--n", 0), "--limit 0 must be at least 1\n--n 0"),
        ((a, a, *judge, "--fields", "[]"), "--fields \\[\\] must be a JSON object"),
        ((a, a, "--function", "nowhere"), "--function nowhere cannot be imported"),
        ((a, a, *judge, "model.policy_dtyp=float32"), "did you mean"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call(*arguments)
        assert len(str(error.value).splitlines()) <= 2, error.value
    assert not list(tmp_path.rglob("results.json"))
    found = call(a, other, *judge, "--prompts", a)["results"]["-"]  # which are in both
    assert (found["prompts"], found["ties"]) == (4, 4)


@pytest.mark.full
def test_wandb(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    a, b = write_responses(tmp_path / "a.jsonl", 5, 1), write_responses(tmp_path / "b.jsonl", 5, 3)
    found = call(a, b, "--sentiment", "--wandb")["results"]["-"]
    [tables] = tmp_path.rglob("wandb/offline-run-*/files/media/table")
    [pairs], [rates] = (sorted(tables.glob(f"{name}_*.table.json")) for name in ("pairs", "win_rates"))
    assert json.loads(pairs.read_text())["data"][0][:4] == ["-", "The film 0 was", " awful", " awful"]
    assert json.loads(rates.read_text())["data"] == [
        ["-", found["win_rate"]["rate"], found["length_controlled"]["rate"]]
    ]


@pytest.mark.full
def test_transformers_serve_judges(call: Call, tmp_path: Path) -> None:
    """The embedded model, behind a real server. It is small: what counts is that all questions get an answer."""
    if missing := [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed: pip install 'transformers[serving]'")
    model, tokenizer, _ = find_saved(find_embedded(), ["device=cpu", "layout=padded"]).open()
    model.save_pretrained(folder := tmp_path / "smollm2")
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    program = Path(sys.executable).with_name("transformers")
    with open(tmp_path / "serve.log", "w") as log:
        process = subprocess.Popen([str(program), *given], stdout=log, stderr=log)
    try:
        until = time.monotonic() + 120
        while not healthy(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "serve.log").read_text()
            time.sleep(0.5)
        a, b = write_responses(tmp_path / "a.jsonl", 4, 1), write_responses(tmp_path / "b.jsonl", 4, 3)
        judge = ["--endpoint", f"http://127.0.0.1:{port}/v1", "--model", folder, "--parallel", 2]
        outcome = call(a, b, *judge, "--fields", '{"temperature": 0, "max_tokens": 40}')
        answers = read_jsonl(tmp_path / "out" / "answers.jsonl")
        assert len(answers) == outcome["usage"]["asked"] == 4 and all(row["text"].strip() for row in answers)
        assert outcome["usage"]["tokens_in"] > 4 * 100 and 0 < outcome["usage"]["tokens_out"] <= 160
        with pytest.raises(UserError, match="refuses: HTTP"):
            call(a, b, *judge[:3], "no/such-model", out="other")
    finally:
        process.terminate()
        process.wait(30)


def find_embedded() -> str:
    return load_config(["exp_name=judge", "model=smollm2"]).model.name_or_path


def healthy(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except OSError:
        return False
