"""Judges and their statistics: verdicts, faults of an endpoint, win rates, intervals and their coverage."""

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import first_fast, make_tokenizer
from judge_server import SECRET, Server
from transformers import AutoModelForSequenceClassification, LlamaConfig

from dpo.judging.endpoint import KEY, Answers, Endpoint, Usage, read_answer
from dpo.judging.judges import REFUSED, TIE, UNPARSABLE, ScoreJudge, Verdict, function_judge, reward_model_judge
from dpo.judging.statistics import RIDGE, exact_interval, interval, length_controlled, share_interval, win_rate
from dpo.utils import UserError

PAIRS = [(f"Prompt {i}?", f" {'long ' * (i % 3 + 1)}answer {i}", f" short {i}") for i in range(4)]


@contextlib.contextmanager
def endpoint(server: Server, folder: Path, **options: Any) -> Iterator[Endpoint]:
    answers = Answers(folder / "answers.jsonl")
    try:
        yield Endpoint(server.url, "m", "helpful", answers, **{"timeout": 0.5, "retries": 2, **options})
    finally:
        answers.close()


# --- An endpoint ---


def test_an_endpoint_is_asked_in_both_orders_once(server: Server, tmp_path: Path) -> None:
    pairs = [*PAIRS, PAIRS[0], ("Prompt 9?", " same", "same ")]
    with endpoint(server, tmp_path) as judge:
        verdicts = judge.compare(pairs)
        assert verdicts == [Verdict("a", "a")] * 5 + [Verdict(TIE, TIE)]
        assert [verdict.win for verdict in verdicts] == [1] * 5 + [0.5]
        assert judge.usage == Usage(8, 8, 80, 16) and judge.usage.cost(2, 10) == pytest.approx((160 + 160) / 1e6)
    counts = Counter(server.questions)
    assert len(counts) == 8 and set(counts.values()) == {1}
    assert all(text.strip() in question for text in PAIRS[0] for question in list(counts) if "Prompt 0?" in question)
    assert server.bodies[0]["temperature"] == 0 and server.bodies[0]["max_tokens"] == 300
    with endpoint(server, tmp_path) as judge:  # again, with sides swapped
        swapped = judge.compare([(prompt, b, a) for prompt, a, b in pairs])
        assert [1 - verdict.win for verdict in swapped] == [1] * 5 + [0.5]
        assert judge.usage == Usage(8, 0, 80, 16) and len(server.questions) == 8
    with endpoint(server, tmp_path, fields={"temperature": 1}) as judge:  # other questions
        judge.compare(PAIRS[:1])
        assert judge.usage.asked == 2


@pytest.mark.parametrize("fault", ["429", "500", "hang", "closed", "half", "empty choices", "schema"])
def test_faults_are_retried(fault: str, server: Server, tmp_path: Path) -> None:
    server.faults, began = [fault], time.monotonic()
    with endpoint(server, tmp_path, parallel=1) as judge:
        assert judge.compare(PAIRS) == [Verdict("a", "a")] * 4
        assert judge.usage.asked == 8 and len(server.questions) == 9
    if fault == "429":
        assert time.monotonic() - began >= 1


@pytest.mark.parametrize(("fault", "answer"), [("empty content", UNPARSABLE), ("refusal", REFUSED)])
def test_replies_without_a_verdict_are_counted(fault: str, answer: str, server: Server, tmp_path: Path) -> None:
    server.faults = [fault]
    with endpoint(server, tmp_path, parallel=1) as judge:
        verdicts = judge.compare(PAIRS[:2])
    assert verdicts == [Verdict(answer, "a"), Verdict("a", "a")] and verdicts[0].win == 0.5
    assert len(server.questions) == 4  # asked again it would say the same


