"""Checkpoints of ``mamba_ssm``: ``config.json``, both ways; names are in ``mamba``.

Its readers refuse unknown fields, so our description of a model is in ``earlyfuse.json`` beside it.
The embedding has ``vocab_size`` rows rounded up to ``pad_vocab_size_multiple``; each is a token id.
"""

from collections.abc import Mapping
from math import ceil, inf, nextafter
from typing import Any

from earlyfuse.data.json_files import JsonObject, shown
from earlyfuse.models.blocks.block import Block
from earlyfuse.models.blocks.linear import NORM_EPS
from earlyfuse.models.blocks.mamba import Mamba
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.state_dicts import mamba
from earlyfuse.models.state_dicts.config_json import CONFIG, describe, read_description
from earlyfuse.models.state_dicts.plain_decoder import (
    agreed,
    function_differences,
    mamba_mixer,
    plain_decoder,
)
from earlyfuse.models.state_dicts.public_config import (
    Exported,
    Imported,
    positive,
    refuse_others,
    sizes,
    without_nulls,
)
from earlyfuse.models.state_dicts.tensor_map import Entry, Mapped, Tensors
from earlyfuse.models.vocabulary import Vocabulary

OUR_FILE = "earlyfuse.json"
_EMBEDDING = "embedding"
_DEFAULTS: dict[str, Any] = {"vocab_size": 50277, "pad_vocab_size_multiple": 8}
_MIXER_DEFAULTS: dict[str, Any] = {
    "d_state": 16,
    "d_conv": 4,
    "expand": 2,
    "dt_rank": "auto",
    "conv_bias": True,
}
# mixer fields without effect on the function: initial values, and a choice of kernels
_NOT_COMPUTED = {
    *("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor"),
    *("use_fast_path", "device", "dtype"),
}


def is_config(raw: JsonObject) -> bool:
    """True if a ``config.json`` is ``mamba_ssm``'s."""
    return "model_type" not in raw and "d_model" in raw and "n_layer" in raw


def import_model(
    raw: JsonObject, entries: Mapping[str, Entry], beside: JsonObject | None
) -> Imported:
    """Imports the model that ``raw`` (``config.json``) describes; ``beside``: our
    ``earlyfuse.json``. ``ValueError`` names what is not supported.
    """
    config, vocabulary, remark = _read_config(raw)
    if beside is not None:
        written, vocabulary, _ = read_description(beside)
        config, remark = agreed(written, config, raw.where), ""
    tied, conv_bias = _is_tied(raw), _has_conv_bias(raw)
    maps = mamba.import_maps(config, entries, embedding=_EMBEDDING, tied=tied, conv_bias=conv_bias)
    carried = raw.values if beside is None else {}
    return Imported(config, vocabulary, maps, carried=carried, remark=remark)


