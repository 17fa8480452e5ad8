"""Adapters: what they learn, what the reference is, and what is saved, against PEFT and plain loops."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import COSTS, EVERYTHING, ROOT, first_fast, make_model, make_tokenizer, read_jsonl, train_here
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo
from dpo.model import adapters
from dpo.model.loading import merged_model
from dpo.utils import UserError
from settings import load_config

Overrides = Callable[..., list[str]]
DPO = ("loss=dpo", "loss.beta=0.5", "n_eval_examples=8", "sample_during_eval=false")
SHORT = (*DPO, "lr=1e-2", "batch_size=8", "n_examples=16")
LORA = ("adapter=lora", "adapter.rank=4")


@pytest.fixture
def trained(overrides: Overrides, tmp_path: Path) -> Callable[..., Path]:
    """Train a run of this name, and return its folder."""

    def train(name: str, *given: str) -> Path:
        wide = [f"model.name_or_path={folder_of('llama', tmp_path, 64)}"] if "adapter=qlora" in given else []
        train_here(overrides(*SHORT, *wide, f"local_run_dir={tmp_path / name}", *given))
        return tmp_path / name

    return train


def updates(folder: Path) -> list[dict]:
    return [row for row in read_jsonl(folder / "metrics.jsonl") if "loss/train" in row]


def evaluations(folder: Path) -> list[dict]:
    return [row for row in read_jsonl(folder / "metrics.jsonl") if "loss/eval" in row]


def rows_of(pairs: Path, tokenizer: Any, split: str = "train") -> list[list[tuple[list[int], list[int]]]]:
    """Return [chosen, rejected] of each row as (prompt ids, response ids with EOS)."""
    found = []
    for row in read_jsonl(pairs / f"{split}.jsonl"):
        end = row["chosen"].rfind("Assistant:") + len("Assistant:")
        texts = [row[side] for side in ("chosen", "rejected")]
        responses = [
            tokenizer(t[end:], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for t in texts
        ]
        found.append([(tokenizer(row["chosen"][:end])["input_ids"], response) for response in responses])
    return found


def logp(model: torch.nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
    places = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
    return logits[places].log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)].sum()


def folder_of(kind: str, tmp_path: Path, hidden: int = 32) -> Path:
    """Return a model folder. 4-bit weights need rows of at least 64 numbers."""
    folder = tmp_path / f"{kind}-{hidden}"
    if not folder.exists():
        make_model(kind, hidden).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", first_fast(["llama", "gpt_neox", "gpt2", "qwen3"]))
def test_three_steps_equal_peft_and_a_plain_loop(
    kind: str, overrides: Overrides, pairs_dir: Path, tmp_path: Path
) -> None:
    folder, lr, steps = folder_of(kind, tmp_path), 0.5, 3
    given = ["adapter=lora", "adapter.rank=8", "optimizer=SGD", f"lr={lr}", "batch_size=24", f"n_epochs={steps}"]
    given = overrides(*DPO, f"model.name_or_path={folder}", "microbatch_tokens=600", *given)
    train_here(given)

    config = load_config(given)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    first = adapters.state_of(adapters.put_on(model, adapters.peft_config(config.adapter), str(folder), config.seed))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).train(False)
    lora = peft.LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    peft.set_peft_model_state_dict(model, {name: tensor.double() for name, tensor in first.items()})
    parameters = [p.requires_grad_(True) for name, p in model.named_parameters() if "lora_" in name]
    for parameter in parameters:
        parameter.data = parameter.data.double()
    pairs = rows_of(pairs_dir, AutoTokenizer.from_pretrained(folder))
    with torch.no_grad():
        reference = [[logp(model, *side) for side in pair] for pair in pairs]
    rows = updates(tmp_path / "run")
    assert len(rows) == steps
    for row in rows:
        losses = []
        for pair, (chosen, rejected) in zip(pairs, reference, strict=True):
            ours = [logp(model, *side) for side in pair]
            losses.append(-torch.nn.functional.logsigmoid(0.5 * ((ours[0] - chosen) - (ours[1] - rejected))))
        loss = torch.stack(losses).mean()
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.sqrt(sum((g**2).sum() for g in gradients))  # type: ignore[arg-type]
        assert row["loss/train"] == pytest.approx(float(loss), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= lr * gradient * min(1.0, 10 / float(norm))
    assert abs(rows[-1]["loss/train"] - rows[0]["loss/train"]) > 1e-2
    found = load_file(tmp_path / "run" / "LATEST" / "adapter_model.safetensors")
    expected = peft.get_peft_model_state_dict(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor.detach(), rtol=1e-5, atol=1e-5)


STARTS = ["base", "continued", "stacked", "qlora", "pissa", "checkpoint", "int8", "dora", "rslora", "ia3"]
IA3 = "adapter=peft adapter.peft_type=IA3 adapter.target_modules=[k_proj,down_proj]".split()
IA3 += ["+adapter.peft_kwargs.feedforward_modules=[down_proj]"]


STARTED = [(start, mode) for mode in ("live", "stored") for start in STARTS]
STARTED = STARTED if EVERYTHING else STARTED[:13]


@pytest.mark.parametrize(("start", "mode"), first_fast(STARTED, 5))
def test_rewards_are_0_before_the_first_update(
    start: str, mode: str, trained: Callable[..., Path], run_dir: Path, tmp_path: Path
) -> None:
    given = {
        "checkpoint": [*LORA, f"model.archive={run_dir}"],
        "continued": [*LORA, f"model.archive={tmp_path / 'first'}"],
        "stacked": [*LORA, f"model.archive={tmp_path / 'first'}", "adapter.stack=true"],
        "ia3": [*IA3],
        "int8": ["adapter=qlora", "adapter.quantization=int8"],
    }.get(start, [f"adapter={start}" if start != "base" else "adapter=lora", "adapter.rank=4"])
    if start in ("continued", "stacked"):
        trained("first", *LORA, "do_first_eval=false")
    run = trained("run", f"reference.mode={mode}", *given)
    before, after = evaluations(run)
    rewards = [f"rewards_eval/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
    assert [before[name] for name in rewards] == [0, 0, 0, 0]
    assert after["rewards_eval/chosen"] != 0 and after["rewards_eval/rejected"] != 0
    assert updates(run)[0]["rewards_train/chosen"] == 0 and updates(run)[1]["rewards_train/chosen"] != 0


@pytest.mark.full
def test_stored_and_live_references_train_alike(trained: Callable[..., Path], tmp_path: Path) -> None:
    trained("first", *LORA)
    given = [f"model.archive={tmp_path / 'first'}", *LORA, "optimizer=SGD", "lr=0.1", "sample_during_eval=true"]
    both = [trained(mode, *given, f"reference.mode={mode}") for mode in ("stored", "live")]
    rows = [read_jsonl(folder / "metrics.jsonl") for folder in both]
    for one, two in zip(*rows, strict=True):
        for name in one.keys() - COSTS:
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=2e-5), name
    assert rows[0][-1]["kl_eval/plain"] != 0


def test_a_fresh_adapter_shares_the_stored_reference_of_its_base(trained: Callable[..., Path], tmp_path: Path) -> None:
    cache = f"cache_dir={tmp_path / 'cache'}"
    trained("plain", cache)
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 1
    trained("lora", cache, *LORA)
    trained("rslora", cache, "adapter=rslora", "seed=1")
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 1
    trained("continued", cache, f"model.archive={tmp_path / 'lora'}", *LORA)
    trained("qlora", cache, "adapter=qlora")
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 3


@pytest.mark.parametrize("adapter", first_fast(["pissa", "lora", "qlora", "dora"]))
def test_resuming_is_bit_exact(adapter: str, trained: Callable[..., Path]) -> None:
    given = [f"adapter={adapter}", "n_examples=24", "save_every=8", "do_final_eval=false", "optimizer=AdamW"]
    whole, parts = trained("whole", *given), trained("parts", *given, "n_examples=8")
    trained("parts", *given, "resume=auto")
    one, two = ([{k: v for k, v in row.items() if k not in COSTS} for row in updates(run)] for run in (whole, parts))
    assert one == two and len(one) == 3
    weights = [(run / "LATEST" / "adapter_model.safetensors").read_bytes() for run in (whole, parts)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("adapter", first_fast(["pissa", "modules_to_save", "lora", "qlora", "dora"], 2))
def test_peft_opens_a_checkpoint_and_merging_keeps_its_log_probabilities(
    adapter: str, trained: Callable[..., Path], tiny_model_dir: Path, pairs_dir: Path
) -> None:
    kind = "lora" if adapter == "modules_to_save" else adapter
    more = ["adapter.modules_to_save=[lm_head]"] if adapter == "modules_to_save" else []
    run = trained("run", f"adapter={kind}", *more)
    folder = run / "LATEST"
    names = {file.name for file in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names and "model.safetensors" not in names
    opened = dpo.load_run(run)
    pairs = rows_of(pairs_dir, opened.tokenizer, "test")
    given = read_jsonl(pairs_dir / "test.jsonl")
    scores = opened.score([{"chosen": row["chosen"], "rejected": row["rejected"]} for row in given])
    base = opened.policy if adapter == "qlora" else AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    models = [] if adapter == "qlora" else [peft.PeftModel.from_pretrained(base, str(folder))]
    config = opened.config
    models.append(merged_model(config, folder))
    assert all(name.startswith("model.") or name.startswith("lm_head") for name in models[-1].state_dict())
    for model in models:
        for pair, score in zip(pairs, scores, strict=True):
            with torch.no_grad():
                for side, name in zip(pair, ("chosen", "rejected"), strict=True):
                    assert float(logp(model, *side)) == pytest.approx(score[name]["policy"], rel=1e-5, abs=1e-4)
    assert abs(scores[0]["margin"]) > 1e-3


FSDP = [
    LORA,
    pytest.param(("adapter=dora", "adapter.modules_to_save=[lm_head]"), marks=pytest.mark.full),
    pytest.param((*LORA, "kl_during_eval=true", "sample_during_eval=true"), marks=pytest.mark.full),
    pytest.param(("adapter=dora", "reference.mode=stored"), marks=pytest.mark.full),
]


@pytest.mark.parametrize("adapter", FSDP if EVERYTHING else FSDP[:3])
def test_fsdp_equals_one_process(adapter: tuple[str, ...], trained: Callable[..., Path]) -> None:
    given = ["reference.mode=live", *adapter, "optimizer=SGD", "lr=0.5", "n_examples=24"]
    one, two = trained("one", *given), trained("two", *given, "trainer=FSDPTrainer", "nproc=2")
    for a, b in zip(updates(one), updates(two), strict=True):
        for name in ("loss/train", "grad_norm", "rewards_train/margins"):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), name
    weights = [load_file(run / "LATEST" / "adapter_model.safetensors") for run in (one, two)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-5, atol=1e-5)
    assert all(row["rewards_eval/margins"] == 0 for row in (evaluations(one)[0], evaluations(two)[0]))


SAME = ["activation_checkpointing=true", "microbatch_tokens=100", "layout=packed", "layout=padded", "compile=true"]


@pytest.mark.parametrize("given", first_fast(SAME if EVERYTHING else SAME[:3]))
def test_ways_to_compute_agree(given: str, trained: Callable[..., Path]) -> None:
    shared = [*LORA, "optimizer=SGD", "lr=0.5", "sample_during_eval=true", "kl_during_eval=true"]
    rows = [read_jsonl(trained(name, *shared, *more) / "metrics.jsonl") for name, *more in (("one",), ("two", given))]
    for one, two in zip(*rows, strict=True):
        for name in (one.keys() & two.keys()) - COSTS:
            assert one[name] == pytest.approx(two[name], rel=1e-5, abs=1e-5), name


OTHERS = ["model.policy_dtype=bfloat16", "loss=sft", "mixed_precision=bfloat16", "loss=simpo"]


@pytest.mark.parametrize("given", first_fast(OTHERS))
def test_other_losses_and_types(given: str, trained: Callable[..., Path]) -> None:
    more = ["loss.beta="] if given == "loss=sft" else []
    run = trained("run", *LORA, given, *more)
    assert all(
        tensor.dtype == torch.float32 for tensor in load_file(run / "LATEST" / "adapter_model.safetensors").values()
    )
    first, last = evaluations(run)[0]["loss/eval"], evaluations(run)[-1]["loss/eval"]
    assert last != first


SCORED = ["stacked qlora", "continued", "checkpoint", "pissa", "base", "stacked", "qlora"]


@pytest.mark.parametrize("start", first_fast(SCORED if EVERYTHING else SCORED[:4]))
def test_a_trained_adapter_is_scored_against_where_it_began(
    start: str, trained: Callable[..., Path], run_dir: Path, pairs_dir: Path, tmp_path: Path
) -> None:
    archive = {"checkpoint": run_dir}.get(start, tmp_path / "first")
    if start.split()[0] in ("continued", "stacked"):
        trained("first", *LORA, *(["adapter=qlora"] if "qlora" in start else []))
    given = [f"model.archive={archive}"] if start not in ("base", "qlora", "pissa") else []
    given += ["adapter.stack=true"] if "stacked" in start else []
    kind = "qlora" if "qlora" in start else "pissa" if start == "pissa" else "lora"
    run = trained("run", *LORA, f"adapter={kind}", *given)
    final = evaluations(run)[-1]
    pairs = [{side: row[side] for side in ("chosen", "rejected")} for row in read_jsonl(pairs_dir / "test.jsonl")]
    scores = dpo.load_run(run).score(pairs)
    margin = 0.5 * sum(score["margin"] for score in scores) / len(scores)
    assert margin == pytest.approx(final["rewards_eval/margins"], rel=1e-4, abs=1e-4) and abs(margin) > 1e-2
    if start in ("continued", "stacked qlora"):  # the scripts find the reference by themselves
        command = [
            sys.executable,
            str(ROOT / "scripts" / "score.py"),
            str(run),
            "--data",
            str(pairs_dir / "test.jsonl"),
        ]
        command += ["--out", str(tmp_path / "scores.jsonl"), "device=cpu"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
        rewards = [[response["reward"] for response in row["responses"]] for row in rows]
        assert len(rows) == len(pairs)
        found = sum(abs(a - b) for a, b in rewards) / len(rewards)
        assert found == pytest.approx(sum(abs(s["margin"]) for s in scores) / len(scores) / 2, rel=1e-4)


REFUSED = {
    "adapter.target_modules=[query]": "target_modules: no module is called query; there are .*down_proj, .*q_proj",
    "adapter.target_modules=query": r"whose matrices are down_proj, .*q_proj, .*Target modules .*query.* not found",
    'adapter.target_modules="q_proj["': r"whose matrices are down_proj, .*: unterminated character set",
    "adapter.init=loftq": "adapter.init=loftq is not known; choose from: true, gaussian, pissa",
    "adapter=pissa adapter.modules_to_save=[lm_head]": "saved as LoRA of twice the rank, so it goes with neither dora",
    "adapter.target_modules=[q_proj,v_porj]": "target_modules: no module is called v_porj; there are .*v_proj",
    "adapter.modules_to_save=[nohead]": "modules_to_save: no module is called nohead; there are .*lm_head",
    "adapter.layers=[1]": r"adapter.layers=\[1\] needs names of matrices",
    "+adapter.peft_kwargs.layer_replication=[[0,2],[0,2]]": "this adapter changes the model before it is trained",
    "adapter=peft adapter.peft_type=FOURIERFT adapter.rank=null +adapter.peft_kwargs.n_frequency=9": "changes the",
    "+adapter.peft_kwargs.lora_dropout=0.1": "further settings of LORA are",
    "adapter=peft adapter.rank=null": "adapter.peft_type=<method> is none of ADAMSS",
    "adapter=pissa adapter.rank=64": "init=pissa_niter_16 cannot take rank 64 out of",
    "adapter=pissa adapter.quantization=nf4": "changes the weights, and adapter.quantization rounds them",
    "adapter.stack=true": "merges an adapter, and model.archive=None is none",
    "+adapter.peft_kwargs.alora_invocation_tokens=[3]": "takes effect in PEFT's own wrapper only",
    "adapter.rank=0": "adapter.rank=0 must be at least 1",
    "adapter.dropout=0.1": "adapter.dropout=0.1: policy and reference would differ by noise",
    "adapter.peft_type=LORRA": "adapter.peft_type=LORRA is none of ADAMSS, .*LORA",
    "adapter.peft_type=IA3": r"adapter.rank=4: IA3 has no such setting; set adapter.rank=null",
    "+adapter.peft_kwargs.bais=all": "adapter.peft_kwargs.bais=all: further settings of LORA are .*bias",
    "adapter=none": "adapter.rank=4 needs an adapter; choose one, such as adapter=lora",
    "adapter=none adapter.rank=null adapter.quantization=nf4": "an adapter: quantised weights cannot be trained",
    "adapter=pissa trainer=FSDPTrainer nproc=2": "adapter.init=pissa_niter_16 changes the weights.*BasicTrainer",
    "trainer=TensorParallelTrainer nproc=2": "cannot train an adapter.*use trainer=FSDPTrainer",
    "adapter=qlora trainer=FSDPTrainer nproc=2": "is for trainer=BasicTrainer",
}


@pytest.mark.parametrize("given", REFUSED)
def test_misuse_is_one_line(given: str, trained: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=REFUSED[given]) as error:
        trained("run", *LORA, *given.split())
    assert "\n" not in str(error.value)


KEY = """
import sys
import torch
from dpo.model import adapters
from dpo.model.logps import Computation
from dpo.reference import model_key
from settings import load_config
from transformers import AutoModelForCausalLM
folder, *given = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
adapters.put_on(model, adapters.peft_config(load_config(["exp_name=x", *given]).adapter), folder, 0)
print(adapters.adds_nothing(model), model_key(model, Computation(torch.float32)))
"""


@pytest.mark.full
def test_a_stored_reference_has_one_name_in_every_process(tiny_model_dir: Path) -> None:
    """Names of modules are a set in PEFT, in an order of chance."""

    def found(*given: str, seed: str = "1") -> list[str]:
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", KEY, str(tiny_model_dir), *given]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()[-2:]

    assert found("adapter=dora") == found("adapter=dora", seed="2") and found("adapter=dora")[0] == "False"
    assert found("adapter=lora")[0] == "True"
    embedding = found("adapter=lora", "adapter.target_modules=[embed_tokens]")
    assert embedding[0] == "False" and embedding[1] != found("adapter=lora")[1]


def test_adapters_that_would_come_apart_are_refused(trained: Callable[..., Path], tmp_path: Path) -> None:
    tied = f"model.name_or_path={folder_of('qwen3', tmp_path)}"
    with pytest.raises(UserError, match="are one matrix: with an adapter on one of them the merged model"):
        trained("run", tied, *LORA, "adapter.target_modules=[embed_tokens,q_proj]")
    wide = f"model.name_or_path={folder_of('llama', tmp_path, 64)}"
    archive = f"model.archive={trained('first', 'adapter=qlora', 'adapter.rank=2')}"
    with pytest.raises(UserError, match=r"was trained with nf4: on other weights .*Set adapter.quantization=nf4"):
        trained("run", "adapter=lora", wide, archive)
    run = trained("on", "adapter=qlora", archive)
    assert json.loads((run / "LATEST" / "adapter_config.json").read_text())["r"] == 2  # its own, not the preset's
    assert "\n  rank: 2\n" in (run / "config.yaml").read_text()


def test_a_package_that_is_missing_is_named(trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo.model.config.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package: pip install bitsandbytes"):
        trained("run", "adapter=qlora")


def test_adapters_of_another_model_are_refused(trained: Callable[..., Path], tmp_path: Path) -> None:
    folder = trained("first", *LORA) / "LATEST"
    archive = f"model.archive={folder}"
    with pytest.raises(UserError, match=r"is an adapter\. To train it further: adapter=lora"):
        trained("run", archive)
    other = folder_of("gpt2", tmp_path)
    with pytest.raises(UserError, match="is of another architecture than"):
        trained("run", archive, *LORA, f"model.name_or_path={other}")
    with pytest.raises(UserError, match=r"adapter.peft_type=LOHA, but .* holds an adapter of LORA: set .*=LORA"):
        trained("run", archive, "adapter=peft", "adapter.peft_type=LOHA", "adapter.target_modules=all-linear")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "manifest.json").unlink()
    config = json.loads((copy / "adapter_config.json").read_text())
    for base, reason in (("org/other", "lies on org/other, and this run's model is"), (None, "names no base_model")):
        (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        (copy / "trainer_state.json").unlink(missing_ok=True)
        with pytest.raises(UserError, match=reason):
            trained("run", f"model.archive={copy}", *LORA)
    (copy / "adapter_config.json").write_text(json.dumps(config))
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    with pytest.raises(UserError, match=r"holds no weights .*adapter_model.bin, which could run a program"):
        trained("run", f"model.archive={copy}", *LORA)
