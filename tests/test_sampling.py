"""Samples, and estimates of KL(policy || reference) against the sum over every response there is."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo import sampling
from dpo.model.logps import Computation, add_token_logps
from dpo.reference import LiveReference
from dpo.sampling import Sampling, continuation, divergence, mean_and_error, sample

EOS, VOCABULARY, LONGEST = 0, 4, 3
TOKENIZER = SimpleNamespace(eos_token_id=EOS)
PROMPTS = [[1, 2], [3], [2, 2, 1]]
HOW = Computation(torch.float32)


def small_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # far from uniform
    return add_token_logps(model)


POLICY, REFERENCE = small_model(0), small_model(1)


def every_response() -> list[list[int]]:
    """All that can be sampled: ended by EOS, or cut after LONGEST tokens."""
    found = []
    for n in range(1, LONGEST + 1):
        for ids in itertools.product(range(VOCABULARY), repeat=n):
            if EOS not in ids[:-1] and (ids[-1] == EOS or n == LONGEST):
                found.append(list(ids))
    return found


def slow_logp(model: LlamaForCausalLM, prompt: list[int], response: list[int]) -> float:
    ids = torch.tensor([prompt + response])
    logps = model.double()(input_ids=ids).logits[0].log_softmax(-1)
    model.float()
    return sum(float(logps[len(prompt) + i - 1, token]) for i, token in enumerate(response))


@torch.no_grad()
def exact_kl(prompt: list[int]) -> float:
    total = 0.0
    for response in every_response():
        ours, theirs = (slow_logp(model, prompt, response) for model in (POLICY, REFERENCE))
        total += math.exp(ours) * (ours - theirs)
    return total


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_both_estimators_have_the_divergence_as_their_mean(prompt: list[int]) -> None:
    """Weighed by how likely each response is, not sampled: no sampling error."""
    responses = every_response()
    found = divergence(POLICY, LiveReference(REFERENCE, HOW), [prompt] * len(responses), responses, HOW)
    with torch.no_grad():
        logps = [(slow_logp(POLICY, prompt, r), slow_logp(REFERENCE, prompt, r)) for r in responses]
    chance = [math.exp(ours) for ours, _ in logps]
    assert sum(chance) == pytest.approx(1, abs=1e-6)
    assert found.plain == pytest.approx([ours - theirs for ours, theirs in logps], abs=1e-5)
    expected = sum(c * (ours - theirs) for c, (ours, theirs) in zip(chance, logps))
    assert expected > 0.05
    spread = []
    for values in (found.plain, found.rao_blackwell):
        mean = sum(c * value for c, value in zip(chance, values))
        assert mean == pytest.approx(expected, abs=1e-5)
        spread.append(sum(c * (value - mean) ** 2 for c, value in zip(chance, values)))
    assert spread[1] < spread[0] and min(found.rao_blackwell) >= 0


def test_sampled_estimates_agree_within_their_errors() -> None:
    exact = sum(map(exact_kl, PROMPTS)) / len(PROMPTS)
    for name in sampling.ESTIMATORS:
        off = []
        for prompt in PROMPTS:
            prompts = [prompt] * 500
            responses = sample(POLICY, TOKENIZER, prompts, Sampling(LONGEST, 250, 7, torch.float32))
            metrics = divergence(POLICY, LiveReference(REFERENCE, HOW), prompts, responses, HOW).metrics(prompts)
            off.append((metrics[f"kl_eval/{name}"] - exact_kl(prompt), metrics[f"kl_eval/{name}_error"]))
            assert abs(off[-1][0]) < 4 * off[-1][1]
        assert max(error for _, error in off) < 0.2 * exact + 0.05


def test_a_divergence_does_not_depend_on_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    responses = every_response()
    prompts = [PROMPTS[i % 3] for i in range(len(responses))]
    whole = divergence(POLICY, LiveReference(REFERENCE, HOW), prompts, responses, HOW)
    monkeypatch.setattr(sampling, "LOGITS_AT_ONCE", VOCABULARY)
    one_by_one = divergence(POLICY, LiveReference(REFERENCE, HOW), prompts, responses, HOW)
    assert one_by_one.plain == pytest.approx(whole.plain, abs=1e-5)
    assert one_by_one.rao_blackwell == pytest.approx(whole.rao_blackwell, abs=1e-5)
    same = divergence(POLICY, LiveReference(POLICY, HOW), prompts, responses, HOW)
    assert set(same.plain) == set(same.rao_blackwell) == {0.0}


def test_a_token_that_the_policy_rules_out_adds_nothing() -> None:
    class Ruling(torch.nn.Module):
        def forward(self, logits: torch.Tensor) -> torch.Tensor:
            return torch.where(torch.arange(VOCABULARY) == 1, -math.inf, logits)

    policy = small_model(0)
    policy.lm_head = torch.nn.Sequential(policy.lm_head, Ruling())
    found = divergence(policy, LiveReference(policy, HOW), [[2]], [[3, 2]], HOW)
    assert found.rao_blackwell == [0.0] and found.plain == [0.0]


def test_errors_are_over_prompts() -> None:
    mean, error = mean_and_error([0.0, 0.0, 1.0, 1.0] * 50, [i // 2 for i in range(200)])
    assert mean == 0.5 and error == pytest.approx(math.sqrt(0.25 * 100 / 99) / 10)
    assert mean_and_error([1.0, 3.0], ["a", "a"]) == (2.0, pytest.approx(1.0))
    assert mean_and_error([1.0], ["a"]) == (1.0, None)


def test_greedy_and_nucleus_samples() -> None:
    how = Sampling(LONGEST, 2, 3, torch.float32, temperature=0)
    greedy = sample(POLICY, TOKENIZER, PROMPTS, how)
    for prompt, response in zip(PROMPTS, greedy):
        ids = list(prompt)
        for token in response:
            with torch.no_grad():
                assert token == int(POLICY(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
    assert sample(POLICY, TOKENIZER, PROMPTS, dataclasses.replace(how, temperature=1, top_p=1e-6)) == greedy
    assert sample(POLICY, TOKENIZER, PROMPTS * 20, dataclasses.replace(how, temperature=5)) != greedy * 20


def test_a_continuation_keeps_its_first_space() -> None:
    """SentencePiece's decoder drops the space that a text begins with."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "\u2581Hi": 1, "\u2581I": 2, "'m": 3, ":": 4}, unk_token="<s>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")
    assert fast.decode([2, 3]) == "I'm"
    assert continuation(fast, [0, 1, 4], [2, 3, 0]) == " I'm" and continuation(fast, [0], [2, 3]) == "I'm"
