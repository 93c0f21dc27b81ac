"""Hugging Face's Mamba: ``config.json``, both ways. Names are in ``mamba``.

Vocabularies are those of the embedding: the ``vocab_size`` there counts rows of padding.
"""

from math import ceil
from typing import Any

from earlyfuse.data.json_files import JsonObject
from earlyfuse.models.blocks.linear import NORM_EPS
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.state_dicts import decoder_config, mamba
from earlyfuse.models.state_dicts.chameleon import function_differences
from earlyfuse.models.state_dicts.config_json import (
    check_numbers,
    read_decoder,
    read_vocabulary,
    refuse_others,
    without_nulls,
)
from earlyfuse.models.state_dicts.mamba import MAMBA_2, MambaSizes, agreed
from earlyfuse.models.state_dicts.tensor_map import Made, Tensors, common_dtype
from earlyfuse.models.state_dicts.vocabulary_map import to_vocabulary
from earlyfuse.models.vocabulary import Vocabulary

MODEL_TYPE, ARCHITECTURE = "mamba", "MambaForCausalLM"
EMBEDDINGS, OLD_EMBEDDINGS = "embeddings", "embedding"  # transformers reads both
OURS = "earlyfuse"  # our part of a config that we write; transformers keeps and ignores it

# other state-space models of transformers, and why their checkpoints are not these
RELATIVES = {
    "mamba2": MAMBA_2,
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


_NUMBERS = (
    *("vocab_size", "intermediate_size", "num_hidden_layers", "state_size"),
    *("conv_kernel", "time_step_rank"),
)


def read_config(raw: JsonObject) -> tuple[Decoder.Config, Vocabulary]:
    """The decoder and its vocabulary: all text, if earlyfuse did not write the config.

    ``raw``: ``config.json``. ``ValueError`` names what it has that we do not compute.
    """
    given = without_nulls(raw, _DEFAULTS)
    _refuse_unknown(given)
    check_numbers(given, ("hidden_size", "expand"))
    width = given.field("hidden_size", int)
    if given.values["time_step_rank"] == "auto":
        given.values["time_step_rank"] = ceil(width / 16)
    given.values.setdefault("intermediate_size", int(given.field("expand", float) * width))
    check_numbers(given, _NUMBERS)
    config = MambaSizes(
        dim=width,
        layers=given.field("num_hidden_layers", int),
        inner_dim=given.field("intermediate_size", int),
        dt_rank=given.field("time_step_rank", int),
        vocab_size=given.field("vocab_size", int),
        states=given.field("state_size", int),
        conv_width=given.field("conv_kernel", int),
        init_std=given.field("initializer_range", float, least=0),
    ).decoder()
    if OURS in raw:
        ours = raw.object(OURS)
        written, vocabulary = read_decoder(ours.object("model")), ours.object("vocabulary")
        return agreed(written, config, raw.where), read_vocabulary(vocabulary)
    return config, to_vocabulary(JsonObject({}, "", ""), given, 1)[0]


def is_tied(raw: JsonObject) -> bool:
    """Whether the head may be absent from the files."""
    return bool(without_nulls(raw, _DEFAULTS).field("tie_word_embeddings", bool))


def has_conv_bias(raw: JsonObject) -> bool:
    """Whether convolutions have a bias."""
    return bool(without_nulls(raw, _DEFAULTS).field("use_conv_bias", bool))


def _refuse_unknown(given: JsonObject) -> None:
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
    refuse_others(given, wanted, "our mixer has nothing else")


def export(
    config: Decoder.Config,
    vocabulary: Vocabulary,
    tensors: Tensors,
    carried: JsonObject | None,
) -> tuple[Tensors, dict[str, Any]]:
    """Their tensors and ``config.json`` of our model ``config`` with ``tensors``.

    The head is left out if it equals the embedding. ``carried``: the config that the model came
    with, or None. ``ValueError`` says why the format cannot express the model.
    """
    sizes = MambaSizes.of(config, "Hugging Face's Mamba")
    tied = mamba.is_tied(tensors)
    bare = carried is not None and not has_conv_bias(carried)
    conv_bias = not bare or mamba.has_conv_bias(tensors)
    recipes = mamba.export_recipes(sizes, embedding=EMBEDDINGS, tied=tied, conv_bias=conv_bias)
    theirs = Made(recipes, tensors)
    dtype = common_dtype(theirs)
    return theirs, _write_config(
        sizes, config, vocabulary, carried, dtype=dtype, tied=tied, conv_bias=conv_bias
    )


def _write_config(
    sizes: MambaSizes,
    config: Decoder.Config,
    vocabulary: Vocabulary,
    carried: JsonObject | None,
    *,
    dtype: str | None,
    tied: bool,
    conv_bias: bool,
) -> dict[str, Any]:
    # the config it came with goes back as it was if it still describes the model
    if carried is not None and not function_differences(config, read_config(carried)[0]):
        fields = dict(carried.values)
        if is_tied(carried) != tied:
            fields["tie_word_embeddings"] = tied
        if has_conv_bias(carried) != conv_bias:
            fields["use_conv_bias"] = conv_bias
        name = "torch_dtype" if "torch_dtype" in fields else "dtype"
        return fields | ({name: dtype} if dtype is not None and name in fields else {})
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "dtype": dtype or "float32",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.dim,
        "num_hidden_layers": sizes.layers,
        "state_size": sizes.states,
        "expand": max(1, round(sizes.inner_dim / sizes.dim)),
        "intermediate_size": sizes.inner_dim,
        "conv_kernel": sizes.conv_width,
        "time_step_rank": sizes.dt_rank,
        "hidden_act": "silu",
        "initializer_range": sizes.init_std,
        "layer_norm_epsilon": NORM_EPS,
        "use_bias": False,
        "use_conv_bias": conv_bias,
        "residual_in_fp32": False,
        "tie_word_embeddings": tied,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.pad,
        OURS: {"model": decoder_config.to_dict(config), "vocabulary": vocabulary.to_dict()},
    }