@pytest.mark.parametrize(("fault", "advice"), [
    ("401", f"HTTP 401, .*set a valid key in the environment variable {KEY}"), ("404", "HTTP 404, .*check --endpoint"),
    ("400", "HTTP 400, .*--fields"),
])  # fmt: skip
def test_refusals_of_the_request_end_it_at_once(fault: str, advice: str, server: Server, tmp_path: Path) -> None:
    server.faults = [fault] * 99
    with endpoint(server, tmp_path, parallel=1) as judge, pytest.raises(UserError, match=advice) as error:
        judge.compare(PAIRS)
    assert len(server.questions) == 1 and "\n" not in str(error.value) and SECRET not in str(error.value)
    server.faults = []
    with endpoint(server, tmp_path) as judge:
        assert judge.compare(PAIRS) == [Verdict("a", "a")] * 4


@pytest.mark.parametrize(("fault", "said"), [("500", "HTTP 500"), ("closed", "does not answer"), ("half", "no chat")])
def test_lasting_faults_end_it_and_it_resumes(fault: str, said: str, server: Server, tmp_path: Path) -> None:
    server.faults = [""] * 3 + [fault] * 99
    again = "run the same command again to resume"
    with endpoint(server, tmp_path, parallel=1, retries=1) as judge, pytest.raises(UserError, match=f"{said}.*{again}"):
        judge.compare(PAIRS)
    server.faults, n = [], len(server.questions)
    assert n == 5  # three answered, one asked twice
    with endpoint(server, tmp_path) as judge:
        judge.compare(PAIRS)
        assert judge.usage.asked == 5 and len(server.questions) == n + 5


def test_a_cut_line_is_asked_again(server: Server, tmp_path: Path) -> None:
    with endpoint(server, tmp_path) as judge:
        judge.compare(PAIRS)
    file = tmp_path / "answers.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    for asked in (1, 0):
        with endpoint(server, tmp_path) as judge:
            assert judge.compare(PAIRS) == [Verdict("a", "a")] * 4 and judge.usage.asked == asked
    assert len({json.loads(line)["key"] for line in file.read_text().splitlines()}) == 8
    with endpoint(server, tmp_path), pytest.raises(UserError, match="another process writes"):
        Answers(file)
    file.write_text('{"key": 1}\n')
    with pytest.raises(UserError, match="a line that is no answer"):
        Answers(file)


def test_a_judge_that_likes_the_first_has_no_favourite(server: Server, tmp_path: Path) -> None:
    server.judge = lambda question: "Verdict: A"
    server.usage = None
    with endpoint(server, tmp_path) as judge:
        verdicts = judge.compare(PAIRS)
        assert verdicts == [Verdict("a", "b")] * 4 and judge.usage == Usage(8, 8, None, None)
        assert judge.usage.cost(1, 1) is None
    assert win_rate([verdict.win for verdict in verdicts], [pair[0] for pair in PAIRS]).rate == 0.5


def test_a_cut_reply_is_no_verdict(server: Server, tmp_path: Path) -> None:
    server.faults = ["cut", "", "cut"]
    with endpoint(server, tmp_path, parallel=1) as judge:
        verdicts = judge.compare(PAIRS)
    assert verdicts[0] == Verdict(UNPARSABLE, "a") and verdicts[1] == Verdict(UNPARSABLE, "a")
    assert [verdict.win for verdict in verdicts] == [0.5, 0.5, 1, 1]


def test_the_key_is_sent_and_never_written(server: Server, tmp_path: Path) -> None:
    server.judge = lambda question: f"Your key is {SECRET}.\nVerdict: B"
    with endpoint(server, tmp_path) as judge:
        judge.compare(PAIRS)
    assert server.keys == {f"Bearer {SECRET}"}
    assert SECRET not in (text := (tmp_path / "answers.jsonl").read_text()) and "Your key is ***" in text
    for url in ("ftp://x", "https://me:secret@x/v1", "https://x/v1?key=secret", "x/v1"):
        with pytest.raises(UserError, match=f"without name, password or query: the key goes into {KEY}") as error:
            Endpoint(url, "m", "helpful", judge._answers)
        assert "secret" not in str(error.value)


