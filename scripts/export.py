"""A trained model as a folder that other programs open, as a GGUF file, or on the hub.

    python scripts/export.py RUN --out FOLDER --merge --dtype bfloat16
    python scripts/export.py RUN --out FOLDER --merge --gguf
    python scripts/export.py RUN --out FOLDER --push organisation/name

RUN is a run's folder, a checkpoint, or a PEFT adapter. An adapter stays one, or --merge adds it to the weights; weights
that were quantised for its training are taken back to full precision first. The exported model is compared with the
trained one, on samples of the latter. KEY=VALUE are overrides as train.py takes them: device=cpu.
"""

import argparse
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dpo.utils import UserError
from options import check_name, take_overrides
from utils import HelpFormatter, run_main


def read_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run's folder, checkpoint, or adapter")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to write; must not exist")
    parser.add_argument("--merge", action="store_true", help="add the adapter to the weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; else as trained")
    parser.add_argument("--gguf", action="store_true", help="also a GGUF file in FOLDER, by llama.cpp's converter")
    parser.add_argument("--push", metavar="NAME", help="then upload FOLDER to this repository of the hub")
    others, overrides = take_overrides(sys.argv[1:])
    given = parser.parse_args(others)
    if given.out.exists():
        raise UserError(f"--out {given.out} is there already; give a folder that is not")
    check_name(given.run)
    return given, overrides


if __name__ == "__main__":
    run_main(read_arguments)  # before the slow imports: --help and mistakes are answered at once

import torch
from huggingface_hub import HfApi
from torch import Tensor
from transformers import PreTrainedModel

from dpo.data.batching import Batch, Tree
from dpo.data.tokenise import own_bos
from dpo.files import replace_folder
from dpo.model.adapters import CONFIG_FILE, WEIGHTS_FILE
from dpo.model.loading import load_policy, load_tokenizer, merged_model
from dpo.model.logps import Computation, response_logps
from dpo.model.patches import quiet_transformers
from dpo.run.card import card
from dpo.run.saved import Saved
from dpo.run.weights import base_of
from dpo.sampling import Sampling, sample
from dpo.utils import log, make_dir, visible
from opening import find_saved

CONVERTER = "convert_hf_to_gguf.py"
N_SAMPLES, LENGTH = 8, 64  # on which models are compared


def find_converter() -> Path:
    """Return llama.cpp's program that writes GGUF files. Raise UserError if there is none."""
    place = os.environ.get("LLAMA_CPP")
    found = shutil.which(CONVERTER) or (place and shutil.which(CONVERTER, path=place, mode=os.F_OK))
    if not found:
        raise UserError(
            "--gguf needs llama.cpp: the installed package gguf writes files, but only llama.cpp's "
            f"{CONVERTER} knows which tensors a model's file holds. Set "
            "LLAMA_CPP=<folder of llama.cpp>, or put that folder on PATH"
        )
    return Path(found)


def samples_of(saved: Saved) -> tuple[list[Tree], list[Tensor]]:
    """Return texts that the trained model samples, and its log-probabilities of their tokens, in nats."""
    model, tokenizer, how = saved.open()
    start = own_bos(tokenizer) or [tokenizer.eos_token_id]
    responses = sample(model, tokenizer, [start] * N_SAMPLES, Sampling(LENGTH, N_SAMPLES, 0, how.dtype))
    trees = [Tree(start, [response]) for response in responses]
    return trees, logps_of(model, trees, how)


@torch.no_grad()
def logps_of(model: PreTrainedModel, trees: list[Tree], how: Computation) -> list[Tensor]:
    found = response_logps(model, Batch(trees, [], None), how)
    return [logps[mask].cpu() for logps, mask in zip(found.logps, found.mask, strict=True)]


def write_model(saved: Saved, adapter: Path | None, dtype: torch.dtype | None, folder: Path) -> None:
    """Write the whole model, with the adapter added to its weights if there is one."""
    config = saved.config
    if adapter is not None:
        model = merged_model(config, adapter)
    else:
        model = load_policy(config, torch.device("cpu"), archive=config.model.archive, trains=False, compiled=False)
    model.to(dtype or model.dtype).save_pretrained(folder)  # type: ignore[arg-type]
    load_tokenizer(config).save_pretrained(folder)


