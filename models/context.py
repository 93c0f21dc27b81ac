"""ForwardContext: what every layer needs to know of a batch, worked out once and handed down.

B rows, S positions, L positions of a row up to the last one here, T = B·S tokens, H width of a
head.
"""

from dataclasses import dataclass, field

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from earlyfuse.models.blocks.cache import DecodeCache
from earlyfuse.models.blocks.sequence_shard import FullSequence, SequenceShard
from earlyfuse.models.routes import Routes, by_modality


@dataclass
class ForwardContext:
    """Where each token of a batch sits: row, document, position, modality.

    ``group_T``     (T,) int64: modality group of each token; indexes untied parameters
    ``by_group``    the same as routes, every token once
    ``cos_BS1H``, ``sin_BS1H``  (B, S, 1, H) fp32: of the rotary angles; see ``rotary_angles``.
                    H is 0 where no layer attends
    ``mask``        who attends whom: see ``attention_mask``; None too where no layer attends
    ``positions_BS``  (B, S) int64: places in the documents; 0 resets convolutions and scans
    ``place_T``     (T,) int64: row of the global batch · its length + position in the row
    ``cache``    what blocks keep of the tokens read before, where a document is being written
    ``sequence_shard``    which part of each row the S positions are, and how to reach the others
    """

    rows: int
    seq_len: int
    group_T: torch.Tensor
    by_group: Routes
    cos_BS1H: torch.Tensor
    sin_BS1H: torch.Tensor
    mask: "torch.Tensor | BlockMask | None"
    positions_BS: torch.Tensor
    place_T: torch.Tensor
    cache: DecodeCache | None = None
    sequence_shard: SequenceShard = field(default_factory=FullSequence)

    @classmethod
    def build(
        cls,
        modality_BS: torch.Tensor,
        positions_BS: torch.Tensor,
        modalities: tuple[int, ...],
        head_dim: int,
        rope_theta: float,
        row_B: torch.Tensor | None = None,
        cache: DecodeCache | None = None,
        sequence_shard: SequenceShard | None = None,
    ) -> "ForwardContext":
        """Work out the context of one batch, or of a part of its rows, from its modalities and
        positions alone; with ``cache``, that of the next tokens of the session's documents,
        which are whole wherever they are written.

        ``head_dim`` 0: no layer attends. ``row_B`` int64: which rows of the global batch these
        are; the first ones if None.
        """
        rows, seq_len = positions_BS.shape
        if sequence_shard is None or cache is not None:
            sequence_shard = FullSequence()
        if row_B is None:
            row_B = torch.arange(rows, device=positions_BS.device)
        part_B = row_B * sequence_shard.parts + sequence_shard.index
        place_BS = part_B[:, None] * seq_len + torch.arange(seq_len, device=row_B.device)
        group_T = group_of_modality(modality_BS.reshape(-1), modalities)
        cos_BS1H, sin_BS1H = rotary_angles(positions_BS, head_dim, rope_theta)
        mask: torch.Tensor | BlockMask | None = None
        if cache is not None:
            mask = cache.begin(positions_BS)
        elif head_dim:
            mask = attention_mask(positions_BS, sequence_shard.index * seq_len)
        return cls(
            rows,
            seq_len,
            group_T,
            by_modality(group_T, len(modalities)),
            cos_BS1H,
            sin_BS1H,
            mask,
            positions_BS,
            place_BS.flatten(),
            cache,
            sequence_shard,
        )


def group_of_modality(modality_T: torch.Tensor, modalities: tuple[int, ...]) -> torch.Tensor:
    """(T,) ids → (T,) int64 index into ``modalities``; those the model lacks join group 0."""
    group_T = torch.zeros_like(modality_T, dtype=torch.int64)
    for group, modality in enumerate(modalities):  # no table: copying one over waits for the device
        group_T = group_T.masked_fill(modality_T == modality, group)
    return group_T


def rotary_angles(
    positions_BS: torch.Tensor, head_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed sin, (B, S, 1, head_dim) fp32, of position / theta^(2i/head_dim).

    Angle i belongs to dimensions i and i + head_dim/2 (RoFormer 15, in halves): cos is written
    twice, sin as -sin, then sin.
    """
    exponent_H = (
        torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=torch.float32) / head_dim
    )
    angle_BS1H = positions_BS.float()[:, :, None, None] * theta**-exponent_H
    cos, sin = angle_BS1H.cos(), angle_BS1H.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def attention_mask(positions_BS: torch.Tensor, first: int = 0) -> "torch.Tensor | BlockMask | None":
    """Causal within each document: a token sees as many before it as its position says.

    ``first``: place in the row of the first position here; the columns are those of the row from
    its start to the last position here, L. One definition, ``visible`` below. On CUDA it becomes a
    FlexAttention ``BlockMask``; elsewhere a boolean (B, 1, S, L) tensor for SDPA, or None where
    every row is whole and one document, and plain causal attention says the same at less cost.
    """
    rows, seq_len = positions_BS.shape

    def visible(
        b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        before = query + first - key
        return (before >= 0) & (before <= positions_BS[b, query])

    device, upto = positions_BS.device, first + seq_len
    if device.type == "cuda":
        return create_block_mask(visible, rows, None, seq_len, upto, device=device)
    query = torch.arange(seq_len, device=device)
    if first == 0 and bool((positions_BS >= query).all()):
        return None
    row = torch.arange(rows, device=device)[:, None, None, None]
    key = torch.arange(upto, device=device)
    return visible(row, row.new_zeros(1), query[:, None], key[None, :])
