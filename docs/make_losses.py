"""Write docs/losses.md from config/loss, losses.py and the table below: python docs/make_losses.py

A test compares the file with what this returns.
"""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dpo.tables import markdown
from losses import Loss, make
from utils import CONFIG_DIR, loss_values, run_main

FILE = ROOT / "docs" / "losses.md"
FIRST = ("sft", "dpo", "ipo")  # then by name; `pairs` and `mix` have sections of their own
ROWS = {
    "pairs": "pairs",
    "targets": "demonstrations",
    "labelled": "completions with a label",
    "ranked": "rankings",
}

HEAD = """# Losses

Choose what the policy learns from pairs, rankings, labels or demonstrations. `loss=<name>` chooses, `loss.<key>` sets.

```bash
python train.py loss=simpo loss.gamma=0.5 'datasets=[sentiment]' exp_name=simpo
python train.py loss=dpo loss.beta=0.1 loss.nll_weight=0.1 'datasets=[sentiment]' exp_name=dpo_with_nll
```

`python docs/make_losses.py` writes this file from `config/loss`, `losses.py` and its own table of deviations.

u is the log-ratio log pi(y)/ref(y) of a response, summed over its tokens with EOS; d = u(chosen) - u(rejected); r
is the loss's reward. The loss of a batch is the mean over its examples, whatever the micro-batches and the number
of processes. What depends on other examples (KTO's z0, AOT's ranks, BCO's delta, `nll=batch_mean`) sees the whole
global batch.

Formulas and gradients are tested against float64 formulas written apart from this code (`tests/test_losses.py`), 14
of them also against four updates of TRL 1.16 (`tests/test_trl.py`). The papers' texts were not at hand for all: the
formulas of exo, nca, sppo, apo_zero, apo_down, discopop, chi2_kl, alpha, forward_kl, tdpo and R-DPO's margin rest
on knowledge of the papers, and on TRL's numbers for exo, sppo, apo_zero and js. Check them before you publish on
one of these alone, and tell us.
"""

PARTS = """## Parts of every loss of pairs

`loss=dpo`, `simpo`, `hinge` and the others of kind `pairs` are presets of one formula. Each part can be set for
each of them: `loss=simpo loss.nll_weight=0.1`, `loss=dpo loss.length_normalized=true loss.margin=column`.
Contradictions are refused.
"""

RANKINGS = """## Rankings

A ranking of two responses is a pair, and its Plackett-Luce likelihood DPO's loss: on rows of pairs `loss=listwise`
trains as `loss=dpo` does, but takes one row of each prompt. It is for rankings of three or more. Metrics of pairs
(`rewards_*/margins`, `rewards_*/accuracies`, and all called chosen and rejected) compare the best response of a
ranking with the worst.
"""

MIX = """## Sums of losses

`loss=mix loss.beta=0.1 'loss.terms={dpo: 0.8, bco: 0.2, nll: 1.0}'` adds weighted losses of pairs; `loss=mpo` is
this one. Keys of one term: `'loss.settings={simpo: {gamma: 0.5}}'`. Rewards and `gradient_weight_*` are those of the
first term that has some, without its weight. Metrics: `loss_train/dpo`, `loss_eval/dpo` and so on are each term's loss
before its weight, and `loss/train` is their weighted sum.
"""

