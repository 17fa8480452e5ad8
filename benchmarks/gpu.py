"""Measure on one CUDA GPU what a CPU cannot show, and write it into benchmarks/gpu.md: about 25 minutes on an H100.

    python benchmarks/gpu.py

Each stage is a process with a time limit; 25 minutes is the sum of the limits. Its result is written into --folder when
it is done. Run it again to resume: stages that finished on this GPU are not repeated, others are. A failed stage does
not stop the others; the exit code is then 1. What a stage prints is in <folder>/<stage>.log. To repeat a stage, remove
<folder>/<stage>.json. The stages stand in gpu_stages.py.
"""

import argparse
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch

from benchmark import machine
from dpo.files import atomic_write
from dpo.tables import markdown
from dpo.utils import UserError, make_dir
from utils import HelpFormatter, run_main

# Functions of gpu_stages.py, in this order, and their limits in seconds.
LIMITS = {
    "tests": 120,
    "correctness": 120,
    "waits": 120,
    "dpo_embedded": 150,
    "dpo_1b": 210,
    "plan_1b": 180,
    "mfu_1b": 120,
    "mfu_8b": 270,
    "sampling": 90,
    "optimizers": 120,
}
TINY = "cpu, tiny"


def gpu_name() -> str:
    """Return the GPU's name and memory. Raise UserError if there is none."""
    if not torch.cuda.is_available():
        raise UserError("no CUDA device: this measures one GPU. On a CPU, --tiny only tries the stages out")
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{torch.cuda.get_device_name()}, {memory:.1f} GiB, CUDA {torch.version.cuda}"


def run_stage(command: list[str], limit: float, out: Path, log: Path) -> dict[str, Any]:
    """Run the command of a stage, which writes its result to `out`. Return the result, or {"error": why there is none}.

    After `limit` seconds the command is killed, with the processes that it started.
    """
    out.unlink(missing_ok=True)
    with open(log, "wb") as output:
        options: Any = {"stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, cwd=ROOT, **options)
        try:
            code = process.wait(limit)
        except BaseException as error:  # Ctrl-C among them
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return {"error": f"killed: it took longer than its {limit:g} s"}
            raise
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    if code < 0:
        return {"error": f"killed by signal {-code}"}
    if code or not out.exists():
        return {"error": next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}")}
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    out.unlink()
    return found


def is_done(result: Mapping[str, Any], place: str) -> bool:
    """Return whether a stage has finished at this place, and all was as it should be."""
    return result.get("place") == place and not (result.get("error") or result.get("problems"))


def run_all(
    limits: Mapping[str, float], command: Callable[[str], list[str]], folder: Path, place: str
) -> dict[str, dict[str, Any]]:
    """Run the stages that are not done, `command(stage)` each. Return all results; each is written to `folder` at once,
    and the report after each."""
    results: dict[str, dict[str, Any]] = {}
    for name, limit in limits.items():
        file = folder / f"{name}.json"
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if not is_done(found, place):
            print(f"{name}, up to {limit:g} s", flush=True)
            start = time.perf_counter()
            found = {"place": place, "machine": machine()}
            found |= run_stage(command(name), limit, folder / f".{name}", folder / f"{name}.log")
            found |= {"seconds": time.perf_counter() - start}
            atomic_write(file, json.dumps(found, indent=1))
        results[name] = found
        print(f"{name}: {outcome(found)}", flush=True)
        atomic_write(folder / "gpu.md", report(results, limits))
    return results


def outcome(result: Mapping[str, Any]) -> str:
    """Return how a stage ended, in a line."""
    if result.get("error"):
        return f"FAILED: {result['error']}"
    if result.get("problems"):
        return f"FAILED: {'; '.join(result['problems'])}"
    return f"skipped: {result['skipped']}" if result.get("skipped") else "done"


def report(results: Mapping[str, Mapping[str, Any]], limits: Mapping[str, float]) -> str:
    """Return the page. Its head is of the last stage; a stage of another commit or machine says so."""
    *_, last = results.values()
    head, tiny = {"GPU": last["place"], **last["machine"]}, last["place"] == TINY
    lines = ["# One GPU", "", "`python benchmarks/gpu.py`; random seeds are fixed, each stage is a process."]
    lines += ["Updates are those of a run: `trainers.py`, `train_step`. Memory is torch.cuda.max_memory_allocated.", ""]
    lines += ["TINY, ON A CPU: only tries the stages out, on a small model. Nothing here is a measurement.", ""] * tiny
    lines += [*(f"- {key}: {value}" for key, value in head.items()), ""]
    waiting = [[name, "not run yet", ""] for name in limits if name not in results]
    ended = [[name, outcome(r).replace("|", r"\|"), f"{r['seconds']:.0f}"] for name, r in results.items()]
    lines += markdown([["stage", "outcome", "seconds"], *ended, *waiting])
    for name, result in results.items():
        other = {"GPU": result["place"], **result["machine"]}.items()
        differs = [f"- {key}: {value}" for key, value in other if value != head[key]]
        lines += ["", f"## {name}", *([""] if differs else []), *differs]
        lines += ["", result.get("method", "No result.")]
        lines += ["", result["note"]] if result.get("note") else []
        lines += ["", *markdown(result["table"])] if result.get("table") else []
    return "\n".join(lines) + "\n"


def work(name: str, folder: Path, tiny: bool) -> None:
    """Be a stage's process. The last line that it prints says what failed."""
    import gpu_stages

    stage = getattr(gpu_stages, name)
    try:
        found = stage(gpu_stages.Setting(folder, tiny))
    except Exception as error:
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    atomic_write(folder / f".{name}", json.dumps({"method": inspect.getdoc(stage), **asdict(found)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    default = Path("gpu_day")
    parser.add_argument("--folder", type=Path, default=default, help="of results, logs and caches")
    parser.add_argument("--tiny", action="store_true", help="try the stages out on the CPU; nothing is measured")
    parser.add_argument("--stage", choices=LIMITS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if arguments.stage:
        return work(arguments.stage, folder, arguments.tiny)
    place = TINY if arguments.tiny else gpu_name()
    make_dir(folder, "--folder")
    own = [sys.executable, "-u", __file__, "--folder", str(folder), *(["--tiny"] if arguments.tiny else [])]
    results = run_all(LIMITS, lambda name: [*own, "--stage", name], folder, place)
    if not arguments.tiny:
        shutil.copy(folder / "gpu.md", ROOT / "benchmarks" / "gpu.md")
    print(f"written to {folder / 'gpu.md'}")
    if not all(is_done(result, place) for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
