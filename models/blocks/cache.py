"""What a decoding session has read, kept by each block so that no token is read twice.

``DecodeCache`` travels in the ``ForwardContext``. A block looks up its own state there,
``layout.cache.state(self, Kind)``, made when it first asks. A kind of state is a class like
``KVCache`` below: built from the session, it is filled by its block, and ``select`` drops rows
of documents that have ended. Forward signatures stay as they are.

Token i of a document has position i, and a row holds one document. Rows are filled from the left,
so prompts of different lengths end at different places: ``real_B`` says where. What a state takes
in behind that place is overwritten before anyone may see it; a state that sums over positions must
leave it out. Position 0 begins a document anew, whatever the row held before.

B rows, S positions of this call, L slots, K key/value heads, H width of a head, D width.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import nn


class State(Protocol):
    """What one block keeps."""

    def select(self, row_R: torch.Tensor) -> None:
        """Keep these rows alone, in this order."""


S = TypeVar("S", bound=State)


class DecodeCache:
    """The state of ``rows`` documents of at most ``slots`` tokens, over all blocks of a model."""

    def __init__(self, rows: int, slots: int):
        self.rows, self.slots = rows, slots
        self.real_B: torch.Tensor | None = None
        self.seen = 0
        self._states: dict[nn.Module, State] = {}

    def expect(self, real_B: torch.Tensor, seen: int) -> None:
        """Before each forward: how many tokens of each row are real (from the left), and how long
        the longest document will be after it.
        """
        if seen > self.slots:
            raise ValueError(
                f"a document of {seen} tokens does not fit into the {self.slots} slots of this "
                "session; begin it with more"
            )
        self.real_B, self.seen = real_B, seen

    def begin(self, positions_BS: torch.Tensor) -> torch.Tensor:
        """Take note of the positions of a forward; who attends whom in it, (B, 1, S, seen) bool."""
        self.positions_BS = positions_BS
        slot_L = torch.arange(self.seen, device=positions_BS.device)
        return slot_L <= positions_BS[:, None, :, None]

    def state(self, block: nn.Module, kind: Callable[["DecodeCache"], S]) -> S:
        """What ``block`` keeps, ``kind(self)`` at first."""
        if block not in self._states:
            self._states[block] = kind(self)
        return self._states[block]  # type: ignore[return-value]

    def last(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """The last real token of each row, (B, 1, D)."""
        assert self.real_B is not None, "expect comes before a forward"
        if x_BSD.shape[1] == 1:
            return x_BSD
        rows_B = torch.arange(len(x_BSD), device=x_BSD.device)
        return x_BSD[rows_B, self.real_B - 1].unsqueeze(1)

    def select(self, row_R: torch.Tensor) -> None:
        """Go on with these rows alone, in this order."""
        self.rows = len(row_R)
        for state in self._states.values():
            state.select(row_R)


class KVCache:
    """Keys and values of an attention layer; the slot of a token is its position."""

    def __init__(self, cache: DecodeCache):
        self.cache = cache
        self.keys_BKLH: torch.Tensor | None = None
        self.values_BKLH: torch.Tensor | None = None

    def extend(
        self, k_BSKH: torch.Tensor, v_BSKH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in keys and values at the session's positions; all seen so far, (B, seen, K, H)."""
        if self.keys_BKLH is None or self.values_BKLH is None:
            # zeros: a slot that nobody may see still meets a weight of 0, and 0 · NaN is NaN
            rows, _, heads, width = k_BSKH.shape
            self.keys_BKLH = k_BSKH.new_zeros(rows, heads, self.cache.slots, width)
            self.values_BKLH = torch.zeros_like(self.keys_BKLH)
        at_BS, seen = self.cache.positions_BS, self.cache.seen
        row_B1 = torch.arange(len(at_BS), device=at_BS.device).unsqueeze(1)
        self.keys_BKLH[row_B1, :, at_BS] = k_BSKH
        self.values_BKLH[row_B1, :, at_BS] = v_BSKH
        return (
            self.keys_BKLH[:, :, :seen].transpose(1, 2),
            self.values_BKLH[:, :, :seen].transpose(1, 2),
        )

    def select(self, row_R: torch.Tensor) -> None:
        """See ``State``."""
        if self.keys_BKLH is not None and self.values_BKLH is not None:
            self.keys_BKLH = self.keys_BKLH[row_R]
            self.values_BKLH = self.values_BKLH[row_R]
