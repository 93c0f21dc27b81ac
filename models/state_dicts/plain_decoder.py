"""Decoders that public formats can express: identical blocks, all modalities sharing all
parameters.
"""

from copy import deepcopy
from typing import Any, Literal

import torch

from earlyfuse.models.blocks.attention import Attention
from earlyfuse.models.blocks.block import Block
from earlyfuse.models.blocks.feed_forward import FeedForward
from earlyfuse.models.blocks.mamba import Mamba
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.state_dicts.decoder_config import differences, to_dict
from earlyfuse.models.state_dicts.tensor_map import Shape

_CHAMELEON = (
    "Chameleon is dense, with identical blocks, and all modalities share all parameters; sparse "
    "and modality-untied models convert to earlyfuse and dcp only"
)
_MAMBA = (
    "a public Mamba is dense, with identical blocks of one mixer behind a norm, and all modalities "
    "share all parameters; hybrids and Mixture-of-Mamba convert to earlyfuse and dcp only"
)
_MIXER_SIZES = ("dim", "inner_dim", "dt_rank", "states", "conv_width")


def plain_decoder(block: Block.Config, *, layers: int, **fields: Any) -> Decoder.Config:
    """Returns a decoder of ``layers`` copies of ``block``; ``fields``: of ``Decoder.Config``."""
    branch = block.attention or block.mamba
    assert branch is not None
    return Decoder.Config(dim=branch.dim, layers=[deepcopy(block) for _ in range(layers)], **fields)


def chameleon_block(
    *, dim: int, heads: int, kv_heads: int, hidden_dim: int, norm_order: Literal["pre", "swin"]
) -> Block.Config:
    """Returns a block of Chameleon; ``ValueError`` if the heads do not divide the width."""
    if dim % heads:
        raise ValueError(f"dim ({dim}) must be a multiple of heads ({heads}); correct the config")
    return Block.Config(
        attention=Attention.Config(dim=dim, heads=heads, kv_heads=kv_heads, head_dim=dim // heads),
        feed_forward=FeedForward.Config(dim=dim, hidden_dim=hidden_dim),
        norm_order=norm_order,
    )


def chameleon_parts(
    config: Decoder.Config, target: str
) -> tuple[Attention.Config, FeedForward.Config]:
    """Returns attention and feed-forward of every block; ``ValueError`` says why ``target`` cannot
    express the model.
    """
    first = config.layers[0]
    attention, feed_forward = first.attention, first.feed_forward
    if attention is None:
        raise _cannot_express(target, ["its first block has no attention"], _CHAMELEON)
    if not isinstance(feed_forward, FeedForward.Config):
        kind = type(feed_forward).__qualname__.removesuffix(".Config")
        raise _cannot_express(target, [f"its feed-forward is a {kind}"], _CHAMELEON)
    if config.dim != attention.heads * attention.head_dim:
        width = f"{attention.heads} heads of {attention.head_dim}"
        raise _cannot_express(target, [f"{width} are not its width ({config.dim})"], _CHAMELEON)
    block = chameleon_block(
        dim=config.dim,
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        hidden_dim=feed_forward.hidden_dim,
        norm_order=first.norm_order,
    )
    _check_plain(config, block, target, _CHAMELEON)
    return attention, feed_forward


def mamba_mixer(config: Decoder.Config, target: str) -> Mamba.Config:
    """Returns the mixer of every block; ``ValueError`` says why ``target`` cannot express it."""
    for index, layer in enumerate(config.layers):
        if list(layer.branches) != ["mamba"]:
            found = " and ".join(layer.branches)
            raise _cannot_express(target, [f"layers[{index}] is made of {found}"], _MAMBA)
    mixer = config.layers[0].mamba
    assert mixer is not None
    plain = Mamba.Config(**{name: getattr(mixer, name) for name in _MIXER_SIZES})
    _check_plain(config, Block.Config(mamba=plain), target, _MAMBA)
    return mixer


def _check_plain(config: Decoder.Config, block: Block.Config, target: str, rule: str) -> None:
    fields = {"vocab_size": config.vocab_size, "rope_theta": config.rope_theta}
    plain = plain_decoder(block, layers=len(config.layers), **fields)
    if reasons := function_differences(config, plain):
        raise _cannot_express(target, reasons, rule)


def _cannot_express(target: str, reasons: list[str], rule: str) -> ValueError:
    shown = "; ".join(reasons[:3]) + ("; …" if len(reasons) > 3 else "")
    return ValueError(f"{target} cannot express this model: {shown}. {rule}")


def function_differences(left: Decoder.Config, right: Decoder.Config) -> list[str]:
    """Lists the fields in which two configs describe different functions or parameters.

    Ignores dropout, initialisation and the modalities that a run distinguishes, and the rotary base
    of models without attention.
    """
    return differences(_as_computed(left), _as_computed(right))


def _as_computed(config: Decoder.Config) -> dict[str, Any]:
    fields = to_dict(config)
    for name in ("modalities", "init_std", "seed"):
        del fields[name]
    if config.head_dim == 0:
        del fields["rope_theta"]
    for layer in fields["layers"]:
        del layer["dropout"]
    return fields


def agreed(written: Decoder.Config, config: Decoder.Config, where: str) -> Decoder.Config:
    """Returns ``written``, the config that earlyfuse put beside a public one; ``ValueError`` unless
    both describe the same function.
    """
    if wrong := function_differences(written, config):
        raise ValueError(
            f"{where} contradicts the config that earlyfuse wrote with it: {'; '.join(wrong[:3])}; "
            "remove earlyfuse's part if the model was changed after its export"
        )
    return written


def tensor_shapes(config: Decoder.Config) -> dict[str, Shape]:
    """Returns name → shape of the model's state dict; nothing is allocated."""
    with torch.device("meta"):
        model = config.build()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
