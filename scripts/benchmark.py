"""Measure the project's claims on this machine and write them, with hardware and versions, into benchmarks/.

    python scripts/benchmark.py dpo      pairs per second of the original's formulation, and with each of our ideas
    python scripts/benchmark.py data     160,800 HH-like pairs: time and memory to tokenise, and to start again
    python scripts/benchmark.py start    host memory of 4 processes while FSDPTrainer loads the embedded 135M model

`dpo` computes the same global batch in each way in turn, in one process, and checks that all give the same loss and
gradient: on the embedded model unless overrides say otherwise. `--sweep` does so for four betas as a whole.

`data` writes a file of synthetic dialogues with HH's token lengths, then loads it in fresh processes: once with an
empty cache, then `--repeats` times with what the first left. Memory is the proportional set size (PSS) summed over the
loading process and its workers, sampled every 0.1 s: pages that processes share count once. (Elsewhere than
on Linux it is RSS, which counts them each time.)

`start` (Linux) measures all processes in the same way, from the moment when they have imported everything and joined
their group (the interpreters' own memory) to the moment when the policy is loaded and every weight has been written to
once, as the first update does (until then weights are pages of their file). Pages of files are listed apart.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil

from utils import UserError, run_main

PACKAGES = ("torch", "transformers", "datasets", "pyarrow", "tokenizers", "numpy", "trl")
WORDS = """
    the a of and to in is that it for you was with on as are have be at or from can this what how would people think
    make time know just about which their will some could other into more very your like because should really
    good question help want need something different probably important information recipe garden weather travel
    history computer language favourite neighbour understand difficult possible interesting sometimes
""".split()


def machine() -> dict[str, str]:
    """What a measurement depends on besides the code."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "processor": f"{cpu}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES if find_spec(name)),
        "commit": (commit.stdout.strip() or "none") + (" with changes" if dirty else ""),
        "date": datetime.date.today().isoformat(),
    }


def write_dialogues(path: Path, n: int) -> None:
    """`n` rows of chosen and rejected dialogues. Word counts follow HH: prompts have a mean of 125 tokens and a median
    of 98, chosen replies 41 and rejected 51 on average."""
    rng = random.Random(0)

    def text(mean: float, spread: float) -> str:
        return " ".join(rng.choices(WORDS, k=max(1, min(600, round(rng.lognormvariate(mean, spread))))))

    with open(path, "w", encoding="utf-8") as file:
        for i in range(n):
            prompt = f"\n\nHuman: ({i}) {text(4.4, 0.75)}?\n\nAssistant:"
            row = {"chosen": f"{prompt} {text(3.3, 0.9)}.", "rejected": f"{prompt} {text(3.5, 0.9)}."}
            file.write(json.dumps(row) + "\n")


