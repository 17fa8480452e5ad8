"""Train a language model by SFT, then by DPO (or another loss) against the frozen SFT checkpoint.

    python train.py loss=sft 'datasets=[hh]' exp_name=hh_sft
    python train.py loss=dpo loss.beta=0.1 'datasets=[hh]' exp_name=hh_dpo model.archive=runs/hh_sft

Every key of config/config.yaml can be overridden in this way.
"""

import atexit
import gc
import os
import signal
import subprocess
import sys
from typing import Any

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # a scheduler's warning waits for stopping.listen
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends it quietly; run_main takes over later

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from dpo.commandline import arranged
from dpo.utils import ROOT
from settings import all_keys, build_config, check_command, register_resolvers
from utils import run_main

# torch and transformers are imported once the configuration is accepted: a misspelt key is answered at once.


def train(composed: DictConfig, overrides: list[str], stop: Any = None) -> None:
    """Validate Hydra's configuration and train. `stop` is a StopRequest, or None for one of the run's own."""
    config = build_config(composed)
    if config.plan:
        others = [override for override in overrides if not override.startswith("plan=")]
        if code := subprocess.call([sys.executable, str(ROOT / "scripts" / "plan.py"), *others]):
            sys.exit(code)
        return
    import trainers

    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    trainers.train(config, overrides, stop)


def fails_first() -> bool:
    """Return whether this process is the one of its group that prints an error."""
    if "WORLD_SIZE" not in os.environ and "SLURM_STEP_NUM_TASKS" not in os.environ:
        return True
    from dpo import parallel

    return parallel.fails_first()


@hydra.main(version_base="1.3", config_path="config", config_name="config")
def main(composed: DictConfig) -> float | None:
    import train as module  # by this name other processes, such as those of Hydra's launchers, find what they run

    overrides = list(HydraConfig.get().overrides.task)

    def run(stop: Any = None) -> None:
        run_main(lambda: module.train(composed, overrides, stop), fails_first)

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        from dpo.run import sweeps

        return sweeps.run_in_sweep(composed, run)
    run()
    return None


class TableAtEnd(Callback):
    """Hydra's callback that ends a sweep with a table and a report of its runs, however it ends. The process that
    writes them can fail without an effect on the sweep."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = str(config.hydra.sweep.dir)
        command = [sys.executable, str(ROOT / "scripts" / "report.py"), folder, "--out", folder]
        atexit.register(subprocess.run, command, check=False)


if __name__ == "__main__":
    gc.disable()  # until everything is imported: nearly all that is made until then stays
    # Hydra's launchers start jobs in processes of their own, which have to find these modules.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (sys.path[0], os.environ.get("PYTHONPATH"))))
    register_resolvers()
    sys.argv[1:] = run_main(lambda: arranged(sys.argv[1:], check_command, all_keys()), fails_first)
    main()
