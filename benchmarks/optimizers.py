"""Measure what bfloat16 weights learn at a small learning rate, by rounding: benchmarks/optimizers.md.

python benchmarks/optimizers.py --updates 300 --lr 1e-5 1e-6
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from dpo.optimizer import build_optimizer
from settings import load_config

ROWS, LENGTH = 8, 64
WAYS = {
    "float32": ("float32", "round_to_nearest=false"),
    "bfloat16, nearest": ("bfloat16", "round_to_nearest=true"),
    "bfloat16, stochastic": ("bfloat16", "round_to_nearest=false"),
}


def rows(text: torch.Tensor, seed: int, n: int) -> torch.Tensor:
    """Return `n` rows of LENGTH bytes of the text, int64."""
    random = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - LENGTH, (n,), generator=random)
    return torch.stack([text[start : start + LENGTH] for start in starts.tolist()])


def train(optimizer: str, lr: float, dtype: str, rounding: str, updates: int, text: torch.Tensor) -> tuple[float, ...]:
    """Return the mean loss on 256 rows (nats a byte), the share of weights that changed, and seconds an update."""
    torch.manual_seed(0)
    sizes: Any = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2}
    shape = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=LENGTH)
    model = LlamaForCausalLM(shape).to(getattr(torch, dtype))
    before = [p.detach().clone() for p in model.parameters()]
    stepper = build_optimizer(model, load_config(["exp_name=x", f"optimizer={optimizer}", f"lr={lr}", rounding]))
    seconds = 0.0
    for update in range(updates):
        batch = rows(text, update, ROWS)
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        start = time.perf_counter()
        stepper.update = update
        stepper.step()
        seconds += time.perf_counter() - start
        stepper.zero_grad()
    with torch.no_grad():
        losses = [float(model(batch, labels=batch).loss) for batch in rows(text, 10**6, 256).split(32)]
    changed = sum(int((p != old).sum()) for p, old in zip(model.parameters(), before, strict=True))
    return sum(losses) / len(losses), changed / sum(p.numel() for p in before), seconds / updates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-5, 1e-6])
    parser.add_argument("--optimizer", nargs="+", default=["RMSprop", "AdamW", "AdamW8bit"])
    options = parser.parse_args()
    pages = b"".join(path.read_bytes() for path in sorted((ROOT / "docs").glob("*.md")))
    text = torch.frombuffer(bytearray(pages), dtype=torch.uint8).long()
    print("| optimizer | lr | weights | loss, nats a byte | changed | step, ms |\n|---|---|---|---|---|---|")
    for optimizer in options.optimizer:
        for lr in options.lr:
            for name, way in WAYS.items():
                loss, changed, seconds = train(optimizer, lr, *way, options.updates, text)
                print(
                    f"| {optimizer} | {lr:g} | {name} | {loss:.4f} | {changed:.1%} | {seconds * 1e3:.1f} |", flush=True
                )


if __name__ == "__main__":
    main()
