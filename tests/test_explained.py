"""python train.py --help."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from dpo.explained import GROUPS, comments, help_text
from settings import all_keys

QUICK = ("chat", "compare", "export", "inspect_data", "judge", "plan", "report", "rounds", "sample", "score")
KEYS = [key for keys in GROUPS.values() for key in keys]


def test_the_twenty_keys_that_matter_are_explained_by_their_comments() -> None:
    text = help_text(ROOT / "config")
    words = " ".join(text.split())
    assert len(KEYS) == 20 == len(set(KEYS)) and set(KEYS) <= set(all_keys())
    main = comments(ROOT / "config/config.yaml")
    for key in KEYS:
        assert re.search(rf"(^  |, ){re.escape(key)}\b", text, re.M), key
        if key in main:
            assert main[key][1] and " ".join(main[key][1].split()) in words
    assert "Strength of the pull to the reference" in words and "a policy.pt of the original code" in words
    assert "datasets=[hh]" in words and "smollm2" in words and "config/config.yaml" in words
    assert max(map(len, text.splitlines())) <= 120


def test_comments_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "# Of the file.\n\n# (new) Two\n# lines.\na: 1\nb: ${a}\n\nc:\n- x\n- y\n\n# D.\nd:\n  e: 2\n"
    )
    expected = {
        "a": (1, "Two lines."),
        "b": ("${a}", "Two lines."),
        "c": (["x", "y"], ""),
        "d": ({"e": 2}, "D."),
        "d.e": (2, "D."),
    }
    assert comments(tmp_path / "a.yaml") == expected


@pytest.mark.parametrize("command", ["train.py", *(f"scripts/{name}.py" for name in QUICK)])
def test_help_imports_no_torch(command: str, tmp_path: Path) -> None:
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    given = [sys.executable, command, "--help"]
    done = subprocess.run(
        given, cwd=ROOT, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 0 and "imported" not in done.stderr and len(done.stdout) > 200, done.stderr
