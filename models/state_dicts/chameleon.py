"""The decoders that Chameleon's formats can express: their sizes, and why others cannot be."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from earlyfuse.models.blocks.attention import Attention
from earlyfuse.models.blocks.feed_forward import FeedForward
from earlyfuse.models.decoder import Block, Decoder
from earlyfuse.models.state_dicts.decoder_config import differences, to_dict
from earlyfuse.models.state_dicts.tensor_map import Shape


@dataclass(frozen=True)
class Sizes:
    """A dense Chameleon: all blocks alike, all parameters shared by all modalities."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden_dim: int
    vocab_size: int
    norm_order: Literal["pre", "swin"]
    rope_theta: float
    init_std: float = 0.02

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.heads

    def decoder(self) -> Decoder.Config:
        """Our config of it; ``ValueError`` if the sizes do not go together."""
        if self.dim % self.heads:
            raise ValueError(
                f"dim ({self.dim}) must be a multiple of heads ({self.heads}); correct the config"
            )
        layers = [
            Block.Config(
                attention=Attention.Config(
                    dim=self.dim,
                    heads=self.heads,
                    kv_heads=self.kv_heads,
                    head_dim=self.head_dim,
                ),
                feed_forward=FeedForward.Config(dim=self.dim, hidden_dim=self.hidden_dim),
                norm_order=self.norm_order,
            )
            for _ in range(self.layers)
        ]
        return Decoder.Config(
            dim=self.dim,
            vocab_size=self.vocab_size,
            layers=layers,
            rope_theta=self.rope_theta,
            init_std=self.init_std,
        )

    @classmethod
    def of(cls, config: Decoder.Config, target: str) -> "Sizes":
        """The sizes of ``config``; ``ValueError`` says why ``target`` cannot express it."""
        first = config.layers[0]
        attention, feed_forward = first.attention, first.feed_forward
        if attention is None:
            raise ValueError(_cannot(target, ["its first block does not attend"]))
        if not isinstance(feed_forward, FeedForward.Config):
            kind = type(feed_forward).__qualname__.removesuffix(".Config")
            raise ValueError(_cannot(target, [f"its feed-forward is a {kind}"]))
        sizes = cls(
            dim=config.dim,
            layers=len(config.layers),
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            hidden_dim=feed_forward.hidden_dim,
            vocab_size=config.vocab_size,
            norm_order=first.norm_order,
            rope_theta=config.rope_theta,
            init_std=config.init_std,
        )
        if config.dim != attention.heads * attention.head_dim:
            width = f"{attention.heads} heads of {attention.head_dim}"
            raise ValueError(_cannot(target, [f"{width} are not its width ({config.dim})"]))
        if wrong := function_differences(config, sizes.decoder()):
            raise ValueError(_cannot(target, wrong))
        return sizes


def function_differences(left: Decoder.Config, right: Decoder.Config) -> list[str]:
    """Where two configs describe different functions of the same parameters, or different ones.

    Dropout, first values and the modalities that a run distinguishes do not count, nor does the
    base of rotary angles where nothing attends.
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


def _cannot(target: str, reasons: list[str]) -> str:
    shown = "; ".join(reasons[:3]) + ("; …" if len(reasons) > 3 else "")
    return (
        f"{target} cannot express this model: {shown}. Chameleon is dense, all its blocks are "
        "alike and all modalities share all parameters; sparse and modality-untied models convert "
        "to earlyfuse and dcp only"
    )


def tensor_shapes(config: Decoder.Config) -> dict[str, Shape]:
    """Shape of every tensor that a checkpoint of the model holds, by name, in the order of the
    module; nothing is allocated.
    """
    with torch.device("meta"):
        model = config.build()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
