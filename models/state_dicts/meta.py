"""Meta's original Chameleon files: ``params.json`` and the layout of their shards, both ways.

Each ``consolidated.NN.pth`` is the shard of one of n model-parallel ranks (arXiv 2405.09818; layout
as in the public files):

==========================================  ========================================================
tensor                                      in shard i of n
==========================================  ========================================================
tok_embeddings, wo, w2                      part i of dimension 1
output, wq, wk, wv, w1, w3                  part i of dimension 0
attention_norm, ffn_norm, norm              replicated; the mean over shards is read
q_normalization, k_normalization            one row of head_dim, for all heads of the shard
==========================================  ========================================================

Meta's rotary positions rotate neighbours, (0, 1), (2, 3) …, ours halves, (0, h/2) …, so rows of
wq and wk and the values of the qk-norms are reordered within each head.

Tensor ``name`` of shard i is called ``0i/name`` here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from earlyfuse.data.json_files import JsonObject, shown
from earlyfuse.models.blocks.linear import NORM_EPS
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.state_dicts import vocabulary_map
from earlyfuse.models.state_dicts.config_json import own_description
from earlyfuse.models.state_dicts.plain_decoder import (
    chameleon_block,
    chameleon_parts,
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
)
from earlyfuse.models.state_dicts.tensor_map import (
    Entry,
    Mapped,
    Shape,
    TensorMap,
    Tensors,
    check_layers,
)
from earlyfuse.models.vocabulary import Vocabulary

PARAMS, CONSOLIDATE_PARAMS = "params.json", "consolidate_params.json"
TEXT_TOKENIZER = "text_tokenizer.json"
ROPE = "rope.freqs"  # in some files; follows from the config
_TARGET = "Meta's Chameleon"


@dataclass(frozen=True)
class ShardLayout:
    """Sharding of one of our tensors: along dimension ``dim``, or replicated.

    ``heads``: rotary heads along dimension 0, reordered within each; 0 for none. ``row``: a shard
    has one row for all its heads.
    """

    dim: int | None = None
    heads: int = 0
    row: bool = False

    def shard_shape(self, shape: Shape, shards: int) -> Shape:
        """Returns the shape in a shard of a tensor that has ``shape`` here."""
        if self.row:
            return shape[1:]
        if self.dim is None:
            return shape
        return (*shape[: self.dim], shape[self.dim] // shards, *shape[self.dim + 1 :])

    def join(self, *parts: torch.Tensor) -> torch.Tensor:
        """Returns our tensor from the shards."""
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
        """Returns shard ``shard`` of our tensor."""
        if self.row:
            return to_pairs(tensor[shard * len(tensor) // shards], 1)
        if self.dim is None:
            return tensor
        length = tensor.shape[self.dim] // shards
        own = tensor.narrow(self.dim, shard * length, length)
        return to_pairs(own, self.heads // shards) if self.heads else own


def to_halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Moves neighbours (2i, 2i + 1) of each head, along dimension 0, to i and i + head_dim/2."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


def to_pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Inverse of ``to_halves``."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def layouts(config: Decoder.Config) -> dict[str, tuple[str, ShardLayout]]:
    """Returns our name → Meta's name and layout, for every tensor."""
    attention, _ = chameleon_parts(config, _TARGET)
    q, k = attention.heads, attention.kv_heads
    block = {
        "attention_norm.weight": ("attention_norm.weight", ShardLayout()),
        "attention.wq.weight": ("attention.wq.weight", ShardLayout(0, q)),
        "attention.wk.weight": ("attention.wk.weight", ShardLayout(0, k)),
        "attention.wv.weight": ("attention.wv.weight", ShardLayout(0)),
        "attention.wo.weight": ("attention.wo.weight", ShardLayout(1)),
        "feed_forward_norm.weight": ("ffn_norm.weight", ShardLayout()),
        "feed_forward.w1": ("feed_forward.w1.weight", ShardLayout(0)),
        "feed_forward.w3": ("feed_forward.w3.weight", ShardLayout(0)),
        "feed_forward.w2": ("feed_forward.w2.weight", ShardLayout(1)),
    }
    for which, heads in (("q", q), ("k", k)):
        for leaf in ("weight", "bias"):
            theirs = f"attention.{which}_normalization.{leaf}"
            layout = ShardLayout(heads=heads, row=True)
            block[f"attention.{which}_norm.{leaf}"] = (theirs, layout)
    found = {
        "tok_embeddings.weight": ("tok_embeddings.weight", ShardLayout(1)),
        "norm.weight": ("norm.weight", ShardLayout()),
        "lm_head.weight": ("output.weight", ShardLayout(0)),
    }
    for number in range(len(config.layers)):
        for ours, (theirs, layout) in block.items():
            found[f"layers.{number}.{ours}"] = (f"layers.{number}.{theirs}", layout)
    return found


def shard_name(shard: int, name: str) -> str:
    """Returns the name here of tensor ``name`` of a shard."""
    return f"{shard:02d}/{name}"


def import_model(
    params: JsonObject, entries: Mapping[str, Entry], shards: int, tokens: JsonObject | None
) -> Imported:
    """Imports the model that ``params`` (``params.json`` with ``consolidate_params.json``) and the
    shapes of the first shard describe. ``tokens``: token → id of its text tokenizer.

    ``ValueError`` names what is missing or not supported.
    """
    config = _read_config(params, entries, shards)
    maps, where = {}, layouts(config)
    for ours, shape in tensor_shapes(config).items():
        theirs, layout = where[ours]
        part = layout.shard_shape(shape, shards)
        sources = tuple((shard_name(shard, theirs), part) for shard in range(shards))
        maps[ours] = TensorMap(shape, sources, layout.join)
    if OURS in params:
        config, vocabulary = read_ours(params, config)
        remark = ""
    else:
        vocabulary, remark = _vocabulary(params, config.vocab_size, tokens)
    carried = {"shards": shards, "params": params.values}
    return Imported(config, vocabulary, maps, carried=carried, remark=remark)


