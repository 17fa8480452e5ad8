"""Every yaml composes; every command of the original README passes validation; every bad value is named."""

import dataclasses
import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from omegaconf import OmegaConf

from dpo.config import keys
from dpo.run.config import Config
from dpo.utils import UserError
from settings import CONFIG_DIR, build_config, check_command, load_config
from utils import loss_values

MODELS = sorted(path.stem for path in (CONFIG_DIR / "model").glob("*.yaml"))
LOSSES = sorted(path.stem for path in (CONFIG_DIR / "loss").glob("*.yaml"))

# The commands of the original README without "python -u train.py", one a line. The trainer is BasicTrainer where the
# original names FSDPTrainer.
BASE = "gradient_accumulation_steps=2 batch_size=64 eval_batch_size=32 trainer=FSDPTrainer sample_during_eval=false"
ORIGINAL_COMMANDS = [
    f"model=pythia69 datasets=[hh] loss=sft exp_name=anthropic_dpo_pythia69 {BASE}",
    "model=blank_model model.name_or_path=/PATH/TO/LLAMA/WEIGHTS model.block_name=LlamaDecoderLayer datasets=[hh,shp] "
    f"loss=sft exp_name=anthropic_shp_sft_llama_7b {BASE}",
    "exp_name=x model=blank_model model.name_or_path=gpt2-xl model.block=GPT2Block",
    "model=pythia69 datasets=[hh] loss=dpo loss.beta=0.1 "
    "model.archive=/path/to/checkpoint/from/sft/step-XXXX/policy.pt "
    f"exp_name=anthropic_dpo_pythia69 {BASE.replace('batch_size=64', 'batch_size=32', 1)}",
    f"model=pythia28 datasets=[hh] loss=sft exp_name=anthropic_dpo_pythia28 {BASE} model.fsdp_policy_mp=bfloat16",
    f"model=pythia28 datasets=[hh] loss=dpo loss.beta=0.1 exp_name=anthropic_dpo_pythia28 {BASE} "
    "model.fsdp_policy_mp=bfloat16 model.archive=/path/to/archive/from/sft/LATEST/policy.pt",
    "exp_name=x loss=dpo loss.beta=0.1 loss.label_smoothing=0.1",
    "exp_name=x loss=dpo loss.beta=0.1 loss.reference_free=true",
    "exp_name=x loss=ipo loss.beta=0.1",
]


@pytest.mark.parametrize("command", ORIGINAL_COMMANDS)
def test_commands_of_the_original_readme(command: str) -> None:
    config = load_config(command.split())
    asked = dict(item.split("=", 1) for item in command.split())
    assert config.exp_name == asked["exp_name"]
    if "batch_size" in asked:
        assert (config.batch_size, config.gradient_accumulation_steps) == (int(asked["batch_size"]), 2)
    if "model.fsdp_policy_mp" in asked:
        assert config.mixed_precision == "bfloat16"


@pytest.mark.parametrize("model", MODELS)
def test_every_model_config_composes(model: str) -> None:
    overrides = ["model.name_or_path=x"] if model == "blank_model" else []
    config = load_config([f"model={model}", "exp_name=x", *overrides])
    assert config.model.name_or_path
    assert model == "blank_model" or config.model.block_name


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_config_composes(loss: str) -> None:
    required = [key for key, value in loss_values(loss).items() if value == "???"]
    given = [f"loss.{key}=" + ("{nll: 1}" if key == "terms" else "0.3") for key in required]
    live = ["reference.mode=live"] if loss == "tdpo" else []
    built = load_config([f"loss={loss}", "exp_name=x", *given, *live]).loss
    assert built.needs_rejected == (loss not in ("sft", "kto")) and built.name == loss
    assert "beta" not in required or built.beta == 0.3


def test_the_issue_of_missing_models_is_covered() -> None:
    wanted = {"gpt2-large", "gpt2-xl", "gptj", "llama7b", "pythia28", "pythia69", "blank_model", "smollm2"}
    assert wanted <= set(MODELS)


