"""Checkpoints of ``mamba_ssm``: ``config.json`` and ``pytorch_model.bin``. Names are in ``mamba``.

Its readers refuse fields that they do not know, so that our own description of a model lies in
``earlyfuse.json`` beside. Rows of the embedding are the ``vocab_size`` rounded up to
``pad_vocab_size_multiple``; ours are all of them.
"""

from math import ceil, inf, nextafter
from typing import Any

from earlyfuse.data.json_files import JsonObject, shown
from earlyfuse.models.blocks.linear import NORM_EPS
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.state_dicts import mamba
from earlyfuse.models.state_dicts.chameleon import function_differences
from earlyfuse.models.state_dicts.config_json import check_numbers, refuse_others, without_nulls
from earlyfuse.models.state_dicts.mamba import MAMBA_2, MambaSizes
from earlyfuse.models.state_dicts.tensor_map import Made, Tensors
from earlyfuse.models.vocabulary import Vocabulary

EMBEDDING, WEIGHTS, OURS = "embedding", "pytorch_model.bin", "earlyfuse.json"

_DEFAULTS: dict[str, Any] = {"vocab_size": 50277, "pad_vocab_size_multiple": 8}
_MIXER_DEFAULTS: dict[str, Any] = {
    "d_state": 16,
    "d_conv": 4,
    "expand": 2,
    "dt_rank": "auto",
    "conv_bias": True,
}
# of the mixer, without influence on what it computes: first values, and a choice of kernels
_NOT_COMPUTED = {
    *("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor"),
    *("use_fast_path", "device", "dtype"),
}


def is_config(raw: JsonObject) -> bool:
    """Whether a ``config.json`` is of ``mamba_ssm``."""
    return "model_type" not in raw and "d_model" in raw and "n_layer" in raw


def read_config(raw: JsonObject) -> tuple[Decoder.Config, Vocabulary, str]:
    """The decoder, a vocabulary of text alone, and a remark on its padding ("" if there is none).

    ``raw``: ``config.json``. ``ValueError`` names what it has that we do not compute.
    """
    given, mixer = without_nulls(raw, _DEFAULTS), _mixer(raw)
    _refuse_unknown(given, mixer)
    check_numbers(given, ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"))
    width, multiple = given.field("d_model", int), given.field("pad_vocab_size_multiple", int)
    if mixer.values["dt_rank"] == "auto":
        mixer.values["dt_rank"] = ceil(width / 16)
    check_numbers(mixer, ("d_state", "d_conv", "expand", "dt_rank"))
    size = given.field("vocab_size", int)
    rows = -(-size // multiple) * multiple
    config = MambaSizes(
        dim=width,
        layers=given.field("n_layer", int),
        inner_dim=int(mixer.field("expand", float) * width),
        dt_rank=mixer.field("dt_rank", int),
        vocab_size=rows,
        states=mixer.field("d_state", int),
        conv_width=mixer.field("d_conv", int),
    ).decoder()
    remark = f"the last {rows - size} of {rows} token ids are padding" if rows > size else ""
    return config, Vocabulary(rows, 0, 0, 0), remark


def is_tied(raw: JsonObject) -> bool:
    """Whether the head may be absent from the files."""
    return bool(without_nulls(raw, _DEFAULTS).field("tie_embeddings", bool, default=True))


def has_conv_bias(raw: JsonObject) -> bool:
    """Whether convolutions have a bias."""
    return bool(_mixer(raw).field("conv_bias", bool))


def _mixer(raw: JsonObject) -> JsonObject:
    given = without_nulls(raw, {}).object("ssm_cfg", default={})
    return JsonObject(_MIXER_DEFAULTS | given.values, given.where, given.remedy)


def _refuse_unknown(given: JsonObject, mixer: JsonObject) -> None:
    kind = mixer.values.get("layer", "Mamba1")
    if kind != "Mamba1":
        reason = MAMBA_2 if kind == "Mamba2" else "its recurrence is another"
        raise ValueError(f"{mixer.where}: layer ({shown(kind)}) must be 'Mamba1'. {reason}")
    values = given.values
    for name, value, ours, reason in (
        ("rms_norm", values.get("rms_norm", True), True, "LayerNorm is none of our norms"),
        ("attn_layer_idx", values.get("attn_layer_idx") or [], [], "attention there is not ours"),
        ("d_intermediate", values.get("d_intermediate", 0), 0, "its MLPs are none of ours"),
        ("norm_epsilon", values.get("norm_epsilon", NORM_EPS), NORM_EPS, "ours is fixed"),
        ("bidirectional", values.get("bidirectional", False), False, "our scan goes forward"),
        ("ssm_cfg.bias", mixer.values.get("bias") or False, False, "our projections have none"),
    ):
        refuse_others(given, {name: (value, ours)}, reason)
    mixer.check_names({*_MIXER_DEFAULTS, *_NOT_COMPUTED, "layer", "bias"})


def export(
    config: Decoder.Config, tensors: Tensors, carried: JsonObject | None
) -> tuple[Tensors, dict[str, Any], dict[str, str]]:
    """Their tensors and ``config.json`` of our model ``config`` with ``tensors``, and second names.

    A head that equals the embedding is a second name of it, as in their own files. ``carried``: the
    config that the model came with, or None. ``ValueError`` says why the format cannot express the
    model.
    """
    sizes = MambaSizes.of(config, "mamba_ssm")
    tied = mamba.is_tied(tensors)
    bare = carried is not None and not has_conv_bias(carried)
    conv_bias = not bare or mamba.has_conv_bias(tensors)
    recipes = mamba.export_recipes(sizes, embedding=EMBEDDING, tied=tied, conv_bias=conv_bias)
    same = {mamba.HEAD: mamba.name_of(mamba.EMBEDDING, EMBEDDING)} if tied else {}
    fields = _write_config(sizes, config, carried, tied=tied, conv_bias=conv_bias)
    return Made(recipes, tensors), fields, same


def _write_config(
    sizes: MambaSizes,
    config: Decoder.Config,
    carried: JsonObject | None,
    *,
    tied: bool,
    conv_bias: bool,
) -> dict[str, Any]:
    # the config it came with goes back as it was if it still describes the model
    if carried is not None and not function_differences(config, read_config(carried)[0]):
        fields = dict(carried.values)
        if is_tied(carried) != tied:
            fields["tie_embeddings"] = tied
        if has_conv_bias(carried) != conv_bias:
            fields["ssm_cfg"] = (fields.get("ssm_cfg") or {}) | {"conv_bias": conv_bias}
        return fields
    expand = sizes.inner_dim / sizes.dim
    if int(expand * sizes.dim) < sizes.inner_dim:  # its reader rounds down
        expand = nextafter(expand, inf)
    mixer = {
        "d_state": sizes.states,
        "d_conv": sizes.conv_width,
        "expand": int(expand) if expand.is_integer() else expand,
        "dt_rank": sizes.dt_rank,
    }
    return {
        "d_model": sizes.dim,
        "d_intermediate": 0,
        "n_layer": sizes.layers,
        "vocab_size": sizes.vocab_size,
        "ssm_cfg": mixer if conv_bias else mixer | {"conv_bias": False},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8 if sizes.vocab_size % 8 == 0 else 1,
        "tie_embeddings": tied,
    }
