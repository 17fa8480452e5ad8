"""Shared by all tests: tiny models and tokenizers, files of pairs, and train.py as a process or in this one."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers run tests at once, and torch reads it when it is imported

import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from judge_server import SECRET, Server, serving
from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

# DPO_ALL=1 pytest: also what takes too long to be tested with every change.
EVERYTHING = bool(os.environ.get("DPO_ALL"))
# Files of tests are handed out in this order, so that no worker is left alone with a long one at the end.
SLOWEST = ("test_parallel", "test_resume", "test_train", "test_parity", "test_data_sets_train", "test_layouts")
# No test waits for the network: here, and in the processes that tests start.
huggingface_hub.constants.HF_HUB_OFFLINE = True
os.environ["HF_HUB_OFFLINE"] = "1"

# Metrics of the machine and of how the work was cut, not of the training.
COSTS = {"time", "examples_per_second", "reference_seconds", "tokens_per_second", "flops_per_second", "mfu"}
COSTS |= {"statistics_seconds", "peak_memory_mib", "tokens_distinct_over_computed", "tokens_alone_over_distinct"}
ROOT = Path(__file__).resolve().parent.parent
TEXTS = [
    "\n\nHuman: What is the tallest mountain?\n\nAssistant: It is Mount Everest, of course.",
    "The film was a dull, slow and clumsy affair. I loved the acting, though the plot made no sense at all!",
    "Please write a short poem about rivers, boats, and 17 green birds; then explain it to my sister.",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def first_fast(values: Iterable[Any], n: int = 1) -> list[Any]:
    """Return pytest parameters of which `make test` runs the first `n` only."""
    tuples = [value if isinstance(value, tuple) else (value,) for value in values]
    return [
        *itertools.starmap(pytest.param, tuples[:n]),
        *(pytest.param(*v, marks=pytest.mark.full) for v in tuples[n:]),
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
    """A random causal language model of two layers, of the architecture (model_type) `kind`."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=320, n_positions=64, n_embd=hidden, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
        )
        return AutoModelForCausalLM.from_config(config)
    sizes = {"vocab_size": 320, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4}
    more = {"gpt_neox": {"num_attention_heads": 4, "rotary_pct": 0.5}, "mistral": {**heads, "sliding_window": None}}
    more["qwen3"] = {**heads, "tie_word_embeddings": True}
    arguments = {**sizes, **more.get(kind, heads), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **arguments))


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
    """Shared by all workers, as runs share theirs."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own) / "cache"


def real_data(*parts: str) -> Path:
    """A path below DPO_REAL_DATA; skips the test where that is not set."""
    folder = os.environ.get("DPO_REAL_DATA")
    if not folder:
        pytest.skip("DPO_REAL_DATA is not set: no real rows")
    return Path(folder, *parts)


def tiny_overrides(model: Path, pairs: Path, cache: Path, run_dir: Path, *overrides: str) -> list[str]:
    """Overrides that train the tiny model on the tiny pairs; later ones win, and an empty value removes one."""
    defaults = [
        "exp_name=test",
        "model=blank_model",
        f"model.name_or_path={model}",
        f"datasets=[{pairs}]",
        f"local_run_dir={run_dir}",
        f"cache_dir={cache}",
        "wandb.enabled=false",
        "device=cpu",
        "num_proc=1",
        "n_eval_model_samples=2",
        "max_length=64",
        "max_prompt_length=32",
        "warmup_steps=0",
    ]
    merged = {item.split("=", 1)[0]: item for item in (*defaults, *overrides)}
    return [item for key, item in merged.items() if item != f"{key}="]


RunTrain = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def overrides(tiny_model_dir: Path, pairs_dir: Path, cache_dir: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides for a tiny run in tmp_path/run, followed by those given."""
    return functools.partial(tiny_overrides, tiny_model_dir, pairs_dir, cache_dir, tmp_path / "run")


@pytest.fixture
def train_process(overrides: Callable[..., list[str]], tmp_path: Path) -> RunTrain:
    """Run `python train.py <tiny overrides> <given>` as a process."""

    def run(*given: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "train.py"), *overrides(*given)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **env}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)

    return run


def compose(given: list[str]) -> DictConfig:
    import hydra

    import settings

    settings.register_resolvers()
    with hydra.initialize_config_dir(str(settings.CONFIG_DIR), version_base="1.3"):
        return hydra.compose("config", given)


def train_here(given: list[str]) -> None:
    """train.py's whole work in this process, for tests that need no process of their own."""
    import train

    train.train(compose(given), given)


def train_in_group(cases: list[dict]) -> None:
    """Train every resolved configuration, one after the other, in one group of gloo processes. For parallel.launch."""
    import trainers
    from dpo import parallel
    from settings import build_config, literal

    torch.set_num_threads(1)
    with parallel.group(torch.device("cpu")):
        for case in cases:
            trainers.train_in_process(build_config(OmegaConf.create(literal(case))), [])


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, pairs_dir: Path, cache_dir: Path) -> Path:
    """A DPO run that has moved away from its reference, the tiny model."""
    folder = tmp_path_factory.mktemp("dpo") / "run"
    given = ["loss=dpo", "loss.beta=0.3", "lr=1e-2", "n_examples=16", "batch_size=8", "n_eval_examples=8"]
    train_here(tiny_overrides(tiny_model_dir, pairs_dir, cache_dir, folder, *given, "sample_during_eval=false"))
    return folder


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An OpenAI-compatible endpoint, and its key in the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with serving() as server:
        yield server
