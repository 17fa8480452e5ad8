"""Build the embedded controlled-sentiment data: review openers, sampled continuations, VADER scores.

python experiments/build_sentiment.py                                   # 4 to 6 minutes on 2 CPU cores
python experiments/build_sentiment.py --model FOLDER --out FOLDER2      # any Hugging Face causal language model
python experiments/build_sentiment.py --model RUN --pairs 3 --out data/sentiment_pairs    # pairs of a policy's own

The task is the small form of controlled sentiment generation in Rafailov et al. 2023 (arXiv:2305.18290, section 6).
Writes train.jsonl.gz and test.jsonl.gz, one row a prompt: {"prompt": str, "responses": [str], "scores": [float]}.
Prints the counts of the data card, data/sentiment/README.md.

With --pairs N prompts and test rows are those of data/sentiment. A training row is then one pair: of a prompt's
samples the best with the worst, the second best with the second worst, and so on, N rows a prompt.
"""

import argparse
import gzip
import json
import random
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch

import dpo.sampling
from dpo.model.patches import quiet_transformers
from dpo.sampling import Sampling
from dpo.utils import UserError, make_dir
from opening import find_saved
from results import sentiment
from settings import load_config
from utils import HelpFormatter, run_main

DATA = ROOT / "data" / "sentiment"
N_SAMPLED = 6  # a prompt; more than are kept, because some are unusable
N_RESPONSES = 4  # the first usable ones, whatever their scores: six pairs a prompt
N_PAIRED = 16  # with --pairs
N_TOKENS = 20
MIN_WORDS = 3
TEST_FRACTION = 0.25
FATES = (f"under {MIN_WORDS} words", "without leading space", "duplicate", "spare", "kept")
Row = dict[str, Any]
"""prompt, responses and their scores."""


def first_line(text: str) -> str:
    """Without trailing space or a half-decoded last character. The leading space stays, it belongs to the response."""
    return next(iter(text.splitlines()), "").rstrip(" \t\ufffd")


def fate(line: str, kept: list[str], most: int = N_RESPONSES) -> str:
    """What becomes of a sampled line, given the responses its prompt already has: "kept" or the reason why not."""
    short, glued, duplicate, spare, usable = FATES
    if len(line.split()) < MIN_WORDS:
        return short
    if not line.startswith(" "):  # a word or a sign glued to the prompt: tokens of the two would merge
        return glued
    if line in kept:
        return duplicate
    return usable if len(kept) < most else spare


@torch.inference_mode()
def sample(model: Any, tokenizer: Any, prompts: list[str], batch_size: int) -> Iterator[list[str]]:
    """Yields N_SAMPLED raw continuations of each prompt, at temperature 1 from the model's whole distribution."""
    special = set(tokenizer.all_special_ids)
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": N_SAMPLED}
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True).to(model.device)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=N_TOKENS, pad_token_id=tokenizer.pad_token_id, **how
        )
        texts = []
        for row in out[:, ids.shape[1] :].tolist():
            end = next((i for i, token in enumerate(row) if token in special), len(row))
            texts.append(tokenizer.decode(row[:end], clean_up_tokenization_spaces=False))
        yield from (texts[i : i + N_SAMPLED] for i in range(0, len(texts), N_SAMPLED))
        print(f"sampled {min(start + batch_size, len(prompts))}/{len(prompts)} prompts", file=sys.stderr, flush=True)


def own_samples(model: Any, tokenizer: Any, prompts: list[str], batch_size: int, seed: int) -> Iterator[list[str]]:
    """Yield N_PAIRED continuations of each prompt, sampled as evaluations do, in bfloat16."""
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for number, start in enumerate(range(0, len(prompts), batch_size)):
        repeated = [prompt for prompt in ids[start : start + batch_size] for _ in range(N_PAIRED)]
        how = Sampling(N_TOKENS, len(repeated), seed, torch.bfloat16, first_batch=number)
        tokens = dpo.sampling.sample(model, tokenizer, repeated, how)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        yield from (texts[i : i + N_PAIRED] for i in range(0, len(texts), N_PAIRED))
        print(f"sampled {min(start + batch_size, len(prompts))}/{len(prompts)} prompts", file=sys.stderr, flush=True)


def build_rows(
    prompts: list[str], sampled: Iterator[list[str]], most: int = N_RESPONSES
) -> tuple[list[Row], dict[str, int]]:
    """Scored rows, without the prompts that have fewer than two responses; and the funnel: counts by reason."""
    rows: list[Row] = []
    funnel = {"openers": len(prompts)} | {f"sampled responses {name}": 0 for name in FATES} | {"prompts dropped": 0}
    for prompt, texts in zip(prompts, sampled, strict=True):
        responses: list[str] = []
        for line in map(first_line, texts):
            name = fate(line, responses, most)
            funnel[f"sampled responses {name}"] += 1
            if name == "kept":
                responses.append(line)
        if len(responses) < 2:
            funnel["prompts dropped"] += 1
        else:
            scores = [sentiment(prompt + response) for response in responses]
            rows.append({"prompt": prompt, "responses": responses, "scores": scores})
    return rows, funnel


