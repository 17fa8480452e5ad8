"""What this installation has: versions, devices, disk; and whether it can train. Attach it to a report of a fault.

    python scripts/doctor.py

Nothing is sent anywhere, and no secret is printed. The exit code is 1 if something is wrong.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch

import dpo
from dpo.utils import ROOT, UserError, default_cache, get_local_dir, n_cores
from settings import load_config
from utils import HelpFormatter, run_main

ENVIRONMENT = ("HF_HUB_OFFLINE", "WANDB_MODE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "NCCL_DEBUG")


def versions(requirements: Path) -> Iterator[tuple[str, bool]]:
    """Yield (a line about a pinned package, whether it is the pinned version)."""
    for name, pinned in re.findall(r"^([\w.-]+)==(\S+)", requirements.read_text(encoding="utf-8"), re.MULTILINE):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        fits = found.partition("+")[0] == pinned  # torch 2.13.0+cpu
        yield f"{name} {found}" + ("" if fits else f" (tested with {pinned}: make setup)"), fits


def devices() -> Iterator[str]:
    """Yield a line about each device that models can train on."""
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        free, _ = torch.cuda.mem_get_info(i)
        yield f"GPU {i}: {facts.name}, {facts.total_memory / 2**30:.1f} GiB, {free / 2**30:.1f} free"
    if torch.backends.mps.is_available():
        yield "Apple GPU"
    memory = psutil.virtual_memory()
    yield f"CPU: {n_cores()} cores, {memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} free"


def commit() -> str:
    """Return the commit of the project's folder, or that it is not known."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not known"


def folders() -> Iterator[tuple[str, bool]]:
    """Yield (a line about a folder, whether it can be written) for caches and runs."""
    for what, path in (("caches", default_cache()), ("runs", get_local_dir([str(ROOT / "runs")]))):
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        writable = os.access(there, os.W_OK)
        free = shutil.disk_usage(there).free / 2**30
        yield f"{what}: {path}, {free:.1f} GiB free" + ("" if writable else ", NOT writable"), writable


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter).parse_args()
    print(f"dpo {dpo.__version__}, commit {commit()}")
    print(f"Python {platform.python_version()}, {platform.platform()}")
    found = [*versions(ROOT / "requirements.txt"), *folders()]
    for line in [*(line for line, _ in found), *devices()]:
        print(line)
    print(f"torch: CUDA {torch.version.cuda or 'none'}, processes by {backends()}")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None)
    print(f"C++ compiler (for compile=true on CPUs): {compiler or 'none'}")
    print("environment:", ", ".join(f"{key}={os.environ[key]}" for key in ENVIRONMENT if key in os.environ) or "-")
    wrong = [line for line, fits in found if not fits]
    try:
        load_config(["exp_name=doctor", "loss=sft"])
    except UserError as error:
        wrong.append(f"train.py refuses its defaults: {error}")
    if wrong:
        raise UserError("this installation differs from the tested one:\n" + "\n".join(wrong))
    print("all is as tested")


def backends() -> str:
    """Return what processes can talk by."""
    names = [name for name in ("nccl", "gloo", "mpi") if getattr(torch.distributed, f"is_{name}_available")()]
    return ", ".join(names) or "nothing"


if __name__ == "__main__":
    run_main(main)