def test_defaults_of_the_original() -> None:
    config = load_config(["exp_name=x", "model=pythia28"])
    expected = {
        "seed": 0,
        "batch_size": 4,
        "eval_batch_size": 16,
        "lr": 5e-7,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": 10.0,
        "max_length": 512,
        "max_prompt_length": 256,
        "n_epochs": 1,
        "n_examples": None,
        "n_eval_examples": 256,
        "trainer": "BasicTrainer",
        "optimizer": "RMSprop",
        "warmup_steps": None,  # the original's 150, of 1,500 updates or more
        "eval_every": 20_000,
        "n_eval_model_samples": 16,
        "do_first_eval": True,
        "sample_during_eval": True,
        "debug": False,
        "datasets": ["hh"],
        "minimum_log_interval_secs": 1.0,
        "activation_checkpointing": False,
    }
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.model.policy_dtype == "float32" and config.wandb.project == "direct-preference-optimization"


def test_the_warm_up_is_a_tenth_of_a_short_run_unless_given() -> None:
    updates = [5, 100, 1499, 1500, 100_000]
    assert [load_config(["exp_name=x"]).warmup(n) for n in updates] == [0, 10, 149, 150, 150]
    assert [load_config(["exp_name=x", "warmup_steps=150"]).warmup(n) for n in updates] == [150] * 5