@pytest.mark.parametrize(("text", "answer"), [
    ("Verdict: A", "A"), ("B is worse.\n**Verdict: B**", "B"), ("verdict - a.", "A"), (" B ", "B"),
    ("Verdict: Tie", TIE),
    ("Verdict: A\nOn second thought:\nVerdict: B", "B"), ("Verdict: A or B", UNPARSABLE), ("A is better", UNPARSABLE),
    ("", UNPARSABLE), ("I'm sorry, I cannot help with that.", REFUSED), ("I can\u2019t compare these.", REFUSED),
    ("I'm sorry to say both are bad.\nVerdict: tie", TIE),
    ("**Final verdict: B**", "B"),
    ("Verdict: Candidate A.", "A"),
])  # fmt: skip
def test_answers_are_read(text: str, answer: str) -> None:
    assert read_answer(text) == answer


def test_scores_of_k_responses(server: Server, tmp_path: Path) -> None:
    groups = [("Why?", [" a", " aaa", " aa"]), ("Who?", [" b"])]
    with endpoint(server, tmp_path) as judge:
        assert judge.scores(groups) == [[0, 1, 0.5], [0.5]]
    assert ScoreJudge("length", lambda items: [len(r) for _, r in items]).scores(groups) == [[2, 4, 3], [2]]


# --- Scores ---


def test_scores_make_verdicts() -> None:
    calls: list[int] = []

    def score(items: Any) -> list[float]:
        calls.append(len(items))
        return [len(response) for _, response in items]

    verdicts = ScoreJudge("length", score).compare(
        [("p", "aa", "b"), ("p", "b", "aa"), ("p", "b", "c"), ("q", "b", "aa")]
    )
    assert verdicts == [Verdict("a", "a"), Verdict("b", "b"), Verdict(TIE, TIE), Verdict("b", "b")]
    assert calls == [5]  # each (prompt, response) once
    with pytest.raises(UserError, match="judge bad: the score of 'x' to 'p' is nan"):
        ScoreJudge("bad", lambda items: [math.nan] * len(items)).compare([("p", "x", "y")])


def test_a_function_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import numpy as np\ndef bad(p, r): return 'x'\ndef count(p, r): return np.float32(r.count(p))\n"
    (tmp_path / "judging_rewards.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    judge = function_judge("judging_rewards:count")
    assert judge.compare([("o", "foo", "bar")]) == [Verdict("a", "a")] and judge.name == "judging_rewards:count"
    with pytest.raises(UserError, match="returned 'x' for 'foo'; it must return a number"):
        function_judge("judging_rewards:bad").compare([("o", "foo", "bar")])
    for path in ("judging_rewards:none", "judging_nowhere:f", "judging_rewards", ":f"):
        with pytest.raises(UserError, match=f"--function {path} cannot be imported"):
            function_judge(path)


def reward_model(folder: Path, template: str | None, pad: int | None, labels: int = 1) -> Path:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=320, **sizes, pad_token_id=pad, num_labels=labels, max_position_embeddings=128)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("pad", [None, 5])
@pytest.mark.parametrize("template", [None, "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"])
def test_a_reward_model_judges(template: str | None, pad: int | None, tmp_path: Path) -> None:
    folder = reward_model(tmp_path / "rm", template, pad)
    dialogue = "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Who?\n\nAssistant:"
    responses = [" You", " It is Mount Everest, of course.", " Rivers and boats"]
    judge = reward_model_judge(str(folder), torch.device("cpu"), batch_size=4)
    scores = judge.scores([(dialogue, responses), ("Rivers", responses[:2])])
    as_text = (
        ("[user]Hi[assistant]Ho[user]Who?[assistant]", "[user]Rivers[assistant]") if template else (dialogue, "Rivers")
    )
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), make_tokenizer()
    for prompt, group in zip(as_text, scores):
        for response, score in zip(responses, group):
            ids = tokenizer(prompt + (response.strip() if template else response))["input_ids"]
            assert score == pytest.approx(float(model(torch.tensor([ids])).logits), abs=1e-5)
    with pytest.raises(UserError, match="has 128 positions"):
        judge.compare([("a, " * 200, "b", "c")])
    if template:  # a dialogue that begins with a system message's text
        [[score]] = judge.scores([("Be brief." + dialogue, responses[:1])])
        ids = tokenizer("[system]Be brief.[user]Hi[assistant]Ho[user]Who?[assistant]You")["input_ids"]
        assert score == pytest.approx(float(model(torch.tensor([ids])).logits), abs=1e-5)


