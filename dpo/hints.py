"""Hints for mistakes on the command line: keys of other trainers, misspelt keys, values that need quotes."""

import difflib
import json
import shlex
from collections.abc import Collection

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from dpo.utils import UserError

# Names of the same thing in transformers, TRL and their like, with what is written here. `docs/make_names.py` makes a
# table of this for readers.
ELSEWHERE = {
    "learning_rate": "lr=<value>",
    "per_device_train_batch_size train_batch_size micro_batch_size": "batch_size=<examples in one update, over all "
    "devices>, and gradient_accumulation_steps or microbatch_tokens to cut it",
    "per_device_eval_batch_size": "eval_batch_size=<value>",
    "max_steps total_steps num_steps": "n_examples=<steps x batch_size>",
    "num_train_epochs num_epochs epochs max_epochs": "n_epochs=<value>",
    "max_train_samples num_samples": "n_examples=<value>",
    "max_eval_samples": "n_eval_examples=<value>",
    "eval_steps evaluation_strategy eval_strategy eval_interval": "eval_every=<examples between evaluations>",
    "eval_on_start": "do_first_eval=<value>",
    "generate_during_eval": "sample_during_eval=<value>",
    "save_steps save_strategy save_interval": "save_every=<examples between checkpoints>",
    "save_total_limit": "keep_last_n=<value>",
    "save_only_model": "save_weights_only=<value>",
    "metric_for_best_model load_best_model_at_end": "keep_best=<metric, such as loss/eval>",
    "logging_steps logging_strategy logging_first_step": "nothing: metrics.jsonl has every update",
    "report_to with_tracking": "tracker=[<wandb, tensorboard, trackio>], or [] for none",
    "output_dir logging_dir save_dir out_dir": "local_run_dir=<folder>, or local_dirs=[<folder>] for a fresh one in it",
    "run_name": "exp_name=<value>",
    "push_to_hub hub_model_id": "scripts/export.py <run> --out <folder> --push <organisation/name>, after training",
    "project wandb_project": "wandb.project=<value>",
    "wandb_entity": "wandb.entity=<value>",
    "use_wandb": "wandb.enabled=<value>",
    "bf16 bfloat16": "mixed_precision=bfloat16",
    "fp16 float16 half": "mixed_precision=float16",
    "tf32": "allow_tf32=<value>",
    "dtype torch_dtype": "model.policy_dtype=<float32 or bfloat16>",
    "model_name_or_path model_name name_or_path model_id": "model=blank_model model.name_or_path=<value>",
    "tokenizer_name tokenizer_name_or_path": "model.tokenizer_name_or_path=<value>",
    "trust_remote_code": "model.trust_remote_code=<value>",
    "ref_model ref_model_name_or_path": "reference.archive=<checkpoint>; null: model.archive, where training starts",
    "dataset dataset_name train_file data data_path": "datasets=[<name or path>]",
    "dataset_mixer dataset_mixer_list": "datasets=[<names or paths>] dataset_weights=[<shares of each>]",
    "dataset_train_split dataset_test_split": "nothing: splits are found by their names; without one for tests, "
    "holdout_fraction=<share of the prompts>",
    "completion_only_loss assistant_only_loss": "nothing: only the assistant's tokens count (sft_turns)",
    "packing padding_free": "layout=<auto, packed, tree or padded>; auto packs on CUDA",
    "dataset_num_proc preprocessing_num_workers": "num_proc=<value>",
    "beta dpo_beta": "loss.beta=<value>",
    "loss_type dpo_loss_type": "loss=<a file of config/loss>",
    "label_smoothing label_smoothing_factor": "loss.label_smoothing=<value>",
    "reference_free": "loss.reference_free=<value>",
    "simpo_gamma gamma_beta_ratio": "loss=simpo loss.gamma=<value, not divided by beta>",
    "cpo_alpha rpo_alpha pref_ftx nll_loss_coef": "loss.nll_weight=<value>, loss.nll=<mean, sum or batch_mean>",
    "f_divergence_type": "loss.divergence=<value>",
    "ld_alpha": "loss.ld_alpha=<value>",
    "discopop_tau": "loss.tau=<value>",
    "use_weighting": "loss.weighting=wpo",
    "desirable_weight undesirable_weight": "loss=kto loss.desirable_weight=<value> loss.undesirable_weight=<value>",
    "sigmoid": "loss=dpo",
    "sigmoid_norm": "loss=dpo loss.length_normalized=true",
    "exo_pair": "loss=exo",
    "nca_pair": "loss=nca",
    "bco_pair": "loss=bco",
    "sppo_hard": "loss=sppo loss.pair_weight=2",
    "aot_pair": "loss=aot_unpaired (loss=aot is their aot)",
    "kto_pair": "loss=kto, on rows with a label",
    "apo": "loss=apo_zero or loss=apo_down",
    "loss_weights": "loss=mix 'loss.terms={dpo: 0.8, nll: 1.0}'",
    "use_peft use_lora lora peft": "adapter=lora (config/adapter)",
    "use_dora": "adapter=dora",
    "use_rslora": "adapter=rslora",
    "load_in_4bit use_qlora": "adapter=qlora",
    "load_in_8bit": "adapter=qlora adapter.quantization=int8",
    "lora_r lora_rank": "adapter=lora adapter.rank=<value>",
    "lora_alpha": "adapter=lora adapter.alpha=<value>",
    "lora_dropout": "nothing: dropout would make policy and reference differ",
    "lora_target_modules target_modules": "adapter=lora adapter.target_modules=<all-linear, or a list>",
    "modules_to_save lora_modules_to_save": "adapter=lora adapter.modules_to_save=[<names>]",
    "init_lora_weights": "adapter.init=<value>",
    "adapter_name_or_path peft_model_id": "model.archive=<folder of the adapter>",
    "precompute_ref_log_probs": "reference.mode=<stored or live>",
    "max_seq_length max_seq_len seq_length model_max_length": "max_length=<tokens of prompt and response>",
    "max_completion_length max_target_length": "max_length=<tokens of prompt and response>, max_prompt_length=<tokens>",
    "warmup_ratio": "warmup_steps=<updates>; by default a tenth of the run's, at most 150",
    "num_warmup_steps": "warmup_steps=<updates>",
    "lr_scheduler_type lr_scheduler scheduler": "lr_schedule=<constant, linear or cosine>",
    "optim": "optimizer=<class of torch.optim>",
    "adam_beta1 adam_beta2 betas": "+optimizer_kwargs.betas=[<beta1>,<beta2>]",
    "adam_epsilon eps": "+optimizer_kwargs.eps=<value>",
    "gradient_clipping max_norm clip_grad_norm": "max_grad_norm=<value>",
    "gradient_accumulation accumulate_grad_batches": "gradient_accumulation_steps=<value>",
    "gradient_checkpointing": "activation_checkpointing=<value>",
    "resume_from_checkpoint": "resume=<auto, or a folder>",
    "torch_compile": "compile=<value>",
    "fsdp deepspeed zero_stage": "trainer=FSDPTrainer",
    "auto_find_batch_size": "microbatch_tokens=auto",
    "data_seed": "seed=<value>",
    "use_cpu no_cuda": "device=cpu",
    "experiment recipe": "+experiment=<name of a file in config/experiment>",
    "num_gpus n_gpus num_processes world_size": "trainer=FSDPTrainer nproc=<value>",
    "do_train do_eval": "nothing: it always trains; n_eval_examples=0 turns evaluations off",
}
HERE = {name: meaning for names, meaning in ELSEWHERE.items() for name in names.split()}


