"""Every loss computes the same, however the global batch is cut: into micro-batches, layouts and processes."""

import json
import math
from pathlib import Path

import pytest
from conftest import read_jsonl, train_here
from test_losses import LOSS_FILES
from test_parallel import launch
from test_trl import FOLDER, overrides_of, updates_in

from utils import loss_values

CUTS = {
    "1": ["gradient_accumulation_steps=1"],
    "2": ["gradient_accumulation_steps=2", "layout=padded"],
    "8": ["gradient_accumulation_steps=8"],
}
STEEP = {"discopop": 3e-5}  # 1 / tau = 20 times the rounding of a log-ratio, which is 1e-6
VALUES = {"beta": 0.3, "alpha": 0.5, "terms": "{simpo: 1.0, slic: 0.5, nll: 0.5}"}
PARTS = {
    "every part": "loss=dpo loss.beta=0.3 loss.ld_alpha=0.5 loss.dpop_weight=1 loss.nll_weight=0.1 loss.nll=batch_mean "
    "loss.divergence=js loss.margin=column loss.weighting=column",
    "wpo": "loss=dpo loss.beta=0.3 loss.weighting=wpo",
}


def cases() -> dict[str, list[str]]:
    """Return name -> overrides of every file of config/loss, and of the parts that none of them sets."""
    found = {}
    for name in LOSS_FILES:
        missing = [key for key, value in loss_values(name).items() if value == "???"]
        live = ["reference.mode=live"] if name == "tdpo" else []
        found[name] = [f"loss={name}", *live, *(f"loss.{key}={VALUES[key]}" for key in missing)]
    return found | {name: given.split() for name, given in PARTS.items()}


def command(folder: Path, rows: Path, given: list[str], cut: list[str]) -> list[str]:
    more = [f"datasets=[{rows.with_stem(KINDS.get(given[0], 'pairs'))}]", "n_epochs=2", "lr=1e-5", *given, *cut]
    return [*overrides_of(folder), *more]


KINDS = {"loss=kto": "labelled", "loss=listwise": "ranked"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TRL's eight rows with two columns of numbers; beside them labelled completions, and rankings of three."""
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    pairs = read_jsonl(FOLDER / "rows.jsonl")
    labelled = [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
        for i, row in enumerate(pairs)
    ]
    ranked = [
        {"prompt": row["prompt"], "responses": [row["rejected"], row["chosen"], " Maybe."], "scores": [0.1, 0.9, 0.5]}
        for row in pairs
    ]
    for kind, some in (("labelled", labelled), ("ranked", ranked)):
        path.with_stem(kind).write_text("".join(json.dumps(row) + "\n" for row in some))
    numbered = [
        row | {"margin": 0.1 * i, "weight": 0.5 + i % 3} for i, row in enumerate(read_jsonl(FOLDER / "rows.jsonl"))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in numbered))
    return path


def must_be_equal(folders: list[Path], name: str) -> None:
    first, *others = [updates_in(folder) for folder in folders]
    names = [n for n in first[0] if n.startswith(("loss", "logps", "rewards", "grad", "logratios", "chosen_fell"))]
    assert len(first) == 2 and len(names) >= 3
    slack = STEEP.get(name, 1e-5)
    for folder, updates in zip(folders[1:], others):
        for ours, theirs in zip(updates, first, strict=True):
            assert {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, rel=slack, abs=slack), (
                folder
            )


FAST = ("aot", "kto", "listwise", "tdpo", "mpo", "every part")
NAMES = [pytest.param(name, marks=() if name in FAST else pytest.mark.full) for name in cases()]


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_and_layouts_do_not_matter(name: str, rows: Path, tmp_path: Path) -> None:
    for cut, given in CUTS.items():
        train_here(command(tmp_path / cut, rows, cases()[name], given))
    must_be_equal([tmp_path / cut for cut in CUTS], name)


GROUPS = {
    "FSDP": ("trainer=FSDPTrainer", list(cases())),
    "TP": ("trainer=TensorParallelTrainer tensor_parallel_size=2", ["tdpo", "wpo", "kto", "aot"]),
}


@pytest.mark.full
def test_the_kl_is_0_at_the_start_whatever_fsdp_computes_in(rows: Path, tmp_path: Path) -> None:
    """FSDP casts floating-point inputs of a model; the reference's distribution must not be one of them."""
    cut = ["trainer=FSDPTrainer", "nproc=2", "mixed_precision=bfloat16", "n_epochs=1"]
    launch([command(tmp_path, rows, cases()["tdpo"], cut)], 2)
    assert updates_in(tmp_path)[0]["loss/train"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("processes", GROUPS)
def test_processes_do_not_matter(processes: str, rows: Path, tmp_path: Path) -> None:
    trainer, names = GROUPS[processes]
    cut = [*trainer.split(), "nproc=2", "gradient_accumulation_steps=2"]
    folders = {name: tmp_path / name.replace(" ", "_") for name in names}
    launch([command(folder / "2", rows, cases()[name], cut) for name, folder in folders.items()], 2)
    for name, folder in folders.items():
        train_here(command(folder / "1", rows, cases()[name], CUTS["1"]))
        must_be_equal([folder / "1", folder / "2"], name)
