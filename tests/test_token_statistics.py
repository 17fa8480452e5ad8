"""What losses see of the whole distribution at each token: sums of squares, and the KL from the reference."""

import copy

import pytest
import torch
from conftest import make_model
from test_batching import make_data
from transformers import PreTrainedModel

from dpo.data.batching import make_batch
from dpo.model import logps
from dpo.model.checks import disable_dropout
from dpo.model.logps import Computation, add_token_logps, response_logps
from dpo.reference import LiveReference


def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    policy = make_model()
    disable_dropout(policy)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return add_token_logps(policy), add_token_logps(reference)


@pytest.mark.parametrize("layout", ["padded", "tree", "packed"])
@pytest.mark.parametrize("at_once", [2**25, 700])
def test_they_are_those_of_the_whole_vocabulary(layout: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logps, "LOGITS_AT_ONCE", at_once)
    policy, reference = models()
    data = make_data()
    batch = make_batch(data, [(i, 0) for i in range(3)])
    how = Computation(torch.float32, layout)
    theirs = LiveReference(reference, how).next_token_logps(batch, how)
    found = response_logps(policy, batch, how, squares=True, reference=theirs)
    assert found.squares is not None and found.kl is not None and not found.squares.requires_grad
    total = torch.zeros(())
    row = 0
    for tree in batch.trees:
        for response in tree.responses:
            ids = torch.tensor([tree.prompt + response])
            ours, other = (
                m(input_ids=ids).logits[0, len(tree.prompt) - 1 : -1].log_softmax(-1) for m in (policy, reference)
            )
            other = other.detach()
            kl = (other.exp() * (other - ours)).sum(-1)
            total = total + kl.sum()
            n = len(response)
            torch.testing.assert_close(found.squares[row, :n], (ours.exp() ** 2).sum(-1).log(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.kl[row, :n], kl, rtol=1e-4, atol=1e-5)
            plain = response_logps(policy, batch, how).logps
            assert torch.equal(found.logps, plain)
            row += 1
    expected = torch.autograd.grad(total, list(policy.parameters()), allow_unused=True, materialize_grads=True)
    gradients = torch.autograd.grad(
        found.kl[found.mask].sum(), list(policy.parameters()), allow_unused=True, materialize_grads=True
    )
    for one, two in zip(gradients, expected):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
