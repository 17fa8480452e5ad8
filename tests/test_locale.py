"""Text and paths outside ASCII under locales and terminals that cannot show them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, read_jsonl

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ENVIRONMENTS = {
    "C locale": ASCII,
    "latin-1 terminal": {"PYTHONIOENCODING": "latin-1"},
}


@pytest.mark.full
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_commands_work_in_any_locale(name: str, overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "é 日本"
    folder.mkdir()
    rows = [{"prompt": f"Où {i}? ", "chosen": f" Zürich — 日本 {i}", "rejected": f" Ñandú {7 * i}"} for i in range(30)]
    data = folder / "données.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}

    def run(script: str, *arguments: object) -> str:
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        environment = {**inherited, "OMP_NUM_THREADS": "1", **ENVIRONMENTS[name]}
        done = subprocess.run(command, env=environment, capture_output=True, cwd=tmp_path, timeout=120)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done
        assert (done.stdout + done.stderr).decode("latin-1" if "latin" in name else "ascii")
        return done.stdout.decode("latin-1")

    given = overrides(f"local_run_dir='{folder / 'run'}'", f"cache_dir='{folder / 'cache'}'", f"datasets=['{data}']")
    run("train.py", *given, "loss=dpo", "loss.beta=0.1", "n_examples=8", "batch_size=8")
    config = yaml.safe_load((folder / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert config["datasets"] == [str(data)]
    run("scripts/score.py", folder / "run", "--data", data, "--out", folder / "s.jsonl", "device=cpu")
    scored = read_jsonl(folder / "s.jsonl")
    assert sorted(row["responses"][0]["text"] for row in scored) == sorted(row["chosen"] for row in rows)
    run("scripts/report.py", folder / "run", "--out", folder / "report")
    shown = run("scripts/inspect_data.py", *given, "n=1")
    assert ("ü" if "latin" in name else r"\xfc") in shown
