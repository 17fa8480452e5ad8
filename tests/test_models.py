"""Models that are refused: weights that are not there, noise in training, rows that change each other, odd models."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer, train_here
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dpo.model.checks import batch_differences, check_noise, disable_dropout, pick_computation, positions
from dpo.model.loading import load_policy, load_tokenizer, local_folder
from dpo.model.logps import Computation, add_token_logps
from dpo.utils import UserError
from settings import load_config

Overrides = Callable[..., list[str]]


# --- Weights that are not there ---

NAMES = {
    "embed_tokens": "token_embd", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
}  # fmt: skip


def gguf_tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The weights of a tiny Llama under the names of GGUF; the heads of query and key in its order."""
    found = {}
    for name, tensor in model.state_dict().items():
        if re.search("(q|k)_proj", name):
            heads = 4 if "q_proj" in name else 2
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        found[name.removeprefix("model.")] = tensor.numpy()
    return found


def write_gguf(path: Path, tensors: dict[str, np.ndarray], blocks: int = 2) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(blocks)
    writer.add_context_length(2048)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(320)
    tokenizer = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]
    words = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3 if word == "<|eos|>" else 1 for word in words])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_whole_gguf_is_read(tmp_path: Path) -> None:
    model = make_model()
    folder = local_folder(str(write_gguf(tmp_path / "tiny.gguf", gguf_tensors(model))), tmp_path / "cache")
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(20)[None]
    assert torch.equal(found(ids).logits, model.eval()(ids).logits)
    ours, theirs = AutoTokenizer.from_pretrained(folder), make_tokenizer()
    assert ours("The film was")["input_ids"] == theirs("The film was")["input_ids"]


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_converted_model_that_is_damaged_is_converted_anew(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = str(write_gguf(tmp_path / "tiny.gguf", gguf_tensors(make_model())))
    path = local_folder(name, tmp_path / "cache") / file
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    assert local_folder(name, tmp_path / "cache") == path.parent and path.read_bytes() == content
    assert f"is damaged: {file} has been altered" in capsys.readouterr().out


Edit = Callable[[dict[str, Any]], Any]
GGUF_FAULTS: dict[str, tuple[Edit, str]] = {
    "a norm": (lambda t: t.pop("blk.1.attn_norm.weight"), "lack 1 tensors that the model needs, such as model.lay"),
    "the embeddings": (lambda t: t.pop("token_embd.weight"), "lack 1 tensors .* such as model.embed_tokens.weight"),
    "the last norm": (lambda t: t.pop("output_norm.weight"), "such as model.norm.weight"),
    "a block": (lambda t: [t.pop(name) for name in [*t] if name.startswith("blk.1.")], "lack 9 tensors"),
    "everything": (lambda t: t.clear(), "lack 21 tensors"),
    "a further block": (
        lambda t: t.update({k.replace("1", "2"): v for k, v in t.items() if ".1." in k}), "have 9 .* unknown"
    ),
    "another name": (
        lambda t: t.update({"blk.0.attn_norm.weights": t.pop("blk.0.attn_norm.weight")}), "lack 1 tensors"
    ),
    "frequencies": (lambda t: t.update({"rope_freqs.weight": np.full(4, 2, np.float32)}), "such as rope_freqs.weight"),
    "another shape": (
        lambda t: t.update({"blk.0.ffn_up.weight": np.zeros((8, 8), np.float32)}), "could not be read as a GGUF model"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", GGUF_FAULTS)
def test_a_gguf_that_is_not_whole_is_refused(fault: str, tmp_path: Path) -> None:
    edit, message = GGUF_FAULTS[fault]
    tensors = gguf_tensors(make_model())
    edit(tensors)
    path = write_gguf(tmp_path / "tiny.gguf", tensors)
    for _ in range(2):  # the first leaves nothing behind that the second would take
        with pytest.raises(UserError, match=message):
            local_folder(str(path), tmp_path / "cache")
        assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.name[0] != "."]


def test_damaged_gguf_files_are_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf", gguf_tensors(make_model())).read_bytes()
    rng = random.Random(0)
    cuts = {f"cut at {n}": whole[:n] for n in (0, 3, 20, 200, len(whole) // 2, len(whole) - 5)}
    for _ in range(8):  # of header and metadata
        place = rng.randrange(400)
        cuts[f"byte {place}"] = whole[:place] + bytes([whole[place] ^ rng.randrange(1, 256)]) + whole[place + 1 :]
    for name, content in cuts.items():
        path = tmp_path / "broken.gguf"
        path.write_bytes(content)
        try:
            local_folder(str(path), tmp_path / "cache")
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and not [*(tmp_path / "cache" / "models").glob("broken*")], name
        else:
            assert name.startswith("byte"), name  # of a name or number that is not used
            shutil.rmtree(tmp_path / "cache")


def edit_weights(folder: Path, edit: Edit) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})
    return folder


FAULTS: dict[str, tuple[Edit, str]] = {
    "missing": (lambda t: t.pop("model.layers.0.mlp.up_proj.weight"), "lack 1 tensors"),
    "head missing": (lambda t: t.pop("lm_head.weight"), "lack 1 tensors .* lm_head.weight"),
    "unknown": (lambda t: t.update({"v_head.weight": torch.ones(3)}), "have 1 tensors unknown to it, such as v_head"),
    "another shape": (lambda t: t.update({"model.norm.weight": torch.ones(3)}), "no model could be read|architecture"),
    "unknown layer": (
        lambda t: t.update({k.replace("rs.1.", "rs.2."): v.clone() for k, v in t.items() if "rs.1." in k}), "have 9"
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", ["name_or_path", "archive"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_whole_is_refused(fault: str, way: str, overrides: Overrides, tmp_path: Path) -> None:
    edit, message = FAULTS[fault]
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    folder = edit_weights(tmp_path / "model", edit)
    with pytest.raises(UserError, match=message):
        train_here(overrides(f"model.{way}={folder}"))


POLICY_PT: dict[str, tuple[Edit, str]] = {
    "missing": (*FAULTS["missing"][:1], "it lacks"),
    "unknown": (lambda t: t.update({"v_head.weight": torch.ones(3)}), "unknown"),
    "no tensor": (lambda t: t.update({"model.norm.weight": 3}), "policy.pt"),
    "no name": (lambda t: t.update({3: torch.ones(2)}), "policy.pt"),
    "empty": (lambda t: t.clear(), "policy.pt"),
}


@pytest.mark.parametrize("fault", POLICY_PT)
def test_a_policy_pt_that_is_not_whole_is_refused(fault: str, overrides: Overrides, tmp_path: Path) -> None:
    edit, message = POLICY_PT[fault]
    state: dict[Any, Any] = make_model().state_dict()
    edit(state)
    torch.save({"state": state}, tmp_path / "policy.pt")
    with pytest.raises(UserError, match=message):
        train_here(overrides(f"model.archive={tmp_path / 'policy.pt'}"))


def test_buffers_of_old_versions_are_no_unknown_tensors(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit_weights(tmp_path / "model", lambda t: t.update(old))
    load_policy(config_of(tmp_path / "model"), torch.device("cpu"))


def test_an_adapter_that_names_no_base_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no base_model_name_or_path; write there"):
        load_policy(config_of(tmp_path / "model"), torch.device("cpu"))


# --- Noise, and rows that change each other ---

SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
BASE = {**SIZES, **HEADS}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def config_of(folder: Path, *more: str) -> Any:
    return load_config(["exp_name=x", "model=blank_model", f"model.name_or_path={folder}", "device=cpu", *more])


def strong(model: Any) -> PreTrainedModel:
    """Weights so large that noise and frequencies show in the log-probabilities."""
    for parameter in model.parameters():
        parameter.data.mul_(5 if parameter.ndim > 1 else 1)
    return model


def model_of(kind: str, **arguments: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = strong(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **arguments)))
    disable_dropout(model)
    return add_token_logps(model)


OPT = {"vocab_size": 320, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
SWITCHED_OFF = {
    "mixtral": ("mixtral", {**BASE, **EXPERTS, "router_jitter_noise": 0.3, "attention_dropout": 0.2}),
    "opt": ("opt", {**OPT, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "layerdrop": 0.5, "dropout": 0.3}),
    "bloom": ("bloom", {"vocab_size": 320, "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.4}),
    "biogpt": ("biogpt", {**BASE, "layerdrop": 0.5, "activation_dropout": 0.3}),
    "gpt2": ("gpt2", {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.3}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SWITCHED_OFF)
def test_noise_is_switched_off(kind: str) -> None:
    name, arguments = SWITCHED_OFF[kind]
    model = model_of(name, **arguments)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **arguments)).eval()
    plain.load_state_dict(model.state_dict())
    check_noise(model, Computation(torch.float32))
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        assert torch.equal(model.train()(ids).logits, plain(ids).logits)  # the model's own function, without the noise


FALCON = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
REFUSED = {
    "falcon": ("falcon", {**FALCON, "hidden_dropout": 0.3}, "hidden_dropout=0.3 to 0"),
    "phimoe": ("phimoe", {**BASE, **EXPERTS, "router_jitter_noise": 0.3}, "noise=0.3 .* in evaluation, too"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_noise_that_stays_is_refused(kind: str) -> None:
    name, arguments, message = REFUSED[kind]
    with pytest.raises(UserError, match=message):
        check_noise(model_of(name, **arguments), Computation(torch.float32))


@pytest.mark.parametrize("code", ["torch.randn_like", "numpy", "training"])
def test_noise_of_any_other_origin_is_refused(code: str) -> None:
    model = model_of("llama", **BASE)
    norm = model.model.norm
    own = norm.forward

    def forward(states: torch.Tensor) -> torch.Tensor:
        if not norm.training:
            return own(states)
        noise = {"torch.randn_like": torch.rand_like(states), "numpy": np.random.rand(), "training": 1.5}[code]
        return own(states) * noise

    norm.forward = forward
    model.eval()
    state = torch.get_rng_state()
    with pytest.raises(UserError, match="other log-prob" if code == "training" else "computes with noise"):
        check_noise(model, Computation(torch.float32))
    assert torch.equal(torch.get_rng_state(), state) and not model.training


@pytest.mark.parametrize("loss", [["loss=sft"], ["loss=dpo", "loss.beta=0.1"]])
def test_a_run_with_noise_is_refused(loss: list[str], overrides: Overrides, tmp_path: Path) -> None:
    strong(AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **REFUSED["falcon"][1]))).save_pretrained(
        tmp_path / "falcon"
    )
    make_tokenizer().save_pretrained(tmp_path / "falcon")
    with pytest.raises(UserError, match=r"hidden_dropout=0\.3"):
        train_here(overrides(f"model.name_or_path={tmp_path / 'falcon'}", *loss))


LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
LONGROPE |= {"original_max_position_embeddings": 24}


def longrope(**more: Any) -> PreTrainedModel:
    return model_of(
        "phi3",
        **BASE,
        max_position_embeddings=96,
        original_max_position_embeddings=24,
        rope_parameters={**LONGROPE, **more},
    )


def test_rows_of_longrope_are_computed_alike_or_refused(overrides: Overrides, tmp_path: Path) -> None:
    model = longrope()
    how = Computation(torch.float32)
    assert batch_differences(model, how, 24)[0] < 1e-5 < 1e-2 < batch_differences(model, how, 25)[0]
    assert positions(model.config)[0] == 24
    assert positions(longrope(long_factor=[1.0] * 4).config)[0] == 96
    model.save_pretrained(tmp_path / "phi3")
    make_tokenizer().save_pretrained(tmp_path / "phi3")
    given = [f"model.name_or_path={tmp_path / 'phi3'}", "loss=dpo", "loss.beta=0.1", "max_prompt_length=12"]
    with pytest.raises(UserError, match=r"max_length=64 is more than the 24 positions up to which .*LongRoPE"):
        train_here(overrides(*given))
    train_here(overrides(*given, "max_length=24", "n_examples=4"))


def test_rows_that_change_each_other_are_refused() -> None:
    """As code of a model's own might: it chooses by the longest row."""
    model = model_of("llama", **BASE)
    rotary = model.model.rotary_emb
    own = rotary.forward
    rotary.forward = lambda x, position_ids: own(x, position_ids * (3 if int(position_ids.max()) >= 30 else 1))
    lengths = ["exp_name=x", "max_prompt_length=12", "layout=padded"]
    assert pick_computation(model, load_config([*lengths, "max_length=30"])).layout == "padded"
    with pytest.raises(UserError, match="if a row of max_length=31 tokens is computed with them"):
        pick_computation(model, load_config([*lengths, "max_length=31"]))


# --- Tokenizers ---


def other_tokenizer() -> Any:
    """Gives some texts other ids than make_tokenizer's, and ends responses with another token."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "The"})
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


def test_the_archives_tokenizer_is_used(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    archive, plain, explicit = tmp_path / "sft", tmp_path / "plain", tmp_path / "explicit"
    for folder in (archive, plain):
        make_model().save_pretrained(folder)
    other_tokenizer().save_pretrained(archive)
    make_tokenizer().save_pretrained(explicit)
    own, theirs = make_tokenizer().eos_token_id, other_tokenizer().eos_token_id
    said = "differs in its special tokens, chat template"
    cases = [
        ([f"model.archive={archive}"], theirs, f"that of {archive}; that of {tiny_model_dir} {said}"),
        ([f"model.archive={archive}", f"model.tokenizer_name_or_path={explicit}"], own, f"that of {archive} {said}"),
        ([f"model.archive={plain}"], own, ""),
        ([f"model.archive={plain}", f"model.tokenizer_name_or_path={archive}"], theirs, said),
        ([f"model.tokenizer_name_or_path={archive}"], theirs, ""),
        ([f"model.archive={tiny_model_dir}"], own, ""),
    ]
    for given, eos, message in cases:
        found = load_tokenizer(config_of(tiny_model_dir, *given))
        assert found.eos_token_id == eos, given
        output = capsys.readouterr().out
        assert message in output and bool(message) == bool(output), given


def test_a_run_from_an_archive_trains_on_its_tokens(overrides: Overrides, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "sft")
    other_tokenizer().save_pretrained(tmp_path / "sft")
    train_here(overrides(f"model.archive={tmp_path / 'sft'}", "n_examples=4", "n_eval_examples=0"))
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "LATEST")
    assert saved.eos_token == "The" and saved.chat_template == other_tokenizer().chat_template


# --- Odd models ---

BERT = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.mark.parametrize(("kind", "arguments", "message"), [
    ("bert", {**BERT, "is_decoder": False}, "is not causal; .*is_decoder to true"),
    ("prophetnet", {"vocab_size": 320, "hidden_size": 32, "num_decoder_layers": 2, "num_decoder_attention_heads": 4,
                    "decoder_ffn_dim": 64}, "is not supported: its forward pass failed"),
    ("cpmant", {"vocab_size": 320, "hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 64,
                "num_hidden_layers": 2}, "is not supported"),
])  # fmt: skip
def test_models_that_cannot_be_trained_are_refused_in_one_line(
    kind: str, arguments: dict[str, Any], message: str, overrides: Overrides, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    strong(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **arguments))).save_pretrained(tmp_path / kind)
    make_tokenizer().save_pretrained(tmp_path / kind)
    with pytest.raises(UserError, match=message) as refused:
        train_here(
            overrides(f"model.name_or_path={tmp_path / kind}", "model.tokenizer_name_or_path=" + str(tmp_path / kind))
        )
    assert "\n" not in str(refused.value)


def test_a_decoder_of_an_encoders_kind_is_trained() -> None:
    model = model_of("bert", **BERT, is_decoder=True)
    assert (
        pick_computation(model, load_config(["exp_name=x", "max_length=24", "max_prompt_length=12"])).layout == "tree"
    )


CONFIGS = {
    "no object": "[]", "heads": {"num_attention_heads": 0}, "text": {"hidden_size": "wide"},
    "negative": {"vocab_size": -1}, "layers": {"num_hidden_layers": None}, "unknown": {"model_type": "\x1b[2J"},
    "rope": {"rope_parameters": {"rope_type": 3}}, "act": {"hidden_act": "none"}, "list": {"num_hidden_layers": [2]},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("way", ["name_or_path", "archive"])
def test_broken_configurations_are_refused_in_one_line(
    name: str, way: str, overrides: Overrides, tmp_path: Path
) -> None:
    make_model().save_pretrained(folder := tmp_path / "model")
    make_tokenizer().save_pretrained(folder)
    change, config = CONFIGS[name], json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(change if isinstance(change, str) else json.dumps(config | change))
    with pytest.raises(UserError) as refused:
        train_here(overrides(f"model.{way}={folder}"))
    assert str(folder) in str(refused.value) and "\x1b" not in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("loss", [["loss=sft"], ["loss=dpo", "loss.beta=0.1"]])
def test_weights_that_are_not_finite_are_refused(
    value: float, loss: list[str], overrides: Overrides, tmp_path: Path
) -> None:
    model = make_model()
    model.model.norm.weight.data[3] = value
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"weights that are not finite: model\.norm\.weight"):
        train_here(overrides(f"model.name_or_path={tmp_path / 'model'}", *loss))
