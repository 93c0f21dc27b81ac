"""Meta's original Chameleon files: ``params.json`` and the layout of their shards, both ways.

Each ``consolidated.NN.pth`` is what one of n model-parallel ranks held. How our tensors lie in them
(arXiv 2405.09818; layout as in the public files):

==========================================  ========================================================
tensor                                      in shard i of n
==========================================  ========================================================
tok_embeddings, wo, w2                      part i of dimension 1
output, wq, wk, wv, w1, w3                  part i of dimension 0
attention_norm, ffn_norm, norm              all of it, in every shard; their mean is read
q_normalization, k_normalization            one row of head_dim: that of all heads of this shard
==========================================  ========================================================

Rotary positions turn pairs of neighbours there, (0, 1), (2, 3) …, and halves here, (0, h/2) …. Rows
of wq and wk, and the values of the qk-norms, are therefore reordered within each head.

A tensor of shard i is called ``0i/name`` here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from earlyfuse.data.json_files import JsonObject, shown
from earlyfuse.models.blocks.linear import NORM_EPS
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.state_dicts import decoder_config
from earlyfuse.models.state_dicts.chameleon import Sizes, tensor_shapes
from earlyfuse.models.state_dicts.config_json import check_numbers, refuse_others
from earlyfuse.models.state_dicts.tensor_map import Entry, Recipe, Shape, Tensors, check_layers
from earlyfuse.models.vocabulary import Vocabulary

OURS = "earlyfuse"  # our part of a params.json that we write; Meta's code reads what it knows
ROPE = "rope.freqs"  # in some files; follows from the config


@dataclass(frozen=True)
class Layout:
    """How one of our tensors lies in the shards: part i of dimension ``dim``, or all of it in each.

    ``heads``: rotary heads along dimension 0, reordered within each; 0 for none. ``row``: a shard
    holds one row for all its heads.
    """

    dim: int | None = None
    heads: int = 0
    row: bool = False

    def shard_shape(self, shape: Shape, shards: int) -> Shape:
        """Shape in a shard of a tensor that has ``shape`` here."""
        if self.row:
            return shape[1:]
        if self.dim is None:
            return shape
        return (*shape[: self.dim], shape[self.dim] // shards, *shape[self.dim + 1 :])

    def join(self, *parts: torch.Tensor) -> torch.Tensor:
        """Ours from the shards."""
        if self.row:
            rows_SH = to_halves(torch.stack(parts).flatten(), len(parts)).view(len(parts), -1)
            return rows_SH.repeat_interleave(self.heads // len(parts), 0)
        if self.dim is None:
            if all(torch.equal(parts[0], part) for part in parts[1:]):
                return parts[0]
            return torch.stack([part.double() for part in parts]).mean(0).to(parts[0].dtype)
        whole = torch.cat(parts, self.dim) if len(parts) > 1 else parts[0]
        return to_halves(whole, self.heads) if self.heads else whole

    def part(self, shard: int, shards: int, tensor: torch.Tensor) -> torch.Tensor:
        """Shard ``shard`` from ours."""
        if self.row:
            return to_pairs(tensor[shard * len(tensor) // shards], 1)
        if self.dim is None:
            return tensor
        length = tensor.shape[self.dim] // shards
        own = tensor.narrow(self.dim, shard * length, length)
        return to_pairs(own, self.heads // shards) if self.heads else own


def to_halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Neighbours (2i, 2i + 1) of each head, along dimension 0, to places i and i + head_dim/2."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


def to_pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Inverse of ``to_halves``."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def layouts(sizes: Sizes) -> dict[str, tuple[str, Layout]]:
    """Our name → Meta's name and layout, for every tensor."""
    block = {
        "attention_norm.weight": ("attention_norm.weight", Layout()),
        "attention.wq.weight": ("attention.wq.weight", Layout(0, heads=sizes.heads)),
        "attention.wk.weight": ("attention.wk.weight", Layout(0, heads=sizes.kv_heads)),
        "attention.wv.weight": ("attention.wv.weight", Layout(0)),
        "attention.wo.weight": ("attention.wo.weight", Layout(1)),
        "feed_forward_norm.weight": ("ffn_norm.weight", Layout()),
        "feed_forward.w1": ("feed_forward.w1.weight", Layout(0)),
        "feed_forward.w3": ("feed_forward.w3.weight", Layout(0)),
        "feed_forward.w2": ("feed_forward.w2.weight", Layout(1)),
    }
    for ours, theirs, heads in (("q", "q", sizes.heads), ("k", "k", sizes.kv_heads)):
        for leaf in ("weight", "bias"):
            theirs_name = f"attention.{theirs}_normalization.{leaf}"
            block[f"attention.{ours}_norm.{leaf}"] = (theirs_name, Layout(heads=heads, row=True))
    found = {
        "tok_embeddings.weight": ("tok_embeddings.weight", Layout(1)),
        "norm.weight": ("norm.weight", Layout()),
        "lm_head.weight": ("output.weight", Layout(0)),
    }
    for number in range(sizes.layers):
        for ours, (theirs, layout) in block.items():
            found[f"layers.{number}.{ours}"] = (f"layers.{number}.{theirs}", layout)
    return found


def shard_name(shard: int, name: str) -> str:
    """What tensor ``name`` of a shard is called here."""
    return f"{shard:02d}/{name}"


def import_recipes(sizes: Sizes, shards: int) -> dict[str, Recipe]:
    """Ours from the shards."""
    where = layouts(sizes)
    recipes = {}
    for ours, shape in tensor_shapes(sizes.decoder()).items():
        theirs, layout = where[ours]
        part = layout.shard_shape(shape, shards)
        sources = tuple((shard_name(shard, theirs), part) for shard in range(shards))
        recipes[ours] = Recipe(shape, sources, layout.join)
    return recipes


