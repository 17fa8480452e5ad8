"""Verdicts that are kept: a second start computes no check again, and a change of anything they depend on does."""

import dataclasses
import functools
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COSTS, compose, make_model, read_jsonl, train_here, train_in_group
from omegaconf import OmegaConf
from transformers import PreTrainedModel

import trainers
from dpo import parallel, reference, sampling, scoring
from dpo.model import checks, verdicts
from dpo.model.checks import checked_computation, disable_dropout
from dpo.model.logps import add_token_logps
from dpo.run.config import Config
from dpo.utils import UserError
from settings import load_config

DPO = ["loss=dpo", "loss.beta=0.1", "lr=1e-2", "n_eval_examples=8", "eval_every=12"]
Overrides = Callable[..., list[str]]


def prepared(model: Any) -> PreTrainedModel:
    disable_dropout(model)
    return add_token_logps(model.requires_grad_(True))


def configured(cache: Path, *more: str) -> Config:
    return load_config(["exp_name=x", "max_length=24", "max_prompt_length=12", f"cache_dir={cache}", *more])


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each batch that the checks compute."""
    seen: list[int] = []
    own = checks.response_logps

    def counted(model: Any, batch: Any, how: Any) -> Any:
        seen.append(sum(len(tree.prompt) + sum(map(len, tree.responses)) for tree in batch.trees))
        return own(model, batch, how)

    monkeypatch.setattr(checks, "response_logps", counted)
    return seen


def files(cache: Path, kind: str = "layout") -> list[Path]:
    return sorted((cache / verdicts.FOLDER).glob(f"{kind}-*"))


def test_a_second_start_checks_a_short_tree_only(tmp_path: Path, passes: list[int]) -> None:
    config, model = configured(tmp_path), prepared(make_model())
    first = checked_computation(model, config, trains=True)
    assert len(passes) > 10 and first.layout == "tree"
    passes.clear()
    assert checked_computation(prepared(make_model()), config, trains=True) == first and passes == [41, 41]
    passes.clear()
    with torch.no_grad():  # other weights, which are not finite
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="log-probabilities of LlamaForCausalLM are not finite"):
        checked_computation(model, config, trains=True)


def test_a_model_that_does_not_train_has_a_verdict_of_its_own(tmp_path: Path, passes: list[int]) -> None:
    model = prepared(make_model())
    checked_computation(model, configured(tmp_path), trains=False)
    frozen = len(passes)
    passes.clear()
    checked_computation(model, configured(tmp_path), trains=True)
    assert len(passes) > frozen and len(files(tmp_path)) == 2


SETTINGS = [
    "layout=padded", "compile=true", "max_length=25", "max_prompt_length=11", "allow_tf32=false",
    "mixed_precision=bfloat16", "model.block_name=Block", "activation_checkpointing=true", "adapter=lora",
    "trainer=FSDPTrainer", "trainer=TensorParallelTrainer", "model.trust_remote_code=true",
]  # fmt: skip


def wider(model: Any) -> None:
    model.config.rope_parameters["rope_theta"] = 1.0


CHANGES: dict[str, Callable[[Any, pytest.MonkeyPatch], Any]] = {
    "configuration": lambda model, patch: wider(model),
    "type of the weights": lambda model, patch: model.to(torch.bfloat16),
    "attention": lambda model, patch: setattr(model.config, "_attn_implementation", "eager"),
    "class of a layer": lambda model, patch: setattr(model.model.layers[0], "mlp", torch.nn.Identity()),
    "trained weights": lambda model, patch: model.lm_head.requires_grad_(False),
    "versions": lambda model, patch: patch.setattr(verdicts, "version", lambda name: "0"),
    "machine": lambda model, patch: patch.setattr(verdicts, "_machine", lambda device: ["cuda", "H100"]),
    "processes": lambda model, patch: patch.setattr(parallel, "gather", lambda value: [value, value], raising=False),
    "own code": lambda model, patch: patch.setattr(verdicts, "file_hash_once", lambda path: "0"),
}


def verdict_of(model: PreTrainedModel, config: Config) -> Path | None:
    return verdicts.Verdict.of(config.cache, "layout", verdicts.structure(model, config)).path


def test_each_setting_counts(tmp_path: Path) -> None:
    model = prepared(make_model())
    found = [verdict_of(model, configured(tmp_path, *given)) for given in ([], *([setting] for setting in SETTINGS))]
    assert None not in found and len({*found}) == 1 + len(SETTINGS)
    same = ["lr=1", "seed=3", "loss=dpo", "loss.beta=0.3", "microbatch_tokens=7", "model.name_or_path=gpt2"]
    assert verdict_of(prepared(make_model()), configured(tmp_path, *same)) == found[0]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_or_machine_is_checked_again(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model = configured(tmp_path), prepared(make_model())
    before = verdict_of(model, config)
    CHANGES[change](model, monkeypatch)
    assert verdict_of(model, config) != before


@pytest.mark.parametrize("damage", ["cut", "altered", "another's", "list"])
def test_a_damaged_verdict_is_found_again(damage: str, tmp_path: Path, passes: list[int]) -> None:
    config, model = configured(tmp_path), prepared(make_model())
    checked_computation(model, config, trains=True)
    [file] = files(tmp_path)
    whole = file.read_text()
    checked_computation(model, configured(tmp_path, "layout=padded"), trains=True)
    [other] = [path for path in files(tmp_path) if path != file]
    broken = {"cut": whole[:-5], "altered": whole.replace('"tree"', '"packed"'), "another's": other.read_text()}
    file.write_text(broken.get(damage, "[1]"))
    passes.clear()
    assert checked_computation(model, config, trains=True).layout == "tree"
    assert len(passes) > 10 and file.read_text() == whole


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, passes: list[int]) -> None:
    (tmp_path / verdicts.FOLDER).write_text("")  # where the folder would be
    for _ in range(2):
        passes.clear()
        assert checked_computation(prepared(make_model()), configured(tmp_path), trains=True).layout == "tree"
        assert len(passes) > 10


def test_refusals_are_not_kept(tmp_path: Path, passes: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    model = prepared(make_model())
    norm = model.model.norm
    own = norm.forward
    norm.forward = lambda states: own(states) * (1.5 if norm.training else 1)
    for _ in range(2):
        passes.clear()
        with pytest.raises(UserError, match="other log-probabilities in training"):
            checked_computation(model, configured(tmp_path), trains=True)
        assert len(passes) > 10 and not files(tmp_path)
    learned = prepared(make_model("gpt2"))
    learned.transformer.wpe.forward = lambda ids: learned.transformer.wpe.weight[torch.arange(ids.shape[-1])][None]
    for _ in range(2):  # the layout `auto` gives way
        assert checked_computation(learned, configured(tmp_path), trains=True).layout == "padded"
        assert "not layout=tree" in capsys.readouterr().out and not files(tmp_path)


REMOTE = """
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from own_helper import scale


