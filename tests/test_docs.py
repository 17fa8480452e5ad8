"""Documents that are written by programs are what these programs write."""

import subprocess
import sys

from conftest import ROOT


def test_the_table_of_losses_is_that_of_the_code() -> None:
    code = "import make_losses, sys; sys.exit(make_losses.FILE.read_text(encoding='utf-8') != make_losses.text())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docs", timeout=100)
    assert done.returncode == 0, "docs/losses.md is old: run python docs/make_losses.py"
