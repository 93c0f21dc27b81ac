"""ForwardContext: what every layer needs to know about a batch and a step, computed once.

B rows, S positions, L positions of a row up to the last one here, T = B·S tokens, R selected
tokens, N routers with noise, H width of a head.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch

from earlyfuse.models.batch import PADDING, MixedBatch, places_in_documents
from earlyfuse.models.blocks.cache import DecodeCache
from earlyfuse.models.blocks.sequence_shard import FullSequence, SequenceShard
from earlyfuse.models.field_checks import check_choices
from earlyfuse.models.masks import Mask, attention_mask, attention_spans, merged_masks
from earlyfuse.models.routes import Routes, by_modality

Rule = Literal["batch", "causal", "threshold"]


@dataclass(frozen=True)
class ForwardSettings:
    """Settings of a step or call, not of the model or the batch.

    ``rule``            how experts choose: "batch", the top tokens of each routing group; "causal",
                        by the causal routers, or "threshold", by running thresholds, so that no
                        output depends on later tokens or other rows. All are the same for models
                        without expert choice
    ``budgets``         "configured" in each router, or "exact", from counts that the host waits for
    ``step``            training step, from 1, for router noise; 0: no noise
    ``step_tokens``     tokens of the step over all ranks and micro-batches, which normalise losses
                        of causal routers; None: those of the batch
    ``first_row``       number of the batch's first row in the global batch
    ``recording``       routers and the last block record statistics
    ``sequence_shard``  which part of each row the batch holds
    """

    rule: Rule = "batch"
    budgets: Literal["configured", "exact"] = "configured"
    step: int = 0
    step_tokens: float | None = None
    first_row: int = 0
    recording: bool = False
    sequence_shard: SequenceShard = field(default_factory=FullSequence)

    def __post_init__(self) -> None:
        check_choices(self, rule=get_args(Rule), budgets=("configured", "exact"))


@dataclass
class ForwardContext:
    """Row, document, position and modality of each token, and the settings of the forward.

    ``group_T``       (T,) int64: modality group of each token; indexes untied parameters
    ``by_group``      the same as routes, every token once
    ``cos_BS1H``, ``sin_BS1H``  (B, S, 1, H) fp32: see ``rotary_angles``; H is 0 without attention
    ``mask``          see ``attention_mask``; None without attention
    ``document_BS``   (B, S): see ``MixedBatch``
    ``place_BS``      (B, S) int64: tokens of the same document before each one; convolutions and
                      scans are reset where it is 0
    ``row_place_T``   (T,) int64: row of the global batch · its length + position in the row
    ``noise_2N``      key and scale of each router's noise: see ``RouterNoise``
    ``cache``         states of earlier tokens, while decoding
    ``depth_weights`` weight and bias of the depth router that layers share, if any do
    ``real_T``        (T,) bool: False for tokens that only fill a selection up, which no expert
                      takes; None: all are real
    ``merged_rows``   rows of the batch that a row of a selection has tokens of
    ``attention_span_BS``  (B, S): see ``attention_spans``; None: attention is causal
    """

    rows: int
    seq_len: int
    settings: ForwardSettings
    group_T: torch.Tensor
    by_group: Routes
    cos_BS1H: torch.Tensor
    sin_BS1H: torch.Tensor
    mask: Mask
    document_BS: torch.Tensor
    span_BS: torch.Tensor
    place_BS: torch.Tensor
    row_place_T: torch.Tensor
    rope_theta: float = 10_000.0
    noise_2N: tuple[torch.Tensor, torch.Tensor] | None = None
    cache: DecodeCache | None = None
    depth_weights: tuple[torch.Tensor, torch.Tensor | None] | None = None
    real_T: torch.Tensor | None = None
    merged_rows: int = 1
    attention_span_BS: torch.Tensor | None = None

    @property
    def sequence_shard(self) -> SequenceShard:
        """The part of each row on this rank, and how to reach the rest."""
        return self.settings.sequence_shard

    @classmethod
    def build(
        cls,
        batch: MixedBatch,
        settings: ForwardSettings | None = None,
        *,
        modalities: tuple[int, ...],
        head_dim: int,
        rope_theta: float,
        cache: DecodeCache | None = None,
        noise_2N: tuple[torch.Tensor, torch.Tensor] | None = None,
        depth_weights: tuple[torch.Tensor, torch.Tensor | None] | None = None,
        bidirectional: bool = False,
        noised_hidden: bool = False,
    ) -> "ForwardContext":
        """The context of ``batch``; with ``cache``, of the next tokens of its documents, where a
        row is one whole document. ``head_dim`` 0: no attention.

        ``bidirectional``: attention inside spans of vectors; with a cache, a call holds all vectors
        of a span. ``noised_hidden``: spans are there twice, and no later token sees the noised copy
        (``attention_spans``); with a cache they are there once.
        """
        if noised_hidden and not bidirectional:
            raise ValueError(
                "noised_hidden (True) needs bidirectional (True): a noised copy that is hidden "
                "from later tokens is a bidirectional span; set both, or neither"
            )
        settings = settings or ForwardSettings()
        if cache is not None:
            settings = replace(settings, sequence_shard=FullSequence())
        shard = settings.sequence_shard
        rows, seq_len = batch.modality_BS.shape
        device = batch.modality_BS.device
        first = shard.index * seq_len
        document_BL = batch.document_BS[:, : first + seq_len]
        span_BS = None
        if bidirectional:
            span_BS = attention_spans(batch, noised_hidden)
        if span_BS is not None and shard.parts > 1:
            raise ValueError("bidirectional attention needs whole rows: no context parallelism")
        mask: Mask = None
        if cache is not None:
            place_BS, mask = cache.places(seq_len), cache.mask(seq_len, span_BS)
        else:
            place_BS = places_in_documents(document_BL)[:, first:].contiguous()
            if head_dim:
                mask = attention_mask(document_BL, first, span_BS)
        row_B1 = torch.arange(rows, device=device)[:, None] + settings.first_row
        column_S = torch.arange(seq_len, device=device)
        row_place_BS = (row_B1 * shard.parts + shard.index) * seq_len + column_S
        group_T = group_of_modality(batch.modality_BS.reshape(-1), modalities)
        return cls(
            rows,
            seq_len,
            settings,
            group_T,
            by_modality(group_T, len(modalities)),
            *rotary_angles(batch.positions_BS, head_dim, rope_theta),
            mask,
            document_BL[:, first:],
            batch.span_BS,
            place_BS,
            row_place_BS.flatten(),
            rope_theta,
            noise_2N,
            cache,
            depth_weights,
            attention_span_BS=span_BS,
        )

    def select(
        self,
        routes: Routes,
        rows: int = 1,
        cache: DecodeCache | None = None,
        *,
        compacted: bool = False,
        exact: bool = False,
    ) -> "ForwardContext":
        """The context of the tokens of ``routes`` alone, for a block that runs on a selection.

        ``routes`` has one group; its ``row_R`` ascends. ``rows``: 1, all selected tokens in a row,
        or the rows of this context if each has equally many selected tokens. Either way a block
        computes what it would without the other tokens: documents stay separate, rotary positions
        keep their gaps unless ``compacted``. Tokens of weight 0 are padding, which no other token
        sees; they interrupt convolutions and scans, so they must come last in their row.
        ``exact``: their number follows from the batch, so experts have exact budgets.
        """
        if self.sequence_shard.parts > 1:
            raise ValueError("select needs whole rows: no context parallelism")
        if (self.cache is None) != (cache is None):
            raise ValueError("while decoding, a selection needs a decode cache of its own")
        row_R = routes.row_R
        # documents of different rows may now share a row
        document_R = self.document_BS.flatten()[row_R] + (row_R // self.seq_len << 32)
        padding_R = self.document_BS.flatten()[row_R] == PADDING
        real_R = None if self.real_T is None else self.real_T[row_R]
        if routes.weight_R is not None:
            filled_R = routes.weight_R != 0
            real_R = filled_R if real_R is None else real_R & filled_R
            padding_R = padding_R | ~filled_R
        document_BS = document_R.masked_fill(padding_R, PADDING).view(rows, -1)
        group_T, head_dim = self.group_T[row_R], self.cos_BS1H.shape[-1]
        span_BS = self.attention_span_BS
        if span_BS is not None:
            span_BS = span_BS.flatten()[row_R].view(rows, -1)
        mask: Mask = None
        if cache is not None:
            seq_len = document_BS.shape[1]
            place_BS, mask = cache.places(seq_len), cache.mask(seq_len, span_BS)
        else:
            place_BS = places_in_documents(document_BS)
            if head_dim and rows < self.rows:
                mask = merged_masks(document_BS, (row_R // self.seq_len).view(rows, -1), span_BS)
            if head_dim and mask is None:
                mask = attention_mask(document_BS, 0, span_BS, padding_is_read=False)
        if compacted:
            cos_BS1H, sin_BS1H = rotary_angles(place_BS, head_dim, self.rope_theta)
        else:
            cos_BS1H, sin_BS1H = (
                angle.flatten(0, 1)[row_R].unflatten(0, document_BS.shape)
                for angle in (self.cos_BS1H, self.sin_BS1H)
            )
        settings = replace(self.settings, budgets="exact") if exact else self.settings
        return replace(
            self,
            rows=rows,
            seq_len=document_BS.shape[1],
            settings=settings,
            group_T=group_T,
            by_group=by_modality(group_T, len(self.by_group.offset_G1) - 1),
            cos_BS1H=cos_BS1H,
            sin_BS1H=sin_BS1H,
            mask=mask,
            document_BS=document_BS,
            span_BS=self.span_BS.flatten()[row_R].view(rows, -1),
            place_BS=place_BS,
            row_place_T=self.row_place_T[row_R],
            real_T=real_R,
            cache=cache,
            merged_rows=self.merged_rows * (self.rows // rows),
            attention_span_BS=span_BS,
        )


def group_of_modality(modality_T: torch.Tensor, modalities: tuple[int, ...]) -> torch.Tensor:
    """(T,) ids → (T,) int64 index into ``modalities``; unknown ids join group 0."""
    group_T = torch.zeros_like(modality_T, dtype=torch.int64)
    for group, modality in enumerate(modalities):  # the host would wait to copy a table over
        group_T = group_T.masked_fill(modality_T == modality, group)
    return group_T


def rotary_angles(
    positions_BS: torch.Tensor, head_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed sin, (B, S, 1, head_dim) fp32, of position / theta^(2i/head_dim).

    Angle i belongs to dimensions i and i + head_dim/2 (RoFormer 15, in halves): cos is repeated,
    sin is -sin, then sin.
    """
    even_H = torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=torch.float32)
    exponent_H = even_H / head_dim
    angle_BS1H = positions_BS.float()[:, :, None, None] * theta**-exponent_H
    cos, sin = angle_BS1H.cos(), angle_BS1H.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
