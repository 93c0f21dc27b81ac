"""Growth of a vocabulary: embedding and head of a model whose child has other token ids.

Ids that the parent has keep their rows. New rows of the embedding are the mean of these rows plus
normal noise of their standard deviation in each column, so that they look like the others and
differ from one another; new rows of the head are the mean, with which no new id is likelier than
the average of the old ones (Hewitt 2021, "Initializing new word embeddings").

V ids of the child, N new ones, D width.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from earlyfuse.models.blocks.branch import Inherited, Shape

EMBEDDING, HEAD = "tok_embeddings.weight", "lm_head.weight"


@dataclass(frozen=True)
class GrownRows(Inherited):
    """Embedding or head of the child; ``row_V``: the parent's row of each id, None for a new id."""

    row_V: tuple[int | None, ...] = ()
    seed: int = 0

    def make(self, tensor: torch.Tensor) -> torch.Tensor:
        """The child's tensor, from the parent's."""
        row_V = torch.tensor([-1 if row is None else row for row in self.row_V])
        grown_VD, new_V = tensor[row_V.clamp(min=0)], row_V < 0
        known_KD = tensor[row_V[~new_V]].float()
        mean_D, count = known_KD.mean(0), int(new_V.sum())
        new_ND = mean_D.expand(count, -1)
        if self.name == EMBEDDING:
            generator = torch.Generator().manual_seed(
                zlib.crc32(f"{self.seed}:{self.name}".encode())
            )
            noise_ND = torch.randn(count, len(mean_D), generator=generator)
            new_ND = mean_D + noise_ND * known_KD.std(0, correction=0)
        grown_VD[new_V] = new_ND.to(tensor.dtype)
        return grown_VD


def grown_rows(
    name: str, shape: Shape, parent: Shape, row_V: Sequence[int | None], seed: int
) -> GrownRows:
    """The origin of embedding or head ``name``; ``ValueError`` unless widths and ids fit."""
    if parent[1:] != shape[1:] or len(row_V) != shape[0]:
        raise ValueError(f"{name} is {shape}, in the parent {parent} with {len(row_V)} ids mapped")
    return GrownRows(name, parent, None, tuple(row_V), seed)
