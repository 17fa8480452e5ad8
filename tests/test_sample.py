"""scripts/sample.py: what is sampled, going on after interruptions, and misuse."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_tokenizer, read_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import sample as script
from dpo.data.rendering import ChatFormat
from dpo.sampling import Sampling, sample
from dpo.utils import UserError
from opening import find_saved

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PROMPTS = ["Rivers are", "\n\nHuman: What?\n\nAssistant:", "It", "Tell me \u00e9", "The film was", "17 green", "boats,"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    return path


Call = Callable[..., Path]


@pytest.fixture
def call(run_dir: Path, cache_dir: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call the script on the run, in this process; returns the file it wrote."""

    def run(*arguments: object, name: str = "samples.jsonl", run: Path = run_dir, prompts: Path = prompts) -> Path:
        given = [run, f"cache_dir={cache_dir}", "device=cpu", "--prompts", prompts, "--out", tmp_path / name]
        given += ["--max-new-tokens", 8, "--batch-size", 4, *arguments]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, given)])
        script.main()
        return tmp_path / name

    return run


@torch.no_grad()
def slow_kl(run_dir: Path, reference: Path, before: list[int], after: list[int]) -> tuple[float, float]:
    """Both estimates for one response, in float64."""
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()(torch.tensor([before + after]))
        .logits[0, len(before) - 1 : -1].log_softmax(-1)
        for folder in (run_dir / "LATEST", reference)
    )  # fmt: skip
    at = (torch.arange(len(after)), torch.tensor(after))
    return float((ours - theirs)[at].sum()), float((ours.exp() * (ours - theirs)).sum())


