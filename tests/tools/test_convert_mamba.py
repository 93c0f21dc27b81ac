"""Mambas of other projects compute here what they do there, come back as they were, and what is no
such Mamba is refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from batches import batch_of
from exported_models import (
    assert_equal,
    assert_same_files,
    change_json,
    change_state,
    change_tensors,
    described,
    export,
    saved,
    tensors_of,
)
from public_mambas import hugging_face, logits, mamba_ssm_state, write_mamba_ssm
from safetensors.torch import load_file, save_file
from tiny_runs import MAMBA_SHAPE, MAMBAS

from earlyfuse.configs import mamba_decoders
from earlyfuse.parallel.checkpoint.open_checkpoint import load_model
from earlyfuse.tools.convert import convert, main

FIRST = "model-00001-of-00001.safetensors"
TOKENS = torch.randint(0, 48, (2, 33), generator=torch.Generator().manual_seed(1))


def found_logits(folder: Path, **options) -> torch.Tensor:
    model, vocabulary = load_model(folder)
    assert not model.training
    with torch.no_grad():
        return model(batch_of(TOKENS, vocabulary.modality_of(TOKENS), **options))


# ---------------------------------------------------------------- logits


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tied": False},
        {"state_size": 5, "conv_kernel": 3, "time_step_rank": 7, "expand": 3},
        {"hidden_size": 20, "conv_kernel": 2, "vocab_size": 61, "use_conv_bias": False},
        {"intermediate_size": 40},
    ],
    ids=str,
)
def test_an_imported_mamba_has_the_logits_of_transformers(tmp_path, fields):
    theirs = hugging_face(**fields)
    expected = logits(theirs, TOKENS)
    assert expected.std() > 0.5, "a comparison of zeros would prove nothing"
    with torch.no_grad():
        for layer in theirs.backbone.layers:
            layer.mixer.A_log += 0.1
        assert (logits(theirs, TOKENS) - expected).std() > 1e-3, "the scan must be heard"
        for layer in theirs.backbone.layers:
            layer.mixer.A_log -= 0.1
    convert(saved(theirs, tmp_path / "hf"), tmp_path / "ours")
    write_mamba_ssm(
        tmp_path / "ssm",
        theirs,
        pad_vocab_size_multiple=1,
        tie_embeddings=fields.get("tied", True),
        ssm_cfg={
            "d_state": theirs.config.state_size,
            "d_conv": theirs.config.conv_kernel,
            "expand": theirs.config.intermediate_size / theirs.config.hidden_size,
            "dt_rank": theirs.config.time_step_rank,
            "conv_bias": theirs.config.use_conv_bias,
        },
    )
    for folder in ("hf", "ours", "ssm"):
        torch.testing.assert_close(found_logits(tmp_path / folder), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_an_exported_mamba_of_ours(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    shape = replace(MAMBA_SHAPE, states=6, conv_width=3, expand=3)
    export(mamba_decoders.mamba(shape), tmp_path / "ours")
    if tied:
        change_tensors(
            tmp_path / "ours" / FIRST,
            lambda t: t.update({"lm_head.weight": t["tok_embeddings.weight"]}),
        )
    convert(tmp_path / "ours", tmp_path / "hf", "hf", verify=True)
    theirs, report = transformers.MambaForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not report["unexpected_keys"] and not report["missing_keys"]
    assert theirs.config.tie_word_embeddings is tied
    assert ("lm_head.weight" in tensors_of(tmp_path / "hf")) is not tied
    expected = found_logits(tmp_path / "ours")
    torch.testing.assert_close(logits(theirs.eval(), TOKENS), expected, rtol=0, atol=2e-5)
    convert(tmp_path / "ours", tmp_path / "ssm", "mamba_ssm", verify=True)
    held = torch.load(tmp_path / "ssm" / "pytorch_model.bin", weights_only=True)
    assert_equal(held, mamba_ssm_state(theirs))
    places = [held[name].data_ptr() for name in ("lm_head.weight", "backbone.embedding.weight")]
    assert (places[0] == places[1]) is tied, "values that are tied are there once"


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", [{}, {"tied": False}, {"use_conv_bias": False}], ids=str)
def test_hugging_faces_mamba_comes_back_byte_by_byte(tmp_path, fields, dtype):
    saved(hugging_face(**fields).to(dtype), tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "hf", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "dcp", "dcp")
    convert(tmp_path / "dcp", tmp_path / "ours again")
    convert(tmp_path / "ours again", tmp_path / "back", "hf")
    assert_same_files(tmp_path / "back", tmp_path / "hf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_mamba_ssm_comes_back_tensor_by_tensor_with_its_config(tmp_path, tied, dtype):
    theirs = hugging_face(tied).to(dtype)
    fields = {} if tied else {"tie_embeddings": False}
    write_mamba_ssm(tmp_path / "ssm", theirs, **fields)
    convert(tmp_path / "ssm", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", "mamba_ssm")
    back = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert_equal(back, mamba_ssm_state(theirs))
    assert {tensor.dtype for tensor in back.values()} == {dtype}
    assert described(tmp_path / "ssm") == described(tmp_path / "back")
    assert not (tmp_path / "back" / "earlyfuse.json").exists()
    convert(tmp_path / "ssm", tmp_path / "hf", "hf")
    held = load_file(tmp_path / "hf" / "model.safetensors")
    expected = theirs.state_dict()
    if tied:
        del expected["lm_head.weight"]
    assert_equal(held, expected)


def test_a_vocabulary_is_padded_as_mamba_ssm_pads_it(tmp_path):
    theirs = hugging_face(vocab_size=48)
    write_mamba_ssm(tmp_path / "ssm", theirs, vocab_size=45, pad_vocab_size_multiple=16)
    remarks = convert(tmp_path / "ssm", tmp_path / "ours")
    assert "the last 3 of 48 token ids are padding" in remarks
    assert found_logits(tmp_path / "ours").shape[-1] == 48
    convert(tmp_path / "ours", tmp_path / "back", "mamba_ssm")
    assert described(tmp_path / "back")["vocab_size"] == 45
    change_json(tmp_path / "ssm" / "config.json", vocab_size=60)
    with pytest.raises(ValueError, match=r"mis-shaped backbone.embedding.weight: .* of \(64, 32\)"):
        load_model(tmp_path / "ssm")
    odd = mamba_decoders.mamba(replace(MAMBA_SHAPE, vocab_size=51))
    export(odd, tmp_path / "odd")
    convert(tmp_path / "odd", tmp_path / "odd ssm", "mamba_ssm", verify=True)
    written = described(tmp_path / "odd ssm")
    assert written["vocab_size"] % written["pad_vocab_size_multiple"] == 0


def test_biases_that_were_learned_here_are_written_where_there_were_none(tmp_path):
    saved(hugging_face(use_conv_bias=False), tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours")
    name = "layers.1.mamba.conv.bias"
    change_tensors(tmp_path / "ours" / FIRST, lambda t: t[name].add_(0.5))
    convert(tmp_path / "ours", tmp_path / "hf again", "hf", verify=True)
    assert "backbone.layers.1.mixer.conv1d.bias" in tensors_of(tmp_path / "hf again")


def test_files_that_name_the_embedding_as_before_and_leave_out_defaults_are_read(tmp_path):
    theirs = hugging_face()
    saved(theirs, tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    state = mamba_ssm_state(theirs)
    del state["lm_head.weight"]
    save_file(state, path, {"format": "pt"})
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 48, "model_type": "mamba"}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(sizes))
    expected = logits(theirs, TOKENS)
    torch.testing.assert_close(found_logits(tmp_path / "hf"), expected, rtol=0, atol=2e-5)


# ---------------------------------------------------------------- refused

MAMBA_2 = "rate of decay for all channels and states of a head"
CONFIGS = [
    ("hf", {"model_type": "mamba2"}, f"'mamba2'. must be .*{MAMBA_2}"),
    ("hf", {"model_type": "falcon_mamba"}, "FalconMamba norms step sizes, B and C"),
    ("hf", {"model_type": "jamba"}, "'jamba'. must be 'chameleon' or 'mamba'"),
    ("hf", {"use_bias": True}, "use_bias .True. must be False"),
    ("hf", {"hidden_act": "gelu"}, "hidden_act .'gelu'. must be 'silu'"),
    ("hf", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
    ("hf", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("hf", {"conv_kernel": 6}, "conv_width .6. must be 2, 3 or 4"),
    ("hf", {"hidden_size": "32"}, "hidden_size .'32'. must be a whole number"),
    ("hf", {"state_size": 8}, "mis-shaped backbone.layers.0.mixer.A_log"),
    ("hf", {"num_hidden_layers": 3}, "num_hidden_layers .3. is more than the 2 layers in the f"),
    ("hf", {"tie_word_embeddings": False}, "missing    lm_head.weight"),
    ("hf", {"use_conv_bias": False}, "unexpected backbone.layers.0.mixer.conv1d.bias"),
    ("ssm", {"ssm_cfg": {"layer": "Mamba2"}}, f"ssm_cfg: layer .'Mamba2'. .*{MAMBA_2}"),
    ("ssm", {"ssm_cfg": {"layer": "Mamba3"}}, "'Mamba3'. must be 'Mamba1'"),
    ("ssm", {"ssm_cfg": {"headdim": 64}}, "unknown field 'headdim'"),
    ("ssm", {"ssm_cfg": {"bias": True}}, "ssm_cfg.bias"),
    ("ssm", {"rms_norm": False}, "rms_norm .False. must be True: LayerNorm"),
    ("ssm", {"attn_layer_idx": [1]}, "attn_layer_idx"),
    ("ssm", {"d_intermediate": 64}, "d_intermediate .64. must be 0"),
    ("ssm", {"n_layer": None}, "config.json has no field 'n_layer'"),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mambas")
    saved(hugging_face(), root / "hf")
    write_mamba_ssm(root / "ssm", hugging_face())
    return root


@pytest.mark.parametrize(("folder", "fields", "says"), CONFIGS, ids=str)
def test_configs_of_other_models_are_refused_by_name(sources, tmp_path, folder, fields, says):
    shutil.copytree(sources / folder, tmp_path / "source")
    config = described(tmp_path / "source") | fields
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=says):
        convert(tmp_path / "source", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


class Code:
    def __reduce__(self):
        return (print, ("code was run",))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def with_scalar_decay(path: Path) -> None:
    decays = {f"backbone.layers.{n}.mixer.A_log": torch.ones(4) for n in range(2)}
    change_tensors(path, lambda t: t.update(decays))


def without_d(path: Path) -> None:
    change_state(path, lambda t: t.pop("backbone.layers.1.mixer.D"))
    change_state(path, lambda t: t.update(extra=torch.ones(2)))


WEIGHTS = {"hf": "model.safetensors", "ssm": "pytorch_model.bin"}
DAMAGE = [
    ("hf", truncate, "is truncated or no safetensors file"),
    ("hf", Path.unlink, "must hold model.safetensors"),
    ("hf", with_scalar_decay, f"holds a Mamba-2: .*{MAMBA_2}"),
    ("ssm", truncate, "is truncated or was not written by torch.save"),
    ("ssm", Path.unlink, "must hold"),
    ("ssm", lambda path: torch.save({"a": Code()}, path), "run code of its own"),
    ("ssm", without_d, r"missing    .*1.mixer.D \(64,\)\n  unexpected extra"),
]


@pytest.mark.parametrize(("folder", "harm", "says"), DAMAGE)
def test_damaged_files_and_those_of_a_mamba_2_are_refused(sources, tmp_path, folder, harm, says):
    shutil.copytree(sources / folder, tmp_path / "source")
    harm(tmp_path / "source" / WEIGHTS[folder])
    with pytest.raises(ValueError, match=says):
        load_model(tmp_path / "source")


@pytest.mark.parametrize("kind", ["mixture_of_mamba", "hybrid"])
@pytest.mark.parametrize("to", ["hf", "mamba_ssm", "meta"])
def test_mixtures_and_hybrids_are_no_public_mambas(tmp_path, kind, to):
    export(MAMBAS[kind](), tmp_path / "ours")
    reasons = {"mixture_of_mamba": "in_proj_groups is 2", "hybrid": r"layers\[0\] is made of att"}
    says = "cannot express this model: .*"
    with pytest.raises(ValueError, match=says + (reasons[kind] if to != "meta" else "")):
        convert(tmp_path / "ours", tmp_path / "new", to)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_mamba_with_the_norm_behind_is_no_public_one(tmp_path):
    export(mamba_decoders.mamba(replace(MAMBA_SHAPE, norm_order="swin")), tmp_path / "ours")
    with pytest.raises(ValueError, match="norm_order is 'swin'"):
        convert(tmp_path / "ours", tmp_path / "new", "hf")


def test_the_command_verifies_files_of_mamba_ssm(tmp_path, capsys):
    write_mamba_ssm(tmp_path / "ssm", hugging_face())
    assert main([str(tmp_path / "ssm"), str(tmp_path / "good"), "--verify"]) == 0
    assert "KL" in capsys.readouterr().out
