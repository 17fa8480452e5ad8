"""The steps that `benchmark.py dpo` times: the original's formulation, each idea of ours in turn, and TRL."""

import dataclasses
import gc
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dpo.data.batching import Batch, Cut, Example, epoch_order, make_batch
from dpo.data.records import PreferenceData
from dpo.model.checks import pick_computation
from dpo.model.loading import load_policy, load_tokenizer, local_folder, pick_device
from dpo.model.logps import Computation
from dpo.model.patches import quiet_transformers
from dpo.reference import LiveReference, build_reference, wanted_by
from dpo.run.config import Config
from dpo.run.throughput import Cost, cost_of, peak_memory, throughput
from dpo.scoring import Scorer, Share, shares
from dpo.stored import StoredReference
from dpo.utils import UserError
from preference_datasets import load_data
from settings import data_settings, load_config, quoted

ORIGINAL, TRIMMED, OURS = "original", "padded to the longest of a micro-batch", "+ stored reference"


@dataclasses.dataclass
class Work:
    """One global batch: a policy that has moved a little from its reference, and the pairs it is to learn from."""

    config: Config
    policy: PreTrainedModel
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: PreferenceData
    examples: list[Example]
    micro: int
    how: Computation

    @property
    def pairs(self) -> int:
        return len(self.examples)

    def cut(self, how: Computation) -> Cut:
        return Cut(how.layout, 1, 1, self.config.token_limit, 0)

    def shares(self, how: Computation) -> list[Share]:
        """Sorted, and cut by tokens."""
        return shares(self.data, self.examples, self.cut(how))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and response."""
        trees = make_batch(self.data, self.examples).trees
        return max(len(tree.prompt) + len(response) for tree in trees for response in tree.responses)

    def micro_batches(self) -> list[Batch]:
        """In the given order, `micro` pairs each."""
        parts = (self.examples[i : i + self.micro] for i in range(0, self.pairs, self.micro))
        return [make_batch(self.data, part) for part in parts]


def prepare(config: Config, pairs: int, micro: int) -> Work:
    """Load what is timed. Raise UserError if there are too few pairs."""
    quiet_transformers()
    torch.manual_seed(0)
    device, tokenizer = pick_device(config), load_tokenizer(config)
    data = load_data(data_settings(config), tokenizer, "train")
    examples = [(int(record), int(pair)) for record, pair in epoch_order(data, config.seed, 0)[:pairs]]
    if len(examples) < pairs:
        raise UserError(f"--pairs {pairs}, and the data has {len(examples)}")
    policy, reference = (load_policy(config, device, archive=config.model.archive) for _ in range(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std().nan_to_num(0), alpha=1e-3)
    how = pick_computation(policy, config)
    return Work(config, policy.train(), reference.requires_grad_(False).eval(), tokenizer, data, examples, micro, how)


def random_model(shape: str, folder: Path, given: list[str], weights: bool = True) -> list[str]:
    """Write a model like the embedded one with random weights into `folder`, for speed alone: `shape` is LAYERSxWIDTH,
    with heads of 128. Without `weights` only its configuration. Returns the overrides that choose it, beside those
    `given`. Raises UserError for a shape that cannot be."""
    layers, _, width = shape.partition("x")
    if not (layers.isdecimal() and width.isdecimal() and int(layers) and int(width) and int(width) % 512 == 0):
        raise UserError(f"--shape {shape}: give LAYERSxWIDTH, the width a multiple of 512, such as 16x2048 (1B)")
    size, cache = int(width), [override for override in given if override.startswith("cache_dir=")]
    embedded = load_config(["exp_name=benchmark", *cache])
    shaped = AutoConfig.from_pretrained(local_folder(embedded.model.name_or_path, embedded.cache))
    shaped.update({"num_hidden_layers": int(layers), "hidden_size": size, "intermediate_size": 4 * size})
    shaped.update({"num_attention_heads": size // 128, "num_key_value_heads": size // 512, "head_dim": 128})
    shaped.save_pretrained(folder)
    if weights:
        AutoModelForCausalLM.from_config(shaped, dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer(embedded).save_pretrained(folder)
    return ["model=blank_model", f"model.name_or_path={quoted(folder)}"]


def original_logps(model: PreTrainedModel, ids: Tensor, attends: Tensor, labels: Tensor) -> Tensor:
    """Sum of log-probabilities of each row's labels from the whole of its logits, as the original code has it."""
    logits = model(input_ids=ids, attention_mask=attends).logits.to(torch.float32)[:, :-1]
    labels = labels[:, 1:].clone()
    counts = labels != -100
    labels[~counts] = 0
    return (torch.gather(logits.log_softmax(-1), 2, labels[..., None]).squeeze(-1) * counts).sum(-1)