def load_once(source: Path, cache: Path, num_proc: int) -> None:
    """What the measured process does: load as train.py would, and print times and counts as JSON."""
    started = time.perf_counter()
    from models import load_tokenizer
    from preference_datasets import load_data
    from settings import data_settings, load_config

    config = load_config(
        [
            "exp_name=benchmark",
            "model=smollm2",
            "loss=dpo",
            "loss.beta=0.1",
            f"datasets=[{source}]",
            f"cache_dir={cache}",
            f"num_proc={num_proc}",
            "holdout_fraction=0",
        ]
    )
    tokenizer = load_tokenizer(config)
    imported = time.perf_counter()
    data = load_data(data_settings(config), tokenizer, "train")
    loaded = time.perf_counter()
    sampled = range(0, len(data), max(len(data) // 2000, 1))
    records = [data[i] for i in sampled]
    result = {
        "imports and tokenizer (s)": imported - started,
        "load_data (s)": loaded - imported,
        "one record (ms)": 1000 * (time.perf_counter() - loaded) / len(records),
        "pairs": int(data.n_examples.sum()),
        "mean tokens of a prompt": statistics.fmean(len(r.prompt) for r in records),
        "mean tokens of a response": statistics.fmean(len(x) for r in records for x in r.responses),
    }
    print(json.dumps(result))


def peak_memory(process: subprocess.Popen[str]) -> float:
    """Largest sum of PSS over `process` and its children while it runs, in GiB."""

    peak = 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        try:
            members = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        for member in members:
            try:
                memory = member.memory_full_info()
                total += getattr(memory, "pss", memory.rss)  # PSS is Linux's
            except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                continue
        peak = max(peak, total)
        time.sleep(0.1)
    return peak / 2**30


def measured_load(source: Path, cache: Path, num_proc: int) -> dict[str, float]:
    command = [sys.executable, __file__, "load", str(source), str(cache), "--num-proc", str(num_proc)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = peak_memory(process)
    output = process.communicate()[0].strip().splitlines()
    if process.returncode or not output:
        raise UserError("the measured process failed; see above")
    return {**json.loads(output[-1]), "peak memory (GiB)": peak}


def benchmark_data(rows: int, repeats: int, num_proc: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "train.jsonl"
        print(f"writing {rows} dialogues", flush=True)
        write_dialogues(source, rows)
        size = source.stat().st_size / 2**20
        warm_up = Path(folder) / "few.jsonl"  # converts the embedded model, which is no part of the data
        write_dialogues(warm_up, 10)
        measured_load(warm_up, Path(folder) / "cache", num_proc)
        runs = [measured_load(source, Path(folder) / "cache", num_proc) for _ in range(1 + repeats)]
    first, later = runs[0], {key: statistics.median(run[key] for run in runs[1:]) for key in runs[1]}
    method = (
        f"`python scripts/benchmark.py data --rows {rows} --repeats {repeats} --num-proc {num_proc}`; the method "
        "stands in the script. Second start: the median of the repeats."
    )
    facts = {"input": f"{rows} HH-like pairs, {size:.0f} MiB of JSON lines, default max_length 512"}
    table = [["", "first start", "second start"]]
    table += [[key, f"{first[key]:.4g}", f"{later[key]:.4g}"] for key in first if key != "pairs"]
    write_table(
        "data", "Data pipeline", method, facts, [*table, ["pairs", str(first["pairs"]), f"{later['pairs']:.0f}"]]
    )


def load_sharded(overrides: list[str], marks: str) -> None:
    """What each process of `start` does: join, wait, load, wait; the main one leaves marks for the observer."""
    import parallel
    import trainers
    from models import load_policy, pick_device, quiet_transformers
    from settings import load_config

    config = load_config(overrides)
    quiet_transformers()
    device = pick_device(config)
    with parallel.group(device):
        sharding = trainers.FSDPTrainer.sharding(config)
        parallel.build_mesh(sharding, device)
        for mark in ("ready", "loaded"):
            policy = load_policy(config, device, sharding) if mark == "loaded" else None
            for parameter in policy.parameters() if policy else ():
                parallel.local(parameter.detach()).mul_(1)
            parallel.gather(0)
            if parallel.is_main():
                (Path(marks) / mark).touch()
            time.sleep(3)


def memory_by_kind(processes: Sequence[psutil.Process]) -> tuple[float, float]:
    """(PSS without files, PSS of mapped files) in MiB over `processes`."""
    total = {"Pss_Anon": 0.0, "Pss_Shmem": 0.0, "Pss_File": 0.0}
    for process in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                name = line.partition(":")[0]
                if name in total:
                    total[name] += int(line.split()[1]) / 1024
    return total["Pss_Anon"] + total["Pss_Shmem"], total["Pss_File"]


def benchmark_start(n: int) -> None:
    from models import load_policy, pick_device
    from settings import load_config

    overrides = ["exp_name=benchmark", "model=smollm2", "trainer=FSDPTrainer", "device=cpu"]
    config = load_config(overrides)
    whole = load_policy(config, pick_device(config))  # converts the embedded model, if this has not been done
    copy = sum(p.numel() * p.element_size() for p in whole.parameters()) / 2**20
    del whole
    with tempfile.TemporaryDirectory() as marks:
        command = [sys.executable, __file__, "workers", marks, str(n), *overrides]
        job = subprocess.Popen(command)
        before: list[tuple[float, float]] = []
        after: list[tuple[float, float]] = []
        while job.poll() is None:
            found = memory_by_kind(psutil.Process(job.pid).children())
            (after if (Path(marks) / "ready").exists() else before).append(found)
            if len(after) == 1:
                before.append(found)
            time.sleep(0.02)
    if job.returncode or not after:
        raise UserError("the measured processes failed; see above")
    own_memory, own_files = before[-1]
    peak, files = max(memory for memory, _ in after), max(files for _, files in after)
    table = [
        [f"{n} processes, SmolLM2-135M in float32", "MiB", "copies of the weights"],
        ["one copy of the weights", f"{copy:.0f}", "1"],
        ["interpreters' own, all processes", f"{own_memory:.0f}", ""],
        ["peak beyond that, all processes", f"{peak - own_memory:.0f}", f"{(peak - own_memory) / copy:.2f}"],
        ["cached pages of files beyond those before", f"{files - own_files:.0f}", f"{(files - own_files) / copy:.2f}"],
    ]
    method = f"`python scripts/benchmark.py start --nproc {n}`; the method stands in the script."
    write_table("start", "Host memory at the start", method, {}, table)


def write_table(name: str, title: str, method: str, facts: dict[str, str], rows: Sequence[Sequence[str]]) -> None:
    """Write benchmarks/<name>.md: how it was measured, on what, and a table whose first row is its head."""
    described = {**machine(), **facts}
    lines = [f"# {title}", "", method, "", *(f"- {key}: {value}" for key, value in described.items()), ""]
    lines += [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    target = ROOT / "benchmarks" / f"{name}.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(lines) + "\n")
    print("\n".join(lines), f"\nwritten to {target}")


def benchmark_dpo(arguments: argparse.Namespace) -> None:
    import speed
    from settings import load_config

    given = ["exp_name=benchmark", "loss=dpo", "loss.beta=0.1", "n_eval_examples=0", *arguments.overrides]
    own = speed.resident()
    work = speed.prepare(load_config(given), arguments.pairs, arguments.micro)
    if arguments.memory:
        print(speed.step_memory(work, arguments.memory) - (own if work.policy.device.type == "cpu" else 0))
        return
    peaks = {name: measured_peak(name, arguments) for name in (speed.ORIGINAL, speed.OURS)}
    steps = speed.sweeps(work, (0.05, 0.1, 0.3, 1.0)) if arguments.sweep else speed.variants(work)
    steps = {name: step for name, step in steps.items() if not arguments.only or name in arguments.only.split(",")}
    exact = 1e-4 if work.config.compute_dtype.itemsize == 4 else 0.05
    seconds = speed.compare(work, steps, arguments.repeats, exact)
    base = statistics.median(next(iter(seconds.values())))
    pairs = arguments.pairs * (4 if arguments.sweep else 1)
    rows = [["", "seconds", "pairs/s", "ratio to the original", "peak of one micro-batch, MiB"]]
    for name, times in seconds.items():
        median = statistics.median(times)
        peak = f"{peaks[name]:.0f}" if name in peaks else ""
        rows.append([name, f"{median:.1f}", f"{pairs / median:.3f}", f"{base / median:.2f}", peak])
    counts = speed.tokens(work)
    facts = {
        "model": f"{Path(work.config.model.name_or_path).name}, {work.config.compute_dtype} on {work.policy.device}",
        "work": f"{arguments.pairs} pairs of {', '.join(Path(name).name for name in work.config.datasets)}"
        + (", once for each of four betas" if arguments.sweep else ""),
        "tokens": ", ".join(f"{value} {key}" for key, value in counts.items())
        + f"; of ours {counts['distinct'] / counts['ours']:.3f} are distinct",
    }
    name = arguments.name or ("sweep" if arguments.sweep else "dpo")
    command = f"python scripts/benchmark.py {' '.join(sys.argv[1:])}"
    method = (
        f"`{command}`; medians of {arguments.repeats} runs in turn; all gave the same loss and gradient (relative "
        f"{exact:g}). The original's micro-batches have {arguments.micro} pairs, ours up to "
        f"{work.config.microbatch_tokens} tokens. `{speed.OURS}` counts the time to compute it."
    )
    write_table(name, "Speed of DPO", method, facts, rows)


def measured_peak(name: str, arguments: argparse.Namespace) -> float:
    """Peak memory of one micro-batch in a process of its own, beyond that of the interpreter."""
    few = ["--pairs", str(arguments.micro), "--micro", str(arguments.micro), "--memory", name]
    command = [sys.executable, __file__, "dpo", *few, *arguments.overrides, "microbatch_tokens=null"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError("the measured process failed; see above")
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    dpo = commands.add_parser("dpo", help="speed of a DPO step, and of a sweep")
    dpo.add_argument("--pairs", type=int, default=64)
    dpo.add_argument("--micro", type=int, default=8, help="pairs of the original's micro-batches")
    dpo.add_argument("--repeats", type=int, default=3)
    dpo.add_argument("--sweep", action="store_true", help="time four betas as a whole")
    dpo.add_argument("--only", help="comma-separated names of what to time, as in the table; the first is the base")
    dpo.add_argument("--name", help="of the file in benchmarks/")
    dpo.add_argument("--memory", help=argparse.SUPPRESS)
    dpo.add_argument("overrides", nargs="*", help="of the configuration: model=..., datasets=[...], device=...")
    data = commands.add_parser("data", help="tokenise and reload a training set")
    data.add_argument("--rows", type=int, default=160_800)
    data.add_argument("--repeats", type=int, default=3)
    load = commands.add_parser("load", help="the process that `data` measures")
    load.add_argument("source", type=Path)
    load.add_argument("cache", type=Path)
    start = commands.add_parser("start", help="host memory while processes load a model")
    start.add_argument("--nproc", type=int, default=4)
    workers = commands.add_parser("workers", help="the job that `start` measures")
    workers.add_argument("marks")
    workers.add_argument("n", type=int)
    workers.add_argument("overrides", nargs="*")
    for command in (data, load):
        command.add_argument("--num-proc", type=int, default=0, help="tokenising processes; 0: one per core")
    arguments = parser.parse_args()
    for name in ("rows", "repeats", "pairs", "micro"):
        if getattr(arguments, name, 1) < 1:
            raise UserError(f"--{name} must be at least 1")
    if arguments.command == "load":
        load_once(arguments.source, arguments.cache, arguments.num_proc)
    elif arguments.command == "workers":
        import parallel

        parallel.launch(load_sharded, (arguments.overrides, arguments.marks), arguments.n, None)
    elif arguments.command == "start":
        benchmark_start(arguments.nproc)
    elif arguments.command == "dpo":
        benchmark_dpo(arguments)
    else:
        benchmark_data(arguments.rows, arguments.repeats, arguments.num_proc)


if __name__ == "__main__":
    run_main(main)
