"""Converted models compute what the originals do, and come back as they were."""

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
from safetensors.torch import load_file, save_file
from tiny_runs import MAMBA_SHAPE, MAMBAS, MODELS, SHAPE

from earlyfuse.configs import decoders, mamba_decoders
from earlyfuse.configs.registry import catalogue
from earlyfuse.data.json_files import JsonObject
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.state_dicts import (
    decoder_config,
    huggingface,
    mamba,
    meta,
    vocabulary_map,
)
from earlyfuse.models.state_dicts.tensor_map import Mapped, StateDict, TensorMap
from earlyfuse.models.vocabulary import Modality, Vocabulary
from earlyfuse.parallel.checkpoint.files.safetensors import write_file
from earlyfuse.parallel.checkpoint.open_checkpoint import load_model
from earlyfuse.tools import convert as tool
from earlyfuse.tools.convert import convert, main

TOKENS = torch.randint(0, 96, (2, 33), generator=torch.Generator().manual_seed(1))
PUBLIC = {  # a model of transformers, and its logits
    "chameleon": (lambda: chameleon(True, 2), logits),
    "mamba": (lambda: public_mambas.hugging_face(False, vocab_size=96), public_mambas.logits),
}
both = pytest.mark.parametrize("family", PUBLIC)


# ---------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("swin_norm", [False, True])
def test_an_imported_model_has_the_logits_of_transformers(tmp_path, swin_norm, kv_heads):
    theirs = chameleon(swin_norm, kv_heads)
    convert(saved(theirs, tmp_path / "hf"), tmp_path / "ours")
    expected = logits(theirs, TOKENS)
    assert expected.std() > 0.5, "a comparison of zeros would prove nothing"
    for folder in ("ours", "hf"):
        ours, vocabulary = load_model(tmp_path / folder)
        assert not ours.training and vocabulary.medium(Modality.IMAGE).start == 8
        modality_BS = vocabulary.modality_of(TOKENS)
        with torch.no_grad():
            found = ours(MixedBatch.of(TOKENS, modality_BS))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@both
def test_packed_documents_have_the_logits_of_each_alone(tmp_path, family):
    make, logits = PUBLIC[family]
    theirs = make()
    ours, _ = load_model(saved(theirs, tmp_path / "hf"))
    lengths = (12, 2, 19)
    positions_S = torch.cat([torch.arange(length) for length in lengths])
    row_BS = TOKENS[:, : sum(lengths)]
    expected = torch.cat([logits(theirs, part) for part in row_BS.split(lengths, 1)], 1)
    with torch.no_grad():
        found = ours(batch_of(row_BS, None, positions_S.expand(len(row_BS), -1)))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("norm_order", ["pre", "swin"])
def test_transformers_computes_an_exported_model_of_ours(tmp_path, norm_order):
    transformers = pytest.importorskip("transformers")
    shape = replace(SHAPE, kv_heads=1, norm_order=norm_order)
    config = replace(decoders.dense(shape), rope_theta=300.0)
    ours = export(config, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "hf", "hf")
    theirs, report = transformers.ChameleonForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not report["unexpected_keys"]
    assert [key for key in report["missing_keys"] if "vqmodel" not in key] == []
    assert theirs.model.vocabulary_mapping.image_tokens == list(range(32, 48))
    tokens = TOKENS % 48
    with torch.no_grad():
        expected = ours(batch_of(tokens))
    torch.testing.assert_close(logits(theirs.eval(), tokens), expected, rtol=0, atol=2e-5)


def test_there_and_back_every_byte_is_as_it_was(tmp_path):
    saved(chameleon(True, 2), tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "hf", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "dcp", "dcp")
    convert(tmp_path / "dcp", tmp_path / "ours again")
    convert(tmp_path / "ours again", tmp_path / "hf again", "hf")
    assert_same_files(tmp_path / "hf again", tmp_path / "hf")
    assert_same_files(tmp_path / "ours again", tmp_path / "ours")
    assert any("vqmodel" in name for name in load_file(tmp_path / "hf again" / "model.safetensors"))


@pytest.mark.parametrize("to", ["hf", "meta", "hf mamba", "mamba_ssm"])
def test_our_own_model_there_and_back_keeps_all_that_the_other_format_cannot_say(tmp_path, to):
    made = mamba_decoders.mamba(MAMBA_SHAPE) if "mamba" in to else decoders.dense(SHAPE)
    config = replace(made, seed=3, init_std=0.5, rope_theta=7.0 if "mamba" in to else 1e4)
    config.layers[1].dropout = 0.1
    export(config, tmp_path / "ours")
    if to == "meta":  # one row for all heads
        even_norms(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to.partition(" ")[0])
    convert(tmp_path / "theirs", tmp_path / "back")
    assert_equal(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "ours"))
    back = described(tmp_path / "back")
    assert back["model"] == decoder_config.to_dict(config)
    assert Vocabulary.from_dict(back["vocabulary"]) == VOCABULARY


