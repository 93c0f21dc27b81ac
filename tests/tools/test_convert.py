"""Converted models compute what the originals do, and come back unchanged."""

import json
from dataclasses import replace
from pathlib import Path

import public_mambas
import pytest
import torch
from batches import batch_of
from exported_models import (
    VOCABULARY,
    assert_equal,
    assert_same_files,
    change_json,
    change_state,
    change_tensors,
    described,
    export,
    saved,
    tensors_of,
    write,
)
from public_chameleons import chameleon, logits, meta_shard, write_meta
from public_mambas import hugging_face, mamba_ssm_state, sizes_of, write_mamba_ssm
from safetensors.torch import load_file, save_file
from tiny_runs import MAMBA_SHAPE, MAMBAS, MODELS, SHAPE, THRESHOLDS

from earlyfuse.configs import decoders, mamba_decoders
from earlyfuse.configs.registry import catalogue
from earlyfuse.configs.transfusion import with_vectors
from earlyfuse.data.json_files import JsonObject
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.state_dicts import decoder_config, huggingface, mamba, meta, vocabulary_map
from earlyfuse.models.state_dicts.tensor_map import StateDict
from earlyfuse.models.vocabulary import Modality, Vocabulary
from earlyfuse.parallel.checkpoint.files.safetensors import write_file
from earlyfuse.parallel.checkpoint.open_checkpoint import load_model
from earlyfuse.tools import convert as tool
from earlyfuse.tools.compare_logits import compare
from earlyfuse.tools.convert import convert, main

FIRST = "model-00001-of-00001.safetensors"
TOKENS = torch.randint(0, 48, (2, 33), generator=torch.Generator().manual_seed(1))
PUBLIC = {  # a model of transformers, and its logits
    "chameleon": (lambda: chameleon(True, 2), logits),
    "mamba": (lambda: hugging_face(False), public_mambas.logits),
}
both = pytest.mark.parametrize("family", PUBLIC)


def found_logits(folder: Path) -> torch.Tensor:
    model, vocabulary = load_model(folder)
    assert not model.training
    with torch.no_grad():
        return model(MixedBatch.of(TOKENS, vocabulary.modality_of(TOKENS)))


def assert_logits(folder: Path, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found_logits(folder), expected, rtol=0, atol=2e-5)


# ---------------------------------------------------------------- logits


@pytest.mark.parametrize(("swin_norm", "kv_heads"), [(False, 4), (True, 2)])
def test_an_imported_chameleon_has_the_logits_of_transformers(tmp_path, swin_norm, kv_heads):
    theirs = chameleon(swin_norm, kv_heads)
    convert(saved(theirs, tmp_path / "hf"), tmp_path / "ours")
    expected = logits(theirs, TOKENS)
    assert expected.std() > 0.5, "a comparison of zeros would prove nothing"
    for folder in ("ours", "hf"):
        assert_logits(tmp_path / folder, expected)
    assert load_model(tmp_path / "hf")[1].medium(Modality.IMAGE).start == 8


@pytest.mark.parametrize(
    "fields",
    [
        {"state_size": 5, "conv_kernel": 3, "time_step_rank": 7, "expand": 3},
        {"hidden_size": 20, "conv_kernel": 2, "vocab_size": 61, "use_conv_bias": False},
        {"intermediate_size": 40, "tied": False},
    ],
    ids=str,
)
def test_an_imported_mamba_has_the_logits_of_transformers(tmp_path, fields):
    theirs = hugging_face(**fields)
    expected = public_mambas.logits(theirs, TOKENS)
    assert expected.std() > 0.5, "a comparison of zeros would prove nothing"
    convert(saved(theirs, tmp_path / "hf"), tmp_path / "ours")
    settings = {"pad_vocab_size_multiple": 1, "tie_embeddings": fields.get("tied", True)}
    write_mamba_ssm(tmp_path / "ssm", theirs, ssm_cfg=sizes_of(theirs), **settings)
    for folder in ("hf", "ours", "ssm"):
        assert_logits(tmp_path / folder, expected)
    with torch.no_grad():
        for layer in theirs.backbone.layers:
            layer.mixer.A_log += 0.1
    assert (public_mambas.logits(theirs, TOKENS) - expected).std() > 1e-3, "the scan matters"


