"""Say before a run what it needs: python scripts/plan.py [--gpu H100] [--processes 8] KEY=VALUE ... (as for train.py)

The run's own training step computes its own batches on a GPU without memory and arithmetic (torch's fake tensors), with
the processes of a group that does not exist. So no GPU is needed, and no weights: of the model only its configuration.
Printed are memory by phase and kind, operations, traffic and waits of an update, an estimate of its time, and advice.
Not planned: evaluations and samples, torch.compile (ignored), fragmentation of memory, quantised weights, experts,
tensor parallelism. The time takes all GPUs for linked as those of one machine are.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dpo.hardware import DEVICES, GiB
from dpo.utils import UserError
from options import take_overrides
from utils import HelpFormatter, run_main


def read_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--gpu", choices=[*DEVICES], default="H100", help="the GPU to plan for")
    parser.add_argument(
        "--processes", type=int, help="GPUs of all machines, unless trainer=BasicTrainer; else nproc, or 8"
    )
    parser.add_argument("--no-advice", action="store_true", help="do not look for better settings, which takes longer")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.usage = "%(prog)s [options] KEY=VALUE ..."
    others, overrides = take_overrides(sys.argv[1:])
    arguments = parser.parse_args(others)
    if arguments.processes is not None and arguments.processes < 1:
        raise UserError(f"--processes {arguments.processes} must be at least 1")
    return arguments, overrides


if __name__ == "__main__":
    run_main(read_arguments)  # before the slow imports: --help and mistakes are answered at once

from dpo.plan.planning import Planned, Planner
from dpo.plan.tracker import KINDS
from settings import load_config
from trainers import planner


def as_text(found: Planned, plan: Planner, name: str) -> str:
    """Return the plan for people."""
    kinds = [kind for kind in KINDS if any(kind in phase for phase in found.memory.values())]
    rows = [["phase", *kinds, "together"]]
    for phase, sizes in found.memory.items():
        cells = [sizes.get(kind, 0) for kind in kinds]
        rows.append([phase, *(f"{size / GiB:.2f}" for size in (*cells, sum(cells)))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    fits = "fits" if plan.fits(found) else "DOES NOT FIT"
    trained = f" ({found.trained / 1e6:.1f}M trained)" if found.trained != found.parameters else ""
    sent = {call: n for call, n in found.collectives.items() if call != "wait_tensor"}
    traffic = ", ".join(f"{n} {call.strip('_')} ({found.traffic[call] / 1e9:.2f} GB)" for call, n in sent.items())
    hours = f"{found.hours:.1f} h" if found.hours >= 1 else f"{found.hours * 60:.1f} minutes"
    waits = ", ".join(f"{n} x {where}" for where, n in found.waits.items())
    return "\n".join(
        [
            f"{found.parameters / 1e9:.2f}B parameters{trained} on {found.processes} x {name}",
            "memory of a GPU in GiB, when most of it is in use:",
            *table,
            f"peak {found.peak / GiB:.1f} GiB of {plan.usable / GiB:.1f} that may be used: {fits}",
            f"largest update: {found.passes} passes of up to {found.tokens} tokens, {found.tflop:.1f} TFLOP, "
            f"{found.kernels} kernels, {found.moved / 1e9:.0f} GB moved; {found.useful:.2f} of the work is useful",
            f"traffic: {traffic or 'none'}",
            f"the host waits for the GPU: {waits or 'never'}",
            f"estimate, not measured: {found.seconds:.2f} s for that update, {hours} for {found.updates} updates",
        ]
    )


def main() -> None:
    arguments, overrides = read_arguments()
    given = [] if any(override.startswith("exp_name=") for override in overrides) else ["exp_name=plan"]
    config = load_config([*given, *overrides])
    with contextlib.redirect_stdout(sys.stderr):
        plan = planner(config, DEVICES[arguments.gpu], arguments.processes or config.nproc or 8)
        if config.microbatch_tokens == "auto":
            config = dataclasses.replace(config, **plan.limits(config))
        found = plan(config)
    lines = () if arguments.no_advice else plan.advice(config, found, arguments.gpu)
    if arguments.json:
        facts = {"gpu": arguments.gpu, "peak": found.peak, "usable": int(plan.usable)}
        facts |= {"microbatch_tokens": config.microbatch_tokens}
        print(json.dumps({**dataclasses.asdict(found), **facts, "advice": [*lines]}))
        return
    print(as_text(found, plan, arguments.gpu), flush=True)
    for line in lines:
        print(f"advice: {line}", flush=True)


if __name__ == "__main__":
    run_main(main)