class Norm(LlamaRMSNorm):
    def forward(self, states):
        return super().forward(states) * scale(self.training)


class OwnForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.norm = Norm(config.hidden_size)
"""


def test_other_code_of_a_model_is_checked_again(
    tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code of a model's own, in a package, under the same names: in its own file, then in one that it imports."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    package = tmp_path / "own_model"
    package.mkdir()
    (package / "__init__.py").write_text("")
    modules = ("own_model", "own_model.modeling", "own_model.helper")
    good, bad = "def scale(training):\n    return 1.0\n", "def scale(training):\n    return 1.5 if training else 1.0\n"

    def check(modeling: str, helper: str) -> int:
        (package / "modeling.py").write_text(modeling.replace("own_helper", "own_model.helper"))
        (package / "helper.py").write_text(helper)
        for name in modules:
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        made = importlib.import_module("own_model.modeling").OwnForCausalLM(make_model().config)
        passes.clear()
        checked_computation(prepared(made), configured(tmp_path / "cache"), trains=True)
        return len(passes)

    assert check(REMOTE, good) > 10 and check(REMOTE, good) == 2
    assert check(REMOTE + "\n# another\n", good) > 10
    with pytest.raises(UserError, match="other log-probabilities in training"):
        check(REMOTE, bad)
    for name in modules:
        sys.modules.pop(name, None)


def test_code_without_a_file_is_checked_each_time(tmp_path: Path, passes: list[int]) -> None:
    norm = type("Norm", (type(make_model().model.norm),), {"__module__": "typed_in"})
    model = prepared(make_model())
    model.model.norm = norm(32)
    for _ in range(2):
        passes.clear()
        checked_computation(model, configured(tmp_path), trains=True)
        assert len(passes) > 10 and not files(tmp_path)


# A run ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a run did what: compared policy and reference on a batch, sampled, compared two models for the KL."""
    counts: dict[str, int] = {}

    def count(place: Any, name: str) -> None:
        own = getattr(place, name)

        @functools.wraps(own)
        def counting(*args: Any, **more: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return own(*args, **more)

        monkeypatch.setattr(place, name, counting)

    count(scoring.Scorer, "differences")
    count(reference, "_check")
    count(sampling, "sample")
    count(sampling, "_compare")
    count(trainers, "load_reference")
    return counts


def test_examples_on_which_policy_and_reference_agreed_are_not_compared_again(
    overrides: Overrides, tmp_path: Path, counted: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    runs = iter(range(10))

    def compared(*more: str) -> int:
        counted.clear()
        given = [*DPO, "n_eval_examples=0", "n_examples=8", f"cache_dir={cache}", *more]
        train_here(overrides(*given, f"local_run_dir={tmp_path / str(next(runs))}"))
        return counted.get("differences", 0)

    assert compared() > 1 and compared() == 0 and "_check" not in counted  # of an entry alone
    assert "agree on 8 of 8 training examples, as an earlier start found" in capsys.readouterr().out
    assert compared("loss.beta=0.3", "lr=1e-4") == 0  # the runs of a sweep
    assert compared("seed=1") > 1  # other examples, whose entries are new: so the store is another, too
    assert compared() > 1 and counted["_check"] == 1 and compared() == 0 and "_check" not in counted
    assert compared("batch_size=8") > 1
    rows, again = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("0", "1"))
    assert rows and len(rows) == len(again)
    for one, other in zip(rows, again):
        assert {k: v for k, v in one.items() if k not in COSTS} == {k: v for k, v in other.items() if k not in COSTS}


@pytest.mark.full
def test_processes_agree_on_what_is_kept(overrides: Overrides, tmp_path: Path) -> None:
    given = [*DPO, "trainer=FSDPTrainer", "n_examples=4", "device=auto", f"cache_dir={tmp_path / 'cache'}"]
    given += ["debug=true", "sample_during_eval=false"]
    names = ("first", "second")
    cases = [overrides(*given, f"local_run_dir={tmp_path / name}") for name in names]
    resolved: list[Any] = [OmegaConf.to_container(compose(case), resolve=True) for case in cases]
    parallel.launch(train_in_group, (resolved,), 2, None)
    first, second = ((tmp_path / name / "log.txt").read_text() for name in names)
    assert "as an earlier start found" not in first and "as an earlier start found" in second
    assert len(files(tmp_path / "cache")) == len(files(tmp_path / "cache", "agreement")) == 1
    rows = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in names]
    losses = [[row["loss/train"] for row in found if "loss/train" in row] for found in rows]
    assert losses[0] == losses[1] != []
    train_here(overrides(*given, "trainer=BasicTrainer"))
    assert len(files(tmp_path / "cache")) == 2


