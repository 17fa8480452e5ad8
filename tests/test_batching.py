"""Order of examples, prompt trees and the padded layout; log-probabilities and gradients against slow loops."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.batching import Batch, Cut, Plan, chunks, deal, epoch_order, eval_examples, make_batch
from dpo.data.records import Record
from dpo.loss import Loss, sum_tokens
from dpo.model.checks import disable_dropout
from dpo.model.layouts import PADDING, lay_out
from dpo.model.logps import Computation, TokenLogps, add_token_logps, response_logps
from dpo.reference import LiveReference
from dpo.scoring import Scorer
from losses import DPO, IPO, SFT


@dataclass
class Data:
    """A PreferenceData in memory."""

    records: list[Record]
    source: np.ndarray
    names: tuple[str, ...] = ("a", "b")
    rows: str = "pairs"

    @property
    def n_examples(self) -> np.ndarray:
        return np.array([max(len(record.pairs), 1) for record in self.records])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Record:
        return self.records[i]


def make_data(n: int = 10, sft: bool = False) -> Data:
    rng = np.random.default_rng(0)
    ids = lambda low, high: rng.integers(1, 320, rng.integers(low, high)).tolist()  # noqa: E731
    records = []
    for i in range(n):
        n_responses = 1 if sft else 2 + i % 3
        pairs = [] if sft else [(a, b) for a in range(n_responses) for b in range(a)][: 1 + i % 4]
        records.append(Record(ids(1, 9), [ids(1, 12) for _ in range(n_responses)], pairs))
    return Data(records, np.array([i % 2 for i in range(n)]))


def test_order_depends_on_seed_and_epoch_alone_and_holds_every_example_once() -> None:
    data = make_data()
    order = epoch_order(data, 3, 5)
    assert np.array_equal(order, epoch_order(data, 3, 5))
    assert not np.array_equal(order, epoch_order(data, 3, 6))
    assert not np.array_equal(order, epoch_order(data, 4, 5))
    assert sorted(map(tuple, order)) == [(r, p) for r in range(10) for p in range(len(data[r].pairs))]


def test_pairs_of_a_prompt_stay_together() -> None:
    records = [record for record, _ in epoch_order(make_data(), 0, 0)]
    assert sum(a != b for a, b in itertools.pairwise(records)) == 9


def test_weights_are_passes_over_a_data_set() -> None:
    data = make_data(sft=True)
    taken = np.bincount([record for record, _ in epoch_order(data, 0, 0, [2.0, 0.4])], minlength=10)
    assert taken[::2].tolist() == [2] * 5 and sorted(taken[1::2]) == [0, 0, 0, 1, 1]
    again = np.bincount([record for record, _ in epoch_order(data, 0, 1, [2.0, 0.4])], minlength=10)
    assert again[1::2].tolist() != taken[1::2].tolist()


@settings(deadline=None)
@given(
    batch_size=st.integers(1, 30),
    n_epochs=st.one_of(st.none(), st.integers(1, 3)),
    n_examples=st.one_of(st.none(), st.integers(1, 70)),
)
def test_plan_announces_what_it_deals(batch_size: int, n_epochs: int | None, n_examples: int | None) -> None:
    if n_epochs is None and n_examples is None:
        return
    data = make_data()
    plan = Plan(0, batch_size, n_epochs, n_examples)
    dealt = list(plan.batches(data))
    assert plan.size(data) == (sum(map(len, dealt)), len(dealt))
    whole = int(data.n_examples.sum())
    limits = [n_epochs * whole if n_epochs else None, n_examples]
    assert sum(map(len, dealt)) == min(limit for limit in limits if limit is not None)
    assert all(0 < len(batch) <= batch_size for batch in dealt)


def test_evaluation_examples_are_exactly_n_and_free_of_the_seed() -> None:
    data = make_data()
    assert len(eval_examples(data, 7)) == 7
    assert len(eval_examples(data, 10**6)) == data.n_examples.sum()


def test_a_batch_holds_each_prompt_and_each_response_once() -> None:
    data = make_data()
    examples = [(7, 0), (2, 0), (7, 1), (5, 1), (2, 1)]
    batch = make_batch(data, examples)
    responses = [r for tree in batch.trees for r in tree.responses]
    assert [tree.prompt for tree in batch.trees] == [data[7].prompt, data[2].prompt, data[5].prompt]
    assert len(responses) == len({tuple(r) for r in responses})
    for (record, pair), chosen, rejected in zip(examples, batch.chosen, batch.rejected or []):
        wanted = data[record].pairs[pair]
        assert responses[chosen] == data[record].responses[wanted[0]]
        assert responses[rejected] == data[record].responses[wanted[1]]


def test_padded_rows_are_prompt_and_response() -> None:
    data = make_data()
    rows = lay_out(make_batch(data, [(4, 0), (5, 0)]), "padded")
    responses = [(r, t.prompt) for t in make_batch(data, [(4, 0), (5, 0)]).trees for r in t.responses]
    width = rows.input_ids.shape[1]
    for i, (response, prompt) in enumerate(responses):
        n = len(prompt) + len(response) - 1  # the last token predicts nothing
        assert rows.input_ids[i, :n].tolist() == (prompt + response)[:-1]
        assert (rows.branch[i] != PADDING).tolist() == [True] * n + [False] * (width - n)
        here = rows.sources // width == i
        assert rows.targets[here].tolist() == response
        assert (rows.sources[here] % width).tolist() == list(range(len(prompt) - 1, n))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_log_probabilities_equal_a_loop_in_float64(kind: str) -> None:
    model, data = add_token_logps(make_model(kind).double().eval()), make_data()
    batch = make_batch(data, [(4, 0), (2, 0), (7, 1)])
    tokens = response_logps(model, batch, Computation(torch.float64, "tree"))
    sums = sum_tokens(tokens.logps, tokens.mask)
    rows = [(tree.prompt, response) for tree in batch.trees for response in tree.responses]
    for i, (prompt, response) in enumerate(rows):
        logits = model(torch.tensor([prompt + response])).logits[0].detach()
        slow = [
            logits[len(prompt) - 1 + t].log_softmax(0)[token].item()  # position p - 1 + t predicts token t
            for t, token in enumerate(response)
        ]
        assert tokens.logps[i][tokens.mask[i]].tolist() == pytest.approx(slow, abs=1e-5)
        assert sums[i].item() == pytest.approx(sum(slow), rel=1e-5)


def gradient(model: torch.nn.Module, data: Data, examples: list, micro: int, scorer: Scorer) -> torch.Tensor:
    model.zero_grad()
    for some in chunks(examples, micro):
        losses, _ = scorer(model, make_batch(data, some), "train")
        (losses.sum() / len(examples)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("sft", [True, False])
def test_gradients_do_not_depend_on_the_split(kind: str, sft: bool) -> None:
    data, policy = make_data(16, sft), add_token_logps(make_model(kind))
    disable_dropout(policy)
    reference = None
    if not sft:
        other = add_token_logps(make_model(kind)).eval()
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        reference = LiveReference(other, Computation(torch.float32))
    scorer = Scorer(SFT() if sft else DPO(0.1), Computation(torch.float32), reference)
    examples = next(Plan(0, 16, 1, None).batches(data))
    whole = gradient(policy, data, examples, 16, scorer)
    assert whole.norm() > 0
    for steps in (2, 8):
        assert (gradient(policy, data, examples, 16 // steps, scorer) - whole).norm() <= 1e-5 * whole.norm()


@pytest.mark.parametrize("layout", ["packed", "tree", "padded"])
@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 4), st.none() | st.integers(1, 200))
def test_dealing_gives_every_example_once_and_every_process_as_many_passes(
    layout: str, n: int, passes: int, ranks: int, tokens: int | None
) -> None:
    data = make_data()
    examples = [(int(record), int(pair)) for record, pair in epoch_order(data, 0, 0)[:n]]
    dealt = deal(data, examples, Cut(layout, ranks, passes, tokens))
    assert len(dealt) >= 1 and all(len(shares) == ranks for shares in dealt)
    if tokens is None:
        assert len(dealt) <= passes
    else:
        for batch in (make_batch(data, share) for shares in dealt for share in shares if share):
            rows = lay_out(batch, layout)
            used = (rows.branch != PADDING).sum() if layout == "packed" else rows.input_ids.numel()
            alone = len(batch.trees) == 1 if layout == "packed" else len(rows.branch) <= len(data[0].responses) + 4
            assert used <= tokens or alone
    assert all(any(shares) for shares in dealt)
    assert sorted(example for shares in dealt for share in shares for example in share) == sorted(examples)


@pytest.mark.parametrize("tokens", [1200, 2048, 4096, 16_384, None])
def test_eight_processes_have_about_the_same_work(tokens: int | None) -> None:
    """Lengths as those of dialogues: log-normal, mean about 200 tokens a tree."""
    lengths = np.random.default_rng(0).lognormal(4.2, 0.6, (20, 64, 3)).astype(int) + 2
    for batch in lengths:
        sizes = [(int(prompt), [int(n) for n in rest]) for prompt, *rest in batch]
        work = [sum(prompt + sum(n - 1 for n in rest) for prompt, rest in [size]) for size in sizes]
        dealt = Cut("packed", 8, 1, tokens).deal(sizes)
        loads = [[sum(work[i] for i in share) for share in shares] for shares in dealt]
        assert sorted(i for shares in dealt for share in shares for i in share) == list(range(64))
        assert sum(work) >= 0.95 * 8 * sum(map(max, loads))
        assert tokens is None or max(map(max, loads)) <= tokens
        assert min(map(min, loads)) > 0 or all(len(share) < 2 for shares in dealt for share in shares)


def test_dealing_balances_tokens_not_examples() -> None:
    lengths = [100, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10]
    data = Data([Record([1], [[2] * n], []) for n in lengths], np.zeros(len(lengths), dtype=int))
    ((long, short),) = deal(data, [(i, 0) for i in range(len(lengths))], Cut("padded", 2, 1, None))
    assert long == [(0, 0)] and len(short) == 10


def crowded(n_responses: int, prompt: int = 20) -> Data:
    """One prompt with many pairs among many responses, and a few others."""
    rng = np.random.default_rng(1)
    many = [rng.integers(1, 320, 3 + i % 17).tolist() for i in range(n_responses)]
    pairs = [(i, (7 * i + 1) % n_responses) for i in range(n_responses)]
    data = make_data(4)
    data.records[1] = Record(rng.integers(1, 320, prompt).tolist(), many, pairs)
    return data


@pytest.mark.parametrize("layout", ["packed", "tree", "padded"])
@pytest.mark.parametrize("tokens", [1, 60, 100, 1000])
@pytest.mark.parametrize(("ranks", "passes"), [(1, 1), (3, 2)])
def test_the_trees_of_a_crowded_prompt_are_cut_by_the_limit(layout: str, tokens: int, ranks: int, passes: int) -> None:
    data = crowded(300)
    examples = eval_examples(data, 10**6)
    dealt = deal(data, examples, Cut(layout, ranks, passes, tokens))
    parts = [part for shares in dealt for part in shares if part]
    assert sorted(example for part in parts for example in part) == sorted(examples)
    for part in parts:
        batch = make_batch(data, part)
        rows = lay_out(batch, layout)
        used = (rows.branch != PADDING).sum() if layout == "packed" else rows.input_ids.numel()
        assert used <= tokens or len(part) == 1


def test_responses_of_a_crowded_prompt_are_cut_without_a_limit_too() -> None:
    lengths = [10] * 1000
    items = [(i,) for i in range(1000)]
    groups = list(Cut("tree", 2, 25, None).groups(20, lengths, items, 1000))
    assert [i for group in groups for i in group] == list(range(1000))
    assert max(map(len, groups)) == 20
    assert list(Cut("tree", 1, 1, 5).groups(20, [10], [(0,)], 1)) == [range(1)]  # left whole
    assert list(Cut("tree", 1, 1, 5).groups(20, [], [], 1)) == []


@pytest.mark.parametrize("layout", ["packed", "tree", "padded"])
def test_gradients_and_metrics_of_a_crowded_prompt_do_not_depend_on_the_limit(layout: str) -> None:
    data, policy = crowded(24, 9), add_token_logps(make_model())
    disable_dropout(policy)
    other = add_token_logps(make_model()).eval()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    how = Computation(torch.float32, layout)
    scorer = Scorer(DPO(0.1), how, LiveReference(other, how))
    examples = eval_examples(data, 10**6)

    def computed(tokens: int | None) -> tuple[torch.Tensor, dict[tuple[int, int], list[float]], int]:
        policy.zero_grad()
        metrics: dict[tuple[int, int], list[float]] = {}
        dealt = deal(data, examples, Cut(layout, 1, 1, tokens))
        for (part,) in dealt:
            losses, found = scorer(policy, make_batch(data, part), "train")
            (losses.sum() / len(examples)).backward()
            metrics |= zip(part, map(list, zip(*found.values())))
        gradients = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
        return torch.cat(gradients), metrics, len(dealt)

    whole, wanted, n = computed(None)
    assert n == 1
    for tokens in (1, 50, 120):
        gradients, metrics, n = computed(tokens)
        assert n > 3 and (gradients - whole).norm() <= 1e-5 * whole.norm()
        for example in examples:
            assert metrics[example] == pytest.approx(wanted[example], rel=1e-5, abs=2e-6)


class Off:
    """A reference that is off from the policy by up to `most` nats a token, at random or for the chosen responses."""

    def __init__(self, model: torch.nn.Module, how: Computation, most: float, biased: bool):
        self.model, self.how, self.most, self.biased = model, how, most, biased

    def response_logps(self, batch: Batch) -> TokenLogps:
        with torch.no_grad():
            found = response_logps(self.model, batch, self.how)
        noise = torch.rand(found.logps.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        if self.biased:
            noise = torch.ones_like(noise)
            noise[batch.chosen] = -1.0
        return TokenLogps(found.logps + self.most * noise, found.mask)


@pytest.mark.parametrize("loss", [DPO(0.1), IPO(0.1, average_log_prob=True)])
@pytest.mark.parametrize(("untrained", "tolerance", "off", "biased", "accuracy"), [
    (True, 1e-4, 0.9e-4, False, 0),  # up to what is taken for rounding before the first update
    (True, 0.1, 0.09, False, 0),  # of bfloat16
    (True, 0.1, 0.09, True, 0),
    (True, 1e-4, 1e-3, True, 1),
    (False, 1e-4, 1e-6, True, 0),  # later: rounding of float32
    (False, 0.1, 1e-6, True, 0),
    (False, 1e-4, 1e-4, True, 1),  # what has been learnt counts, whatever the type
    (False, 0.1, 1e-4, True, 1),
])  # fmt: skip
@pytest.mark.parametrize("confident", [False, True])
def test_differences_up_to_rounding_are_ties(
    confident: bool, untrained: bool, tolerance: float, off: float, biased: bool, accuracy: int, loss: Loss
) -> None:
    model, data = add_token_logps(make_model()).eval(), make_data()
    if confident:  # log-probabilities near 0, whose rounding is that of the logits all the same
        with torch.no_grad():
            model.lm_head.weight *= 1000
        ids = model.generate(torch.tensor([[3]]), max_new_tokens=9, do_sample=False, eos_token_id=None)[0].tolist()
        data.records = [Record(ids[:1], [ids[1:10], ids[1:5]], [(0, 1)])]
    how = Computation(torch.float32, "tree", tolerance=tolerance)
    batch = make_batch(data, [(0, 0)] if confident else [(2, 0), (5, 0), (7, 0)])
    scorer = Scorer(loss, how, Off(model, how, off, biased), untrained)
    assert set(scorer(model, batch, "eval")[1]["rewards_eval/accuracies"]) == {accuracy}