def test_a_reward_models_template_may_refuse(tmp_path: Path) -> None:
    folder = reward_model(tmp_path / "rm", "{{ raise_exception('no such role') }}", 5)
    with pytest.raises(UserError, match="its chat template refuses 'Hi': no such role"):
        reward_model_judge(str(folder), torch.device("cpu"), 4).compare([("Hi", "a", "b")])


def test_what_is_no_reward_model_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    for name, message in (
        (tiny_model_dir, "weights that lack: \\['score.weight'\\]"), (tmp_path / "nowhere", "cannot be read"),
        (reward_model(tmp_path / "two", None, 5, labels=2), "2 labels \\(one is needed\\)"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            reward_model_judge(str(name), torch.device("cpu"), 4)


# --- Statistics ---


def test_exact_intervals() -> None:
    # Tables of the Clopper-Pearson interval.
    for wins, n, low, high in (
        (0, 10, 0, 0.3085),
        (5, 10, 0.1871, 0.8129),
        (9, 10, 0.5550, 0.9975),
        (20, 20, 0.8316, 1),
    ):
        assert exact_interval(wins, n) == pytest.approx((low, high), abs=5e-5)
    for n in (5, 20, 30, 100):
        for p in (0.1, 0.5, 0.62, 0.9, 0.97):
            ends = [exact_interval(k, n) for k in range(n + 1)]
            chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
            assert sum(chance for chance, (low, high) in zip(chances, ends) if low <= p <= high) >= 0.95


def test_swapping_gives_exactly_one_minus() -> None:
    rng = np.random.default_rng(1)
    for n, ties in ((3, False), (7, False), (29, False), (31, False), (50, True), (333, True)):
        wins = rng.choice([0, 0.5, 1] if ties else [0, 1], n).tolist()
        longer = rng.integers(-90, 90, n).tolist()
        prompts = [f"p{i if n < 40 else i // 3}" for i in range(n)]
        rate, other = win_rate(wins, prompts), win_rate([1 - win for win in wins], prompts)
        assert other.rate == 1 - rate.rate and other.interval and rate.interval
        assert (1 - other.interval[1], 1 - other.interval[0]) == rate.interval
        assert rate.rate == pytest.approx(np.mean(wins), abs=1e-12)
        assert rate.method == ("exact binomial" if not ties else "bootstrap over prompts")
        controlled = length_controlled(wins, longer, prompts)
        swapped = length_controlled([1 - win for win in wins], [-d for d in longer], prompts)
        assert swapped.rate == pytest.approx(1 - controlled.rate, abs=1e-9)
    assert win_rate([1, 0.5], ["a", "a"]).interval is None
    for n in (99, 2000):
        assert win_rate([1.0] * n, [*map(str, range(n))]).interval == pytest.approx((0.025 ** (1 / n), 1))
    assert win_rate([1.0] * 16, [f"p{i // 2}" for i in range(16)]).interval == pytest.approx((0.025 ** (1 / 8), 1))
    assert win_rate([0.5] * 9, [*map(str, range(9))]).interval is None


def test_the_interval_counts_prompts_not_pairs() -> None:
    wins, prompts = [1.0, 0.0] * 20, [f"p{i}" for i in range(40)]
    [alone, repeated] = (interval(np.array(wins * k), np.array(prompts * k)) for k in (1, 9))
    assert alone is not None and alone == pytest.approx(repeated)
    assert alone[1] - alone[0] == pytest.approx(4 * 0.5 / 40**0.5, abs=0.04)


def simulated(seed: int, prompts: int, responses: int) -> tuple[list[float], list[str]]:
    """Draw verdicts of a judge that wins 0.62 on average, prompts differ, and that ties where its orders disagree."""
    rng = np.random.default_rng([7, seed])
    chance = np.repeat(rng.beta(0.62 * 3, 0.38 * 3, prompts), responses)  # by prompt, mean 0.62
    answers = rng.random((2, len(chance))) < chance
    return answers.mean(0).tolist(), [f"p{i}" for i in np.repeat(np.arange(prompts), responses)]


@pytest.mark.parametrize(("prompts", "responses", "judges"), first_fast([(80, 1, 200), (256, 1, 200), (64, 4, 500)]))
def test_intervals_cover(prompts: int, responses: int, judges: int) -> None:
    """Of judges with a win rate of 0.62, 92 to 98 % of the intervals hold it."""
    drawn = [simulated(seed, prompts, responses) for seed in range(judges)]
    ends = [win_rate(*each).interval or (2, 2) for each in drawn]
    assert 0.92 <= np.mean([low <= 0.62 <= high for low, high in ends]) <= 0.98
    if responses > 1:  # responses to one prompt are not independent
        ends = [interval(np.array(wins), np.arange(len(wins))) or (2, 2) for wins, _ in drawn]
        assert np.mean([low <= 0.62 <= high for low, high in ends]) < 0.9


@pytest.mark.parametrize(("rate", "n"), [(0.95, 64), (0.97, 100), (0.5, 40)])
def test_intervals_of_one_sided_judges_cover(rate: float, n: int) -> None:
    rng, prompts = np.random.default_rng(2), [*map(str, range(n))]
    ends = [win_rate((rng.random(n) < rate).astype(float).tolist(), prompts).interval or (2, 2) for _ in range(200)]
    assert np.mean([low <= rate <= high for low, high in ends]) >= 0.93


def slow_fit(wins: np.ndarray, d: np.ndarray) -> float:
    """Fit the formula of `length_controlled` by LBFGS in float64."""
    x = torch.tensor(np.tanh(d / np.sqrt((d**2).mean())))
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Any:
        optimizer.zero_grad()
        logits = theta[0] + theta[1] * x
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(wins), reduction="sum")
        loss = loss + RIDGE * theta[1] ** 2 / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(theta[0].detach().sigmoid())


def test_length_control() -> None:
    rng = np.random.default_rng(3)
    d = rng.normal(60, 100, 400).round()
    prompts = [f"p{i}" for i in range(400)]
    wins = (rng.random(400) < 1 / (1 + np.exp(-(-0.4 + 2 * np.tanh(d / 117))))).astype(float)
    found = length_controlled(wins.tolist(), d.tolist(), prompts)
    assert found.rate == pytest.approx(slow_fit(wins, d), abs=1e-7)
    assert found.interval and found.interval[0] < 1 / (1 + math.exp(0.4)) < found.interval[1] < wins.mean()
    assert length_controlled(wins.tolist(), [0] * 400, prompts).rate == pytest.approx(wins.mean())
    # The longer one always wins: that is all the judge says.
    separated = (d > 0).astype(float)
    assert length_controlled(separated.tolist(), d.tolist(), prompts).rate == pytest.approx(
        slow_fit(separated, d), abs=1e-6
    )
    for all_same in (0.0, 1.0):
        found = length_controlled([all_same] * 9, list(range(9)), prompts[:9])
        assert (found.rate, found.interval) == (all_same, None)
    assert length_controlled([1.0, 0.0], [3, -3], ["a", "a"]).interval is None


def test_all_hits_are_not_certain() -> None:
    prompts = np.arange(8)
    assert share_interval(np.ones(8), prompts) == pytest.approx((0.6306, 1), abs=1e-4)  # 0.025 ** (1 / 8)
    assert share_interval(np.zeros(8), prompts) == pytest.approx((0, 0.3694), abs=1e-4)
    assert share_interval(np.ones(8), prompts // 2) == pytest.approx((0.3976, 1), abs=1e-4)  # of 4 prompts
    mixed = np.array([1.0, 1, 0.5, 1, 1, 1, 1, 1])
    assert (
        share_interval(mixed, prompts) == interval(mixed, prompts) and share_interval(np.ones(1), prompts[:1]) is None
    )
