"""Hugging Face's Chameleon: ``config.json`` and names, both ways.

Tensors only change their names: shapes, per-head rows of the qk-norms and pairing of rotary
dimensions are the same. Reads configs of transformers 5 (``rope_parameters``) and before
(``rope_theta``, ``rope_scaling``), with or without defaults; writes those of version 5.
"""

from collections.abc import Mapping
from typing import Any

from earlyfuse.data.json_files import JsonObject, shown
from earlyfuse.models.blocks.attention import Attention
from earlyfuse.models.blocks.feed_forward import FeedForward
from earlyfuse.models.blocks.linear import NORM_EPS
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.state_dicts import huggingface_mamba
from earlyfuse.models.state_dicts.config_json import CONFIG, own_description
from earlyfuse.models.state_dicts.plain_decoder import (
    chameleon_block,
    chameleon_parts,
    function_differences,
    plain_decoder,
    tensor_shapes,
)
from earlyfuse.models.state_dicts.public_config import (
    OURS,
    Exported,
    Imported,
    positive,
    read_ours,
    refuse_others,
    sizes,
    with_dtype,
    without_nulls,
)
from earlyfuse.models.state_dicts.tensor_map import Entry, Mapped, Tensors, common_dtype, renamed
from earlyfuse.models.state_dicts.vocabulary_map import from_vocabulary, to_vocabulary
from earlyfuse.models.vocabulary import Modality, Vocabulary

MODEL_TYPE, ARCHITECTURE = "chameleon", "ChameleonForConditionalGeneration"
_VQ_PREFIX = "model.vqmodel."  # of the image tokenizer
_ROPE = "rotary_emb.inv_freq"  # suffix of buffers in old files; they follow from the config

# transformers leaves out fields that have their default
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 65536,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "swin_norm": False,
    "vocabulary_map": {},
}
_VQ_DEFAULTS: dict[str, Any] = {"resolution": 512, "channel_multiplier": [1, 1, 2, 2, 4]}

_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.q_norm.bias": "self_attn.q_norm.bias",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "attention.k_norm.bias": "self_attn.k_norm.bias",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1": "mlp.gate_proj.weight",
    "feed_forward.w3": "mlp.up_proj.weight",
    "feed_forward.w2": "mlp.down_proj.weight",
}


def name_of(ours: str) -> str:
    """Returns Hugging Face's name of a parameter of ours."""
    if not ours.startswith("layers."):
        return _NAMES[ours]
    _, number, name = ours.split(".", 2)
    return f"model.layers.{number}.{_BLOCK_NAMES[name]}"


def import_model(raw: JsonObject, entries: Mapping[str, Entry]) -> Imported:
    """Imports the model that ``raw`` (``config.json``) describes, with the tensors ``entries``.

    ``ValueError`` names what is not supported.
    """
    config, vocabulary, remark = _read_config(raw)
    maps = {name: renamed(name_of(name), shape) for name, shape in tensor_shapes(config).items()}
    # a tied head that is in the files is read, as transformers does
    if raw.values.get("tie_word_embeddings") and name_of("lm_head.weight") not in entries:
        maps["lm_head.weight"] = maps["tok_embeddings.weight"]
    return Imported(
        config,
        vocabulary,
        maps,
        image_tokenizer={
            name: renamed(name, entry.shape)
            for name, entry in entries.items()
            if name.startswith(_VQ_PREFIX)
        },
        unused=tuple(name for name in entries if name.endswith(_ROPE)),
        carried={} if OURS in raw else raw.values,
        remark=remark,
    )