@both
def test_packed_documents_have_the_logits_of_each_alone(tmp_path, family):
    make, logits = PUBLIC[family]
    theirs = make()
    ours, _ = load_model(saved(theirs, tmp_path / "hf"))
    lengths = (12, 2, 19)
    positions_S = torch.cat([torch.arange(length) for length in lengths])
    expected = torch.cat([logits(theirs, part) for part in TOKENS.split(lengths, 1)], 1)
    with torch.no_grad():
        found = ours(batch_of(TOKENS, None, positions_S.expand(len(TOKENS), -1)))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("norm_order", ["pre", "swin"])
def test_transformers_computes_an_exported_chameleon_of_ours(tmp_path, norm_order):
    transformers = pytest.importorskip("transformers")
    shape = replace(SHAPE, kv_heads=1, norm_order=norm_order)
    export(replace(decoders.dense(shape), rope_theta=300.0), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "hf", "hf")
    theirs, report = transformers.ChameleonForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not report["unexpected_keys"]
    assert [key for key in report["missing_keys"] if "vqmodel" not in key] == []
    assert theirs.model.vocabulary_mapping.image_tokens == list(range(32, 48))
    assert_logits(tmp_path / "ours", logits(theirs.eval(), TOKENS))


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_an_exported_mamba_of_ours(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    shape = replace(MAMBA_SHAPE, states=6, conv_width=3, expand=3)
    export(mamba_decoders.mamba(shape), tmp_path / "ours")
    if tied:
        tie = {"lm_head.weight": tensors_of(tmp_path / "ours")["tok_embeddings.weight"]}
        change_tensors(tmp_path / "ours" / FIRST, lambda t: t.update(tie))
    convert(tmp_path / "ours", tmp_path / "hf", "hf", verify=True)
    theirs, report = transformers.MambaForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not report["unexpected_keys"] and not report["missing_keys"]
    assert theirs.config.tie_word_embeddings is tied
    assert ("lm_head.weight" in tensors_of(tmp_path / "hf")) is not tied
    assert_logits(tmp_path / "ours", public_mambas.logits(theirs.eval(), TOKENS))
    convert(tmp_path / "ours", tmp_path / "ssm", "mamba_ssm", verify=True)
    state = torch.load(tmp_path / "ssm" / "pytorch_model.bin", weights_only=True)
    assert_equal(state, mamba_ssm_state(theirs))
    places = [state[name].data_ptr() for name in ("lm_head.weight", "backbone.embedding.weight")]
    assert (places[0] == places[1]) is tied, "tied values are stored once"


# ---------------------------------------------------------------- there and back

ROUND_TRIPS = {
    "chameleon": lambda: chameleon(True, 2),
    "mamba": hugging_face,
    "mamba, untied, bf16": lambda: hugging_face(False).bfloat16(),
    "mamba, no bias": lambda: hugging_face(use_conv_bias=False),
}


@pytest.mark.parametrize("kind", ROUND_TRIPS)
def test_hugging_face_comes_back_byte_by_byte(tmp_path, kind):
    saved(ROUND_TRIPS[kind](), tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "hf", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "dcp", "dcp")
    convert(tmp_path / "dcp", tmp_path / "ours again")
    convert(tmp_path / "ours again", tmp_path / "back", "hf")
    assert_same_files(tmp_path / "back", tmp_path / "hf")
    assert_same_files(tmp_path / "ours again", tmp_path / "ours")
    has_vq = any("vqmodel" in name for name in tensors_of(tmp_path / "back"))
    assert has_vq == (kind == "chameleon")


@pytest.mark.parametrize("tied", [True, False])
def test_mamba_ssm_comes_back_tensor_by_tensor_with_its_config(tmp_path, tied):
    theirs = hugging_face(tied).bfloat16()
    write_mamba_ssm(tmp_path / "ssm", theirs, **({} if tied else {"tie_embeddings": False}))
    convert(tmp_path / "ssm", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", "mamba_ssm")
    back = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert_equal(back, mamba_ssm_state(theirs))
    assert {tensor.dtype for tensor in back.values()} == {torch.bfloat16}
    assert described(tmp_path / "ssm") == described(tmp_path / "back")
    assert not (tmp_path / "back" / "earlyfuse.json").exists()
    convert(tmp_path / "ssm", tmp_path / "hf", "hf")
    expected = theirs.state_dict()
    if tied:
        del expected["lm_head.weight"]
    assert_equal(tensors_of(tmp_path / "hf"), expected)


@pytest.mark.parametrize("to", ["hf", "meta", "hf mamba", "mamba_ssm"])
def test_our_own_model_there_and_back_keeps_all_that_the_other_format_cannot_say(tmp_path, to):
    made = mamba_decoders.mamba(MAMBA_SHAPE) if "mamba" in to else decoders.dense(SHAPE)
    config = replace(made, seed=3, init_std=0.5, rope_theta=7.0 if "mamba" in to else 1e4)
    config.layers[1].dropout = 0.1
    export(config, tmp_path / "ours")
    if to == "meta":  # one row for all heads
        tensors = tensors_of(tmp_path / "ours")
        norms = {name: t[:1] for name, t in tensors.items() if "q_norm" in name or "k_norm" in name}
        even = {name: row.expand_as(tensors[name]).clone() for name, row in norms.items()}
        write(tmp_path / "ours", tensors | even)
    convert(tmp_path / "ours", tmp_path / "theirs", to.partition(" ")[0])
    convert(tmp_path / "theirs", tmp_path / "back")
    assert_equal(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "ours"))
    back = described(tmp_path / "back")
    assert back["model"] == decoder_config.to_dict(config)
    assert Vocabulary.from_dict(back["vocabulary"]) == VOCABULARY


@both
def test_sharded_folders_are_read_and_written_by_their_index(tmp_path, family):
    theirs = PUBLIC[family][0]()
    saved(theirs, tmp_path / "hf", max_shard_size="60KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    convert(tmp_path / "hf", tmp_path / "back", "hf", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files and len(files) > 3
    state = theirs.state_dict()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    assert_equal(tensors_of(tmp_path / "back"), state)
    for file in files:
        tensors = load_file(tmp_path / "back" / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 20_000


# ---------------------------------------------------------------- variants of public files


def test_older_configs_of_chameleon_with_defaults_left_out_and_old_buffers_are_read(tmp_path):
    saved(chameleon(), tmp_path / "hf")
    expected = found_logits(tmp_path / "hf")
    theta = described(tmp_path / "hf")["rope_parameters"]["rope_theta"]
    left_out = ("hidden_act", "rms_norm_eps", "swin_norm", "tie_word_embeddings", "attention_bias")
    gone = dict.fromkeys((*left_out, "rope_parameters", "rope_scaling"))
    change_json(tmp_path / "hf" / "config.json", **gone, rope_theta=theta)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change_tensors(tmp_path / "hf" / "model.safetensors", lambda t: t.update(old))
    assert torch.equal(found_logits(tmp_path / "hf"), expected)


def test_a_tied_head_that_is_in_the_files_is_read_as_transformers_does(tmp_path):
    saved(chameleon(), tmp_path / "hf")
    changes = {"rope_parameters": {"rope_type": "default"}, "tie_word_embeddings": True}
    change_json(tmp_path / "hf" / "config.json", **changes, rope_theta=300.0)
    cls = pytest.importorskip("transformers").ChameleonForConditionalGeneration
    theirs = cls.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert_logits(tmp_path / "hf", logits(theirs, TOKENS))


def test_a_tied_head_is_imported_as_a_copy_and_exported_untied(tmp_path):
    theirs = chameleon()
    theirs.lm_head.weight.data.copy_(theirs.model.embed_tokens.weight.data)
    saved(theirs, tmp_path / "hf")
    change_json(tmp_path / "hf" / "config.json", tie_word_embeddings=True)
    change_tensors(tmp_path / "hf" / "model.safetensors", lambda t: t.pop("lm_head.weight"))
    convert(tmp_path / "hf", tmp_path / "back", "hf")
    assert described(tmp_path / "back")["tie_word_embeddings"] is False
    assert_equal(tensors_of(tmp_path / "back"), theirs.state_dict())


def test_old_files_of_mamba_with_defaults_left_out_are_read(tmp_path):
    theirs = hugging_face()
    saved(theirs, tmp_path / "hf")
    state = mamba_ssm_state(theirs)  # the embedding's older name
    del state["lm_head.weight"]
    save_file(state, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 48, "model_type": "mamba"}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(sizes))
    assert_logits(tmp_path / "hf", public_mambas.logits(theirs, TOKENS))


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
    export(mamba_decoders.mamba(replace(MAMBA_SHAPE, vocab_size=51)), tmp_path / "odd")
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


# ---------------------------------------------------------------- Meta


@pytest.mark.parametrize(("shards", "fewest"), [(1, 1), (2, 1), (2, 2)])
def test_metas_shards_equal_the_same_hugging_face_model_and_come_back(tmp_path, shards, fewest):
    theirs = chameleon(fewest == 2, kv_heads=2, shards=fewest)
    convert(saved(theirs, tmp_path / "hf"), tmp_path / "from hf")
    convert(write_meta(tmp_path / "meta", theirs, shards), tmp_path / "from meta", verify=True)
    assert_equal(tensors_of(tmp_path / "from meta"), tensors_of(tmp_path / "from hf"))
    one, other = (described(tmp_path / folder) for folder in ("from hf", "from meta"))
    assert one["model"] == other["model"]
    assert all(one["vocabulary"][n] == other["vocabulary"][n] for n in ("bos", "eos", "pad"))
    convert(tmp_path / "from meta", tmp_path / "back", "meta")
    convert(tmp_path / "hf", tmp_path / "again", "meta", verify=True)
    for folder, count in (("back", shards), ("again", fewest)):
        files = sorted((tmp_path / folder).glob("consolidated.*.pth"))
        assert len(files) == count, "as many as it came in, else the fewest"
        for shard, path in enumerate(files):
            expected = meta_shard(theirs, shard, count)
            del expected["rope.freqs"]
            assert_equal(torch.load(path, weights_only=True), expected)
    params = json.loads((tmp_path / "back" / "params.json").read_text())["model"]
    assert params["n_kv_heads"] == 2 and params["rope_theta"] == 500.0
    assert params["swin_norm"] == (fewest == 2)


@pytest.mark.parametrize("hidden_dim", [80, 256, 333, 7])
def test_metas_two_numbers_give_the_width_of_the_feed_forward(hidden_dim):
    given = meta.feed_forward_fields(SHAPE.dim, hidden_dim)
    multiple, factor = given["multiple_of"], given.get("ffn_dim_multiplier", 1)
    wanted = int(factor * int(8 * SHAPE.dim / 3))
    assert multiple * ((wanted + multiple - 1) // multiple) == hidden_dim


def test_norms_that_differ_between_shards_are_averaged(tmp_path):
    theirs = chameleon(kv_heads=2, shards=2)
    write_meta(tmp_path / "meta", theirs, 2)
    change_state(tmp_path / "meta" / "consolidated.01.pth", lambda t: t["norm.weight"].add_(0.5))
    convert(tmp_path / "meta", tmp_path / "ours")
    expected = theirs.model.norm.weight.detach() + 0.25
    torch.testing.assert_close(tensors_of(tmp_path / "ours")["norm.weight"], expected)


# ---------------------------------------------------------------- ours


@pytest.mark.parametrize("kind", [*MODELS, *MAMBAS, *THRESHOLDS])
def test_every_kind_of_model_goes_through_every_format_of_ours(tmp_path, kind):
    model = export((MODELS | MAMBAS | THRESHOLDS)[kind](), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "dcp", "dcp")
    convert(tmp_path / "dcp", tmp_path / "back")
    assert_same_files(tmp_path / "back", tmp_path / "ours", "config.json")
    loaded, vocabulary = load_model(tmp_path / "dcp")
    tokens = torch.randint(0, 48, (4, 24), generator=torch.Generator().manual_seed(2))
    batch = MixedBatch.of(tokens, vocabulary.modality_of(tokens))
    settings = ForwardSettings(budgets="exact")
    with torch.no_grad():
        assert torch.equal(loaded(batch, settings), model(batch, settings))


def test_every_config_of_the_catalogue_survives_as_plain_values():
    configs = [make().model_spec.model for make in catalogue().values()]
    configs += [make() for make in (MODELS | MAMBAS | THRESHOLDS).values()]
    for config in configs:
        text = json.dumps(decoder_config.to_dict(config))
        assert decoder_config.from_dict(json.loads(text)) == config


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda m: m.update(depth=3), "unknown fields .'depth'."),
        (lambda m: m.pop("dim"), "lacks .'dim'."),
        (lambda m: m["layers"][0]["feed_forward"].update(kind="Mamba"), "'Mamba'. must be one of"),
        (lambda m: m["layers"][0].update(norm_order="post"), "norm_order .'post'. must be"),
        (lambda m: m.update(dim="64"), "dim .'64'. must be"),
        (lambda m: m.update(layers={}), "layers"),
    ],
)
def test_a_config_that_this_version_does_not_know_is_refused(change, says):
    fields = decoder_config.to_dict(decoders.dense(SHAPE))
    change(fields)
    with pytest.raises(ValueError, match=says):
        decoder_config.from_dict(fields)


