"""The theory, exactly: python experiments/closed_form.py [--betas 0.05,0.1,...] [--noise 0.1]

Prompts with few enough responses to enumerate, a known reward, preferences drawn from it by Bradley-Terry. What DPO
reaches is compared with the optimum of reward minus beta times KL, pi_ref(y) exp(r(y) / beta) / Z (Rafailov et al.
2023, equation 4), for many betas; and with a share of the labels flipped, for DPO, conservative and robust DPO. Writes
a table and a figure into `--out`.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dpo.loss import Examples, Loss, Responses
from dpo.utils import UserError, make_dir
from losses import DPO
from utils import HelpFormatter, run_main


@dataclass(frozen=True)
class World:
    """Log-probabilities of the reference, normalised over responses, and rewards; float64 [prompts, responses] each."""

    reference: Tensor
    reward: Tensor


def random_world(seed: int, prompts: int = 6, responses: int = 5) -> World:
    """Normal logits and rewards."""
    generator = torch.Generator().manual_seed(seed)
    logits, reward = torch.randn(2, prompts, responses, generator=generator, dtype=torch.float64)
    return World(logits.log_softmax(-1), reward)


def optimum(world: World, beta: float) -> Tensor:
    """log of pi_ref exp(r / beta) / Z, [prompts, responses]."""
    return (world.reference + world.reward / beta).log_softmax(-1)


def preferences(world: World, flipped: float = 0.0) -> Tensor:
    """Probability that the first response is labelled better than the second, [prompts, responses, responses]: Bradley-
    Terry's sigmoid of the difference of rewards, if labels are flipped with probability `flipped`."""
    first = torch.sigmoid(world.reward[:, :, None] - world.reward[:, None, :])
    return first * (1 - flipped) + (1 - first) * flipped


def train(world: World, loss: Loss, preferred: Tensor) -> Tensor:
    """The policy, as log-probabilities [prompts, responses], that minimises the mean of `loss` over all pairs, each
    weighed by how often it is labelled so. One logit a response, L-BFGS in float64."""
    logits = world.reference.clone().requires_grad_()
    better, worse = (~torch.eye(preferred.shape[1], dtype=torch.bool)).nonzero(as_tuple=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        models = logits.log_softmax(-1), world.reference
        one = torch.ones_like(preferred[:, better, worse].flatten())
        sides = [Responses(models[0][:, side].flatten(), one, models[1][:, side].flatten()) for side in (better, worse)]
        pairs = Examples(sides[0], sides[1])
        total = 2 * (preferred[:, better, worse].flatten() * loss(pairs)).mean()  # a pair stands there both ways
        total.backward()
        return total

    optimizer.step(closure)  # type: ignore[arg-type]
    return logits.detach().log_softmax(-1)


def total_variation(a: Tensor, b: Tensor) -> float:
    """The largest over prompts, of policies given as log-probabilities."""
    return float(0.5 * (a.exp() - b.exp()).abs().sum(-1).max())


def reward_error(world: World, policy: Tensor, beta: float) -> float:
    """By how much differences of implicit rewards beta log(policy / reference) are off, at most, from the true ones."""
    off = beta * (policy - world.reference) - world.reward
    return float((off[:, :, None] - off[:, None, :]).abs().max())


def measure(world: World, policy: Tensor) -> tuple[float, float]:
    """Mean over prompts of KL(policy || reference) in nats, and of the expected reward."""
    chance = policy.exp()
    kl, reward = chance * (policy - world.reference), chance * world.reward
    return float(kl.sum(-1).mean()), float(reward.sum(-1).mean())


def compare(world: World, betas: Sequence[float], noise: float) -> list[dict[str, float | str]]:
    """A row for each beta and way of training: where it ends, and how far from the optimum."""
    rows: list[dict[str, float | str]] = []
    clean, noisy = preferences(world), preferences(world, noise)
    for beta in betas:
        policies = {
            "optimum": optimum(world, beta),
            "DPO": train(world, DPO(beta), clean),
            "DPO, flipped labels": train(world, DPO(beta), noisy),
            "conservative DPO": train(world, DPO(beta, noise), clean),
            "conservative DPO, flipped labels": train(world, DPO(beta, noise), noisy),
            "robust DPO, flipped labels": train(world, DPO(beta, noise, robust=True), noisy),
        }
        for method, policy in policies.items():
            row: dict[str, float | str] = {"method": method, "beta": beta}
            row["KL"], row["reward"] = measure(world, policy)
            row["TV"] = total_variation(policy, policies["optimum"])
            row["reward error"] = reward_error(world, policy, beta)
            rows.append(row)
    return rows


def draw(world: World, rows: list[dict[str, float | str]], path: Path) -> None:
    """The analytic frontier as a line, and every method's points."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    line = [measure(world, optimum(world, float(beta))) for beta in torch.logspace(-2, 2, 200)]
    axes.plot(*zip(*line), color="gray", label="optimum of reward - beta KL, all betas")
    for method, marker in zip(dict.fromkeys(str(row["method"]) for row in rows if row["method"] != "optimum"), "+x^vs"):
        points = [(row["KL"], row["reward"]) for row in rows if row["method"] == method]
        axes.plot(*zip(*points), marker, label=method, fillstyle="none")
    axes.set(xlabel="KL(policy || reference), nats", ylabel="expected reward")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--betas", default="0.05,0.1,0.2,0.5,1,2,5", help="comma-separated")
    parser.add_argument("--noise", type=float, default=0.1, help="share of flipped labels, and label_smoothing")
    parser.add_argument("--seed", type=int, default=0, help="of the world")
    parser.add_argument("--out", type=Path, default=Path("closed_form"), help="folder of the results")
    arguments = parser.parse_args()
    try:
        betas = [float(beta) for beta in arguments.betas.split(",")]
    except ValueError:
        betas = [0.0]
    if not min(betas) > 0:
        raise UserError(f"--betas {arguments.betas} must be numbers above 0, such as 0.1,0.5")
    if not 0 <= arguments.noise < 0.5:
        raise UserError(f"--noise {arguments.noise} must be at least 0 and less than 0.5")
    world = random_world(arguments.seed)
    rows = compare(world, betas, arguments.noise)
    out = make_dir(arguments.out, "--out")
    with open(out / "closed_form.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print("TV: total variation from the optimum; reward error: of differences of implicit rewards; both at most")
    print(f"{'method':<34}{'beta':>6}{'KL, nats':>10}{'reward':>9}{'TV':>10}{'reward error':>14}")
    for row in rows:
        numbers = "{beta:>6g}{KL:>10.4f}{reward:>9.4f}{TV:>10.1e}{reward error:>14.1e}".format_map(row)
        print(f"{row['method']:<34}{numbers}")
    draw(world, rows, out / "closed_form.png")
    print(f"written: {out / 'closed_form.csv'}, {out / 'closed_form.png'}")


if __name__ == "__main__":
    run_main(main)
