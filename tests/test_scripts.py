"""What all commands have in common, and inspect_data.py as JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, make_tokenizer

FOLDERS = ("scripts", "experiments", "benchmarks")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
COMMANDS = [path for path in FILES if "__main__" in path.read_text()]


def run(script: str | Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the project; `script` alone is a file in scripts/."""
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env={**os.environ})


@pytest.mark.full
@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_help_works_from_any_folder(script: Path, tmp_path: Path) -> None:
    done = run(script, "--help", folder=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
    assert "None)" not in done.stdout and not [*tmp_path.iterdir()]


@pytest.mark.full
@pytest.mark.parametrize(("script", "shown"), [
    ("score.py", ["scores.jsonl", "default: 3", "default: test"]), ("sample.py", ["default: 128", "default: 1.0"]),
    ("report.py", ["default: report", "default: 8"]), ("inspect_data.py", ["default 3", "default train"]),
])  # fmt: skip
def test_help_shows_defaults(script: str, shown: list[str], tmp_path: Path) -> None:
    text = " ".join(run(script, "--help", folder=tmp_path).stdout.split())
    assert not [part for part in shown if part not in text]


@pytest.mark.full
def test_inspect_data_as_json(tiny_model_dir: Path, tmp_path: Path) -> None:
    human = "\n\nHuman: Why?\n\nAssistant:"
    rows = [
        {"prompt": "\n\nHuman: Is it?\n\nAssistant:", "chosen": f" It is.{human} Rivers.", "rejected": " N\u00f6."},
        {"prompt": "Rivers are", "responses": [" wide", " a poem", " green"], "scores": [1, 2, 2]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--json", f"datasets=[{tmp_path / 'rows.jsonl'}]", "n=5", "model=blank_model", "holdout_fraction=0"]
    given += [f"model.name_or_path={tiny_model_dir}", f"cache_dir={tmp_path / 'cache'}", "num_proc=1"]
    done = run("inspect_data.py", *given, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["record"] for row in found] == [0, 1] and "pairs" in done.stderr
    tokenizer = make_tokenizer()
    for row, record in zip(rows, found, strict=True):
        assert record["dataset"] == str(tmp_path / "rows.jsonl")
        assert record["prompt"] == {"text": row["prompt"], "ids": tokenizer(row["prompt"])["input_ids"]}
        for response in record["responses"]:
            assert tokenizer.decode(response["ids"]) == response["text"]
            assert len(response["loss_mask"]) == len(response["ids"])
    texts = [[response["text"].removesuffix("<|eos|>") for response in record["responses"]] for record in found]
    said = {(texts[1][a], texts[1][b]) for a, b in found[1]["pairs"]}
    assert said == {(" a poem", " wide"), (" green", " wide")}
    [long] = [response for response in found[0]["responses"] if human in response["text"]]
    counted = tokenizer.decode([i for i, counts in zip(long["ids"], long["loss_mask"], strict=True) if counts])
    assert counted == " It is. Rivers.<|eos|>" and all(found[1]["responses"][0]["loss_mask"])
    plain = run("inspect_data.py", *given[1:], folder=tmp_path)
    assert "<<" in plain.stdout and f">>{human.split()[0]}" not in plain.stdout
    for wrong, message in (("n=x", "whole number"), ("max_lenght=3", "did you mean"), ("split=all", "split='all'")):
        refused = run("inspect_data.py", *given, wrong, folder=tmp_path)
        assert refused.returncode == 1 and message in refused.stderr and "Traceback" not in refused.stderr