def even_norms(folder: Path) -> None:
    tensors = tensors_of(folder)
    for name, tensor in tensors.items():
        if "q_norm" in name or "k_norm" in name:
            tensors[name] = tensor[:1].expand_as(tensor).clone()
    write(folder, tensors)


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
        held = load_file(tmp_path / "back" / file)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 20_000


def test_configs_of_older_transformers_and_with_defaults_left_out_are_read(tmp_path):
    saved(chameleon(), tmp_path / "hf")
    expected, _ = load_model(tmp_path / "hf")
    theta = described(tmp_path / "hf")["rope_parameters"]["rope_theta"]
    left_out = ("hidden_act", "rms_norm_eps", "swin_norm", "tie_word_embeddings", "attention_bias")
    gone = dict.fromkeys((*left_out, "rope_parameters", "rope_scaling"))
    change_json(tmp_path / "hf" / "config.json", **gone, rope_theta=theta)
    found, _ = load_model(tmp_path / "hf")
    with torch.no_grad():
        assert torch.equal(found(batch_of(TOKENS)), expected(batch_of(TOKENS)))


def test_a_tied_head_that_is_in_the_files_and_old_buffers_are_read_as_transformers_does(tmp_path):
    saved(chameleon(), tmp_path / "hf")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change_tensors(tmp_path / "hf" / "model.safetensors", lambda t: t.update(old))
    changes = {"rope_parameters": {"rope_type": "default"}, "tie_word_embeddings": True}
    change_json(tmp_path / "hf" / "config.json", **changes, rope_theta=300.0)
    cls = pytest.importorskip("transformers").ChameleonForConditionalGeneration
    theirs = cls.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    model, vocabulary = load_model(tmp_path / "hf")
    with torch.no_grad():
        found = model(MixedBatch.of(TOKENS, vocabulary.modality_of(TOKENS)))
    torch.testing.assert_close(found, logits(theirs, TOKENS), rtol=0, atol=2e-5)


def test_a_tied_head_is_imported_as_a_copy_and_exported_untied(tmp_path):
    theirs = chameleon()
    theirs.lm_head.weight.data.copy_(theirs.model.embed_tokens.weight.data)
    saved(theirs, tmp_path / "hf")
    change_json(tmp_path / "hf" / "config.json", tie_word_embeddings=True)
    change_tensors(tmp_path / "hf" / "model.safetensors", lambda t: t.pop("lm_head.weight"))
    convert(tmp_path / "hf", tmp_path / "back", "hf")
    assert described(tmp_path / "back")["tie_word_embeddings"] is False
    assert_equal(tensors_of(tmp_path / "back"), theirs.state_dict())


# ---------------------------------------------------------------- Meta


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("swin_norm", [False, True])
def test_an_import_of_metas_shards_is_that_of_the_same_hugging_face_model(
    tmp_path, shards, swin_norm
):
    theirs = chameleon(swin_norm, kv_heads=2, shards=shards)
    convert(saved(theirs, tmp_path / "hf"), tmp_path / "from hf")
    convert(write_meta(tmp_path / "meta", theirs, shards), tmp_path / "from meta", verify=True)
    assert_equal(tensors_of(tmp_path / "from meta"), tensors_of(tmp_path / "from hf"))
    configs = [described(tmp_path / folder) for folder in ("from hf", "from meta")]
    assert configs[0]["model"] == configs[1]["model"]
    for name in ("bos", "eos", "pad"):
        assert configs[0]["vocabulary"][name] == configs[1]["vocabulary"][name]


def test_metas_shards_there_and_back_are_the_same_and_so_is_an_export_from_hugging_face(tmp_path):
    theirs = chameleon(True, kv_heads=2, shards=2)
    write_meta(tmp_path / "meta", theirs, 2)
    convert(tmp_path / "meta", tmp_path / "ours")
    convert(saved(theirs, tmp_path / "hf"), tmp_path / "from hf", "meta", verify=True)
    convert(tmp_path / "ours", tmp_path / "back", "meta")
    for shard in range(2):
        expected = meta_shard(theirs, shard, 2)
        del expected["rope.freqs"]
        for folder in ("back", "from hf"):
            path = tmp_path / folder / f"consolidated.{shard:02d}.pth"
            assert_equal(torch.load(path, weights_only=True), expected)
    params = json.loads((tmp_path / "back" / "params.json").read_text())["model"]
    assert params["n_kv_heads"] == 2 and params["swin_norm"] and params["rope_theta"] == 500.0


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_goes_back_into_as_many_shards_as_it_came_in_else_into_the_fewest(tmp_path, shards):
    theirs = chameleon(kv_heads=2, shards=1)
    write_meta(tmp_path / "meta", theirs, shards)
    convert(tmp_path / "meta", tmp_path / "back", "meta")
    assert len(list((tmp_path / "back").glob("consolidated.*.pth"))) == shards
    convert(saved(theirs, tmp_path / "hf"), tmp_path / "fewest", "meta")
    assert len(list((tmp_path / "fewest").glob("consolidated.*.pth"))) == 1


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