def _vocabulary(params: JsonObject, size: int, tokens: JsonObject | None) -> tuple[Vocabulary, str]:
    rows = JsonObject({"vocab_size": size}, params.where, params.remedy)
    if tokens is not None:
        return vocabulary_map.to_vocabulary(tokens, rows, vocabulary_map.RELEASED_BLOCK)
    if size == vocabulary_map.RELEASED_SIZE:
        return vocabulary_map.released(), "ids are those of the released models"
    text_only = JsonObject(vocabulary_map.TEXT_ONLY, "the released vocabulary", params.remedy)
    vocabulary, _ = vocabulary_map.to_vocabulary(text_only, rows, 1)
    return vocabulary, f"no {TEXT_TOKENIZER} was found"


def _read_config(params: JsonObject, entries: Mapping[str, Entry], shards: int) -> Decoder.Config:
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
    dim, layers, heads, kv_heads = sizes(given, "dim", "n_layers", "n_heads", "n_kv_heads")
    rope_theta = positive(given, "rope_theta")
    block = chameleon_block(
        dim=dim,
        heads=heads,
        kv_heads=kv_heads,
        hidden_dim=hidden.shape[0] * shards,
        norm_order="swin" if given.field("swin_norm", bool, default=False) else "pre",
    )
    check_layers(layers, f"{given.where}: n_layers", entries)
    for name in ("dim", "n_heads", "n_kv_heads"):
        if values[name] % shards:
            raise ValueError(
                f"{given.where}: {name} ({values[name]}) cannot be split over {shards} shards; "
                f"model_parallel_size is {shown(values.get('model_parallel_size'))}: is a file "
                "missing?"
            )
    vocab_size = output.shape[0] * shards
    return plain_decoder(block, layers=layers, vocab_size=vocab_size, rope_theta=rope_theta)


def export_model(
    config: Decoder.Config, vocabulary: Vocabulary, tensors: Tensors, carried: JsonObject | None
) -> Exported:
    """Exports a model of ours as Meta's shards and configs: as many shards as it came with, else
    the fewest. ``ValueError`` says why the format cannot express the model.
    """
    attention, feed_forward = chameleon_parts(config, _TARGET)
    shapes, where = tensor_shapes(config), layouts(config)
    preferred = 1 if carried is None else carried.field("shards", int, default=1, least=1)
    divisible = (attention.heads, config.vocab_size, feed_forward.hidden_dim, config.dim)
    shards = _possible_shards(where, tensors, attention.kv_heads, divisible, preferred)
    maps = {}
    for shard in range(shards):
        for ours, shape in shapes.items():
            theirs, layout = where[ours]
            make: Callable[..., torch.Tensor] = partial(layout.part, shard, shards)
            part = layout.shard_shape(shape, shards)
            maps[shard_name(shard, theirs)] = TensorMap(part, ((ours, shape),), make)
    model = {
        "dim": config.dim,
        "n_layers": len(config.layers),
        "n_heads": attention.heads,
        "n_kv_heads": attention.kv_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": NORM_EPS,
        "rope_theta": config.rope_theta,
        "qk_normalization": True,
        "swin_norm": config.layers[0].norm_order == "swin",
        **feed_forward_fields(config.dim, feed_forward.hidden_dim),
    }
    params: dict[str, Any] = {
        "model_parallel_size": shards,
        "model": model,
        OURS: own_description(config, vocabulary),
    }
    files = {PARAMS: params, CONSOLIDATE_PARAMS: {"model_parallel_size": shards}}
    return Exported(Mapped(maps, tensors), files, shards=shards)


def _possible_shards(
    where: Mapping[str, tuple[str, ShardLayout]],
    tensors: Tensors,
    kv_heads: int,
    divisible: tuple[int, ...],
    preferred: int,
) -> int:
    """Returns a number of shards in which the heads of each have the same qk-norm row:
    ``preferred``, else the smallest. ``ValueError`` if there is none.
    """
    possible = [n for n in range(1, kv_heads + 1) if not any(d % n for d in (kv_heads, *divisible))]
    for name, (_, layout) in where.items():
        if layout.row and possible:
            norm_NH = tensors.read(name)
            possible = [n for n in possible if _rows_equal(norm_NH.unflatten(0, (n, -1)))]
    if not possible:
        raise ValueError(
            "Meta's layout cannot express this model: its qk-norms differ between heads, and a "
            "shard has one row for all its heads; export it with --to hf"
        )
    return preferred if preferred in possible else possible[0]


def _rows_equal(rows_SNH: torch.Tensor) -> bool:
    return torch.equal(rows_SNH, rows_SNH[:, :1].expand_as(rows_SNH))


def feed_forward_fields(dim: int, hidden_dim: int) -> dict[str, Any]:
    """Returns the fields from which Meta's code computes the width of the feed-forward:

    multiple_of · ceil(int(ffn_dim_multiplier · int(8 dim / 3)) / multiple_of), multiplier 1 unless
    given.
    """
    natural = int(8 * dim / 3)
    if hidden_dim == 256 * -(-natural // 256):
        return {"multiple_of": 256}
    # half of the width, rounded up to the next multiple of all of it
    return {"multiple_of": hidden_dim, "ffn_dim_multiplier": 0.5 * hidden_dim / natural}
