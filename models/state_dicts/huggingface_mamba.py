"""Hugging Face's Mamba: ``config.json``, both ways; names are in ``mamba``.

Every row of the embedding is a token id: ``vocab_size`` includes rows of padding.
"""

from collections.abc import Mapping
from math import ceil
from typing import Any

from earlyfuse.data.json_files import JsonObject
from earlyfuse.models.blocks.block import Block
from earlyfuse.models.blocks.linear import NORM_EPS
from earlyfuse.models.blocks.mamba import Mamba
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.state_dicts import mamba
from earlyfuse.models.state_dicts.config_json import CONFIG, own_description
from earlyfuse.models.state_dicts.plain_decoder import (
    function_differences,
    mamba_mixer,
    plain_decoder,
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
from earlyfuse.models.state_dicts.tensor_map import Entry, Mapped, Tensors, common_dtype
from earlyfuse.models.state_dicts.vocabulary_map import to_vocabulary
from earlyfuse.models.vocabulary import Vocabulary

MODEL_TYPE, ARCHITECTURE = "mamba", "MambaForCausalLM"
_EMBEDDING, _OLD_EMBEDDING = "embeddings", "embedding"  # transformers reads both
# other state-space models of transformers, and why they cannot be converted
RELATIVES = {
    "mamba2": mamba.MAMBA_2,
    "falcon_mamba": "FalconMamba norms step sizes, B and C, and our mixer does not",
}
# transformers leaves out fields that have their default
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50280,
    "hidden_size": 768,
    "num_hidden_layers": 32,
    "state_size": 16,
    "expand": 2,
    "conv_kernel": 4,
    "time_step_rank": "auto",
    "initializer_range": 0.1,
    "use_conv_bias": True,
    "tie_word_embeddings": True,
}


def import_model(raw: JsonObject, entries: Mapping[str, Entry]) -> Imported:
    """Imports the model that ``raw`` (``config.json``) describes; its vocabulary is text only,
    unless earlyfuse wrote the config. ``ValueError`` names what is not supported.
    """
    config = _read_config(raw)
    if OURS in raw:
        config, vocabulary = read_ours(raw, config)
    else:
        given = without_nulls(raw, _DEFAULTS)
        vocabulary, _ = to_vocabulary(JsonObject({}, "", ""), given, 1)
    old = mamba.name_of(mamba.EMBEDDING, _OLD_EMBEDDING) in entries
    maps = mamba.import_maps(
        config,
        entries,
        embedding=_OLD_EMBEDDING if old else _EMBEDDING,
        tied=_is(raw, "tie_word_embeddings"),
        conv_bias=_is(raw, "use_conv_bias"),
    )
    return Imported(config, vocabulary, maps, carried={} if OURS in raw else raw.values)


def _read_config(raw: JsonObject) -> Decoder.Config:
    given = without_nulls(raw, _DEFAULTS)
    values = given.values
    act = values.get("hidden_act", "silu")
    wanted = {
        "model_type": (values.get("model_type"), MODEL_TYPE),
        "hidden_act": ("silu" if act == "swish" else act, "silu"),
        "use_bias": (values.get("use_bias", False), False),
        "layer_norm_epsilon": (values.get("layer_norm_epsilon", NORM_EPS), NORM_EPS),
        "rms_norm": (values.get("rms_norm", True), True),
        "quantization_config": (values.get("quantization_config"), None),
    }
    refuse_others(given, wanted, "the mixer supports nothing else")
    (width,) = sizes(given, "hidden_size")
    if values["time_step_rank"] == "auto":
        values["time_step_rank"] = ceil(width / 16)
    values.setdefault("intermediate_size", int(positive(given, "expand") * width))
    inner_dim, dt_rank = sizes(given, "intermediate_size", "time_step_rank")
    states, conv_width = sizes(given, "state_size", "conv_kernel")
    layers, vocab_size = sizes(given, "num_hidden_layers", "vocab_size")
    mixer = Mamba.Config(
        dim=width, inner_dim=inner_dim, dt_rank=dt_rank, states=states, conv_width=conv_width
    )
    init_std = given.field("initializer_range", float, least=0)
    block = Block.Config(mamba=mixer)
    return plain_decoder(block, layers=layers, vocab_size=vocab_size, init_std=init_std)


def _is(raw: JsonObject, name: str) -> bool:
    return bool(without_nulls(raw, _DEFAULTS).field(name, bool))


def export_model(
    config: Decoder.Config, vocabulary: Vocabulary, tensors: Tensors, carried: JsonObject | None
) -> Exported:
    """Exports a model of ours as Hugging Face's tensors and config, without a head that equals the
    embedding. ``carried`` and ``ValueError`` as in ``huggingface.export_model``.
    """
    mixer = mamba_mixer(config, "Hugging Face's Mamba")
    tied = mamba.is_tied(tensors)
    conv_bias = carried is None or _is(carried, "use_conv_bias") or mamba.has_conv_bias(tensors)
    maps = mamba.export_maps(config, embedding=_EMBEDDING, tied=tied, conv_bias=conv_bias)
    theirs = Mapped(maps, tensors)
    dtype = common_dtype(theirs)
    if carried is not None and not function_differences(config, _read_config(carried)):
        fields = with_dtype(carried.values, dtype)
        for name, value in (("tie_word_embeddings", tied), ("use_conv_bias", conv_bias)):
            if _is(carried, name) != value:
                fields[name] = value
    else:
        fields = {
            **_config_fields(config, mixer),
            "dtype": dtype or "float32",
            "use_conv_bias": conv_bias,
            "tie_word_embeddings": tied,
            "bos_token_id": vocabulary.bos,
            "eos_token_id": vocabulary.eos,
            "pad_token_id": vocabulary.pad,
            OURS: own_description(config, vocabulary),
        }
    return Exported(theirs, {CONFIG: fields})


def _config_fields(config: Decoder.Config, mixer: Mamba.Config) -> dict[str, Any]:
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": len(config.layers),
        "state_size": mixer.states,
        "expand": max(1, round(mixer.inner_dim / config.dim)),
        "intermediate_size": mixer.inner_dim,
        "conv_kernel": mixer.conv_width,
        "time_step_rank": mixer.dt_rank,
        "hidden_act": "silu",
        "initializer_range": config.init_std,
        "layer_norm_epsilon": NORM_EPS,
        "use_bias": False,
        "residual_in_fp32": False,
    }