def test_ids_of_the_released_models_hold_where_metas_files_come_without_a_tokenizer():
    released = vocabulary_map.released()
    images = released.medium(Modality.IMAGE)
    assert (released.bos, released.pad, released.eos) == (0, 1, 2)
    assert (images.start, images.count, images.block) == (4, 8192, 1024)
    assert (images.begin, images.end) == (8197, 8196)


# ---------------------------------------------------------------- ours


@pytest.mark.parametrize("kind", [*MODELS, *MAMBAS])
def test_every_kind_of_model_goes_through_every_format_of_ours(tmp_path, kind):
    model = export((MODELS | MAMBAS)[kind](), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "dcp", "dcp", verify=True)
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
    configs += [make() for make in (MODELS | MAMBAS).values()]
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
        assert loaded(batch_of(TOKENS % 48)).dtype == torch.float32


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


def test_another_mapping_takes_its_place_in_the_chain(tmp_path):
    """What upcycling needs: copies of a parent's tensors, and tensors that it does not have."""
    parent = StateDict({"w": torch.randn(2, 3).bfloat16()})
    recipes = {
        "experts": TensorMap((4, 2, 3), (("w", (2, 3)),), lambda w: w.expand(4, 2, 3)),
        "router": TensorMap((4, 3), (), lambda: torch.zeros(4, 3)),
    }
    child = Mapped(recipes, parent)
    write_file(tmp_path / "child", child, list(child.entries))
    found = load_file(tmp_path / "child")
    assert found["router"].dtype == torch.bfloat16
    assert torch.equal(found["experts"], parent.tensors["w"].expand(4, 2, 3))


# ---------------------------------------------------------------- vocabulary


def test_an_image_code_has_the_id_that_the_map_gives_it():
    ids = vocabulary_map.ids_of_codes(
        {"IMGIMGBAZ": 5, "<s>": 0}
        | {vocabulary_map.token_of_code(code): 20 - code for code in range(10)}
    )
    assert ids == [20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 5]
    assert vocabulary_map.token_of_code(12) == "IMGIMGBCZ"


def vocabulary_of(named):
    tokens, config = (
        JsonObject(fields, "config.json", "fix it") for fields in (named, {"vocab_size": 48})
    )
    return vocabulary_map.to_vocabulary(tokens, config, 4)


def test_a_vocabulary_of_ours_comes_back_from_its_map():
    named = vocabulary_map.from_vocabulary(VOCABULARY)
    found, remark = vocabulary_of(named)
    assert found == VOCABULARY and not remark


@pytest.mark.parametrize(
    "change, says",
    [
        ({"IMGIMGBZ": 40}, "no range"),
        ({"<eoss>": None}, "no <eoss>"),
        ({"<eoss>": 33}, "among media codes"),
    ],
)
def test_images_that_a_vocabulary_cannot_say_are_left_out_with_a_word(change, says):
    named = dict(list(vocabulary_map.from_vocabulary(VOCABULARY).items())[:8])
    named = {name: number for name, number in (named | change).items() if number is not None}
    found, remark = vocabulary_of(named)
    assert found.modalities == (Modality.TEXT,) and says in remark


# ---------------------------------------------------------------- the command


def test_the_command_says_what_it_did_and_verifies(tmp_path, capsys):
    saved(chameleon(True, 2), tmp_path / "hf")
    assert main([str(tmp_path / "hf"), str(tmp_path / "ours"), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "largest difference of logits" in shown and "KL" in shown and "earlyfuse" in shown
    assert main([str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "hf", "--verify"]) == 0
    assert main([str(tmp_path / "hf"), str(tmp_path / "ours")]) == 2
    assert "is there already" in capsys.readouterr().err


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


def test_what_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    export(decoders.dense(SHAPE), tmp_path / "ours")
    written = []

    def full(*arguments):
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        written.append(arguments)

    monkeypatch.setattr("earlyfuse.parallel.checkpoint.files.safetensors.write_values", full)
    assert main([str(tmp_path / "ours"), str(tmp_path / "new")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


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
    tokens = TOKENS % 48
    modality = vocabulary.modality_of(tokens)
    assert modality.any() and not modality.all()
    with torch.no_grad():
        batch = batch_of(tokens, modality)
        expected = parent(batch)
        torch.testing.assert_close(child(batch), expected, rtol=0, atol=1e-6)
        if untied:
            assert child.layers["1"].mamba.in_proj.weight.ndim == 3
            text = batch_of(tokens)
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
        ("dense", {"upcycle": ""}, r"form \(''\) must be mot"),
        ("dense", {"upcycle": "4t4i", "verify": True}, "drop one"),
        ("moma", {"upcycle": "4t4i"}, "has experts already"),
        ("mamba", {"upcycle": "4t4i"}, "4t4i unties feed-forwards, and the parent has none"),
        ("mixture", {"upcycle": "mixture_of_mamba"}, "the parent has none that is shared"),
        ("dense", {"upcycle": "mixture_of_mamba"}, "the parent has none that is shared"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(tmp_path / source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
