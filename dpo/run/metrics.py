"""Write a run's numbers and samples: files, Weights & Biases, trackio, TensorBoard."""

import contextlib
import io
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpo.files import Lines
from dpo.run.provenance import Provenance
from dpo.utils import TakenOver, is_quiet, log

EVAL_EXAMPLES = "eval_examples.jsonl"
HISTORY = ("metrics.jsonl", "samples.jsonl", EVAL_EXAMPLES)  # files of a run that only grow


class RunLogger:
    """Writes a run's numbers: every event to `metrics.jsonl` and TensorBoard; to W&B and trackio at most one in
    `wandb_interval` seconds.

    `provenance` counts what they cost. `wandb_run`, `trackio_run` and `tensorboard` are open writers or None. No file
    is written before `open`. `check` raises TakenOver if the folder is another process's by now. In processes that
    are quiet it does nothing.
    """

    def __init__(
        self,
        run_dir: Path,
        check: Callable[[], None] = lambda: None,
        wandb_interval: float = 1.0,
        provenance: Provenance | None = None,
    ):
        self.run_dir, self.check, self.wandb_interval = run_dir, check, wandb_interval
        self.provenance = provenance
        self.wandb_run: Any = None
        self.trackio_run: Any = None
        self.tensorboard: Any = None
        self._files: dict[str, Lines] = {}
        self._last_wandb = -math.inf

    def open(self) -> None:
        """Open the metric files."""
        self._files = {} if is_quiet() else {name: Lines(self.run_dir / name) for name in HISTORY}

    def log(self, metrics: Mapping[str, float], step: int, always: bool = False) -> None:
        """Record one event at `step` (examples seen). `always` ignores W&B's interval, as evaluations do."""
        if not self._files:
            return
        self.check()
        # JSON has no infinity, which a gradient norm under loss scaling may be; nothing else gets here non-finite.
        metrics = {name: value for name, value in metrics.items() if name != "grad_norm" or math.isfinite(value)}
        record = {"counters/examples": step, **metrics, "time": round(time.time(), 3)}
        if not self._files["metrics.jsonl"].add(json.dumps(record)):
            log(f"warning: {self.run_dir} is full; metrics wait in memory")
        if self.provenance is not None:
            self.provenance.note(metrics, step)
        if self.tensorboard is not None:
            with contextlib.suppress(OSError):
                for name, value in metrics.items():
                    self.tensorboard.add_scalar(name, value, step)
        if always or time.monotonic() - self._last_wandb >= self.wandb_interval:
            for run in filter(None, (self.wandb_run, self.trackio_run)):
                run.log({"counters/examples": step, **metrics}, step=step)
            self._last_wandb = time.monotonic()

    def samples(self, rows: list[dict[str, Any]], step: int) -> None:
        """Append sampled responses to `samples.jsonl` and to W&B tables, one for each sampled model."""
        if not self._files or not rows:
            return
        self.check()
        for row in rows:
            self._files["samples.jsonl"].add(json.dumps({"counters/examples": step, **row}, ensure_ascii=False))
        if self.wandb_run is None:
            return
        import wandb

        for model in [key for key in rows[0] if key != "prompt"]:
            table = wandb.Table(columns=["step", "prompt", "sample"])
            for row in rows:
                table.add_data(step, row["prompt"], row[model])
            self.wandb_run.log({f"{model}_samples": table}, step=step)

    def eval_examples(self, columns: Mapping[str, list[Any]], step: int) -> None:
        """Append an evaluation's numbers of each example to `eval_examples.jsonl`, one line an evaluation."""
        if self._files:
            self.check()
            self._files[EVAL_EXAMPLES].add(json.dumps({"counters/examples": step, **columns}))

    def history(self) -> dict[str, int]:
        """Return each file's bytes so far, once they are on disk: a run that resumes from here starts with them. Raise
        OSError if the disk refuses."""
        self.check()
        return {name: file.size() for name, file in self._files.items()}

    @property
    def wandb_id(self) -> str | None:
        """W&B's id of the run, under which it can be taken up again."""
        return self.wandb_run.id if self.wandb_run is not None else None

    def close(self, exit_code: int = 0) -> None:
        """Close all writers. Raise TakenOver after that, if the folder is another process's by now."""
        try:
            if self.provenance is not None and not isinstance(sys.exception(), TakenOver):
                self.check()
                self.provenance.end()
        finally:
            for file in self._files.values():
                file.close()
            if self.tensorboard is not None:
                self.tensorboard.close()
            if self.wandb_run is not None:
                self.wandb_run.finish(exit_code=exit_code)
            if self.trackio_run is not None:
                with contextlib.redirect_stdout(io.StringIO()):
                    self.trackio_run.finish()