def _read_config(raw: JsonObject) -> tuple[Decoder.Config, Vocabulary, str]:
    """Returns the decoder, a text-only vocabulary, and a remark on its padding, or ""."""
    given, mixer = without_nulls(raw, _DEFAULTS), _mixer(raw)
    _refuse_unknown(given, mixer)
    width, layers = sizes(given, "d_model", "n_layer")
    size, multiple = sizes(given, "vocab_size", "pad_vocab_size_multiple")
    if mixer.values["dt_rank"] == "auto":
        mixer.values["dt_rank"] = ceil(width / 16)
    states, conv_width, dt_rank = sizes(mixer, "d_state", "d_conv", "dt_rank")
    block = Block.Config(
        mamba=Mamba.Config(
            dim=width,
            inner_dim=int(positive(mixer, "expand") * width),
            dt_rank=dt_rank,
            states=states,
            conv_width=conv_width,
        )
    )
    rows = -(-size // multiple) * multiple
    remark = f"the last {rows - size} of {rows} token ids are padding" if rows > size else ""
    config = plain_decoder(block, layers=layers, vocab_size=rows)
    return config, Vocabulary(rows, 0, 0, 0), remark


def _is_tied(raw: JsonObject) -> bool:
    """True if the head may be absent from the files."""
    return bool(without_nulls(raw, {}).field("tie_embeddings", bool, default=True))


def _has_conv_bias(raw: JsonObject) -> bool:
    return bool(_mixer(raw).field("conv_bias", bool))


def _mixer(raw: JsonObject) -> JsonObject:
    given = without_nulls(raw, {}).object("ssm_cfg", default={})
    return JsonObject(_MIXER_DEFAULTS | given.values, given.where, given.remedy)


def _refuse_unknown(given: JsonObject, mixer: JsonObject) -> None:
    kind = mixer.values.get("layer", "Mamba1")
    if kind != "Mamba1":
        reason = mamba.MAMBA_2 if kind == "Mamba2" else "its recurrence is different"
        raise ValueError(f"{mixer.where}: layer ({shown(kind)}) must be 'Mamba1'. {reason}")
    values = given.values
    for name, value, ours, reason in (
        ("rms_norm", values.get("rms_norm", True), True, "LayerNorm is not supported"),
        ("attn_layer_idx", values.get("attn_layer_idx") or [], [], "attention is not supported"),
        ("d_intermediate", values.get("d_intermediate", 0), 0, "MLPs are not supported"),
        ("norm_epsilon", values.get("norm_epsilon", NORM_EPS), NORM_EPS, "ours is fixed"),
        ("bidirectional", values.get("bidirectional", False), False, "the scan runs forward"),
        ("ssm_cfg.bias", mixer.values.get("bias") or False, False, "the projections have none"),
    ):
        refuse_others(given, {name: (value, ours)}, reason)
    mixer.check_names({*_MIXER_DEFAULTS, *_NOT_COMPUTED, "layer", "bias"})


def export_model(
    config: Decoder.Config, vocabulary: Vocabulary, tensors: Tensors, carried: JsonObject | None
) -> Exported:
    """Exports a model of ours as ``mamba_ssm``'s tensors and config; a head that equals the
    embedding is an alias of it. ``carried`` and ``ValueError`` as in ``huggingface.export_model``.
    """
    mixer = mamba_mixer(config, "mamba_ssm")
    tied = mamba.is_tied(tensors)
    conv_bias = carried is None or _has_conv_bias(carried) or mamba.has_conv_bias(tensors)
    maps = mamba.export_maps(config, embedding=_EMBEDDING, tied=tied, conv_bias=conv_bias)
    aliases = {mamba.HEAD: mamba.name_of(mamba.EMBEDDING, _EMBEDDING)} if tied else {}
    if carried is not None and not function_differences(config, _read_config(carried)[0]):
        fields = dict(carried.values)
        if _is_tied(carried) != tied:
            fields["tie_embeddings"] = tied
        if _has_conv_bias(carried) != conv_bias:
            fields["ssm_cfg"] = (fields.get("ssm_cfg") or {}) | {"conv_bias": conv_bias}
    else:
        fields = _config_fields(config, mixer, tied=tied, conv_bias=conv_bias)
    files = {CONFIG: fields}
    if carried is None:
        files[OUR_FILE] = describe(config, vocabulary, {})
    return Exported(Mapped(maps, tensors), files, aliases)


def _config_fields(
    config: Decoder.Config, mixer: Mamba.Config, *, tied: bool, conv_bias: bool
) -> dict[str, Any]:
    expand = mixer.inner_dim / config.dim
    if int(expand * config.dim) < mixer.inner_dim:  # its reader rounds down
        expand = nextafter(expand, inf)
    sizes = {
        "d_state": mixer.states,
        "d_conv": mixer.conv_width,
        "expand": int(expand) if expand.is_integer() else expand,
        "dt_rank": mixer.dt_rank,
    }
    return {
        "d_model": config.dim,
        "d_intermediate": 0,
        "n_layer": len(config.layers),
        "vocab_size": config.vocab_size,
        "ssm_cfg": sizes if conv_bias else sizes | {"conv_bias": False},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8 if config.vocab_size % 8 == 0 else 1,
        "tie_embeddings": tied,
    }
