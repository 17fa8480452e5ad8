"""Measure the project's claims on this machine and write them, with hardware and versions, into benchmarks/.

    python benchmarks/benchmark.py dpo      pairs per second of the original's formulation, and with each of our ideas
    python benchmarks/benchmark.py data     160,800 HH-like pairs: time and memory to tokenise, and to start again
    python benchmarks/benchmark.py start    host memory of 4 processes while FSDPTrainer loads the embedded 135M model;
                                            CPU time of train.py until its first update

`dpo` computes the same global batch in each way in turn, in one process, and checks that all give the same loss and
gradient: on the embedded model and made-up dialogues with HH's token lengths, unless overrides say otherwise.
`--sweep` does so for four betas as a whole.

`data` writes a file of synthetic dialogues with HH's token lengths, then loads it in fresh processes: once with an
empty cache, then `--repeats` times with what the first left. Memory is the proportional set size (PSS) summed over the
loading process, its workers and multiprocessing's helper, sampled every 0.1 s: pages that processes share count once.
(Elsewhere than on Linux it is RSS, which counts them each time.)

`start` (Linux) measures all processes in the same way, from the moment when they have imported everything and joined
their group (the interpreters' own memory) to the moment when the policy is loaded and every weight has been written to
once, as the first update does (until then weights are pages of their file). Pages of files are listed apart.

It also runs train.py (DPO of 4 pairs in 2 updates, on one core) with an empty cache, then `--repeats` times with what
that run left there. CPU time (user and system, of the process) is read when metrics.jsonl tells of an update; what the
second update took is subtracted from what was spent until the first was done, so what remains is the start.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil

from dpo import parallel
from dpo.installation import checkout, devices, version
from dpo.tables import markdown
from dpo.utils import UserError
from utils import HelpFormatter, run_main

DPO = ["exp_name=benchmark", "loss=dpo", "loss.beta=0.1", "n_eval_examples=0"]
START = ["exp_name=benchmark", "datasets=[sentiment]", "loss=dpo", "loss.beta=0.1", "batch_size=2", "n_examples=4"]
START += ["max_length=64", "max_prompt_length=32", "num_proc=1", "debug=true", "wandb.enabled=false", "device=cpu"]
PACKAGES = ("torch", "transformers", "datasets", "pyarrow", "tokenizers", "numpy", "trl")
WORDS = """
    the a of and to in is that it for you was with on as are have be at or from can this what how would people think
    make time know just about which their will some could other into more very your like because should really
    good question help want need something different probably important information recipe garden weather travel
    history computer language favourite neighbour understand difficult possible interesting sometimes
