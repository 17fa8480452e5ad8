"""Names of runs on the scripts' command lines."""

import time
from pathlib import Path

import pytest

import options
from dpo.utils import UserError


def test_a_name_that_exists_nowhere_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "ROOT", tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    for name in ("hh_dpo_2026-01-02", "hh_dpo_2026-01-01", "hh_sft_2026-01-01"):
        (tmp_path / "project/runs/me" / name).mkdir(parents=True)
    (tmp_path / "own").mkdir()
    for fine in ("own", str(tmp_path / "own"), "openai-community/gpt2", str(tmp_path / "old/policy.pt")):
        options.check_name(fine)
    start = time.perf_counter()
    runs = rf"{tmp_path}/project/runs/me/hh_dpo_2026-01-0\d"
    for name, message in (
        ("hh_dpo", rf"hh_dpo: there is no such folder; did you mean {runs} or {runs}\?; a model of the hub is written"),
        ("hh_sfd_2026-01-01", "did you mean .*hh_sft_2026-01-01"),
        ("ow", r"did you mean own\?"),
        ("own/LATEST", "own/LATEST: there is no such folder$"),
        ("/nowhere/at/all", "/nowhere/at/all: there is no such folder$"),
        ("project/runs/me/hh_dpo_2026-01-03", r"did you mean (project/runs/\S+ or ){2}project/runs/\S+\?$"),
        ("gpt2", "such as openai-community/gpt2"),
        ("name:with", "there is no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            options.check_name(name)
    assert time.perf_counter() - start < 5  # the hub is not asked
