"""Shared by all tests: tiny models and tokenizers, files of pairs, and train.py run as a real process or in this one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [
    "\n\nHuman: What is the tallest mountain?\n\nAssistant: It is Mount Everest, of course.",
    "The film was a dull, slow and clumsy affair. I loved the acting, though the plot made no sense at all!",
    "Please write a short poem about rivers, boats, and 17 green birds; then explain it to my sister.",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred tokens, with an EOS and no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|eos|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>")


def make_model(kind: str = "llama", hidden: int = 32) -> torch.nn.Module:
    """A random causal language model of two layers."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=320, n_embd=hidden, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
        return GPT2LMHeadModel(config)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-shaped model folder with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_pairs(folder: Path, n_train: int = 24, n_test: int = 8) -> Path:
    """A folder with train.jsonl and test.jsonl of HH-style pairs of various lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, n, shift in (("train", n_train, 0), ("test", n_test, 1000)):
        with open(folder / f"{split}.jsonl", "w") as file:
            for i in range(shift, shift + n):
                prompt = f"\n\nHuman: What is {i} times {i % 7}{' please' * (i % 3)}?\n\nAssistant:"
                row = {"chosen": f"{prompt} It is {i * (i % 7)}.", "rejected": f"{prompt} No{' idea' * (1 + i % 5)}."}
                print(json.dumps(row), file=file)
    return folder


@pytest.fixture(scope="session")
def pairs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def real_data(*parts: str) -> Path:
    """A path below DPO_REAL_DATA; skips the test where that is not set."""
    folder = os.environ.get("DPO_REAL_DATA")
    if not folder:
        pytest.skip("DPO_REAL_DATA is not set: no real rows")
    return Path(folder, *parts)


Train = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_train(tiny_model_dir: Path, pairs_dir: Path, cache_dir: Path, tmp_path: Path) -> Train:
    """Run `python train.py <overrides>` as a process on the tiny model and pairs; later overrides win."""

    def run(*overrides: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        defaults = [
            "exp_name=test",
            "model=blank_model",
            f"model.name_or_path={tiny_model_dir}",
            f"datasets=[{pairs_dir}]",
            f"local_run_dir={tmp_path / 'run'}",
            f"cache_dir={cache_dir}",
            "wandb.enabled=false",
            "device=cpu",
            "num_proc=1",
            "n_eval_model_samples=2",
            "max_length=64",
            "max_prompt_length=32",
        ]
        merged = {item.split("=", 1)[0]: item for item in (*defaults, *overrides)}
        return subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *(item for item in merged.values() if item)],
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run