def meant(key: str, keys: Collection[str], value: str = "") -> str:
    """Return what to write instead of `key`, as the end of a message, with the `value` that it was given, if any; empty
    if that is not known."""
    name = key.replace("-", "_").lower()
    for elsewhere in (name, name.removeprefix("loss.")):
        if elsewhere in HERE:
            text = HERE[elsewhere]
            one = value and text.count("<value>") == 1
            return f"; here that is {text.replace('<value>', value) if one else text}"
    if name in keys:
        return f"; did you mean {name!r}?"
    close = difflib.get_close_matches(key, keys, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def parsed(argument: str) -> Override:
    """Return the override as Hydra parses it. Raise UserError with the right spelling if Hydra cannot."""
    key, equals, value = argument.partition("=")
    if not equals and not key.startswith("~"):
        raise UserError(f"{argument!r} is no setting; settings are written key=value")
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException as error:
        quoted = f"{key}={_quote(value)}"
        try:
            OverridesParser.create().parse_override(quoted)
        except HydraException:
            raise UserError(f"{argument!r} cannot be read: {str(error).strip().splitlines()[0]}") from error
        raise UserError(
            f"{argument!r} cannot be read: a value with =, spaces, brackets or letters beyond English ones stands in "
            f"quotes, inside those for the shell: {shlex.quote(quoted)}"
        ) from error


def _quote(value: str) -> str:
    """Return the value, or each entry of a list, in double quotes, unless it is quoted already."""
    if value.startswith("[") and value.endswith("]"):
        return f"[{','.join(_quote(part.strip()) for part in value[1:-1].split(','))}]"
    return value if value[:1] in ("'", '"') else json.dumps(value, ensure_ascii=False)
