"""Count what training steps need on GPUs that are not there: python benchmarks/planned.py [--hh FOLDER]

Llama shapes of 1B and 8B parameters, each step planned as scripts/plan.py does, on pairs of made-up lengths; and how
evenly batches of 64 pairs are dealt to 8 processes. Writes plan.md into --folder.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import numpy as np
from transformers import LlamaConfig

from benchmark import machine
from dpo.data.batching import Cut, Plan, deal, make_batch
from dpo.data.records import Record
from dpo.hardware import DEVICES, GiB
from dpo.model.loading import load_tokenizer
from dpo.plan import gpu
from dpo.plan.planning import Planner
from dpo.run.throughput import cost_of
from dpo.tables import markdown
from preference_datasets import load_data
from settings import data_settings, load_config
from trainers import Updates
from utils import HelpFormatter, run_main

SHAPES: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8},
}  # fmt: skip
VOCABULARY = 128256
LENGTHS = "made-up lengths: log-normal, medians of 150 tokens for prompts, 230 and 220 for responses, 50 to 500"
FSDP = ["trainer=FSDPTrainer", "activation_checkpointing=true", "mixed_precision=bfloat16"]
CASES: list[tuple[str, int, list[str]]] = [
    ("1B", 1, ["mixed_precision=bfloat16", "microbatch_tokens=16384"]),
    ("1B", 1, ["model.policy_dtype=bfloat16", "microbatch_tokens=16384"]),
    ("1B", 1, ["mixed_precision=bfloat16", "microbatch_tokens=16384", "adapter=lora"]),
    ("1B", 1, ["mixed_precision=bfloat16", "microbatch_tokens=16384", "reference.mode=live"]),
    ("8B", 8, [*FSDP, "microbatch_tokens=4096"]),
    ("8B", 8, [*FSDP, "microbatch_tokens=4096", "fsdp_reduce_once=true"]),
    ("8B", 64, [*FSDP, "microbatch_tokens=4096"]),
    ("8B", 64, [*FSDP, "microbatch_tokens=4096", "fsdp_replicate_size=8"]),
]
LIMITS = (512, 1024, 4096, 16384)
HEAD = ["model, GPUs", "overrides", "passes", "peak GiB", "bytes a parameter", "TFLOP", "GB moved", "kernels", "waits"]
HEAD += ["gathers", "reduce-scatters", "s on H100 (estimate)"]


class MadeUp:
    """Pairs of LENGTHS. Stands for PreferenceData."""

    names, source_names, rows, identity = ("made-up",), (), "pairs", "made-up"

    def __init__(self, n: int = 2048):
        draw = np.random.default_rng(0)
        medians, spreads = (150, 230, 220), (0.7, 0.6, 0.65)
        lengths = [np.exp(draw.normal(np.log(m), s, n)) for m, s in zip(medians, spreads, strict=True)]
        self.lengths = np.clip(np.round(np.stack(lengths, 1)), 50, 500).astype(int)
        self.n_examples, self.source = np.ones(n, dtype=np.int64), np.zeros(n, dtype=int)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Record:
        prompt, chosen, rejected = ([1] * int(n) for n in self.lengths[i])
        return Record(prompt, [chosen, rejected], [(0, 1)])


def count(shape: str, processes: int, overrides: list[str]) -> dict[str, Any]:
    """Return the plan of a case, in a process of its own: torch keeps the device and the group."""
    command = [sys.executable, __file__, "--case", json.dumps([shape, processes, overrides])]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def count_here(shape: str, processes: int, overrides: list[str]) -> dict[str, Any]:
    """Return the plan of a case."""
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**SHAPES[shape], vocab_size=VOCABULARY, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
        given = ["exp_name=plan", "loss=dpo", "loss.beta=0.1", "model=blank_model", f"model.name_or_path={folder}"]
        config = load_config([*given, "batch_size=64", "n_epochs=1", "datasets=[hh]", *overrides])
        device = gpu.register()
        if config.needs_group:
            gpu.join_fake_group(processes)
        data: Any = MadeUp()
        found = Planner(data, device, DEVICES["H100"], Updates)(config)
    return dataclasses.asdict(found) | {"peak": found.peak}


def useful_share(data: Any, limit: int, layout: str = "packed", ranks: int = 8, batches: int = 24) -> float:
    """Return the tokens of all processes, as a share of what they would be if all had the busiest one's."""
    useful = busiest = 0
    for number, examples in enumerate(Plan(0, 64, 1, None).batches(data)):
        if number == batches or len(examples) < 64:
            break
        for dealt in deal(data, examples, Cut(layout, ranks, 1, limit)):
            tokens = [cost_of(make_batch(data, part), layout).distinct if part else 0 for part in dealt]
            useful += sum(tokens)
            busiest += ranks * max(tokens)
    return useful / busiest


def as_row(shape: str, processes: int, overrides: list[str], found: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    calls = found["collectives"]
    bytes_each = sum(found["memory"]["optimizer"].values()) / found["parameters"] * processes
    cells = [
        f"{shape}, {processes}", f"`{' '.join(overrides)}`", found["passes"], f"{found['peak'] / GiB:.1f}",
        f"{bytes_each:.2f}", f"{found['tflop']:.0f}", f"{found['moved'] / 1e9:.0f}", found["kernels"],
        sum(found["waits"].values()), calls.get("_allgather_base_", 0), calls.get("_reduce_scatter_base_", 0),
        f"{found['seconds']:.2f}",
    ]  # fmt: skip
    return [*map(str, cells)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks", help="plan.md is written here")
    parser.add_argument("--hh", type=Path, help="also deal these rows, a folder as for dataset_sources.hh")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(count_here(*json.loads(arguments.case))))
        return
    sets: dict[str, Any] = {"made-up lengths": MadeUp()}
    if arguments.hh:
        config = load_config(["exp_name=plan", "model=smollm2", "datasets=[hh]", f"dataset_sources.hh={arguments.hh}"])
        sets["HH"] = load_data(data_settings(config), load_tokenizer(config), "train")
    facts = machine() | {"method": "scripts/plan.py: nothing ran on a GPU"}
    lines = ["# Planned steps", "", *(f"- {name}: {value}" for name, value in facts.items())]
    lines += [f"- data: 64 pairs a batch, {LENGTHS}"]
    lines += ["- bytes a parameter: of the optimizer phase, of all processes together", ""]
    lines += [*markdown([HEAD, *(as_row(*case, count(*case)) for case in CASES)]), ""]
    lines += ["Useful share of the work, 8 processes, 64 pairs a batch, layout packed, by microbatch_tokens:", ""]
    useful = [[name, *(f"{useful_share(data, limit):.3f}" for limit in LIMITS)] for name, data in sets.items()]
    lines += markdown([["data", *map(str, LIMITS)], *useful])
    (arguments.folder / "plan.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    run_main(main)