def _read_config(raw: JsonObject) -> tuple[Decoder.Config, Vocabulary, str]:
    """Returns the decoder, its vocabulary, and a remark on the vocabulary, or ""."""
    given = without_nulls(raw, _DEFAULTS)
    if raw.values.get("num_key_value_heads", 0) is None:
        given.values["num_key_value_heads"] = given.values["num_attention_heads"]
    name = "rope_parameters" if given.values.get("rope_parameters") else "rope_scaling"
    rope = given.object(name, default={})
    _refuse_unknown(given, rope.values)
    dim, hidden_dim = sizes(given, "hidden_size", "intermediate_size")
    heads, kv_heads = sizes(given, "num_attention_heads", "num_key_value_heads")
    layers, vocab_size = sizes(given, "num_hidden_layers", "vocab_size")
    block = chameleon_block(
        dim=dim,
        heads=heads,
        kv_heads=kv_heads,
        hidden_dim=hidden_dim,
        norm_order="swin" if given.field("swin_norm", bool) else "pre",
    )
    config = plain_decoder(
        block,
        layers=layers,
        vocab_size=vocab_size,
        rope_theta=positive(rope if "rope_theta" in rope else given, "rope_theta"),
        init_std=given.field("initializer_range", float, least=0),
    )
    if OURS in raw:
        return *read_ours(raw, config), ""
    tokens = given.object("vocabulary_map")
    return config, *to_vocabulary(tokens, given, _codes_per_image(given))


def _refuse_unknown(given: JsonObject, rope: Mapping[str, Any]) -> None:
    """``ValueError`` if the config is of another architecture, or has unsupported settings."""
    values = given.values
    found = values.get("model_type")
    if found != MODEL_TYPE:
        reason = huggingface_mamba.RELATIVES.get(
            str(found), "they lack Chameleon's norms on queries and keys, or its attention"
        )
        raise ValueError(
            f"{given.where}: model_type ({shown(found)}) must be {MODEL_TYPE!r} or "
            f"{huggingface_mamba.MODEL_TYPE!r}; other architectures are not converted: {reason}"
        )
    wanted = {
        "hidden_act": (values.get("hidden_act"), "silu"),
        "attention_bias": (values.get("attention_bias", False), False),
        "mlp_bias": (values.get("mlp_bias", False), False),
        "rms_norm_eps": (values.get("rms_norm_eps"), NORM_EPS),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
        "quantization_config": (values.get("quantization_config"), None),
    }
    refuse_others(given, wanted, "the decoder supports nothing else")


def export_model(
    config: Decoder.Config, vocabulary: Vocabulary, tensors: Tensors, carried: JsonObject | None
) -> Exported:
    """Exports a model of ours as Hugging Face's tensors and config.

    ``carried``: the config that the model came with; written back unchanged if it still describes
    the model. ``ValueError`` says why the format cannot express the model.
    """
    attention, feed_forward = chameleon_parts(config, "Hugging Face's Chameleon")
    shapes = tensor_shapes(config)
    maps = {name_of(name): renamed(name, shape) for name, shape in shapes.items()}
    theirs = Mapped(maps, tensors)
    dtype = common_dtype(theirs)
    if carried is not None and not function_differences(config, _read_config(carried)[0]):
        fields = with_dtype(carried.values, dtype)
        if fields.get("tie_word_embeddings"):
            fields["tie_word_embeddings"] = False
    else:
        fields = _config_fields(config, attention, feed_forward, vocabulary)
        fields["dtype"] = dtype or "float32"
    return Exported(theirs, {CONFIG: fields})


def _config_fields(
    config: Decoder.Config,
    attention: Attention.Config,
    feed_forward: FeedForward.Config,
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": feed_forward.hidden_dim,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": _DEFAULTS["max_position_embeddings"],
        "initializer_range": config.init_std,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "model_parallel_size": 1,
        "swin_norm": config.layers[0].norm_order == "swin",
        "tie_word_embeddings": False,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "vocabulary_map": from_vocabulary(vocabulary),
        "vq_config": _vq_config(vocabulary),
        OURS: own_description(config, vocabulary),
    }


def _codes_per_image(given: JsonObject) -> int:
    vq = without_nulls(given.object("vq_config", default={}), _VQ_DEFAULTS)
    resolution = vq.field("resolution", int, least=1, most=1 << 20)
    side = resolution >> max(0, len(vq.field("channel_multiplier", list)) - 1)
    if side == 0:
        raise vq.wrong("resolution", "must not be halved to nothing by channel_multiplier")
    return int(side) ** 2


def _vq_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """Describes a small image encoder: transformers makes one of random weights, as none is
    exported.
    """
    images = Modality.IMAGE in vocabulary.modalities
    return {
        "num_embeddings": vocabulary.medium(Modality.IMAGE).count if images else 1,
        "embed_dim": 32,
        "latent_channels": 32,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
    }
