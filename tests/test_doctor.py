"""scripts/doctor.py: what an installation has."""

import sys
from pathlib import Path

import pytest
import torch

import doctor
from dpo.utils import UserError


def test_this_installation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor.py"])
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    doctor.main()
    said = capsys.readouterr().out
    assert f"torch {torch.__version__}" in said and "CPU: " in said and "processes by gloo" in said
    assert said.endswith("all is as tested\n") and "sk-secret" not in said


def test_other_versions_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "requirements.txt").write_text("# A comment\ntorch==0.1\nno-such-package==2.0\nnumpy>=1\n")
    found = [*doctor.versions(tmp_path / "requirements.txt")]
    assert found[0] == (f"torch {torch.__version__} (tested with 0.1: make setup)", False)
    assert found[1] == ("no-such-package missing (tested with 2.0: make setup)", False) and len(found) == 2
    monkeypatch.setattr(doctor, "versions", lambda path: iter(found))
    monkeypatch.setattr(sys, "argv", ["doctor.py"])
    with pytest.raises(UserError, match=r"differs from the tested one:\ntorch .*\nno-such-package missing"):
        doctor.main()
