"""The model card of a checkpoint: README.md with the hub's front matter."""

import contextlib
import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, try_to_load_from_cache
from huggingface_hub.repocard import metadata_load

from dpo.tables import markdown
from dpo.utils import redact, visible

HUB = "https://huggingface.co"
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def card(state: dict[str, Any], merged: bool = False) -> str:
    """Return a model card from a checkpoint's state. `merged`: an adapter of the checkpoint has been added to the
    weights. It names no path of this machine."""
    config, model = state["config"], state["config"]["model"]
    adapter = state.get("adapter")
    facts = [*filter(None, (adapter, (config.get("adapter") or {}).get("quantization")))]
    facts += ["merged into the weights"] if merged else []
    peft = adapter is not None and not merged
    given = {word.partition("=")[0].lstrip("+") for word in shlex.split(state["command"])}
    base, loss = base_of(model, given), config["loss"]["name"]
    license_ = _stated("license", model, given) or license_of(model["name_or_path"])
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
        f"- data: {_named(data, config)}; seed {config['seed']}",
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


def base_of(model: Mapping[str, Any], given: Collection[str] = ()) -> str | None:
    """Return the hub's id of the model that training began with, if it is known. `given`: the command's keys."""
    name = model["name_or_path"] if _on_hub(model["name_or_path"]) else _stated("hub_id", model, given)
    return name if name and _on_hub(name) else None


def _stated(key: str, model: Mapping[str, Any], given: Collection[str]) -> str | None:
    """Return the model's `hub_id` or `license`, unless it is a file of config/model's and about another model."""
    name, hub_id = model["name_or_path"], model.get("hub_id")
    other = "model.name_or_path" in given or (hub_id is not None and _on_hub(name) and name != hub_id)
    return model.get(key) if not other or f"model.{key}" in given else None


def _on_hub(name: str) -> bool:
    """Return whether `name` is an id of the hub, as far as one can tell without it."""
    return bool(HUB_ID.fullmatch(name)) and not name.endswith(".gguf") and not Path(name).exists()


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
    sizes = state.get("metric_sizes") or {}
    rows = [[name, f"{value:.5g}", str(sizes.get(name) or "not known")] for name, value in state["metrics"].items()]
    return "\n".join(markdown([["held-out metric", "value", "n"], *(rows or [["none measured", "-", "-"]])]))


def _data(state: dict[str, Any]) -> dict[str, str | None]:
    """Return the short name of each data set, with its id on the hub if it has one."""
    read = {source.get("name"): source.get("hub") for source in (state.get("sources") or {}).get("train", [])}
    found = {short(name): str(read.get(name)) for name in state["config"]["datasets"]}
    copies = {short(name) for name, place in (state["config"].get("dataset_sources") or {}).items() if place}
    on_hub = {name for name, hub in found.items() if "/" in hub and HUB_ID.fullmatch(hub)} - copies
    return {name: hub if name in on_hub else None for name, hub in found.items()}


def _named(data: Mapping[str, str | None], config: Mapping[str, Any]) -> str:
    """Return the data sets of `_data` in one line."""
    places = config.get("dataset_sources") or {}
    return ", ".join(
        _link(name, hub, "datasets/") + (" (a local copy)" if places.get(name) else "") for name, hub in data.items()
    )


def _link(name: str, hub: str | None, kind: str = "") -> str:
    return f"[`{hub}`]({HUB}/{kind}{hub})" if hub else f"`{name}`"


def short(path: str) -> str:
    """Return the last part of a path or hub id, with the run's folder before a checkpoint."""
    name = Path(path).name.removesuffix(".gguf")
    return f"{Path(path).parent.name}/{name}" if name.startswith(("step-", "LATEST", "BEST")) else name


def without_paths(command: str) -> str:
    """Return a command in which ... stands for each value that may hold a path of this machine."""
    words = [word.partition("=") for word in shlex.split(command)]
    words = [(key, sign, value) if sign else ("", "", key) for key, sign, value in words]
    return shlex.join(f"{key}{sign}{'...' if _may_be_path(value) else value}" for key, sign, value in words)


def _may_be_path(value: str) -> bool:
    """Return whether a value, or an entry of a list, has a sign that paths have and is no id of the hub."""
    return any(re.search(r"[/~\\]", entry) and not _on_hub(entry) for entry in value.strip("[]").split(","))
