"""scripts/export.py: what other programs open, and misuse."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from conftest import make_model, make_tokenizer, read_jsonl, tiny_overrides, train_here
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo
import export as script
from dpo.utils import UserError

Call = Callable[..., Path]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, pairs_dir: Path, cache_dir: Path) -> Path:
    """The folder of a QLoRA run."""
    folder = tmp_path_factory.mktemp("adapter")
    make_model(hidden=64).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    given = ["adapter=qlora", "loss=dpo", "loss.beta=0.5", "lr=1e-2", "n_examples=16", "batch_size=8"]
    given += ["n_eval_examples=8", "sample_during_eval=false", "do_first_eval=false"]
    train_here(tiny_overrides(folder / "base", pairs_dir, cache_dir, folder / "run", *given))
    return folder / "run"


@pytest.fixture
def call(cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    def run(*arguments: object, name: str = "exported") -> Path:
        given = [*arguments, f"cache_dir={cache_dir}", "device=cpu", "--out", tmp_path / name]
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, given)])
        script.main()
        return tmp_path / name

    return run


@torch.no_grad()
def test_a_merged_folder_opens_in_transformers_alone(adapter: Path, call: Call, capsys, pairs_dir: Path) -> None:
    folder = call(adapter, "--merge")
    found = re.search(r"differ from the trained model's by (\S+) nats a token, at most (\S+),", capsys.readouterr().out)
    assert found and float(found[1]) < 1e-5 and float(found[2]) < 1e-4
    assert not any(file.name.startswith("adapter") for file in folder.iterdir())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert getattr(model.config, "quantization_config", None) is None
    row = read_jsonl(pairs_dir / "test.jsonl")[0]
    [score] = dpo.load_run(adapter).score([{side: row[side] for side in ("chosen", "rejected")}])
    end = row["chosen"].rfind("Assistant:") + len("Assistant:")
    before = tokenizer(row["chosen"][:end])["input_ids"]
    after = [*tokenizer(row["chosen"][end:], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    logps = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    assert float(logps[range(len(after)), after].sum()) == pytest.approx(score["chosen"]["policy"], rel=1e-5)
    card = (folder / "README.md").read_text()
    assert "library_name: transformers" in card and "nf4, merged into the weights" in card


def test_types_and_full_models(adapter: Path, run_dir: Path, call: Call, capsys) -> None:
    half = call(adapter, "--merge", "--dtype", "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16
    found = re.search(r"by (\S+) nats a token", capsys.readouterr().out)
    assert found and 1e-4 < float(found[1]) < 0.1
    assert AutoModelForCausalLM.from_pretrained(call(run_dir, "--dtype", "float16", name="b")).dtype == torch.float16


def test_an_adapter_stays_one(adapter: Path, call: Call) -> None:
    folder = call(adapter)
    names = {file.name for file in folder.iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"} | {
        file.name for file in (adapter / "LATEST").iterdir() if "token" in file.name
    }
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    assert "library_name: peft" in (folder / "README.md").read_text()


def test_gguf_goes_through_the_converter_of_llama_cpp(adapter: Path, call: Call, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    with pytest.raises(UserError, match=r"--gguf needs llama.cpp.*Set LLAMA_CPP="):
        call(adapter, "--merge", "--gguf")
    converter = tmp_path / "llama" / "convert_hf_to_gguf.py"  # stands in for the real one, which is not installed
    converter.parent.mkdir()
    converter.write_text("import sys, pathlib; pathlib.Path(sys.argv[3]).write_text(' '.join(sys.argv[4:]))")
    monkeypatch.setenv("LLAMA_CPP", str(converter.parent))
    folder = call(adapter, "--merge", "--gguf", "--dtype", "float16")
    assert (folder / "exported.gguf").read_text() == "--outtype f16"
    converter.write_text("raise SystemExit(1)")
    with pytest.raises(UserError, match=r"--gguf: .* failed, see above"):
        call(adapter, "--merge", "--gguf", name="failed")
    assert not (tmp_path / "failed").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["{run}", "--merge"], "is no adapter; leave --merge out"),
        (["{adapter}", "--dtype", "bfloat16"], "which --gguf and --dtype cannot be for; add --merge"),
        (["{base}", "--merge"], "is no adapter"),
        (["{out}"], "is there already; give a folder that is not"),
        (["/nowhere"], "/nowhere"),
        (["{adapter}", "--push", "org/name"], "is a folder of this machine; add --merge"),
    ],
)
def test_misuse(given: list[str], message: str, adapter: Path, run_dir: Path, call: Call, tmp_path: Path) -> None:
    places = {"run": run_dir, "adapter": adapter, "base": adapter.parent / "base", "out": adapter}
    if given == ["{out}"]:
        (tmp_path / "exported").mkdir()
    with pytest.raises(UserError, match=message):
        call(*(part.format(**places) for part in given))


def test_an_upload_that_fails_keeps_the_export(adapter: Path, call: Call, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(script, "HfApi", lambda: HfApi("http://127.0.0.1:9"))  # nobody listens there
    with pytest.raises(UserError, match=r"--push org/name: .*the export is whole in") as error:
        call(adapter, "--merge", "--push", "org/name")
    assert "\n" not in str(error.value) and (tmp_path / "exported" / "model.safetensors").is_file()