def export_recipes(sizes: Sizes, shards: int) -> dict[str, Recipe]:
    """The shards from ours, shard by shard."""
    where = layouts(sizes)
    recipes = {}
    for shard in range(shards):
        for ours, shape in tensor_shapes(sizes.decoder()).items():
            theirs, layout = where[ours]
            make: Callable[..., torch.Tensor] = partial(layout.part, shard, shards)
            part = layout.shard_shape(shape, shards)
            recipes[shard_name(shard, theirs)] = Recipe(part, ((ours, shape),), make)
    return recipes


def shards_that_hold(sizes: Sizes, tensors: Tensors, preferred: int) -> int:
    """The number of shards in which each one's heads share their qk-norm row.

    ``preferred`` if it is one, else the smallest. ``ValueError`` if there is none: Meta's layout
    has one row per shard.
    """
    divisible = (sizes.heads, sizes.kv_heads, sizes.vocab_size, sizes.hidden_dim, sizes.dim)
    possible = [n for n in range(1, sizes.kv_heads + 1) if not any(d % n for d in divisible)]
    for name, (_, layout) in layouts(sizes).items():
        if layout.row and possible:
            norm_NH = tensors.read(name)
            possible = [n for n in possible if _rows_equal(norm_NH.unflatten(0, (n, -1)))]
    if not possible:
        raise ValueError(
            "Meta's layout cannot express this model: its qk-norms differ between heads, and a "
            "shard of Meta's has one row for all its heads. Export it with --to hf"
        )
    return preferred if preferred in possible else possible[0]


def _rows_equal(rows_SNH: torch.Tensor) -> bool:
    return torch.equal(rows_SNH, rows_SNH[:, :1].expand_as(rows_SNH))


def read_sizes(params: JsonObject, entries: dict[str, Entry], shards: int) -> Sizes:
    """Sizes by ``params.json`` (with those of ``consolidate_params.json``) and the first shard.

    ``ValueError`` names what is missing, or what we do not compute.
    """
    inner = params.object("model", default={})
    values = {"rope_theta": 10_000.0, **params.values, **inner.values}
    given = JsonObject(values, params.where, params.remedy)
    missing = [name for name in ("dim", "n_layers", "n_heads") if name not in given]
    hidden = entries.get(shard_name(0, "layers.0.feed_forward.w1.weight"))
    output = entries.get(shard_name(0, "output.weight"))
    if missing or not (hidden and hidden.shape and output and output.shape):
        raise ValueError(
            f"{given.where} lacks {missing} or the shards hold no Chameleon (output.weight, "
            "layers.0.feed_forward.w1.weight): these are not Meta's Chameleon files"
        )
    wanted = {
        "qk_normalization": (values.get("qk_normalization", True), True),
        "norm_eps": (values.get("norm_eps", NORM_EPS), NORM_EPS),
    }
    refuse_others(given, wanted, "Chameleon's always is")
    values["n_kv_heads"] = values.get("n_kv_heads") or values["n_heads"]
    check_numbers(given, ("dim", "n_layers", "n_heads", "n_kv_heads", "rope_theta"))
    sizes = Sizes(
        dim=given.field("dim", int),
        layers=given.field("n_layers", int),
        heads=given.field("n_heads", int),
        kv_heads=given.field("n_kv_heads", int),
        hidden_dim=hidden.shape[0] * shards,
        vocab_size=output.shape[0] * shards,
        norm_order="swin" if given.field("swin_norm", bool, default=False) else "pre",
        rope_theta=given.field("rope_theta", float),
    )
    check_layers(sizes.layers, f"{given.where}: n_layers", entries)
    split = {"dim": sizes.dim, "n_heads": sizes.heads, "n_kv_heads": sizes.kv_heads}
    for name, size in split.items():
        if size % shards:
            raise ValueError(
                f"{given.where}: {name} ({size}) cannot be split over {shards} shards; "
                f"model_parallel_size is {shown(values.get('model_parallel_size'))}: is a file "
                "missing?"
            )
    return sizes


def write_params(
    sizes: Sizes, config: Decoder.Config, vocabulary: Vocabulary, shards: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``params.json`` and ``consolidate_params.json``."""
    model = {
        "dim": sizes.dim,
        "n_layers": sizes.layers,
        "n_heads": sizes.heads,
        "n_kv_heads": sizes.kv_heads,
        "vocab_size": sizes.vocab_size,
        "norm_eps": NORM_EPS,
        "rope_theta": sizes.rope_theta,
        "qk_normalization": True,
        "swin_norm": sizes.norm_order == "swin",
        **_width(sizes),
    }
    ours = {"model": decoder_config.to_dict(config), "vocabulary": vocabulary.to_dict()}
    return {"model_parallel_size": shards, "model": model, OURS: ours}, {
        "model_parallel_size": shards
    }


def _width(sizes: Sizes) -> dict[str, Any]:
    """What Meta's code computes the width of the feed-forward from:

    multiple_of · ceil(int(ffn_dim_multiplier · int(8 dim / 3)) / multiple_of), multiplier 1 unless
    given.
    """
    natural = int(8 * sizes.dim / 3)
    if sizes.hidden_dim == 256 * -(-natural // 256):
        return {"multiple_of": 256}
    # half of the width, rounded up to the next multiple of all of it
    return {
        "multiple_of": sizes.hidden_dim,
        "ffn_dim_multiplier": 0.5 * sizes.hidden_dim / natural,
    }
