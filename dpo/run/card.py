"""The model card of a checkpoint: README.md with the hub's front matter."""

import contextlib
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, try_to_load_from_cache
from huggingface_hub.repocard import metadata_load

from dpo.utils import redact, visible

HUB = "https://huggingface.co"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Paths: after the start of a value, an absolute one or one from a named place; or any with a slash, if it exists.
PLACED = re.compile(r"(?<![\w.:/])(?:file:/)?(?:~[\w-]*|\.{1,2})?/[^\s,\[\]{}'\"]+")
SLASHED = re.compile(r"(?<![\w./])[\w.+-]+(?:/[\w.+-]+)+")
SAMPLED = ("samples_eval/", "kl_eval/")  # metrics of samples; the others are of evaluation examples


def card(state: dict[str, Any], merged: bool = False) -> str:
    """Return a model card from a checkpoint's state. `merged`: an adapter of the checkpoint has been added to the
    weights. It names no path of this machine."""
    config, model = state["config"], state["config"]["model"]
    adapter = state.get("adapter")
    facts = [*filter(None, (adapter, (config.get("adapter") or {}).get("quantization")))]
    facts += ["merged into the weights"] if merged else []
    peft = adapter is not None and not merged
    base, loss = base_of(model), config["loss"]["name"]
    license_ = model.get("license") or license_of(model["name_or_path"])
    data = _data(state)
    name = short(base or model["name_or_path"])
    front = ModelCardData(
        library_name="peft" if peft else "transformers",
        base_model=base,
        base_model_relation=("adapter" if peft else "finetune") if base else None,
        license=license_,
        datasets=sorted({hub for hub in data.values() if hub}) or None,
        pipeline_tag="text-generation",
        tags=[loss, *([config["adapter"]["peft_type"].lower()] if adapter else [])],
    )
    lines = [
        f"- base model: {_link(name, base)}"
        + (f", from the weights of `{short(model['archive'])}`" if model["archive"] else ""),
        f"- data: {', '.join(_link(name, hub, 'datasets/') for name, hub in data.items())}; seed {config['seed']}",
        f"- loss: `{state.get('loss') or loss}`",
        *([f"- adapter: {', '.join(facts)}"] if adapter else []),
        f"- trained for {state['examples']} examples in {state['updates']} updates",
        *([f"- licence: `{license_}`, the base model's"] if license_ else []),
        f"- command: `{without_paths(state['command'])}`",
    ]
    text = [
        f"---\n{front.to_yaml()}\n---",
        f"# {name} after {loss}",
        "\n".join(lines),
        usage(state, peft),
        table(state),
    ]
    return visible(redact("\n\n".join(text) + "\n"))


def base_of(model: Mapping[str, Any]) -> str | None:
    """Return the hub's id of the model that training began with, if it is known."""
    name = model.get("hub_id") or model["name_or_path"]
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def license_of(name: str) -> str | None:
    """Return the licence that a model's own card states, in its folder or the hub's cache; None if it is not known."""
    with contextlib.suppress(Exception):  # whatever somebody else's card holds
        local = Path(name).expanduser() / "README.md"
        path = local if local.is_file() else try_to_load_from_cache(name, "README.md")
        found = (metadata_load(path) or {}).get("license") if isinstance(path, str | Path) else None
        return found if isinstance(found, str) else None
    return None


def usage(state: dict[str, Any], peft: bool) -> str:
    """Return a section with a program that samples from the model, with a prompt of the form it was trained on."""
    formats = state.get("formats") or ["text"]
    library, kind = ("peft", "AutoPeftModelForCausalLM") if peft else ("transformers", "AutoModelForCausalLM")
    turns, encode = '"Why is the sky blue?"', 'tokenizer(prompt, return_tensors="pt").input_ids'
    if "hh" in (*formats, *state["config"]["datasets"]):
        turns = r'"\n\nHuman: Why is the sky blue?\n\nAssistant:"'
    elif any(name.startswith("template") for name in formats):
        turns = '[{"role": "user", "content": "Why is the sky blue?"}]'
        more = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        encode = f"tokenizer.apply_chat_template(prompt, {more}).input_ids"
    return f"""## Use

```python
from {library} import {kind}
from transformers import AutoTokenizer

name = "."  # this folder, or its name on the hub
model, tokenizer = {kind}.from_pretrained(name), AutoTokenizer.from_pretrained(name)
prompt = {turns}
ids = {encode}
print(tokenizer.decode(model.generate(ids, max_new_tokens=64, do_sample=True)[0, ids.shape[1]:]))
```"""


def table(state: dict[str, Any]) -> str:
    """Return the metrics of the checkpoint's evaluation, each with the number of examples or samples behind it."""
    counts = {True: state.get("eval_samples"), False: state.get("eval_examples")}
    rows = [
        f"| {name} | {value:.5g} | {counts[name.startswith(SAMPLED)] or 'not known'} |"
        for name, value in state["metrics"].items()
    ]
    return "\n".join(["| held-out metric | value | n |", "|---|---|---|", *(rows or ["| none measured | | |"])])


def _data(state: dict[str, Any]) -> dict[str, str | None]:
    """Return the short name of each data set, with its id on the hub if it has one."""
    read = {source.get("name"): source.get("hub") for source in (state.get("sources") or {}).get("train", [])}
    found = {short(name): str(read.get(name)) for name in state["config"]["datasets"]}
    return {name: hub if "/" in hub and HUB_ID.fullmatch(hub) else None for name, hub in found.items()}


def _link(name: str, hub: str | None, kind: str = "") -> str:
    return f"[`{hub}`]({HUB}/{kind}{hub})" if hub else f"`{name}`"


def short(path: str) -> str:
    """Return the last part of a path or hub id, with the run's folder before a checkpoint."""
    name = Path(path).name.removesuffix(".gguf")
    return f"{Path(path).parent.name}/{name}" if name.startswith(("step-", "LATEST", "BEST")) else name


def without_paths(command: str) -> str:
    """Return a command in which .../<name> stands for each path of this machine."""

    def last(path: re.Match[str]) -> str:
        return f".../{short(path[0])}"

    def if_there(path: re.Match[str]) -> str:
        return last(path) if Path(path[0]).exists() else path[0]

    return shlex.join(SLASHED.sub(if_there, PLACED.sub(last, word)) for word in shlex.split(command))
