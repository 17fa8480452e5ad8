"""docs/notebook.ipynb runs, with a tiny model in place of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, tiny_overrides

CELLS = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_the_notebook_is_short_and_holds_no_results() -> None:
    assert 8 <= len(CELLS) <= 13 and not [cell for cell in CODE if cell["outputs"] or cell["execution_count"]]
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in CODE) == 1


@pytest.mark.full
def test_the_notebook_runs(tiny_model_dir: Path, pairs_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    own = tiny_overrides(tiny_model_dir, pairs_dir, cache_dir, tmp_path)
    own = [item for item in own if not item.startswith(("exp_name=", "local_run_dir=", "datasets="))]
    own += ["n_eval_examples=8", "n_examples=16", "eval_every=8", "lr=1e-3", "sample_during_eval=false"]
    parts = []
    for cell in CODE:
        parts.append("".join(cell["source"]))
        if "parameters" in cell["metadata"].get("tags", []):
            parts.append(
                f"from pathlib import Path\nfolder, pairs, common = Path({str(tmp_path)!r}), {str(pairs_dir)!r}, {own}"
            )
    parts.append("assert len(axes[1].lines) == 2 and len(axes[1].lines[0].get_xdata()) == 3; print('all', len(scores))")
    program = tmp_path / "notebook.py"
    program.write_text("\n\n".join(parts))
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    command = [sys.executable, str(program)]
    done = subprocess.run(command, cwd=ROOT / "docs", env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.endswith("all 3\n"), done.stdout + done.stderr
    assert "margin: " in done.stdout and done.stdout.count("\nThe film was") == 3
    assert {"sft", "dpo-0.05", "dpo-0.5"} <= {folder.name for folder in tmp_path.iterdir()}
