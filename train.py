"""Train a language model by SFT, then by DPO (or IPO) against the frozen SFT checkpoint.

    python train.py loss=sft datasets=[hh] exp_name=hh_sft
    python train.py loss=dpo loss.beta=0.1 datasets=[hh] exp_name=hh_dpo model.archive=<run folder of the SFT>

Every key of config/config.yaml can be overridden in this way.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # a scheduler's warning waits for stopping.listen
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends it quietly; run_main takes over later

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

import trainers
from dpo import parallel
from dpo.data.checks import check_format, check_overlap
from dpo.model.loading import load_policy, load_tokenizer, local_folder, pick_device, quiet_transformers
from dpo.run import runs, stopping, sweeps
from dpo.run.checkpoint import find_archive, read_state
from dpo.run.config import Config
from dpo.utils import RunLogger, TakenOver, UserError, be_quiet, log, open_log, redact, run_main
from preference_datasets import REGISTRY, PreferenceData, find_source, format_funnel, load_data
from settings import build_config, data_settings, literal, register_resolvers

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name, or a relative path


def check_sources(config: Config) -> None:
    """Raise UserError for the name of a data set that is not known, or a path that is not there. What the hub has shows
    when it is loaded."""
    settings = data_settings(config)
    for name in config.datasets:
        on_hub = name in REGISTRY or HUB_ID.fullmatch(name)
        if settings.sources.get(name) or not on_hub:
            find_source(name, settings, "train")


def load_splits(config: Config, tokenizer: Any) -> tuple[PreferenceData, PreferenceData | None, dict[str, Any]]:
    """Training and evaluation data, and what data_funnel.json says; prints what became of every row."""
    settings = data_settings(config)
    train = load_data(settings, tokenizer, "train")
    test = load_data(settings, tokenizer, "test") if config.n_eval_examples else None
    examples, steps = trainers.plan_of(config).size(train)
    log(f"training data\n{format_funnel(train)}")
    if test is not None:
        log(f"evaluation data\n{format_funnel(test)}")
        available = int(test.n_examples.sum())
        if available < config.n_eval_examples:
            log(f"n_eval_examples={config.n_eval_examples}, but the test split has {available}: evaluating on those")
    if not examples:
        raise UserError(f"dataset_weights={config.dataset_weights} of these data sets leave no example; raise them")
    log(f"this run: {examples} examples in {steps} updates of up to {config.batch_size}")
    warmup = config.warmup(steps)
    if steps <= warmup:
        reached = config.lr * steps / (warmup + 1)
        log(f"note: warmup_steps={warmup} outlasts the run: lr reaches {reached:.2g} of {config.lr:.2g}")
    archive = Path(config.model.archive) if config.model.archive else None
    check_format(train, archive, tokenizer)
    splits = {"train": train, **({"test": test} if test is not None else {})}
    funnel: dict[str, Any] = {name: split.funnel for name, split in splits.items()} | {"examples": examples}
    funnel |= {"updates": steps, "overlap": check_overlap(train, test, archive)}
    funnel |= {"notes": {name: split.notes for name, split in splits.items()}}
    funnel |= {"sources": {name: split.sources for name, split in splits.items()}}
    return train, test, funnel


def open_logger(logger: RunLogger, config: Config, begin: Callable[[], None]) -> None:
    """Open W&B and TensorBoard, if they are on, and the metric files, in the main process. Calls `begin` when nothing
    is left that could be refused, and before anything is written to a folder that a run goes on in."""
    if not parallel.is_main():
        return
    if config.wandb.enabled and not config.debug:
        logger.wandb_run = open_wandb(config, logger.run_dir)
    examples = read_state(config.checkpoint)["examples"] if config.checkpoint else None
    begin()
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        logger.tensorboard = SummaryWriter(str(logger.run_dir), purge_step=examples and examples + 1)
    logger.open()


def open_wandb(config: Config, run_dir: Path) -> Any:
    """A W&B run: online when logged in, else offline with a line that says so. WANDB_MODE, where set, decides."""
    import wandb

    name = Path(config.exp_name).name
    known = read_state(config.checkpoint)["wandb_id"] if config.checkpoint and runs.goes_on_inside(config) else None
    start = functools.partial(
        wandb.init,
        entity=config.wandb.entity,
        project=config.wandb.project,
        name=config.exp_name if run_dir.name.startswith(name) else f"{config.exp_name} {run_dir.name}",
        dir=str(run_dir),
        config=json.loads(redact(json.dumps(config.to_dict()))),
        id=known,
        resume="allow" if known else None,
        settings=wandb.Settings(console="off", silent=True, init_timeout=30),
    )
    mode: Any = os.environ.get("WANDB_MODE")
    try:
        if not mode:
            wandb.setup(wandb.Settings(silent=True))
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        if mode == "online":
            return start(mode=mode)
    except (wandb.errors.Error, OSError) as error:
        log(f"W&B cannot be reached ({error})")
        mode = "offline"
    try:
        run = start(mode=mode)
    except (wandb.errors.Error, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"W&B cannot start with WANDB_MODE={mode}: {reason}; or set wandb.enabled=false") from error
    if mode == "offline":
        log(f"W&B: offline (not logged in, or no network); upload later with: wandb sync {Path(run.dir).parent}")
    return run


@stopping.final()
def train(composed: DictConfig, overrides: list[str]) -> None:
    """Validate; then train in this process, or in new ones where the trainer works in a group of them."""
    config = build_config(composed)
    if config.model.archive:
        find_archive(config.model.archive)  # a wrong path should not wait for the data
    if parallel.is_main():
        check_sources(config)
    if config.tensorboard and find_spec("tensorboard") is None:
        raise UserError("tensorboard=true needs the package: pip install tensorboard")
    resolved: Any = OmegaConf.to_container(composed, resolve=True)
    if parallel.is_main():
        resolved["resume"], resolved["local_run_dir"] = runs.find_resume(config)
    if not config.needs_group:
        if parallel.joined() and int(os.environ["WORLD_SIZE"]) > 1:
            raise UserError(f"trainer={config.trainer} is one process; inside torchrun or srun set trainer=FSDPTrainer")
        train_in_process(resolved, overrides)
    elif parallel.joined():
        with parallel.group(pick_device(config)):
            train_in_process(*parallel.from_main((resolved, overrides)))
    else:
        train_in_new_processes(config, resolved, overrides)


def train_in_new_processes(config: Config, resolved: Any, overrides: list[str]) -> None:
    """Start a group of processes that train; this one waits, and clears up where they could not."""
    pick_device(config)
    n = config.nproc or (torch.cuda.device_count() if torch.cuda.is_available() and config.device != "cpu" else 2)
    try:
        parallel.launch(work, (resolved, overrides), n, config.fsdp_port)
    except BaseException:  # Ctrl-C among them
        run_dir = Path(resolved["local_run_dir"])
        if run_dir.exists():
            with contextlib.suppress(UserError), runs.locked(run_dir):
                runs.leave(run_dir)
                open_log(run_dir)  # for the reason, where no process could give one
        raise


def work(resolved: dict[str, Any], overrides: list[str]) -> None:
    """What a process started by `train` does."""
    run_main(lambda: train(OmegaConf.create(literal(resolved)), overrides), parallel.fails_first)


def train_in_process(resolved: Any, overrides: list[str]) -> None:
    """Train from a resolved configuration, the same in every process of the group."""
    stopping.listen()
    composed = OmegaConf.create(literal(resolved))
    config = build_config(composed)
    quiet_transformers()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    torch.manual_seed(config.seed)
    if not parallel.is_main():
        be_quiet()
    sharding = getattr(trainers, config.trainer).sharding(config)
    config = with_found_archive(config)
    if config.checkpoint:
        runs.check_changes(config, read_state(config.checkpoint))
    sys.argv = ["train.py", *overrides]  # which a checkpoint records: of a sweep, this job's own
    run_dir = Path(config.local_run_dir)
    if not parallel.is_main():
        build_and_fit(config, sharding, RunLogger(run_dir), lambda funnel: None)
        return
    fresh, accepted = not run_dir.exists(), False

    def begin(funnel: dict[str, Any]) -> None:
        nonlocal accepted
        runs.begin(config, composed, overrides, funnel)
        accepted = True

    with runs.locked(run_dir) as check:
        try:
            runs.open_run(config, composed, overrides)
            build_and_fit(config, sharding, RunLogger(run_dir, check, config.minimum_log_interval_secs), begin)
        except TakenOver:
            raise
        except BaseException as error:
            check()
            runs.leave(run_dir, fresh and not accepted and isinstance(error, UserError))
            raise


def with_found_archive(config: Config) -> Config:
    """The configuration with what LATEST names now, in all processes, whatever another run makes of it later."""
    archive = None
    if config.model.archive and parallel.is_main():
        archive = str(find_archive(config.model.archive, config.checkpoint_check))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, archive=parallel.from_main(archive)))


def build_and_fit(
    config: Config, sharding: parallel.Sharding | None, logger: RunLogger, begin: Callable[[dict[str, Any]], None]
) -> None:
    """Load tokenizer, data and model, and train. `begin` is called, with the data's funnel, when all that could be
    refused has been accepted."""
    device, run_dir = pick_device(config), Path(config.local_run_dir)
    with parallel.one_per_machine_first():
        tokenizer = load_tokenizer(config)
        train_data, eval_data, funnel = load_splits(config, tokenizer)
        if runs.is_finished(config, train_data):
            log(f"{run_dir} is finished, with these settings and data: nothing to do")
            return
        local_folder(config.model.name_or_path, config.cache)  # converts a .gguf file
    parallel.build_mesh(sharding, device)
    if not parallel.is_main() and run_dir.exists():
        open_log(run_dir)  # for an error of this process
    trainer = None
    try:
        trainer_class = getattr(trainers, config.trainer)
        load = functools.partial(load_policy, config, device, sharding)
        trainer = trainer_class(config, load, tokenizer, train_data, eval_data, logger)
        if config.checkpoint:
            trainer.resume(config.checkpoint)
        n_parameters = sum(p.numel() for p in trainer.policy.parameters())
        log(
            f"policy: {n_parameters / 1e6:.1f}M parameters on {device} ({parallel.describe()}), "
            f"a {config.model.name_or_path}, layout {trainer.scorer.how.layout}"
        )
        open_logger(logger, config, lambda: begin(funnel))
        trainer.fit()
    finally:
        if trainer is not None:
            trainer.writer.close()
        ended_well = isinstance(sys.exception(), stopping.Stopped | None)
        logger.close(exit_code=int(not ended_well))
    log(f"done; the run's folder is {run_dir}")


@hydra.main(version_base="1.3", config_path="config", config_name="config")
def main(composed: DictConfig) -> float | None:
    import train as module  # by this name other processes, Hydra's launchers' among them, find what they have to run

    overrides = list(HydraConfig.get().overrides.task)

    def run() -> None:
        run_main(lambda: module.train(composed, overrides), parallel.fails_first)

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return sweeps.run_in_sweep(composed, run)
    run()
    return None


if __name__ == "__main__":
    # Hydra's launchers start jobs in processes of their own, which have to find these modules.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (sys.path[0], os.environ.get("PYTHONPATH"))))
    register_resolvers()
    sys.argv[1:] = run_main(lambda: sweeps.arranged(sys.argv[1:]), parallel.fails_first)
    main()
