"""See again what was not finite: python scripts/replay.py <run folder>/nonfinite-<examples>

Computes loss and gradient of every example that a run recorded there, one by one, with the weights from before the
update, and says which are not finite. Takes overrides such as mixed_precision=null, to see whether they help.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import HelpFormatter, run_main


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", help="of the configuration, such as mixed_precision=null")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(read_arguments)  # before the slow imports: --help and mistakes are answered at once

import torch

from dpo.model.checks import refusing
from dpo.model.loading import load_policy, pick_device
from dpo.model.logps import Computation
from dpo.model.patches import quiet_transformers
from dpo.run.checkpoint import read_state
from dpo.run.health import broken_parameters, read_batch
from dpo.scoring import Scorer
from dpo.utils import visible
from opening import find_saved
from settings import build_loss, quoted


def replay(folder: Path, overrides: list[str]) -> None:
    """Print one line for each example, and whether any was not finite."""
    loss, examples = read_batch(folder)
    with refusing(f"{folder}: its loss cannot be computed"):
        built = build_loss(loss)
    config = find_saved(str(folder), [f"device={quoted(read_state(folder)['config']['device'])}", *overrides]).config
    quiet_transformers()
    policy = load_policy(config, pick_device(config)).train()
    how, broken = Computation(config.compute_dtype), 0
    for example in examples:
        scorer = Scorer(built, how, example if example.logps is not None else None)
        if built.needs_statistics:  # of this example alone: those of its batch are not known
            with torch.no_grad():
                seen = scorer.examples_of(policy, example.batch)
            statistics = {} if built.observes_mismatched else built.observe(seen)
            carried = {} if built.observes_mismatched else built.next_state(built.initial_state(), statistics)
            scorer = replace(scorer, statistics=statistics, state=carried)
        policy.zero_grad()
        with refusing(f"{folder}: {example.name} cannot be computed"):
            losses, _ = scorer(policy, example.batch, "train")
            losses.sum().backward()
        value, state = losses.item(), broken_parameters(policy)
        broken += not math.isfinite(value) or "not finite" in state
        print(visible(f"{example.name}: loss {value:.6g}; {state}"))
    print(f"{broken} of {len(examples)} examples are not finite by themselves")


def main() -> None:
    replay(**vars(read_arguments()))


if __name__ == "__main__":
    run_main(main)