def test_samples_and_their_divergence(call: Call, run_dir: Path, tiny_model_dir: Path, cache_dir: Path, capfd) -> None:
    rows = read_jsonl(call("--n", 3))
    assert [(row["prompt"], row["sample"]) for row in rows] == [(p, i) for p in PROMPTS for i in range(3)]
    assert list(rows[0]) == [
        *("prompt", "sample", "policy", "reference", "kl_plain", "kl_rao_blackwell", "tokens_policy", "ended")
    ]
    tokenizer, saved = make_tokenizer(), find_saved(str(run_dir), [f"cache_dir={cache_dir}", "device=cpu"])
    policy, worst = saved.open()[0], 0.0
    for start in range(0, 21, 4):
        some = rows[start : start + 4]
        ids = [tokenizer(row["prompt"])["input_ids"] for row in some]
        responses = sample(policy, tokenizer, ids, Sampling(8, 4, 0, torch.float32, first_batch=start // 4))
        for row, before, after in zip(some, ids, responses):
            assert row["policy"] == tokenizer.decode(after, skip_special_tokens=True)
            assert row["tokens_policy"] == len(after) and row["ended"] == (after[-1] == tokenizer.eos_token_id)
            plain, exact = slow_kl(run_dir, tiny_model_dir, before, after)
            worst = max(worst, abs(row["kl_plain"] - plain), abs(row["kl_rao_blackwell"] - exact))
    assert worst < 1e-4
    output = capfd.readouterr().out
    mean = np.mean([row["kl_rao_blackwell"] for row in rows])
    by_prompt = np.reshape([row["kl_rao_blackwell"] for row in rows], (7, 3)).mean(1)
    assert f"rao_blackwell {mean:.3f} ± {by_prompt.std(ddof=1) / np.sqrt(7):.3f}" in output
    assert f"21 samples of 7 prompts: {np.mean([row['tokens_policy'] for row in rows]):.1f} tokens" in output


@pytest.mark.parametrize("left", ["a cut line", "a whole row", "nothing", "all", "batches"])
def test_an_interrupted_file_becomes_the_same(left: str, call: Call, tmp_path: Path) -> None:
    whole = call("--n", 2).read_bytes()
    out = call("--n", 2, "--seed", 0, name="again.jsonl")
    assert out.read_bytes() == whole and call("--n", 2, "--seed", 1, name="other.jsonl").read_bytes() != whole
    lines = whole.splitlines(keepends=True)
    n = {"a cut line": 5, "a whole row": 6, "nothing": 0, "all": 14, "batches": 8}[left]
    out.write_bytes(b"".join(lines[:n]) + (lines[n][:-5] if left == "a cut line" else b""))
    assert call("--n", 2, name="again.jsonl").read_bytes() == whole


@pytest.mark.full
def test_a_killed_process_goes_on(call: Call, run_dir: Path, cache_dir: Path, prompts: Path, tmp_path: Path) -> None:
    whole = call("--n", 12).read_bytes()
    out = tmp_path / "killed.jsonl"
    command = [sys.executable, str(ROOT / "scripts" / "sample.py"), str(run_dir), "--prompts", str(prompts)]
    command += ["--out", str(out), "--n", "12", "--max-new-tokens", "8", "--batch-size", "4"]
    command += [f"cache_dir={cache_dir}", "device=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until = time.monotonic() + 120
    while not (out.exists() and out.stat().st_size) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    there = out.read_bytes()
    assert 0 < len(there) < len(whole) and whole.startswith(there)
    assert call("--n", 12, name="killed.jsonl").read_bytes() == whole


def test_two_processes_do_not_write_to_one_file(call: Call, tmp_path: Path) -> None:
    import fcntl

    with open(call(), "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process writes"):
            call()


def test_other_settings_need_another_file(call: Call, run_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    before = call().read_bytes()
    other = tmp_path / "other.txt"
    other.write_text("Rivers")
    for arguments, keys in (
        (["--seed", 1], "seed was 0 and is 1"),
        (["--n", 2, "--top-p", 0.5], "n was 1 and is 2; top_p was 1.0 and is 0.5"),
        (["--reference", "none"], "reference was"),
        (["model.policy_dtype=bfloat16"], "overrides was .*; dtype was torch.float32 and is torch.bfloat16"),
    ):
        with pytest.raises(UserError, match=rf"other settings \({keys}.*: give another --out, or --overwrite"):
            call(*arguments)
    with pytest.raises(UserError, match="prompts_sha256 was"):
        call(prompts=other)
    with pytest.raises(UserError, match="policy was"):
        call("--reference", tiny_model_dir, run=tiny_model_dir)
    assert (tmp_path / "samples.jsonl").read_bytes() == before
    assert len(read_jsonl(call("--overwrite", prompts=other))) == 1
    (tmp_path / "mine.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="does not say what made it"):
        call(name="mine.jsonl")
    (tmp_path / "samples.jsonl").write_text('{"prompt": "x", "sample": 0}\n')
    with pytest.raises(UserError, match="not of this command"):
        call(prompts=other)


def test_tempered_and_greedy_samples_have_no_divergence(call: Call, run_dir: Path, tiny_model_dir: Path, capfd) -> None:
    for given in (["--temperature", 0.5], ["--top-p", 0.5], ["--greedy"], ["--reference", "none"]):
        rows = read_jsonl(call(*given, "--overwrite"))
        assert not [key for key in rows[0] if key.startswith("kl")] and ("reference" in rows[0]) == (
            "none" not in given
        )
        assert "no KL divergence" in capfd.readouterr().out
    greedy = read_jsonl(call("--greedy", "--overwrite"))
    assert greedy == read_jsonl(call("--temperature", 0, "--batch-size", 7, name="other.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(run_dir / "LATEST", dtype=torch.float32)
    ids = tokenizer(PROMPTS[3], return_tensors="pt")
    out = model.generate(**ids, do_sample=False, max_new_tokens=8, pad_token_id=tokenizer.eos_token_id)
    assert tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == greedy[3]["policy"]


def test_prompts(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    text, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("\ufeffone\\n \r\n\n  \n[two\u2028 \n", encoding="utf-8")

    def read(path: Path, style: str = "auto") -> list[script.Prompt]:
        return script.read_prompts(path, tokenizer, ChatFormat(tokenizer, style, "2024-07-26"))

    found = read(text)
    assert [prompt.text for prompt in found] == ["one\\n ", "[two\u2028 "] and found[1].where == f"{text}:4"
    assert found[0].ids == tokenizer("one\\n ")["input_ids"]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows.write_text(json.dumps({"prompt": turns}) + "\n\n" + json.dumps({"prompt": "a\nb", "id": 3}))
    as_hh = "Be brief.\n\nHuman: Hi\n\nAssistant:"
    assert [p.text for p in read(rows)] == [as_hh, "a\nb"]
    tokenizer.chat_template = TEMPLATE
    assert [(p.text, p.format[:9]) for p in read(rows)] == [
        ("[system]Be brief.[user]Hi[assistant]", "template:"), ("a\nb", "text"),
    ]  # fmt: skip
    wrapped = [(p.text, p.format[:9]) for path in (rows, text) for p in read(path, "template")]
    assert wrapped[1:3] == [("[user]a\nb[assistant]", "template:"), ("[user]one\\n[assistant]", "template:")]
    text.write_text("\n\nHuman: Hi\n\nAssistant:")
    rows.write_text(json.dumps({"prompt": "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Who?\n\nAssistant:"}))
    assert read(rows, "template")[0].text == "[user]Hi[assistant]Ho[user]Who?[assistant]"
    rows.write_text(json.dumps({"prompt": turns}))
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|bos|> $A", special_tokens=[("<|bos|>", bos)])
    tokenizer.chat_template = "<|bos|>" + TEMPLATE
    assert [p.ids.count(bos) for p in read(rows)] == [1]


def test_text_for_a_policy_trained_on_conversations_is_said(
    call: Call, run_dir: Path, prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    shutil.copytree(run_dir, run := tmp_path / "run", symlinks=True)
    folder = run / os.readlink(run / "LATEST")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    state = json.loads((folder / "trainer_state.json").read_text())
    state |= {"formats": ["template:" + hashlib.sha256(TEMPLATE.encode()).hexdigest()[:8]]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "manifest.json").unlink()
    call(run=run)
    assert "warning" in (output := capfd.readouterr().out) and "these rows are plain text" in output
    rows = read_jsonl(call("chat_format=template", run=run, name="turns.jsonl"))
    assert rows[0]["prompt"] == "[user]Rivers are[assistant]" and "warning" not in capfd.readouterr().out
    state["config"]["chat_format"] = "template"
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert read_jsonl(call(run=run, name="again.jsonl"))[0]["prompt"] == "[user]Rivers are[assistant]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompt"),
        ("\n \n", "holds no prompt"),
        ('{"prompt": "a"}\n{"text": "b"}', r"p\.jsonl:2: missing field: 'prompt'; the row has 'text'"),
        ('{"prompt": 3}', r"p\.jsonl:1: wrong type: 'prompt' is int"),
        ('{"prompt": "a"\n', r"p\.jsonl:1: invalid JSON"),
        ('"a"', r"p\.jsonl:1: not an object"),
        ('\n{"prompt": " "}', r"p\.jsonl:2: empty prompt"),
        ('{"prompt": []}', r"p\.jsonl:1: empty conversation"),
        ('{"prompt": [{"role": "user"}]}', r"p\.jsonl:1: missing field: 'content'"),
        ('{"prompt": "\\ud800"}', r"p\.jsonl:1: broken Unicode"),
        ('{"prompt": "' + "a, " * 2000 + '"}', r"p\.jsonl:1: \d{4} tokens of the prompt \+ --max-new-tokens 8 = \d+"),
    ],
)
def test_prompts_that_are_none(content: str, message: str, call: Call, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        call(prompts=tmp_path / "p.jsonl")
    assert not (tmp_path / "samples.jsonl").exists()


def test_misuse(call: Call, tiny_model_dir: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["--greedy", "--n", 2], "greedy"),
        (["--temperature", 0, "--n", 2], "greedy"),
        (["--greedy", "--top-p", 0.5], "neither"),
        (["--temperature=-1"], "--temperature -1.0 must be 0 or more"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--top-p", 0], "--top-p 0.0 must be above 0"),
        (["--top-p", 1.5, "--n", 0], "--n 0 must be at least 1\n--top-p 1.5"),
        (["--max-new-tokens", 0], "--max-new-tokens 0"),
        (["--seed", -1], "--seed -1"),
        (["--reference", tmp_path / "nowhere"], "no such folder"),
        (["model.policy_dtyp=float32"], "did you mean 'model.policy_dtype'"),
    ):
        with pytest.raises(UserError, match=message):
            call(*arguments)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        call(name="folder.jsonl")
    for path, message in ((tmp_path / "none.txt", "cannot be read"), (tmp_path / "p.csv", "a .jsonl file with")):
        with pytest.raises(UserError, match=message):
            call(prompts=path)
    with pytest.raises(UserError, match="there is no such folder"):
        call(run=tmp_path / "no run")
    with pytest.raises(UserError, match="not known what the policy was trained against"):
        call(run=tiny_model_dir)
    assert len(read_jsonl(call("--reference", "none", run=tiny_model_dir))) == 7


def test_what_is_shown_holds_no_control_characters() -> None:
    row = {"prompt": "a\x1b[2J", "sample": 0, "policy": "\x07b", "tokens_policy": 1, "ended": False}
    how = Sampling(8, 4, 0, torch.float32)
    shown = script.summary([row], how)
    assert all(c.isprintable() or c == "\n" for c in shown) and "\\x07b" in shown
    assert "unknown (one sample)" in script.summary(
        [{**row, "reference": "", "kl_plain": 1.0, "kl_rao_blackwell": 1.0}], how
    )


def test_prompts_of_the_command_line_are_printed(
    call: Call, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    expected = read_jsonl(call("--greedy"))[:2]

    def given(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, [run_dir, "device=cpu", *arguments])])
        capfd.readouterr()
        script.main()
        return capfd.readouterr().out

    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples.jsonl").unlink()
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPTS[1] + "\n"))
    said = given(PROMPTS[0], "--greedy", "-", "--max-new-tokens", 8)
    for row in expected:
        assert script.visible(f"\n{row['prompt']}\n  policy    {row['policy']}\n") in said
    assert "2 samples of 2 prompts" in said and not (tmp_path / "samples.jsonl").exists()
    said = given("It", "--n", 3, "--max-new-tokens", 4, "--out", "mine.jsonl")
    assert said.count("\nIt\n") == 3 and len(read_jsonl(tmp_path / "mine.jsonl")) == 3
    for wrong in ([], ["It", "--prompts", "prompts.jsonl"]):
        with pytest.raises(UserError, match="give prompts on the command line, - for stdin, or --prompts FILE"):
            given(*wrong)
    with pytest.raises(UserError, match="a prompt of the command line: empty prompt"):
        given(" ")
