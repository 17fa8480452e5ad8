"""What a run shows on the terminal: an evaluation's table, and the block at its end."""

import contextlib
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo.data.sources import TARGETS
from dpo.run.config import Config
from dpo.scoring import LOW_IS_BEST
from dpo.tables import aligned

# Metrics that metrics.jsonl has and a table leaves out. Errors stand beside their means.
LEFT_OUT = re.compile(r"_error$|^(tokens|gradient_weight|chosen_fell|counters)_?|^kl_eval/plain|/reference_")
UNITS = {"logps_per_token": "nats a token", "logps": "nats a response", "kl": "nats a response", "samples": "tokens"}


def evaluation_table(metrics: Mapping[str, float], before: Mapping[str, float], sizes: Mapping[str, int]) -> str:
    """Return an evaluation as a table: its means, their change since the evaluation `before`, of how many examples."""
    rows = [["", "now (± standard error)" if any("_error" in name for name in metrics) else "now", "change", "n"]]
    for name, value in sorted(metrics.items(), key=lambda metric: not metric[0].startswith(("loss", "perplexity"))):
        if not LEFT_OUT.search(name):
            error = metrics.get(f"{name}_error")
            now = f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else "")
            change = f"{value - before[name]:+.3g}" if name in before else "-"
            rows.append([f"{name}{_unit(name)}", now, change, str(sizes[name])])
    return aligned([[f"  {row[0]}", *row[1:]] for row in rows])


def _unit(name: str) -> str:
    group, _, what = name.partition("/")
    unit = UNITS.get(group.removesuffix("_eval"))
    return f" ({unit})" if unit and not what.endswith("_rate") else ""


def closing_block(config: Config) -> str:
    """Return a finished run's last words: its folder, its last and best evaluation, and commands to paste."""
    lines = [f"done: {config.local_run_dir}", *_results(config)]
    if config.debug:
        return "\n".join([*lines, "debug=true: no checkpoint was written"])
    return "\n".join([*lines, "next:", *(f"  {command}" for command in next_commands(config))])


def _results(config: Config) -> list[str]:
    """Return what the run's evaluations found, in a line or two; none if there were none."""
    metric = config.keep_best or "loss/eval"
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(OSError, ValueError):  # on a full disk the file has less
        for line in Path(config.local_run_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows += [row] if "loss/eval" in row else []
    if not rows:
        return []
    names = ("loss/eval", "perplexity/eval", "rewards_eval/accuracies", "rewards_eval/margins")
    last, n = rows[-1], rows[-1]["counters/eval_examples"]
    shown = ", ".join(f"{name} {last[name]:.4g}" for name in names if name in last)
    lines = [f"  last evaluation, after {last['counters/examples']} examples, n={n}: {shown}"]
    if (kl := "kl_eval/rao_blackwell") in last:  # of its samples, which are fewer
        error = last.get(f"{kl}_error")
        lines.append(f"  {kl} {last[kl]:.4g}" + (f" ± {error:.2g} (standard error)" if error is not None else ""))
    rows = [row for row in rows if metric in row]
    if len(rows) > 1:
        sign = 1 if metric.startswith(LOW_IS_BEST) else -1
        best = min(rows, key=lambda row: sign * row[metric])
        lines.append(f"  best {metric}: {best[metric]:.4g}, after {best['counters/examples']} examples")
    return lines


def next_commands(config: Config) -> list[str]:
    """Return what a user may want to do with the finished run, as commands to paste."""
    run = shlex.quote(config.local_run_dir)
    commands = [f"python scripts/report.py {run}", f"python scripts/chat.py {run}"]
    commands.append(f"python scripts/sample.py {run} 'A prompt'")
    if config.loss.rows == TARGETS:
        commands.append(f"python train.py loss=dpo loss.beta=0.1 model.archive={run} <the other settings of this run>")
    elif config.loss.gives_rewards:
        commands.append(f"python scripts/score.py {run}")
    return commands