def kl_names() -> list[str]:
    return [f"kl_eval/{name}{end}" for name in sampling.ESTIMATORS for end in ("", "_error")]


@pytest.mark.parametrize("mode", ["stored", "live"])
def test_the_first_evaluation_needs_no_second_model(
    mode: str, overrides: Overrides, tmp_path: Path, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL is 0 there, and the policy's samples are the reference's: the later numbers are those of a reference that is
    sampled and compared for itself."""
    at_first: dict[str, int] = {}
    evaluate = trainers.Trainer.evaluate

    def watched(trainer: trainers.Trainer) -> None:
        evaluate(trainer)
        if not trainer.examples:
            at_first.update(counted)

    monkeypatch.setattr(trainers.Trainer, "evaluate", watched)
    train_here(overrides(*DPO, "n_examples=12", f"reference.mode={mode}"))
    assert at_first.get("load_reference", 0) == (mode == "live") and "_compare" not in at_first
    assert at_first["sample"] == 1 and counted["sample"] == 2 and counted["_compare"] > 0
    assert counted["load_reference"] == 1

    # As without these short cuts: the reference is sampled at the start, and evaluations never know where they stand.
    monkeypatch.setattr(trainers.Trainer, "evaluate", evaluate)
    own_call, own_samples = sampling.SampleEvaluator.__call__, sampling.SampleEvaluator.remember
    monkeypatch.setattr(sampling.SampleEvaluator, "__call__", lambda self, policy, is_reference: own_call(self, policy))
    prepare = trainers.Trainer.prepare_reference

    def prepared_in_full(trainer: trainers.Trainer) -> None:
        prepare(trainer)
        assert trainer.evaluator.sampler is not None
        own_samples(trainer.evaluator.sampler, trainer.policy)
        divergence = type(trainer.evaluator)._divergence
        monkeypatch.setattr(
            type(trainer.evaluator),
            "_divergence",
            lambda self, policy, scorer, found: divergence(
                self, policy, dataclasses.replace(scorer, untrained=False), found
            ),
        )

    monkeypatch.setattr(trainers.Trainer, "prepare_reference", prepared_in_full)
    counted.clear()
    train_here(overrides(*DPO, "n_examples=12", f"reference.mode={mode}", f"local_run_dir={tmp_path / 'full'}"))
    assert counted["sample"] == 3
    short, full = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("run", "full"))
    assert {short[0][name] for name in kl_names()} == {0.0} and short[-1]["kl_eval/rao_blackwell"] > 0.001
    for one, other in zip(short, full, strict=True):
        assert {k: v for k, v in one.items() if k not in COSTS} == {k: v for k, v in other.items() if k not in COSTS}
        assert list(one) == list(other)
    assert read_jsonl(tmp_path / "run" / "samples.jsonl") == read_jsonl(tmp_path / "full" / "samples.jsonl")


def test_another_reference_is_compared_and_sampled_at_the_start(
    overrides: Overrides, run_dir: Path, tmp_path: Path, counted: dict[str, int]
) -> None:
    train_here(overrides(*DPO, "n_examples=4", f"reference.archive={run_dir}"))
    first = read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["kl_eval/rao_blackwell"] > 0.001 and counted["_compare"] > 0
    rows = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert any(row["policy"] != row["reference"] for row in rows)


def test_a_verdict_is_json_with_a_hash(tmp_path: Path) -> None:
    verdict = verdicts.Verdict.of(tmp_path, "kind", {"a": 1})
    assert verdict.read() is None
    verdict.keep([1, "x"])
    assert verdict.path is not None and verdict.read() == [1, "x"]
    assert json.loads(verdict.path.read_text())["found"] == [1, "x"] and not [*tmp_path.rglob(".*")]
    assert verdicts.Verdict.of(tmp_path, "kind", {"a": 1}, None).path is None
