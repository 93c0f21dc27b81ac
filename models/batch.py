"""MixedBatch: the contract between data and models, one packed batch of mixed-modal rows.

B rows, S positions of a row, P numbers in a continuous vector.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F

IGNORE_LABEL = -100
PADDING = 0  # in document_BS


@dataclass
class MixedBatch:
    """B rows of S positions, packed from documents; the argument of ``Decoder.forward``.

    =====================  =============  =========================================================
    field                  shape, dtype   meaning
    =====================  =============  =========================================================
    ``tokens_BS``          (B, S) int64   ids in one vocabulary (``models/vocabulary.py``); at
                                          positions of a continuous medium its placeholder
    ``labels_BS``          (B, S) int64   the next token of the same document; -100: no loss
    ``modality_BS``        (B, S) uint8   modality of the *input* token; picks the parameters
    ``label_modality_BS``  (B, S) uint8   modality of the label; 0 where there is none
    ``document_BS``        (B, S) int32   number of the document (or tail) in its row, from 1; 0 is
                                          padding. Masks and state resets derive from it
    ``positions_BS``       (B, S) int64   rotary position in the document, and nothing else
    ``span_BS``            (B, S) int32   0 outside media, else the number (from 1) of the image,
                                          frame or utterance in the row
    ``source_BS``          (B, S) uint8   the data source that the position is from
    ``vectors_BSP``        (B, S, P)      continuous vectors at media positions, float, or none
    ``has_vector_BS``      (B, S) bool    positions that hold one; none without ``vectors_BSP``
    ``time_BS``            (B, S) fp32    diffusion time of each vector, from 0, clean, to 1, noise;
                                          none: all are clean. Set by objective or sampler
    ``target_BSP``         (B, S, P)      what a model should predict of each vector; set by the
                                          objective
    =====================  =============  =========================================================
    """

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    modality_BS: torch.Tensor
    label_modality_BS: torch.Tensor
    document_BS: torch.Tensor
    positions_BS: torch.Tensor
    span_BS: torch.Tensor
    source_BS: torch.Tensor
    vectors_BSP: torch.Tensor | None = None
    has_vector_BS: torch.Tensor | None = None
    time_BS: torch.Tensor | None = None
    target_BSP: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        tokens_BS: torch.Tensor,
        modality_BS: torch.Tensor | None = None,
        document_BS: torch.Tensor | None = None,
        *,
        positions_BS: torch.Tensor | None = None,
        labels_BS: torch.Tensor | None = None,
        label_modality_BS: torch.Tensor | None = None,
        vectors_BSP: torch.Tensor | None = None,
        has_vector_BS: torch.Tensor | None = None,
        time_BS: torch.Tensor | None = None,
    ) -> "MixedBatch":
        """A batch from tokens alone: all text, one document per row, no labels, unless given.

        Positions count from 0 in each document; spans follow from ``modality_BS``.
        """
        bytes_BS = torch.zeros_like(tokens_BS, dtype=torch.uint8)
        ints_BS = torch.zeros_like(tokens_BS, dtype=torch.int32)
        if document_BS is None:
            document_BS = ints_BS + 1
        return cls(
            tokens_BS,
            torch.full_like(tokens_BS, IGNORE_LABEL) if labels_BS is None else labels_BS,
            bytes_BS if modality_BS is None else modality_BS,
            bytes_BS if label_modality_BS is None else label_modality_BS,
            document_BS,
            places_in_documents(document_BS) if positions_BS is None else positions_BS,
            ints_BS if modality_BS is None else spans(modality_BS),
            bytes_BS,
            vectors_BSP,
            has_vector_BS,
            time_BS,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "MixedBatch":
        """This batch on ``device``; ``non_blocking`` copies overlap only from pinned memory."""
        return self._map(lambda _, tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "MixedBatch":
        """This batch in page-locked host memory, for non-blocking copies."""
        return self._map(lambda _, tensor: tensor.pin_memory())

    def part(self, positions: slice) -> "MixedBatch":
        """Views of these positions of every row.

        ``document_BS`` keeps whole rows: masks and state resets depend on earlier positions.
        """
        return self._map(lambda name, t: t if name == "document_BS" else t[:, positions])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Field name → tensor, without the absent ones."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def _map(self, function: Callable[[str, torch.Tensor], torch.Tensor]) -> "MixedBatch":
        return MixedBatch(**{name: function(name, t) for name, t in self.tensors().items()})


def spans(modality_BS: torch.Tensor) -> torch.Tensor:
    """(B, S) int32: number of the item (image, frame, utterance) in its row, from 1; 0 on text.

    Sentinels stand between items and items are whole, so a run of one modality is one item.
    """
    media_BS = modality_BS != 0
    begins_BS = media_BS.clone()
    begins_BS[:, 1:] &= modality_BS[:, 1:] != modality_BS[:, :-1]
    return begins_BS.cumsum(1, dtype=torch.int32) * media_BS


def vector_spans(batch: MixedBatch) -> torch.Tensor | None:
    """(B, S) int32: ``span_BS`` at positions that hold a vector, 0 elsewhere; None without any."""
    return None if batch.has_vector_BS is None else batch.span_BS * batch.has_vector_BS


def first_of_spans(span_BS: torch.Tensor) -> torch.Tensor:
    """(B, S) int64: place in its row of the first position of each position's span; 0 outside."""
    begins_BS = span_BS != 0
    begins_BS[:, 1:] &= span_BS[:, 1:] != span_BS[:, :-1]
    place_S = torch.arange(span_BS.shape[1], device=span_BS.device)
    return torch.where(begins_BS, place_S, 0).cummax(1).values * (span_BS != 0)