def test_a_dtype_is_that_of_every_tensor_and_rounds_once(tmp_path):
    model = export(decoders.dense(SHAPE), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "bf16", dtype=torch.bfloat16)
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    assert_equal(tensors_of(tmp_path / "bf16"), state)
    convert(tmp_path / "bf16", tmp_path / "hf", "hf")
    assert described(tmp_path / "hf")["dtype"] == "bfloat16"
    loaded, _ = load_model(tmp_path / "bf16")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    loaded, _ = load_model(tmp_path / "bf16", dtype=torch.float32)
    with torch.no_grad():
        assert loaded(batch_of(TOKENS)).dtype == torch.float32


def test_files_are_those_that_the_library_writes(tmp_path):
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(4).bfloat16(),
        "ä": torch.arange(7),
        "c": torch.ones((), dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(2, 2).half(),
        "flag": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    write_file(tmp_path / "ours", StateDict(tensors), list(tensors))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


# ---------------------------------------------------------------- vocabulary


def test_an_image_code_has_the_id_that_the_map_gives_it():
    codes = {vocabulary_map.token_of_code(code): 20 - code for code in range(10)}
    ids = vocabulary_map.ids_of_codes({"IMGIMGBAZ": 5, "<s>": 0} | codes)
    assert ids == [20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 5]
    assert vocabulary_map.token_of_code(12) == "IMGIMGBCZ"
    released = vocabulary_map.released()  # where Meta's files come without a tokenizer
    images = released.medium(Modality.IMAGE)
    assert (released.bos, released.pad, released.eos) == (0, 1, 2)
    assert (images.start, images.count, images.block) == (4, 8192, 1024)
    assert (images.begin, images.end) == (8197, 8196)


@pytest.mark.parametrize(
    "change, says",
    [
        ({}, ""),
        ({"IMGIMGBZ": 40}, "not contiguous"),
        ({"<eoss>": None}, "no <eoss>"),
        ({"<eoss>": 33}, "among media codes"),
    ],
)
def test_a_vocabulary_comes_back_from_its_map_or_without_images_with_a_remark(change, says):
    named = vocabulary_map.from_vocabulary(VOCABULARY)
    if change:
        named = dict(list(named.items())[:8]) | change
    tokens, config = (
        JsonObject({name: v for name, v in fields.items() if v is not None}, "config.json", "")
        for fields in (named, {"vocab_size": 48})
    )
    found, remark = vocabulary_map.to_vocabulary(tokens, config, 4)
    if change:
        assert found.modalities == (Modality.TEXT,) and says in remark
    else:
        assert found == VOCABULARY and not remark


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("kind", ["hf", "ssm"])
def test_the_command_says_what_it_did_and_verifies(tmp_path, capsys, kind):
    if kind == "hf":
        saved(chameleon(True, 2), tmp_path / kind)
    else:
        write_mamba_ssm(tmp_path / kind, hugging_face())
    assert main([str(tmp_path / kind), str(tmp_path / "ours"), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "largest difference of logits" in shown and "KL" in shown and "earlyfuse" in shown
    assert main([str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "hf", "--verify"]) == 0


@both
def test_verification_sees_a_wrong_conversion_and_nothing_is_kept(tmp_path, monkeypatch, family):
    saved(PUBLIC[family][0](), tmp_path / "hf")
    w1, w3 = "mlp.up_proj.weight", "mlp.gate_proj.weight"
    swapped = {"feed_forward.w1": w1, "feed_forward.w3": w3}
    monkeypatch.setattr(huggingface, "_BLOCK_NAMES", huggingface._BLOCK_NAMES | swapped)
    swapped = {"scan.dt_bias": "D", "scan.D": "dt_proj.bias"}
    monkeypatch.setattr(mamba, "MIXER_NAMES", mamba.MIXER_NAMES | swapped)
    with pytest.raises(ValueError, match="other logits"):
        convert(tmp_path / "hf", tmp_path / "ours", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_sizes_of_shards_are_read_or_refused():
    for text, size in (("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("700", 700), ("2kb", 2000)):
        assert tool.shard_bytes(text) == size
    for text in ("", "GB", "-1GB", "0", "5 apples"):
        with pytest.raises(ValueError, match="max-shard-size"):
            tool.shard_bytes(text)


# ---------------------------------------------------------------- upcycled


@pytest.mark.parametrize("form", ["1t1i", "mot", "1x", "mamba", "hybrid"])
def test_what_is_upcycled_computes_what_its_parent_does(form, tmp_path):
    """Where each token has one feed-forward, or one expert whose weight is made 1."""
    dense = decoders.dense(SHAPE)
    if form == "mamba":
        dense = mamba_decoders.mamba(MAMBA_SHAPE)
    elif form == "hybrid":
        dense = mamba_decoders.hybrid(decoders.dense(replace(SHAPE, layers=3)), "ams", untied=())
    parent = export(dense, tmp_path / "dense")
    untied = form in ("mamba", "hybrid")
    convert(tmp_path / "dense", tmp_path / "new", upcycle="mixture_of_mamba" if untied else form)
    child, vocabulary = load_model(tmp_path / "new")
    modality = vocabulary.modality_of(TOKENS)
    assert modality.any() and not modality.all()
    with torch.no_grad():
        batch, text = batch_of(TOKENS, modality), batch_of(TOKENS)
        torch.testing.assert_close(child(batch), parent(batch), rtol=0, atol=1e-6)
        if untied:
            assert child.layers["1"].mamba.in_proj.weight.ndim == 3
            assert torch.equal(child(text), parent(text)), "of one modality, bit for bit"


def test_upcycled_experts_are_copies_and_routers_are_those_of_a_new_model(tmp_path):
    parent = export(decoders.dense(SHAPE), tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "moma", upcycle="3t2i", max_shard_bytes=10_000)
    child, _ = load_model(tmp_path / "moma")
    new = decoders.grown(decoders.dense(SHAPE), "3t2i").build()
    new.init_states()
    for number, layer in child.layers.items():
        theirs = parent.layers[number].feed_forward
        for pool, count, fresh in zip(
            layer.feed_forward.pools, (3, 2), new.layers[number].feed_forward.pools, strict=True
        ):
            assert torch.equal(pool.experts.w2, theirs.w2.expand(count, -1, -1))
            assert torch.equal(pool.router.weight, fresh.router.weight)


def test_upcycling_is_refused_where_it_cannot_be(tmp_path):
    export(decoders.dense(SHAPE), tmp_path / "dense")
    export(MAMBAS["mamba"](), tmp_path / "mamba")
    export(MAMBAS["mixture_of_mamba"](), tmp_path / "mixture")
    export(MODELS["moma"](), tmp_path / "moma")
    for source, options, words in (
        ("dense", {"upcycle": "4q"}, r"form \('4q'\) must be mot"),
        ("dense", {"upcycle": "4t4i", "verify": True}, "drop one"),
        ("moma", {"upcycle": "4t4i"}, "has experts already"),
        ("mamba", {"upcycle": "4t4i"}, "4t4i unties feed-forwards, and the parent has none"),
        ("mixture", {"upcycle": "mixture_of_mamba"}, "the parent has none that is shared"),
        ("dense", {"upcycle": "mixture_of_mamba"}, "the parent has none that is shared"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(tmp_path / source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_predictions_of_vectors_are_compared_too(tmp_path, capsys):
    shape = decoders.Shape(dim=32, layers=1, heads=2, hidden_dim=64, vocab_size=48)
    export(with_vectors(decoders.dense(shape), 12, block=4), tmp_path / "ours")

    def learned(tensors):
        tensors["vector_output.net.weight"] += torch.randn(12, 32)

    (weights,) = (tmp_path / "ours").glob("*.safetensors")
    change_tensors(weights, learned)
    convert(tmp_path / "ours", tmp_path / "dcp", "dcp", verify=True)
    assert "relative error of predictions 0.00e+00" in capsys.readouterr().out
    change_tensors(weights, learned)
    with pytest.raises(ValueError, match="has other predictions of vectors"):
        compare(tmp_path / "ours", tmp_path / "dcp", exact=True, weights="trained")