""".split()


def machine() -> dict[str, str]:
    """What a measurement depends on besides the code."""
    return {
        "processor": "; ".join(devices()),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {found}" for name in PACKAGES if (found := version(name))),
        "commit": str(checkout()),
        "date": datetime.date.today().isoformat(),
    }


@contextlib.contextmanager
def watched(interval: float) -> Iterator[list[tuple[float, float, float]]]:
    """Meanwhile add the time and the `memory_of` all processes below this one to a list, every `interval` seconds."""
    found: list[tuple[float, float, float]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            found.append((time.time(), *memory_of(psutil.Process().children(recursive=True))))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def memory_of(processes: Sequence[psutil.Process]) -> tuple[float, float]:
    """PSS without files, and of mapped files, in MiB over `processes`; elsewhere than on Linux, RSS and 0."""
    anonymous, files = 0.0, 0.0
    for process in processes:
        with contextlib.suppress(OSError, psutil.Error):  # it has ended
            if sys.platform != "linux":
                anonymous += process.memory_info().rss / 2**20
                continue
            found = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8")
            kinds = {kind: int(kib) / 1024 for kind, kib in re.findall(r"Pss_(\w+): +(\d+)", found)}
            anonymous += kinds.get("Anon", 0) + kinds.get("Shmem", 0)
            files += kinds.get("File", 0)
    return anonymous, files


def spread(values: Sequence[float], form: str) -> str:
    """Return the median of `values`, and their range if they differ."""
    low, middle, high = (f"{value:{form}}" for value in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


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


def load_once(source: Path, cache: Path, num_proc: int) -> dict[str, float]:
    """Load as train.py would, in a fresh process: times and counts."""
    started = time.perf_counter()
    from dpo.model.loading import load_tokenizer
    from preference_datasets import load_data
    from settings import data_settings, load_config

    given = ["exp_name=benchmark", "model=smollm2", "loss=dpo", "loss.beta=0.1", "holdout_fraction=0"]
    config = load_config([*given, f"datasets=[{source}]", f"cache_dir={cache}", f"num_proc={num_proc}"])
    tokenizer = load_tokenizer(config)
    imported = time.perf_counter()
    data = load_data(data_settings(config), tokenizer, "train")
    loaded = time.perf_counter()
    records = [data[i] for i in range(0, len(data), max(len(data) // 2000, 1))]
    return {
        "imports and tokenizer (s)": imported - started,
        "load_data (s)": loaded - imported,
        "one record (ms)": 1000 * (time.perf_counter() - loaded) / len(records),
        "mean tokens of a prompt": statistics.fmean(len(r.prompt) for r in records),
        "mean tokens of a response": statistics.fmean(len(x) for r in records for x in r.responses),
        "pairs": int(data.n_examples.sum()),
    }


def measured_load(source: Path, cache: Path, num_proc: int) -> dict[str, float]:
    with watched(0.1) as found:
        result = parallel.apart(load_once, source, cache, num_proc)
    return {**result, "peak memory (GiB)": max(own + files for _, own, files in found) / 1024}


def benchmark_data(arguments: argparse.Namespace) -> None:
    rows, num_proc = arguments.rows, arguments.num_proc
    with tempfile.TemporaryDirectory() as folder:
        source, few, cache = (Path(folder) / name for name in ("train.jsonl", "few.jsonl", "cache"))
        print(f"writing {rows} dialogues", flush=True)
        write_dialogues(source, rows)
        size = source.stat().st_size / 2**20
        write_dialogues(few, 10)
        parallel.apart(load_once, few, cache, num_proc)  # converts the embedded model, which is no part of the data
        first, *others = [measured_load(source, cache, num_proc) for _ in range(1 + arguments.repeats)]
    method = f"the method stands in the script. Second start: the median of {arguments.repeats} and their range."
    facts = {"input": f"{rows} HH-like pairs, {size:.0f} MiB of JSON lines, default max_length 512"}
    table = [["", "first start", "second start"]]
    for key in first:
        form = ".0f" if key == "pairs" else ".4g"
        table.append([key, f"{first[key]:{form}}", spread([other[key] for other in others], form)])
    write_table("data", "Data pipeline", method, facts, table)


def load_sharded(overrides: list[str], ready: Path) -> None:
    """What each process of `start` does: join, say so, load, write to each weight."""
    from dpo import parallel
    from dpo.model.loading import load_policy, pick_device
    from dpo.model.patches import quiet_transformers
    from dpo.parallel.arrange import sharding_of
    from settings import load_config

    config = load_config(overrides)
    quiet_transformers()
    device = pick_device(config)
    with parallel.group(device):
        sharding = sharding_of(config)
        sharding = sharding and sharding.on_mesh(device)
        parallel.gather(0)
        if parallel.is_main():
            ready.touch()
        time.sleep(3)  # for `watched` to see
        policy = load_policy(config, device, sharding)
        for parameter in policy.parameters():
            parallel.local(parameter.detach()).mul_(1)
        parallel.gather(0)
        time.sleep(3)


def cpu_of_start(cache: Path, *overrides: str) -> tuple[float, float]:
    """CPU seconds of train.py until its first update, without that update; and of the second update."""
    with tempfile.TemporaryDirectory() as folder:
        metrics, seconds = Path(folder, "run", "metrics.jsonl"), list[float]()
        given = [*START, f"cache_dir={cache}", f"local_run_dir={metrics.parent}", *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "train.py"), *given]
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
            process = psutil.Process(run.pid)
            while run.poll() is None and len(seconds) < 2:
                time.sleep(0.02)
                used = process.cpu_times()
                done = metrics.read_text(encoding="utf-8").count('"loss/train"') if metrics.exists() else 0
                seconds += [used.user + used.system] * (done - len(seconds))
        if run.returncode or len(seconds) < 2:
            raise UserError(f"this run failed, or was too fast to watch: {' '.join(command)}")
    return 2 * seconds[0] - seconds[1], seconds[1] - seconds[0]


def cpu_table(repeats: int) -> list[list[str]]:
    """The rows of CPU times until the first update."""
    rows = [["CPU time until the first update", "seconds", "the second update"]]
    evaluation = ["n_eval_examples=8", "n_eval_model_samples=2"]
    with tempfile.TemporaryDirectory() as folder:
        for name, more in (("", ["n_eval_examples=0"]), (", with an evaluation of 8 pairs and 2 samples", evaluation)):
            first, *others = [cpu_of_start(Path(folder, str(len(rows))), *more) for _ in range(1 + repeats)]
            for start, found in (("empty cache", [first]), ("second start", others)):
                rows.append([start + name, *(spread(column, ".1f") for column in zip(*found))])
    return rows


def benchmark_start(arguments: argparse.Namespace) -> None:
    from dpo import parallel
    from dpo.model.loading import load_policy, pick_device
    from settings import load_config

    n = arguments.nproc
    overrides = ["exp_name=benchmark", "model=smollm2", "trainer=FSDPTrainer", "device=cpu"]
    config = load_config(overrides)
    whole = load_policy(config, pick_device(config))  # converts the embedded model, if this has not been done
    copy = sum(p.numel() * p.element_size() for p in whole.parameters()) / 2**20
    del whole
    with tempfile.TemporaryDirectory() as folder, watched(0.02) as found:
        ready = Path(folder) / "ready"
        parallel.launch(load_sharded, (overrides, ready), n, None)
        since = ready.stat().st_mtime
    own, *after = [memory for at, *memory in found if at > since]
    peak, files = (max(column) - start for column, start in zip(zip(*after), own))
    table = [
        [f"{n} processes, SmolLM2-135M in float32", "MiB", "copies of the weights"],
        ["one copy of the weights", f"{copy:.0f}", "1"],
        ["interpreters' own, all processes", f"{own[0]:.0f}", ""],
        ["peak beyond that, all processes", f"{peak:.0f}", f"{peak / copy:.2f}"],
        ["cached pages of files beyond those before", f"{files:.0f}", f"{files / copy:.2f}"],
    ]
    method = f"the method stands in the script. Second start: the median of {arguments.repeats} and their range."
    write_table("start", "Memory and time at the start", method, {}, table, cpu_table(arguments.repeats))


def write_table(name: str, title: str, method: str, facts: dict[str, str], *tables: Sequence[Sequence[str]]) -> None:
    """Write benchmarks/<name>.md: how it was measured, on what, and tables whose first row is their head."""
    described = {**machine(), **facts}
    command = f"`python benchmarks/benchmark.py {' '.join(sys.argv[1:])}`; {method}"
    lines = [f"# {title}", "", command, "", *(f"- {key}: {value}" for key, value in described.items())]
    for rows in tables:
        lines += ["", *markdown(rows)]
    target = ROOT / "benchmarks" / f"{name}.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), f"\nwritten to {target}")


def peak_of_step(name: str, overrides: Sequence[str], micro: int) -> float:
    """Peak memory of one micro-batch in a fresh process, in MiB, beyond what it had at the start."""
    import speed
    from settings import load_config

    own = speed.resident()
    work = speed.prepare(load_config([*DPO, *overrides, "microbatch_tokens=null"]), micro, micro)
    return speed.step_memory(work, name) - (own if work.policy.device.type == "cpu" else 0)


def benchmark_dpo(arguments: argparse.Namespace) -> None:
    name = arguments.name or ("sweep" if arguments.sweep else "dpo")
    write_table(name, "Speed of DPO", *dpo_table(arguments))


def dpo_table(arguments: argparse.Namespace) -> tuple[str, dict[str, str], list[list[str]]]:
    """Return method, facts and table of `dpo`."""
    import speed

    with tempfile.TemporaryDirectory() as folder:
        if arguments.shape:
            arguments.overrides += speed.random_model(
                arguments.shape, Path(folder, f"random_{arguments.shape}"), arguments.overrides
            )
        if not any(override.startswith("datasets=") for override in arguments.overrides):
            rows = Path(folder, "made-up_HH-like_dialogues.jsonl")
            write_dialogues(rows, max(512, arguments.pairs))
            arguments.overrides += [f"datasets=[{rows}]", "holdout_fraction=0"]
        return time_dpo(arguments)


def time_dpo(arguments: argparse.Namespace) -> tuple[str, dict[str, str], list[list[str]]]:
    import speed
    from settings import load_config

    given, micro = arguments.overrides, arguments.micro
    peaks = {name: parallel.apart(peak_of_step, name, given, micro) for name in (speed.ORIGINAL, speed.OURS)}
    work = speed.prepare(load_config([*DPO, *given]), arguments.pairs, micro)
    steps = speed.sweeps(work, (0.05, 0.1, 0.3, 1.0)) if arguments.sweep else speed.variants(work)
    steps = {name: step for name, step in steps.items() if not arguments.only or name in arguments.only.split(",")}
    exact = 1e-4 if work.config.compute_dtype.itemsize == 4 else 0.05
    seconds = speed.compare(work, steps, arguments.repeats, exact)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    base = next(iter(medians.values()))
    pairs = arguments.pairs * (4 if arguments.sweep else 1)
    rows = [["", "seconds", "pairs/s", "ratio to the original", "useful TFLOP/s", "peak of one micro-batch, MiB"]]
    for name, median in medians.items():
        peak = f"{peaks[name]:.0f}" if name in peaks else ""
        useful = speed.useful(work, median * arguments.pairs / pairs)
        rows.append([name, spread(seconds[name], ".1f"), f"{pairs / median:.3f}", f"{base / median:.2f}", useful, peak])
    counts = speed.tokens(work)
    facts = {
        "model": f"{Path(work.config.model.name_or_path).name}, {work.config.compute_dtype} on {work.policy.device}",
        "work": f"{arguments.pairs} pairs of {', '.join(Path(name).name for name in work.config.datasets)}"
        + (", once for each of four betas" if arguments.sweep else ""),
        "tokens": ", ".join(f"{value} {key}" for key, value in counts.items())
        + f"; of ours {counts['distinct'] / counts['ours']:.3f} are distinct",
    }
    method = (
        f"medians and ranges of {arguments.repeats} runs in turn; all gave the same loss and gradient (relative "
        f"{exact:g}). The original's micro-batches have {micro} pairs, ours up to {work.config.microbatch_tokens} "
        f"tokens. `{speed.OURS}` counts the time to compute it. Useful: the policy's operations for distinct "
        "tokens, of the peak if that is known (model FLOPs utilisation)."
    )
    return method, facts, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(required=True)
    dpo = commands.add_parser("dpo", help="speed of a DPO step, and of a sweep")
    dpo.add_argument("--pairs", type=int, default=64, help="to train on")
    dpo.add_argument("--micro", type=int, default=8, help="pairs of the original's micro-batches")
    dpo.add_argument("--repeats", type=int, default=3, help="of each measurement")
    dpo.add_argument("--sweep", action="store_true", help="time four betas as a whole")
    dpo.add_argument("--only", help="comma-separated names of what to time, as in the table; the first is the base")
    dpo.add_argument("--name", help="of the file in benchmarks/")
    dpo.add_argument("--shape", help="LAYERSxWIDTH of a model with random weights, to time instead: 16x2048 is 1B")
    dpo.add_argument("overrides", nargs="*", help="of the configuration: model=..., datasets=[...], device=...")
    data = commands.add_parser("data", help="tokenise and reload a training set")
    data.add_argument("--rows", type=int, default=160_800, help="to read")
    data.add_argument("--repeats", type=int, default=3, help="of each measurement")
    data.add_argument("--num-proc", type=int, default=0, help="tokenising processes; 0: one per core")
    start = commands.add_parser("start", help="host memory while processes load a model; CPU time to the first update")
    start.add_argument("--nproc", type=int, default=4, help="processes that load the model")
    start.add_argument("--repeats", type=int, default=3, help="of the second start")
    for command, function in ((dpo, benchmark_dpo), (data, benchmark_data), (start, benchmark_start)):
        command.set_defaults(function=function)
    arguments = parser.parse_args()
    for name in ("rows", "repeats", "pairs", "micro", "nproc"):
        if getattr(arguments, name, 1) < 1:
            raise UserError(f"--{name} must be at least 1")
    arguments.function(arguments)


if __name__ == "__main__":
    run_main(main)
