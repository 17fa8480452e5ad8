"""scripts/chat.py: what a conversation's prompts are, the reward shown, and one-shot use."""

import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_tokenizer, tiny_overrides, train_here
from test_sample import slow_kl

import chat as script
from dpo.sampling import Sampling, continuation, sample
from dpo.utils import UserError, visible
from opening import find_saved

Call = Callable[..., list[str]]
ASK = ("--max-new-tokens", 8)


@pytest.fixture
def call(run_dir: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Call the script on the run, in this process; return the lines it printed."""

    def run(*arguments: object, run: Path = run_dir) -> list[str]:
        given = map(str, [run, f"cache_dir={cache_dir}", "device=cpu", *arguments])
        monkeypatch.setattr(sys, "argv", ["chat.py", *given])
        capsys.readouterr()
        script.main()
        return capsys.readouterr().out.splitlines()

    return run


def test_replies_and_rewards_of_a_conversation(call: Call, run_dir: Path, tiny_model_dir: Path) -> None:
    messages = ["What is 3?", "Why?"]
    given = [argument for message in messages for argument in ("--message", message)]
    head, *lines = call(*given, *ASK, "--reference", "--temperature", 1, "--seed", 3)
    assert head.endswith("turns: hh") and len(lines) == 8
    tokenizer, text = make_tokenizer(), ""
    policy, reference = (find_saved(str(f), ["device=cpu"]).open()[0] for f in (run_dir, tiny_model_dir))
    for turn, message in enumerate(messages):
        text += f"\n\nHuman: {message}\n\nAssistant:"
        ids, how = tokenizer(text)["input_ids"], Sampling(8, 1, 3, torch.float32, first_batch=turn)
        for who, model in enumerate((policy, reference)):
            [response] = sample(model, tokenizer, [ids], how)
            reply, (said, reward) = continuation(tokenizer, ids, response).strip(), lines[4 * turn + 2 * who :][:2]
            assert said == f"{('policy', 'reference')[who]}: {visible(reply)}"
            ratio, _ = slow_kl(run_dir, tiny_model_dir, ids, response)
            found = re.fullmatch(r"  reward (\S+), log policy / reference (\S+) nats, (\d+) tokens(, cut)?", reward)
            assert found and float(found[1]) == pytest.approx(0.3 * ratio, abs=1e-4), reward
            assert float(found[2]) == pytest.approx(ratio, abs=6e-4) and int(found[3]) == len(response)
            if not who:
                answer = reply
        text += f" {answer}"


def test_one_shot_and_misuse(call: Call, run_dir: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [_, reply, size] = call("--message", "Hi", *ASK, "--no-reward")
    assert reply.startswith("policy: ") and re.fullmatch(r"  \d tokens(, cut)?", size)
    said = call("--message", "Hi", *ASK, run=tiny_model_dir)
    assert said[0].startswith("no rewards: it is not known") and re.fullmatch(r"  \d tokens(, cut)?", said[-1])
    for arguments, message in (
        (["--reference", "--no-reward"], "give one of both"),
        (["--top-p", 0, "--max-new-tokens", 0], "--max-new-tokens 0 must be at least 1\n--top-p"),
        (["--message", "a, " * 3000], r"the conversation: \d+ tokens .* or begin anew with /new"),
        (["chat_format=template"], "the tokenizer has no chat template"),
    ):
        with pytest.raises(UserError, match=message):
            call("--message", "Hi", *arguments)
    with pytest.raises(UserError, match="not known what the policy was trained against"):
        call("--reference", "--message", "Hi", run=tiny_model_dir)
    with pytest.raises(UserError, match="there is no such folder"):
        call(run=run_dir.with_name("nowhere"))


def test_a_run_on_plain_text_continues_each_message(
    call: Call, tiny_model_dir: Path, cache_dir: Path, tmp_path: Path
) -> None:
    rows = "".join(f'{{"prompt": "Rivers {i}", "completion": " are {i}."}}\n' for i in range(80))
    (tmp_path / "plain.jsonl").write_text(rows)
    run = tmp_path / "run"
    train_here([*tiny_overrides(tiny_model_dir, tmp_path / "plain.jsonl", cache_dir, run), "loss=sft", "n_examples=4"])
    head, *lines = call("--message", "Rivers 3", "--message", "Rivers 3", *ASK, "--temperature", 0, run=run)
    assert "continued as plain text" in head
    assert lines[0] == lines[2] and lines[1] == lines[3] and lines[1].startswith("  log policy / reference ")
    tokenizer = make_tokenizer()
    ids = tokenizer("Rivers 3")["input_ids"]
    how = Sampling(8, 1, 0, torch.float32, temperature=0.0)
    [response] = sample(find_saved(str(run), ["device=cpu"]).open()[0], tokenizer, [ids], how)
    assert lines[0] == f"policy: {visible(continuation(tokenizer, ids, response))}"
    assert "turns: hh" in call("chat_format=hh", "--message", "Rivers", *ASK, run=run)[0]


@pytest.mark.full
def test_on_a_terminal_and_in_a_pipe(run_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "chat.py"), str(run_dir), "device=cpu", *map(str, ASK)]
    done = subprocess.run(command, input="Hi\n/new\nHi\n", text=True, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("policy: ") == 2 and "you:" not in done.stdout, done.stderr
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    shown, typed = "", ["Hi", "123 " * 900, "Ho", "/quit"]
    with pytest.raises(OSError):  # the end of a terminal
        while True:
            shown += os.read(leader, 4096).decode(errors="replace")
            if typed and shown.count("you: ") > 4 - len(typed):
                os.write(leader, f"{typed.pop(0)}\n".encode())
    os.close(leader)
    assert process.wait(60) == 0 and shown.count("policy: ") == 2 and shown.count("error: the conversation") == 1
