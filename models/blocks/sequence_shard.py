"""Context parallelism as a layer sees it: this rank's slice of each row, and how to reach the rest.

A layer that looks along a row asks its ``SequenceShard`` for what other ranks have: attention for
keys and values, a convolution for the inputs before, a scan for the state before. Rows are split in
order into slices of equal length; masks and resets need no communication. The default is
``FullSequence``; ``parallel/strategies/context.py`` has ``ContextParallelShard``.

B rows, S positions here, K key/value heads, H width of a head, I channels, V inputs before.
"""

from typing import Protocol

import torch

from earlyfuse.kernels.selective_scan import selective_scan


class SequenceShard(Protocol):
    """``index``: which of the ``parts`` of a row this rank has, from 0."""

    index: int
    parts: int

    def keys_and_values(
        self, k_BSKH: torch.Tensor, v_BSKH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values from the start of the row to this slice, (B, (index + 1) S, K, H)."""

    def inputs_before(self, x_BSI: torch.Tensor, count: int) -> torch.Tensor | None:
        """The last ``count`` inputs before this slice, (B, V, I), zeros before the row; None in the
        first slice.
        """

    def scan(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        """Outputs of this slice of a scan over the row. ``inputs``: arguments of
        ``selective_scan`` in its order, without the state.
        """


class FullSequence:
    """Whole rows are on this rank."""

    index, parts = 0, 1

    def keys_and_values(
        self, k_BSKH: torch.Tensor, v_BSKH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return k_BSKH, v_BSKH

    def inputs_before(self, x_BSI: torch.Tensor, count: int) -> torch.Tensor | None:
        return None

    def scan(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        return selective_scan(*inputs)[0]  # type: ignore[arg-type]