def original_step(work: Work, width: int | None) -> float:
    """Chosen rows, then rejected rows, of `micro` pairs at a time; policy and reference on all of them.

    The original code pads to the longest row of the global batch, here `width`, and then slices it into micro-batches
    (`get_collate_fn` and `slice_and_move_batch_for_device` there). None: to the longest row of each micro-batch.
    """
    total, beta, device = 0.0, work.config.loss.beta, work.policy.device
    for start in range(0, work.pairs, work.micro):
        rows = []
        for side in (0, 1):
            for record, pair in work.examples[start : start + work.micro]:
                content = work.data[record]
                rows.append((content.prompt, content.responses[content.pairs[pair][side]]))
        columns = width or max(len(prompt) + len(response) for prompt, response in rows)
        ids, attends = torch.zeros(2, len(rows), columns, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for i, (prompt, response) in enumerate(rows):
            ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            attends[i, : len(prompt) + len(response)] = 1
            labels[i, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
        inputs = [tensor.to(device) for tensor in (ids, attends, labels)]
        policy = original_logps(work.policy, *inputs)
        with torch.no_grad():
            reference = original_logps(work.reference, *inputs)
        chosen, rejected = (policy - reference).chunk(2)
        loss = -F.logsigmoid(beta * (chosen - rejected)).sum() / work.pairs
        loss.backward()
        total += loss.item()
    return total


def our_step(work: Work, scorer: Scorer, micro_batches: Iterable[Share]) -> float:
    total = 0.0
    for share in micro_batches:
        losses, _ = scorer(work.policy, share.batch, "train")
        loss = losses.sum() / work.pairs
        loss.backward()
        total += loss.item()
    return total


def trl_step(work: Work) -> Callable[[], float] | None:
    """The same token ids through TRL's DPOTrainer, in the given order; None if TRL is not installed."""
    try:
        import trl
    except ImportError:
        return None
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    rows = []
    for record, pair in work.examples:
        content = work.data[record]
        chosen, rejected = (content.responses[side] for side in content.pairs[pair])
        rows.append({"prompt_ids": content.prompt, "chosen_ids": chosen, "rejected_ids": rejected})

    class SameTokens(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *arguments: object) -> Dataset:
            return dataset

        def _get_train_sampler(self, dataset: Dataset | None = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    class KeepGradients(TrainerCallback):
        def on_pre_optimizer_step(self, *arguments: object, **more: object) -> None:
            kept.extend((p, p.grad.clone()) for p in work.policy.parameters() if p.grad is not None)

    kept: list[tuple[torch.nn.Parameter, Tensor]] = []
    arguments = trl.DPOConfig(
        tempfile.mkdtemp(), max_steps=1, per_device_train_batch_size=work.micro,
        gradient_accumulation_steps=work.pairs // work.micro, learning_rate=0.0, beta=work.config.loss.beta,
        max_length=None, bf16=work.how.dtype == torch.bfloat16, use_cpu=work.policy.device.type == "cpu",
        max_grad_norm=0.0, gradient_checkpointing=False, optim="rmsprop", report_to=[], save_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    work.tokenizer.pad_token = work.tokenizer.pad_token or work.tokenizer.eos_token

    def step() -> float:
        kept.clear()
        trainer = SameTokens(
            work.policy, work.reference, arguments, train_dataset=Dataset.from_list(rows),
            processing_class=work.tokenizer, callbacks=[KeepGradients()],
        )  # fmt: skip
        loss = trainer.train().training_loss
        for parameter, gradient in kept:
            parameter.grad = gradient
        return loss

    return step


def store(work: Work) -> StoredReference:
    """Compute the reference of all pairs, from nothing."""
    with tempfile.TemporaryDirectory() as empty:
        wanted = wanted_by(work.data, work.examples)
        return build_reference(work.reference, work.how, work.cut(work.how), Path(empty), wanted)


def variants(work: Work) -> dict[str, Callable[[], float]]:
    """Steps by name, each with one more idea than the one before."""
    loss = work.config.loss
    padded = dataclasses.replace(work.how, layout="padded")

    def live(how: Computation) -> Scorer:
        return Scorer(loss, how, LiveReference(work.reference, how))

    given = [Share(batch, True) for batch in work.micro_batches()]
    steps = {
        ORIGINAL: lambda: original_step(work, work.longest),
        TRIMMED: lambda: original_step(work, None),
        "logits at responses only": lambda: our_step(work, live(padded), given),
        "+ sorted, cut by tokens": lambda: our_step(work, live(padded), work.shares(padded)),
        "+ prompt trees": lambda: our_step(work, live(work.how), work.shares(work.how)),
        OURS: lambda: our_step(work, Scorer(loss, work.how, store(work)), work.shares(work.how)),
    }
    trl = trl_step(work)
    return steps | {"TRL": trl} if trl else steps


def sweeps(work: Work, betas: Sequence[float]) -> dict[str, Callable[[], float]]:
    """A step of each beta, as a whole."""

    def with_beta(beta: float) -> Work:
        loss = dataclasses.replace(work.config.loss, beta=beta)
        return dataclasses.replace(work, config=dataclasses.replace(work.config, loss=loss))

    def ours() -> float:
        stored = store(work)
        scorers = [Scorer(with_beta(beta).config.loss, work.how, stored) for beta in betas]
        return sum(our_step(work, scorer, work.shares(work.how)) for scorer in scorers)

    return {ORIGINAL: lambda: sum(original_step(with_beta(beta), work.longest) for beta in betas), OURS: ours}


def gradient(model: PreTrainedModel) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compare(work: Work, steps: dict[str, Callable[[], float]], repeats: int, exact: float) -> dict[str, list[float]]:
    """Seconds of every step, `repeats` times in turn. Raise UserError if one gives another loss or gradient.

    Each ends with an optimizer step of learning rate 0, which costs what any does.
    """
    optimizer = torch.optim.RMSprop(work.policy.parameters(), lr=0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    wanted: tuple[float, Tensor] | None = None
    for _ in range(repeats):
        for name, step in steps.items():
            optimizer.zero_grad()
            start = time.perf_counter()
            loss = step()
            optimizer.step()
            if work.policy.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
            found = gradient(work.policy)
            wanted = wanted or (loss, found)
            off = float((found - wanted[1]).norm() / wanted[1].norm()), abs(loss / wanted[0] - 1)
            print(f"{name}: {seconds[name][-1]:.2f} s, loss {loss:.6f}, gradient off by {off[0]:.1e}", flush=True)
            if max(off) > exact:
                raise UserError(f"{name} computes another loss or gradient: off by {off[1]:.2g} and {off[0]:.2g}")
    return seconds


def tokens(work: Work) -> dict[str, int]:
    """Tokens that the formulations compute of one global batch, and how many of them are distinct."""
    longest = [
        max(len(tree.prompt) + len(r) for tree in batch.trees for r in tree.responses) for batch in work.micro_batches()
    ]
    sizes = [2 * min(work.micro, work.pairs - start) for start in range(0, work.pairs, work.micro)]
    return {
        "original": 2 * work.pairs * work.longest,
        TRIMMED: sum(rows * width for rows, width in zip(sizes, longest, strict=True)),
        "ours": sum(cost_of(share.batch, work.how.layout).computed for share in work.shares(work.how)),
        "distinct": cost_of(make_batch(work.data, work.examples), "tree").distinct,
    }


def useful(work: Work, seconds: float) -> str:
    """Operations of the policy's distinct tokens in `seconds`, as `throughput` counts them, of the peak if known."""
    costs = (cost_of(share.batch, work.how.layout) for share in work.shares(work.how))
    found = throughput(work.policy, sum(costs, Cost()), seconds)
    return f"{found['flops_per_second'] / 1e12:.3g}" + (f" ({found['mfu']:.1%})" if "mfu" in found else "")


def resident() -> float:
    """Resident memory of this process in MiB."""
    return psutil.Process().memory_info().rss / 2**20


def step_memory(work: Work, name: str) -> float:
    """Most memory in MiB during a step of one micro-batch, weights and gradients included (Linux, CUDA)."""
    cuda = work.policy.device.type == "cuda"
    stored = None
    if name == OURS:
        stored = store(work)
        del work.reference
        gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    if stored is None:
        original_step(work, None)
    else:
        one = [Share(make_batch(work.data, work.examples), True)]
        our_step(work, Scorer(work.config.loss, work.how, stored), one)
    return peak_memory(cuda)