def test_every_key_of_the_yaml_is_commented_and_typed() -> None:
    lines = (CONFIG_DIR / "config.yaml").read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if line and line[0].isalpha()]
    for i in keys:
        block = i
        while lines[block - 1] and not lines[block - 1].startswith("#"):
            block -= 1
        assert lines[block - 1].startswith("#") or lines[i].startswith(("defaults", "hydra")), lines[i]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=dpo"], "loss.beta is missing"),
        (["loss=dpo", "loss.beta=0"], "loss.beta=0 must be more than 0"),
        (["loss=dpo", "loss.beta=-0.1"], "must be more than 0"),
        (["loss=dpo", "loss.beta=nan"], "must be a finite number"),
        (["loss=ipo", "loss.beta=inf"], "must be a finite number"),
        (["loss=dpo", "loss.beta=high"], "loss.beta=high"),
        (["loss=dpo", "loss.beta=0.1", "loss.label_smoothing=0.5"], "less than 0.5"),
        (["loss=dpo", "loss.beta=0.1", "loss.label_smoothing=-0.1"], "at least 0"),
        (["loss=sft", "loss.beta=0.1"], "beta"),
        (["loss=sft", "+loss.beta=0.1"], "loss.beta: no such key of loss=sft"),
        (["loss=dpo", "loss.beta=null"], "loss.beta=null: input should be a valid number"),
        (["reference=live"], "reference=live: "),
        (["loss=ktoo"], "ktoo"),
        (["model=gpt5"], "gpt5"),
        (["model=blank_model"], "model.name_or_path is missing"),
        (["n_epochs=null"], "the run would never end"),
        (["n_epochs=0"], "n_epochs=0 must be at least 1"),
        (["batch_size=6", "gradient_accumulation_steps=4"], "6 / 4 = 1.50"),
        (["batch_size=0"], "batch_size=0 must be at least 1"),
        (["batch_size=four"], "batch_size=four"),
        (["batch_size=2.5"], "batch_size=2.5"),
        (["batch_size=true"], "batch_size=true: input should be a number"),
        (["n_epochs=2.0"], "n_epochs=2.0: input should be a whole number"),
        (["lr=true"], "lr=true: input should be a number"),
        (["dataset_weights=[true]"], "dataset_weights=[true]: input should be a number"),
        (["loss=dpo", "loss.beta=true"], "loss.beta=true: input should be a number"),
        (["max_grad_norm=nan"], "max_grad_norm=nan must be more than 0"),
        (["max_prompt_length=512"], "must be less than max_length"),
        (["trainer=MagicTrainer"], "choose from: BasicTrainer"),
        (["optimizer=Adamm"], "AdamW"),
        (["optimizer=adamw"], "SGD; did you mean 'AdamW'?"),
        (["optimizer=LBFGS"], "choose from"),
        (["lr=-1"], "lr=-1 must be at least 0"),
        (["lr_schedule=step"], "constant, linear, cosine"),
        (["mixed_precision=int8"], "bfloat16"),
        (["model.policy_dtype=float64"], "float32"),
        (["model.reference_dtype=float16"], "would not be 0"),
        (["model.block=A", "model.block_name=B"], "differ"),
        (["device=tpu"], "device=tpu"),
        (["datasets=[]"], "datasets is empty"),
        (["datasets=pairs.csv"], "datasets=pairs.csv is no list: write 'datasets=[pairs.csv]'"),
        (["model.archive="], "model.archive is empty: was a variable of the shell unset"),
        (["reference.archive="], "reference.archive is empty"),
        (["datasets=[hh,'']"], "datasets is empty"),
        (["dataset_weights=[1,2]"], "one number for each"),
        (["dataset_weights=[nan]"], "must be a finite number"),
        (["dataset_weights=[-1]"], "must be at least 0"),
        (["+dataset_sources.hhh=/x"], "no built-in data set"),
        (["optimizer=SparseAdam"], "choose from"),
        (["lr=inf"], "lr=inf"),
        (["model=null"], "Config group override must be a string"),
        (["model.policy_dtype=float16"], "bfloat16"),
        (["model.policy_dtype=bfloat16", "mixed_precision=float16"], "needs float32 weights"),
        (["model.device_map=balanced", "device=cpu"], "leave device=cpu out"),
        (["holdout_fraction=1"], "less than 1"),
        (["chat_format=chatml"], "auto, template, hh"),
        (["betas=1"], "betas"),
        (["+lrr=1"], "did you mean 'lr'?"),
        (["loss=dpo", "loss.beta=0.1", "+loss.bata=1"], "did you mean 'loss.beta'?"),
        (["+wandb.projekt=x"], "did you mean 'wandb.project'?"),
        (["eval_every=0"], "eval_every=0"),
        (["max_grad_norm=0"], "more than 0"),
        (["max_runtime=0"], "max_runtime=0 must be more than 0"),
        (["keep_last_n=0"], "keep_last_n=0 must be at least 1"),
        (["save_every=0"], "save_every=0 must be at least 1"),
        (["warn_loss_spike=1"], "more than 1"),
        (["on_nonfinite=ignore"], "choose from: stop, skip"),
        (["checkpoint_check=slow"], "choose from: fast, full"),
        (["keep_best=loss/eval", "n_eval_examples=0"], "needs evaluations"),
        (["kl_during_eval=true", "sample_during_eval=false"], "needs sample_during_eval=true"),
        (["kl_during_eval=true", "n_eval_model_samples=0"], "it needs"),
        (["n_eval_samples_per_prompt=0"], "n_eval_samples_per_prompt=0 must be at least 1"),
        (["loss=dpo", "loss.beta=0.1", "loss.robust=true"], "loss.robust=true needs loss.label_smoothing"),
        (["loss=unlikelihood", "loss.alpha=2"], "loss.alpha=2 must be at most 1"),
        (["debug=maybe"], "debug=maybe"),
        (["nproc=2"], "nproc=2 does nothing with trainer=BasicTrainer"),
        (["fsdp_cpu_offload=true"], "fsdp_cpu_offload=True does nothing"),
        (["fsdp_replicate_size=2"], "does nothing"),
        (["trainer=FSDPTrainer", "nproc=0"], "nproc=0 must be at least 1"),
        (["trainer=FSDPTrainer", "tensor_parallel_size=2"], "needs trainer=TensorParallelTrainer"),
        (["trainer=FSDPTrainer", "mixed_precision=float16"], "take bfloat16"),
        (["trainer=FSDPTrainer", "model.device_map=balanced"], "is for BasicTrainer"),
        (["trainer=FSDPTrainer", "device=mps"], "device=mps"),
        (["activation_checkpointing_every=2"], "needs activation_checkpointing=true"),
    ],
)
def test_bad_values_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(["exp_name=x", *overrides])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("loss=apo", "; here that is loss=apo_zero or loss=apo_down"),
        ("loss.beta=1", "this run has loss=sft, the default: add loss=dpo"),
        ("loss=sft loss.beta=1", "loss=sft has no such key: leave it out, or choose a loss that has it"),
        ("loss=kto loss.nll_weight=1", "or add terms to a loss of pairs: loss=mix 'loss.terms={bco: 1, nll: 1}'"),
        ("loss=bco loss.nll_weight=1", "loss=bco has no such key: leave it out, or choose a loss that has it, or add"),
        ("loss=mpo loss.gamma=1", "a term's own keys stand in 'loss.settings={dpo: {gamma: <value>}}'"),
        ("loss=dpo,sft,ipo loss.beta=1", "loss=sft has no such key: sweep losses that have it, or leave loss.beta out"),
    ],
)
def test_losses_and_their_keys_are_answered_before_hydra(command: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        check_command(command.split())
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(UserError) as error:
        load_config(["exp_name=x", "batch_size=0", "lr=-1", "optimizer=X", "loss=dpo", "loss.beta=-1"])
    assert len(str(error.value).splitlines()) == 4


def test_a_missing_package_of_the_embedded_model_is_named() -> None:
    with pytest.raises(UserError, match="make setup"):
        load_config(["exp_name=x", "model.name_or_path=${package_file:no_such_package,x.gguf}"])


def test_missing_exp_name() -> None:
    with pytest.raises(UserError, match="exp_name is missing"):
        load_config([])


def test_validation_edits_nothing(tmp_path: Path) -> None:
    import hydra

    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed = hydra.compose("config", ["exp_name=x", f"local_run_dir={tmp_path}", "eval_every=30"])
    before = OmegaConf.to_yaml(composed)
    build_config(composed)
    assert OmegaConf.to_yaml(composed) == before


def test_optimizer_arguments_of_any_shape() -> None:
    config = load_config(["exp_name=x", "optimizer=AdamW", "+optimizer_kwargs.betas=[0.9,0.95]"])
    assert config.optimizer_kwargs == {"betas": [0.9, 0.95]}


def test_every_key_is_declared_once_and_has_a_value_in_the_yaml() -> None:
    composed = OmegaConf.load(CONFIG_DIR / "config.yaml")
    given = {key for key in composed if key not in ("defaults", "hydra", "wandb", "reference")}
    given |= {f"{group}.{key}" for group in ("wandb", "reference") for key in composed[group]}
    for group, file in (("model", "blank_model"), ("adapter", "none")):
        given |= {f"{group}.{key}" for key in OmegaConf.load(CONFIG_DIR / group / f"{file}.yaml")}
    assert given == set(keys(Config)) - {"loss"}
    declared = [name for kind in Config.__mro__ for name in vars(kind).get("__annotations__", {})]
    assert len(declared) == len(set(declared))


def test_optimizers_are_those_of_torch() -> None:
    (field,) = (field for field in dataclasses.fields(Config) if field.name == "optimizer")
    closures = ("Optimizer", "LBFGS", "SparseAdam")  # abstract; needs a closure; for sparse gradients
    assert set(get_args(field.type)) - {"AdamW8bit"} == {name for name in dir(torch.optim) if name[0].isupper()} - {
        *closures
    }


def test_limits_can_be_infinite() -> None:
    keys = ("max_grad_norm", "max_runtime", "warn_chosen_drop", "warn_loss_spike")
    config = load_config(["exp_name=x", *(f"{key}=inf" for key in keys)])
    assert all(getattr(config, key) == math.inf for key in keys)
