"""`import dpo` from any folder: the API as a notebook uses it, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

QUESTIONS = {" No.": "Where is it?", " I do not know it.": "Where is it?", " Birds.": "What is green?"}
PAIRS = [
    {"prompt": f"\n\nHuman: {question}\n\nAssistant:", "chosen": " The river is wide.", "rejected": worse}
    for worse, question in QUESTIONS.items()
]

NOTEBOOK = """
import json, sys
import dpo
assert "torch" not in sys.modules and "transformers" not in sys.modules
from dpo.data import DataSettings, load

run = dpo.load_run(sys.argv[1], device="cpu")
assert run.policy.training is False and run.config.max_length == 64
pairs = json.loads(sys.argv[2])
scores = run.score(pairs)
texts = run.sample([pair["prompt"] for pair in pairs], seed=1)
assert texts == run.sample([pair["prompt"] for pair in pairs], seed=1) and len(texts) == len(pairs)
settings = DataSettings(names=(sys.argv[3],), cache_dir=sys.argv[4], max_length=64, max_prompt_length=32)
data = load(settings, run.tokenizer, "train")
assert not [name for name in sys.modules if name in ("trainers", "settings", "losses", "preference_datasets", "train")]
print(json.dumps({"scores": scores, "texts": texts, "records": len(data), "version": dpo.__version__}))
"""


def test_a_notebook_scores_samples_and_loads_data(run_dir: Path, pairs_dir: Path, tmp_path: Path) -> None:
    pairs = [PAIRS[i] for i in (0, 1, 2, 0)]
    command = [sys.executable, "-c", NOTEBOOK, str(run_dir), json.dumps(pairs), str(pairs_dir), str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    out = tmp_path / "scores.jsonl"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(pair) for pair in pairs) + "\n")
    score = [sys.executable, str(ROOT / "scripts" / "score.py"), str(run_dir), "--data", str(rows), "--out", str(out)]
    subprocess.run([*score, "device=cpu", f"cache_dir={tmp_path / 'cache'}"], check=True, timeout=200, cwd=tmp_path)
    expected = {}
    for row in map(json.loads, out.read_text().splitlines()):
        for response in row["responses"]:
            expected[row["prompt"], response["text"]] = response
    for pair, score in zip(pairs, result["scores"], strict=True):
        for side in ("chosen", "rejected"):
            other = expected[pair["prompt"], pair[side]]
            assert score[side]["policy"] == pytest.approx(other["logp_policy"], abs=1e-4)
            assert score[side]["reference"] == pytest.approx(other["logp_reference"], abs=1e-4)
        assert score["margin"] == pytest.approx(score["chosen"]["log_ratio"] - score["rejected"]["log_ratio"])
    assert result["records"] > 0


def test_rewards_are_those_of_the_loss(run_dir: Path) -> None:
    import dpo
    from losses import DPO

    for score in dpo.load_run(run_dir, device="cpu").score(PAIRS, DPO(0.3)):
        assert score["chosen"]["reward"] == pytest.approx(0.3 * score["chosen"]["log_ratio"])
        assert score["margin"] == pytest.approx(score["chosen"]["reward"] - score["rejected"]["reward"])


def test_scoring_speaks_of_pairs_only(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import dpo

    dpo.load_run(run_dir, device="cpu").score([PAIRS[0] | {"extra": 1}])
    said = capsys.readouterr()
    assert said.out == "warning: pairs: column 'extra' is not used (1 rows)\n" and "pairs.jsonl" not in said.err


NUMBER = {"prompt": "a", "chosen": 1, "rejected": "b"}
SAME = [{"prompt": "a", "chosen": "b", "rejected": "b"}]
LABELLED = [{"prompt": "a", "completion": "b", "label": True}]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda load, run_dir: load("no/such/run"), "no/such/run"),
        (lambda load, run_dir: load(run_dir, devise="cpu"), "devise is no key"),
        (lambda load, run_dir: load(run_dir, layout="wide"), "layout=wide is not known"),
        (lambda load, run_dir: load(run_dir, device="cpu").sample([]), "holds no prompt"),
        (lambda load, run_dir: load(run_dir, device="cpu").sample("a"), "give a list of texts"),
        (
            lambda load, run_dir: load(run_dir, device="cpu").score([{"prompt": "a"}]),
            r"^pairs\[0\]: columns fit no known form: 'prompt'; give prompt, chosen and rejected$",
        ),
        (
            lambda load, run_dir: load(run_dir, device="cpu").score([*PAIRS[:1] * 2, NUMBER]),
            r"^pairs\[2\]: wrong type: 'chosen' is int",
        ),
        (lambda load, run_dir: load(run_dir, device="cpu").score(SAME), r"^pairs\[0\] has no two responses"),
        (
            lambda load, run_dir: load(run_dir, device="cpu").score(LABELLED),
            r"^pairs\[0\] has no two responses.*chosen",
        ),
        (
            lambda load, run_dir: load(run_dir, device="cpu").score(PAIRS, "dpo"),
            "loss='dpo' is no loss; give an object",
        ),
    ],
)
def test_misuse(call, message: str, run_dir: Path) -> None:
    import dpo
    from dpo.utils import UserError

    with pytest.raises(UserError, match=message):
        call(dpo.load_run, run_dir)


def test_a_config_built_in_python_trains(overrides, tmp_path: Path) -> None:
    import trainers
    from settings import load_config

    config = load_config(overrides("n_examples=8", "batch_size=8", "n_eval_examples=0", "sample_during_eval=false"))
    trainers.train(config)
    state = json.loads((tmp_path / "run" / "LATEST" / "trainer_state.json").read_text())
    assert state["examples"] == 8 and state["command"] == "trainers.train(config)"