# (loss here, what others compute under the name, what gives their numbers here). TRL: 1.16, from its numbers; the
# others: from their source, LLaMA-Factory 0005269 and OpenRLHF 09f5ace.
DEVIATIONS = [
    (
        "`ipo`: sums over tokens",
        "TRL, LLaMA-Factory: means over tokens. OpenRLHF: sums",
        "`loss.average_log_prob=true`",
    ),
    ("`hinge`: RSO's, with a reference", "TRL's `hinge` is this, not SLiC", "-; SLiC is `loss=slic`"),
    (
        "`cpo`: the sum of the chosen response's NLL",
        "TRL: its mean over all tokens of the micro-batch",
        "`loss.nll=batch_mean` (of the global batch)",
    ),
    (
        "`dpo loss.nll_weight`: the mean over each response, then over responses",
        "TRL: the mean over all tokens of the micro-batch. LLaMA-Factory (`pref_ftx`): as here",
        "`loss.nll=batch_mean`",
    ),
    (
        "`simpo`: no NLL",
        "TRL: `cpo_alpha` is 1 unless set to 0, which adds an NLL",
        "`loss.nll_weight=1 loss.nll=batch_mean`",
    ),
    (
        "`orpo`: the NLL of the response",
        "TRL: the NLL of prompt and response",
        "not available: prompts are never scored",
    ),
    (
        "`orpo`: `pair_weight` is the paper's lambda",
        "TRL, LLaMA-Factory: it is called beta",
        "`loss.pair_weight=<their beta>`",
    ),
    ("`sppo`: the mean over both responses", "TRL (`sppo_hard`): the sum", "`loss.pair_weight=2`"),
    ("`apo_zero`, `apo_down`: the paper's values", "TRL: a constant 1 more, with the same gradient", "-"),
    (
        "`bco`: delta is the mean of all rewards of both sides so far",
        "TRL (`bco_pair`): no shift. LLaMA-Factory: a running mean of the micro-batches' means, and its mix with DPO "
        "is divided by the sum of the weights",
        "-",
    ),
    ("`divergence=alpha`: the paper's alpha", "TRL: alpha is 1 - the paper's", "`loss.divergence_alpha=<1 - theirs>`"),
    (
        "`ld_alpha`: weighs the policy's and the reference's tokens",
        "TRL: as here. LLaMA-Factory: the policy's alone, so that log-ratios do not start at 0",
        "-",
    ),
    (
        "`kto`: z0 of mismatched prompts and responses of the global batch",
        "TRL, OpenRLHF: of the micro-batch. OpenRLHF's `VanillaKTOLoss`: from the batch's own pairs, with gradients",
        "one micro-batch a batch",
    ),
    (
        "`aot`, `aot_unpaired`: sorted over the global batch",
        "TRL: over the micro-batch; its `aot_pair` is `aot_unpaired`",
        "one micro-batch a batch",
    ),
    (
        "`dpo loss.margin=length`: + alpha (length of chosen - of rejected)",
        "the sign follows from the paper's objective",
        "-",
    ),
]


def comments(name: str) -> tuple[str, dict[str, str]]:
    """Return the head of a loss's file as one text, and the comment of each key that it holds."""
    head: list[str] = []
    found: dict[str, str] = {}
    block: list[str] = []
    for line in (CONFIG_DIR / "loss" / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            block.append(line.removeprefix("#").strip())
        elif key := re.match(r"(\w+):", line):
            if key[1] in ("name", "defaults"):
                head = head or block
            else:
                found[key[1]] = " ".join(block)
            block = block if key[1] not in ("name", "defaults") else []
        elif not line.strip():
            block = []
    return " ".join(head).replace("(new) ", ""), found


def build(name: str) -> Loss:
    """Return the loss of this name, with stand-ins for what a user must give."""
    stand_ins = {"terms": {"nll": 1.0}}
    missing = {key: stand_ins.get(key, 0.1) for key, value in loss_values(name).items() if value == "???"}
    loss, problems = make({"name": name, **missing})
    assert loss is not None, problems
    return loss


def needs(loss: Loss) -> str:
    reference = "live reference" if loss.needs_kl else "reference" if loss.needs_reference else "no reference"
    return f"{ROWS[loss.rows]}; {reference}{'; 2 forward passes' if loss.needs_statistics else ''}"


def own_values(name: str, base: dict[str, Any]) -> str:
    """Return a file's values that differ from those of the file it builds on."""
    values = {key: value for key, value in loss_values(name).items() if key not in ("name", "kind")}
    shown = {key: value for key, value in values.items() if value == "???" or base.get(key, "-") != value}
    return ", ".join(f"`{key}`" + (" required" if value == "???" else f"={value}") for key, value in shown.items())


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(markdown([head, *rows])) + "\n"


def text() -> str:
    """Return the content of docs/losses.md."""
    files = sorted((p.stem for p in (CONFIG_DIR / "loss").glob("*.yaml")), key=lambda n: (n not in FIRST, n))
    parts = loss_values("pairs")
    rows = []
    for name in files:
        if name in ("pairs", "mix"):
            continue
        loss = build(name)
        head = re.split(r" (?:Needs|Keys:|Other keys|Every other key)\b", comments(name)[0])[0]
        base: dict[str, Any] = parts if dataclasses.is_dataclass(loss) and hasattr(loss, "link") else {}
        rewards = "yes" if loss.gives_rewards else "no"
        rows.append([f"`{name}`", head, needs(loss), own_values(name, base), rewards])
    told = comments("pairs")[1]
    keys = [[f"`{key}`", str(value), told.get(key, "").replace("(new) ", "")] for key, value in parts.items()]
    keys = [row for row in keys if row[0] not in ("`name`", "`kind`")]
    return "\n".join(
        [
            HEAD,
            table(["`loss=`", "what it is", "needs", "values", "rewards"], rows),
            PARTS,
            table(["`loss.<key>`", "DPO", "meaning"], keys),
            RANKINGS,
            MIX,
            "## Same name, different loss\n",
            table(["here", "elsewhere", "their numbers here"], [list(row) for row in DEVIATIONS]),
        ]
    )


if __name__ == "__main__":
    run_main(lambda: FILE.write_text(text(), encoding="utf-8"))
