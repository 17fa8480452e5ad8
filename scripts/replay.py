"""See again what was not finite: python scripts/replay.py <run folder>/nonfinite-<examples>

Computes loss and gradient of every example that a run recorded there, one by one, with the weights from before the
update, and says which are not finite. Takes overrides such as mixed_precision=null, to see whether they help.
"""

import argparse
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import read_state
from evaluation import Scorer
from health import broken_parameters, read_batch
from models import Computation, load_policy, pick_device, quiet_transformers
from settings import LossConfig, load_config, quoted
from utils import UserError, run_main


def replay(folder: Path, overrides: list[str]) -> None:
    """Print one line for each example, and whether any was not finite."""
    loss, examples = read_batch(folder)
    before = read_state(folder)["config"]
    kept = [f"model.policy_dtype={before['model']['policy_dtype']}"]
    kept += [f"mixed_precision={before['mixed_precision'] or 'null'}", f"device={before['device']}"]
    given = ["exp_name=replay", "model=blank_model", f"model.name_or_path={quoted(folder)}", *kept, *overrides]
    config = load_config(list({item.partition("=")[0]: item for item in given}.values()))
    quiet_transformers()
    policy = load_policy(config, pick_device(config)).train()
    how, built, broken = Computation(config.compute_dtype), LossConfig(**loss).build(), 0
    for example in examples:
        scorer = Scorer(built, how, example if example.logps is not None else None)
        policy.zero_grad()
        losses, _ = scorer(policy, example.batch, "train")
        losses.sum().backward()
        value, state = losses.item(), broken_parameters(policy)
        broken += not math.isfinite(value) or "not finite" in state
        print(f"{example.name}: loss {value:.6g}; {state}")
    print(f"{broken} of {len(examples)} examples are not finite by themselves")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", help="of the configuration, such as mixed_precision=null")
    arguments = parser.parse_args()
    if not arguments.folder.is_dir():
        raise UserError(f"{arguments.folder}: there is no such folder")
    replay(arguments.folder, arguments.overrides)


if __name__ == "__main__":
    run_main(main)