def extremes(row: Row, n: int) -> list[Row]:
    """Return up to `n` rows of one pair: the best response with the worst, the second best with the second worst."""
    order = sorted(zip(row["scores"], row["responses"], strict=True), reverse=True)
    pairs = [(order[i], order[-1 - i]) for i in range(min(n, len(order) // 2))]
    return [
        {"prompt": row["prompt"], "responses": [best[1], worst[1]], "scores": [best[0], worst[0]]}
        for best, worst in pairs
        if best[0] > worst[0]
    ]


def read(name: str) -> list[Row]:
    """Return the rows of a split of data/sentiment."""
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def split(rows: list[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Train and test rows, by prompt, in the order of the openers."""
    test = set(random.Random(seed).sample(range(len(rows)), round(TEST_FRACTION * len(rows))))
    return [row for i, row in enumerate(rows) if i not in test], [row for i, row in enumerate(rows) if i in test]


def describe(name: str, rows: list[Row]) -> dict[str, float]:
    """Counts of one split: its prompts, responses, pairs and the distribution of its scores."""
    scores = [score for row in rows for score in row["scores"]]
    pairs = [a != b for row in rows for a, b in combinations(row["scores"], 2)]
    flat = sum(len(set(row["scores"])) == 1 for row in rows)
    return {
        f"{name} prompts": len({row["prompt"] for row in rows}),
        f"{name} responses": len(scores),
        f"{name} pairs": sum(pairs),
        f"{name} ties": len(pairs) - sum(pairs),
        f"{name} prompts without a pair": flat,
        f"{name} score mean": round(mean(scores), 3),
        f"{name} score sd": round(pstdev(scores), 3),
        f"{name} share above 0.05": round(mean(score > 0.05 for score in scores), 3),
        f"{name} share below -0.05": round(mean(score < -0.05 for score in scores), 3),
    }


def write(path: Path, rows: list[Row]) -> None:
    """One ASCII JSON object a line, compressed without time or name, so that equal rows give equal bytes."""
    with path.open("wb") as file, gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
        packed.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", help="run, checkpoint, model folder or hub id (default: the embedded model)")
    parser.add_argument("--openers", type=Path, default=DATA / "openers.txt", help="one prompt a line")
    parser.add_argument("--out", type=Path, default=DATA, help="folder for train.jsonl.gz and test.jsonl.gz")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling and of the split")
    parser.add_argument("--batch-size", type=int, help="prompts at a time; default: 16, with --pairs 8")
    parser.add_argument("--pairs", type=int, help=f"training pairs a prompt, out of {N_PAIRED} samples; see above")
    args = parser.parse_args(argv)
    if args.pairs is not None and not 1 <= args.pairs <= N_PAIRED // 2:
        raise UserError(f"--pairs {args.pairs} must be between 1 and {N_PAIRED // 2}")
    if args.pairs and args.out.resolve() == DATA:
        raise UserError(f"--pairs would overwrite {DATA}, whose prompts it reads; give another --out")
    return args


def build(model: Any, tokenizer: Any, args: argparse.Namespace) -> tuple[list[Row], list[Row], dict[str, int]]:
    """Return training rows, test rows and the funnel."""
    try:
        prompts = args.openers.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--openers {args.openers} cannot be read: {error}") from error
    torch.manual_seed(args.seed)
    rows, funnel = build_rows(prompts, sample(model, tokenizer, prompts, args.batch_size or 16))
    if len(rows) < 4:
        raise UserError(f"{len(rows)} of {len(prompts)} prompts kept at least 2 responses; a split needs 4 or more")
    return *split(rows, args.seed), funnel


def build_pairs(model: Any, tokenizer: Any, args: argparse.Namespace) -> tuple[list[Row], list[Row], dict[str, int]]:
    """Return training rows of one pair each, data/sentiment's test rows, and the funnel. See the top of this file."""
    prompts = sorted((row["prompt"] for row in read("train")), key=lambda prompt: len(tokenizer(prompt)["input_ids"]))
    sampled = own_samples(model, tokenizer, prompts, args.batch_size or 8, args.seed)
    rows, funnel = build_rows(prompts, sampled, N_PAIRED)
    pairs = [pair for row in rows for pair in extremes(row, args.pairs)]
    if not pairs:
        raise UserError(f"the samples of {args.model} gave no pair of unequal scores; is it a model that writes text?")
    return pairs, read("test"), funnel


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    quiet_transformers()
    name = args.model or load_config(["exp_name=data", "model=smollm2"]).model.name_or_path
    model, tokenizer, _ = find_saved(name, ["layout=padded"]).open()
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    train, test, funnel = (build_pairs if args.pairs else build)(model, tokenizer, args)

    make_dir(args.out, "--out")
    write(args.out / "train.jsonl.gz", train)
    write(args.out / "test.jsonl.gz", test)
    for key, value in (funnel | describe("train", train) | describe("test", test)).items():
        print(f"| {key} | {value} |")


if __name__ == "__main__":
    run_main(main)