def write_adapter(adapter: Path, folder: Path) -> None:
    """Write the adapter and its tokenizer, without what only training needs."""
    for file in adapter.iterdir():
        if file.name in (CONFIG_FILE, WEIGHTS_FILE) or file.name.endswith((".jinja", ".model")) or "token" in file.name:
            shutil.copy(file, folder)


def compare(saved: Saved, folder: Path, dtype: torch.dtype | None, trees: list[Tree], trained: list[Tensor]) -> None:
    """Log how far the log-probabilities of the model in `folder` are from those of the trained one."""
    own: dict[str, Any] = {"name_or_path": str(folder), "archive": None, "tokenizer_name_or_path": None}
    changed: dict[str, Any] = {}
    if dtype is not None:
        own["policy_dtype"], changed["mixed_precision"] = str(dtype).removeprefix("torch."), None
    if base_of(folder) is None:
        changed["adapter"] = replace(saved.config.adapter, quantization=None)
    config = replace(saved.config, model=replace(saved.config.model, **own), **changed)
    opened, _, how = Saved(config, {}).open()
    differences = torch.cat([(a - b).abs() for a, b in zip(logps_of(opened, trees, how), trained, strict=True)])
    log(
        f"its log-probabilities differ from the trained model's by {differences.mean():.2g} nats a token, at most "
        f"{differences.max():.2g}, on {len(trees)} samples ({len(differences)} tokens) of the trained one"
    )


def push(folder: Path, name: str) -> None:
    """Upload `folder` to the hub, as a private repository if it is new. Raise UserError if that fails."""
    try:
        hub = HfApi()
        hub.create_repo(name, private=True, exist_ok=True)
        log(f"uploaded: {hub.upload_folder(repo_id=name, folder_path=folder)}")
    except Exception as error:  # the hub's client raises exceptions of many libraries
        reason = visible((str(error).strip() or type(error).__name__).splitlines()[0][:300]).rstrip(".")
        advice = f"the export is whole in {folder}; log in with `hf auth login`"
        raise UserError(f"--push {name}: {reason}; {advice}") from error


def main() -> None:
    given, overrides = read_arguments()
    converter = find_converter() if given.gguf else None
    quiet_transformers()
    saved = find_saved(given.run, overrides)
    source = Path(saved.config.model.name_or_path)
    adapter = source if base_of(source) else None
    if given.merge and adapter is None:
        raise UserError(f"--merge: {source} is no adapter; leave --merge out")
    if adapter is not None and not given.merge and (given.gguf or given.dtype):
        raise UserError(f"{source} is an adapter, which --gguf and --dtype cannot be for; add --merge")
    if given.push and adapter is not None and not given.merge and Path(str(base_of(adapter))).exists():
        raise UserError(f"--push: the adapter's base {base_of(adapter)} is a folder of this machine; add --merge")
    dtype = getattr(torch, given.dtype) if given.dtype else None
    trees, trained = samples_of(saved)
    gc.collect()  # a model refers to itself
    make_dir(given.out.parent, "--out")
    folder = Path(tempfile.mkdtemp(prefix=f".{given.out.name}-", dir=given.out.parent))
    try:
        if adapter is not None and not given.merge:
            write_adapter(adapter, folder)
        else:
            write_model(saved, adapter, dtype, folder)
        if saved.state:
            (folder / "README.md").write_text(card(saved.state, merged=given.merge), encoding="utf-8")
        compare(saved, folder, dtype, trees, trained)
        if converter is not None:
            outfile = folder / f"{given.out.name}.gguf"
            kind = {"float32": "f32", "float16": "f16"}.get(given.dtype or saved.config.model.policy_dtype, "bf16")
            command = [sys.executable, str(converter), str(folder), "--outfile", str(outfile), "--outtype", kind]
            if subprocess.run(command, check=False).returncode or not outfile.is_file():
                raise UserError(f"--gguf: {converter} failed, see above; it may not know this architecture")
        folder.chmod(0o755)
        replace_folder(folder, given.out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    log(f"written to {given.out}")
    if given.push:
        push(given.out, given.push)


if __name__ == "__main__":
    run_main(main)