def without_clean_copies(span_BS: torch.Tensor) -> torch.Tensor:
    """``vector_spans`` without clean copies, which follow the noised copy directly."""
    return span_BS * ~directly_after_another(span_BS)


def directly_after_another(span_BS: torch.Tensor) -> torch.Tensor:
    """(B, S) bool: positions of spans that follow another one without a token between."""
    previous_BS = F.pad(span_BS[:, :-1], (1, 0))
    after_BS = (previous_BS != 0) & (previous_BS != span_BS)
    return after_BS.gather(1, first_of_spans(span_BS)) & (span_BS != 0)


def with_shared_positions(batch: MixedBatch) -> MixedBatch:
    """``batch`` with one rotary position for all vectors of an image, so that the token after them
    is one further.
    """
    if (span_BS := vector_spans(batch)) is None or batch.has_vector_BS is None:
        return batch
    counted_BS = without_clean_copies(span_BS)
    place_S = torch.arange(span_BS.shape[1], device=span_BS.device)
    again_BS = (counted_BS != 0) & (first_of_spans(counted_BS) != place_S)
    skipped_BS = again_BS.cumsum(1)
    begin_BS = place_S - places_in_documents(batch.document_BS)
    position_BS = batch.positions_BS - (skipped_BS - skipped_BS.gather(1, begin_BS))
    # of a clean copy too
    first_BS = first_of_spans(batch.has_vector_BS.int())
    shared_BS = position_BS.gather(1, first_BS)
    return replace(batch, positions_BS=torch.where(batch.has_vector_BS, shared_BS, position_BS))


def places_in_documents(document_BS: torch.Tensor) -> torch.Tensor:
    """(B, S) int64: number of tokens of the same document before each token in its row.

    A document begins where the number changes; each padding token is its own document.
    """
    place_S = torch.arange(document_BS.shape[1], device=document_BS.device)
    begins_BS = torch.ones_like(document_BS, dtype=torch.bool)
    begins_BS[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    begins_BS |= document_BS == PADDING
    return place_S - torch.where(begins_BS, place_S, 0).cummax(1).values
