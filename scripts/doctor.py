"""What this installation has: versions, devices, disk; and whether it can train. Attach it to a report of a fault.

    python scripts/doctor.py

Nothing is sent anywhere, and no secret is printed. The exit code is 1 if something is wrong.
"""

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import dpo
from dpo.installation import OPTIONAL, checkout, devices, packages, version
from dpo.utils import ROOT, UserError, default_cache, get_local_dir
from settings import load_config
from utils import HelpFormatter, run_main

ENVIRONMENT = ("HF_HUB_OFFLINE", "WANDB_MODE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "NCCL_DEBUG")


def versions(requirements: Path) -> Iterator[tuple[str, bool]]:
    """Yield (a line about a pinned package, whether it is the pinned version)."""
    for name, pinned, installed in packages(requirements):
        fits = (installed or "").partition("+")[0] == pinned  # torch 2.13.0+cpu
        yield f"{name} {installed or 'missing'}" + ("" if fits else f" (tested with {pinned}: make setup)"), fits


def folders() -> Iterator[tuple[str, bool]]:
    """Yield (a line about a folder, whether it can be written) for caches and runs."""
    for what, path in (("caches", default_cache()), ("runs", get_local_dir([str(ROOT / "runs")]))):
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        writable = os.access(there, os.W_OK)
        free = shutil.disk_usage(there).free / 2**30
        yield f"{what}: {path}, {free:.1f} GiB free" + ("" if writable else ", NOT writable"), writable


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter).parse_args()
    print(f"dpo {dpo.__version__}, commit {checkout()}")
    print(f"Python {platform.python_version()}, {platform.platform()}")
    found = [*versions(ROOT / "requirements.txt"), *folders()]
    for line in [*(line for line, _ in found), *devices(free=True)]:
        print(line)
    print("optional:", ", ".join(f"{name} {version(name) or 'missing'}" for name in OPTIONAL))
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
