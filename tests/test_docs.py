"""Documents that are written by programs are what these programs write."""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("program", ["make_losses", "make_names"])
def test_tables_are_those_of_the_code(program: str) -> None:
    code = f"import {program} as made, sys; sys.exit(made.FILE.read_text(encoding='utf-8') != made.text())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docs", timeout=100)
    assert done.returncode == 0, f"a table is old: run python docs/{program}.py"
