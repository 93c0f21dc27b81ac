"""MixedBatch: the contract between data and models. One packed batch of mixed-modal rows.

B rows, S positions in a row, P numbers in a continuous vector.
"""

import builtins
from dataclasses import dataclass, fields

import torch

IGNORE_LABEL = -100


@dataclass
class MixedBatch:
    """B rows of S positions, packed from documents.

    ================  =============  ==============================================================
    field             shape, dtype   meaning
    ================  =============  ==============================================================
    ``tokens_BS``     (B, S) int64   ids in one vocabulary (``models/vocabulary.py``)
    ``labels_BS``     (B, S) int64   the next token of the same document; -100: no loss
    ``modality_BS``   (B, S) uint8   modality of the *input* token; picks the parameters
    ``positions_BS``  (B, S) int64   restart at 0 with each document in the row: masks, RoPE and
                                     state resets all derive from it
    ``span_BS``       (B, S) int32   0 outside media, else the running number (from 1) of the
                                     image, frame or utterance in the row
    ``vectors_BSP``   (B, S, P)      continuous vectors at media positions, float, or none
    ================  =============  ==============================================================
    """

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    modality_BS: torch.Tensor
    positions_BS: torch.Tensor
    span_BS: torch.Tensor
    vectors_BSP: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """B."""
        return self.tokens_BS.shape[0]

    def to(self, device: torch.device | str) -> "MixedBatch":
        """The same batch on ``device``."""
        return MixedBatch(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Field name → tensor, without the absent ones."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def slice(self, start: int, stop: int) -> "MixedBatch":
        """Rows ``start … stop-1``."""
        return MixedBatch(**{name: tensor[start:stop] for name, tensor in self.tensors().items()})

    def part(self, positions: builtins.slice) -> "MixedBatch":
        """These positions of every row; views."""
        return MixedBatch(**{name: tensor[:, positions] for name, tensor in self.tensors().items()})
