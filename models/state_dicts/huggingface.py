"""Hugging Face's Chameleon: ``config.json`` and names, both ways.

Shapes and pairing of rotary dimensions are ours, so tensors only change their names: the per-head
rows of the qk-norms, too. Read as transformers writes it since version 5 (``rope_parameters``) and
before (``rope_theta``, ``rope_scaling``), defaults left out or not; written for version 5. Tensors
of the image tokenizer (``model.vqmodel.*``) are not the decoder's and go another way.
"""

from collections.abc import Mapping
from typing import Any

from earlyfuse.models.blocks.linear import NORM_EPS
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.modality import Modality, Vocabulary
from earlyfuse.models.state_dicts import decoder_config, huggingface_mamba
from earlyfuse.models.state_dicts.chameleon import Sizes, function_differences, tensor_shapes
from earlyfuse.models.state_dicts.exported import check_numbers
from earlyfuse.models.state_dicts.recipes import Entry, Recipe, renamed
from earlyfuse.models.state_dicts.vocabulary_map import from_vocabulary, to_vocabulary

MODEL_TYPE, ARCHITECTURE = "chameleon", "ChameleonForConditionalGeneration"
VQ_PREFIX = "model.vqmodel."
ROPE = "rotary_emb.inv_freq"  # ends buffers that old files have; they follow from the config
OURS = "earlyfuse"  # our part of a config that we write; transformers keeps and ignores it

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
    "bos_token_id": 1,
    "eos_token_id": 2,
    "swin_norm": False,
    "vocabulary_map": {},
}
_NUMBERS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "rope_theta"),
)
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
    """Hugging Face's name of a parameter of ours."""
    if not ours.startswith("layers."):
        return _NAMES[ours]
    _, number, name = ours.split(".", 2)
    return f"model.layers.{number}.{_BLOCK_NAMES[name]}"


def import_recipes(
    config: Decoder.Config, raw: dict[str, Any], entries: Mapping[str, Entry]
) -> dict[str, Recipe]:
    """Ours from theirs, which are ``entries``. A tied head is a copy of the embedding, unless it is
    in the files: transformers takes it from there, too.
    """
    shapes = tensor_shapes(config)
    recipes = {name: renamed(name_of(name), shape) for name, shape in shapes.items()}
    if raw.get("tie_word_embeddings") and name_of("lm_head.weight") not in entries:
        recipes["lm_head.weight"] = recipes["tok_embeddings.weight"]
    return recipes


def export_recipes(sizes: Sizes) -> dict[str, Recipe]:
    """Theirs from ours."""
    shapes = tensor_shapes(sizes.decoder())
    return {name_of(name): renamed(name, shape) for name, shape in shapes.items()}


def read_config(raw: dict[str, Any]) -> tuple[Decoder.Config, Vocabulary, str]:
    """The decoder, its vocabulary, and a remark on the vocabulary ("" if there is none).

    ``ValueError`` names what the config has that we do not compute.
    """
    refuse_unknown(raw)
    given = _DEFAULTS | {name: value for name, value in raw.items() if value is not None}
    if raw.get("num_key_value_heads", 0) is None:
        given["num_key_value_heads"] = given["num_attention_heads"]
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    given["rope_theta"] = rope.get("rope_theta", given.get("rope_theta", 10_000.0))
    check_numbers(given, _NUMBERS)
    sizes = Sizes(
        dim=given["hidden_size"],
        layers=given["num_hidden_layers"],
        heads=given["num_attention_heads"],
        kv_heads=given["num_key_value_heads"],
        hidden_dim=given["intermediate_size"],
        vocab_size=given["vocab_size"],
        norm_order="swin" if given["swin_norm"] else "pre",
        rope_theta=float(given["rope_theta"]),
        init_std=float(given["initializer_range"]),
    )
    config = sizes.decoder()
    if OURS in raw:
        written = decoder_config.from_dict(raw[OURS]["model"])
        if wrong := function_differences(written, config):
            raise ValueError(
                f"config.json contradicts its own part {OURS!r}: {'; '.join(wrong[:3])}. Remove "
                "that part if the model was changed since it was exported"
            )
        return written, Vocabulary.from_dict(raw[OURS]["vocabulary"]), ""
    vocabulary, remark = to_vocabulary(given["vocabulary_map"], given, _block(raw))
    return config, vocabulary, remark


def refuse_unknown(raw: dict[str, Any]) -> None:
    """``ValueError`` if the config is of another architecture, or has what ours lacks."""
    found = raw.get("model_type")
    if found != MODEL_TYPE:
        raise ValueError(
            f"config.json: model_type ({found!r}) must be {MODEL_TYPE!r} or "
            f"{huggingface_mamba.MODEL_TYPE!r}; other architectures are not converted: "
            + huggingface_mamba.RELATIVES.get(
                str(found), "they lack Chameleon's norms on queries and keys, or its attention"
            )
        )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    wanted = {
        "hidden_act": (raw.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(raw.get("attention_bias")), False),
        "mlp_bias": (bool(raw.get("mlp_bias")), False),
        "rms_norm_eps": (raw.get("rms_norm_eps", NORM_EPS), NORM_EPS),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
        "quantization_config": (raw.get("quantization_config"), None),
    }
    for name, (value, ours) in wanted.items():
        if value != ours:
            raise ValueError(
                f"config.json: {name} ({value!r}) must be {ours!r}: the decoder has nothing else"
            )


def write_config(
    sizes: Sizes,
    config: Decoder.Config,
    vocabulary: Vocabulary,
    carried: dict[str, Any] | None,
    dtype: str | None,
) -> dict[str, Any]:
    """``config.json`` of a model of these sizes; ``dtype`` such as "bfloat16", None if mixed.

    ``carried``: the config that the model came with. It goes back as it was if it still describes
    the model.
    """
    if carried is not None and not function_differences(config, read_config(carried)[0]):
        fields = dict(carried)
        if fields.get("tie_word_embeddings"):
            fields["tie_word_embeddings"] = False
        name = "torch_dtype" if "torch_dtype" in fields else "dtype"
        return fields | ({name: dtype} if dtype is not None and name in fields else {})
    fields = {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "dtype": dtype or "float32",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.dim,
        "intermediate_size": sizes.hidden_dim,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": _DEFAULTS["max_position_embeddings"],
        "initializer_range": sizes.init_std,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "model_parallel_size": 1,
        "swin_norm": sizes.norm_order == "swin",
        "tie_word_embeddings": False,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "vocabulary_map": from_vocabulary(vocabulary),
        "vq_config": _vq_config(vocabulary),
        OURS: {"model": decoder_config.to_dict(config), "vocabulary": vocabulary.to_dict()},
    }
    return fields


def _block(raw: dict[str, Any]) -> int:
    """Codes of one image."""
    vq = _VQ_DEFAULTS | (raw.get("vq_config") or {})
    return int(vq["resolution"] // 2 ** (len(vq["channel_multiplier"]) - 1)) ** 2


def _vq_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """A small image encoder: transformers makes one, with random weights, as none is exported."""
    images = Modality.IMAGE in vocabulary.modalities
    return {
        "num_embeddings": vocabulary.medium(Modality.IMAGE).count if images else 1,
        "embed_dim": 32,
        "latent_channels": 32,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
    }
