"""Decode cache: per-layer state for incremental decoding.

``DecodeCache`` travels in the ``ForwardContext``. A block looks up its state there,
``context.cache.state(self, Kind)``, created at its first call. A kind of state is a class like
``KVCache`` below: built from the cache, filled by its block; ``select`` drops rows.

A row holds one document, and the cache counts its tokens: the slot of a token is its number,
whatever its rotary position. Rows are filled from the left, so prompts of different lengths end at
different places, ``real_B``. What a state stored after that place it overwrites before any token
may see it; a state that sums over positions must leave it out. A call that is not ``kept``, as a
step of denoising, computes with what was read before, and leaves the cache as it was.

B rows, S positions of this call, L slots, K key/value heads, H width of a head, D width.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import nn

from earlyfuse.models.masks import visible


class State(Protocol):
    """The state of one block."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""

    def select(self, row_R: torch.Tensor) -> None:
        """Keep only these rows, in this order."""


S = TypeVar("S", bound=State)


class DecodeCache:
    """The states of ``rows`` documents of at most ``slots`` tokens, over all blocks of a model.

    ``reserved``: slots that are allocated at once, None for all; more are as documents grow.
    """

    def __init__(self, rows: int, slots: int, reserved: int | None = None):
        self.rows, self.slots = rows, slots
        self.reserved = slots if reserved is None else reserved
        self.read_B: torch.Tensor | None = None  # tokens of each document before this call
        self.real_B: torch.Tensor | None = None
        self.kept = True
        self.longest = 0
        self._states: dict[nn.Module, State] = {}

    def start_step(
        self,
        real_B: torch.Tensor,
        longest: int,
        restart_B: torch.Tensor | None = None,
        kept: bool = True,
    ) -> None:
        """Call before each forward. ``real_B``: real tokens of each row, from the left;
        ``longest``: slots that the call needs, at least the tokens of the longest document after
        it; ``restart_B`` bool: rows that begin another document; ``kept`` False: the next call
        continues where this one does.
        """
        if longest > self.slots:
            raise ValueError(
                f"a document of {longest} tokens does not fit into the {self.slots} slots of the "
                "cache; create it with more"
            )
        self.read_B = self.tokens(real_B)
        if restart_B is not None:
            self.read_B = self.read_B.masked_fill(restart_B, 0)
        self.real_B, self.longest, self.kept = real_B, longest, kept

    def tokens(self, like_B: torch.Tensor) -> torch.Tensor:
        """(B,) int64: tokens of each document that were read and kept, the last call's too."""
        if self.read_B is None or self.real_B is None:
            return torch.zeros_like(like_B, dtype=torch.int64)
        return self.read_B + self.real_B if self.kept else self.read_B

    def places(self, seq_len: int) -> torch.Tensor:
        """(B, S) int64: the slots of this call's tokens."""
        assert self.read_B is not None, "start_step comes before a forward"
        return self.read_B[:, None] + torch.arange(seq_len, device=self.read_B.device)

    def mask(self, seq_len: int, span_BS: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 1, S, longest) bool: slots that each token of this call may see: earlier ones, and
        those of its span of vectors, which this call holds as a whole.
        """
        self.slot_BS = self.places(seq_len)
        slot_L = torch.arange(self.longest, device=self.slot_BS.device)
        slot_B1S1 = self.slot_BS[:, None, :, None]
        if span_BS is None or seq_len == 1:
            return slot_L <= slot_B1S1
        assert self.read_B is not None and self.real_B is not None
        here_BL = slot_L - self.read_B[:, None]  # place in this call
        real_BL = (here_BL >= 0) & (here_BL < self.real_B[:, None])
        span_BL = span_BS.gather(1, here_BL.clamp(0, seq_len - 1)).masked_fill(~real_BL, 0)
        spans = span_BS[:, None, :, None], span_BL[:, None, None, :]
        document = torch.ones_like(slot_L)  # one in a row
        return visible(slot_B1S1, slot_L, document, document, *spans)

    def state(self, block: nn.Module, kind: Callable[["DecodeCache"], S]) -> S:
        """The state of ``block``, created by ``kind(self)``."""
        if block not in self._states:
            self._states[block] = kind(self)
        return self._states[block]  # type: ignore[return-value]

    def last(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """The last real token of each row, (B, 1, D)."""
        assert self.real_B is not None, "start_step comes before a forward"
        if x_BSD.shape[1] == 1:
            return x_BSD
        rows_B = torch.arange(len(x_BSD), device=x_BSD.device)
        return x_BSD[rows_B, self.real_B - 1].unsqueeze(1)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all blocks."""
        return sum(state.nbytes for state in self._states.values())

    def select(self, row_R: torch.Tensor) -> None:
        """Continue with these rows only, in this order."""
        self.rows = len(row_R)
        if self.read_B is not None and self.real_B is not None:
            self.read_B, self.real_B = self.read_B[row_R], self.real_B[row_R]
        for state in self._states.values():
            state.select(row_R)


class KVCache:
    """Keys and values of an attention layer, by slot."""

    def __init__(self, cache: DecodeCache):
        self.cache = cache
        self.keys_BKLH: torch.Tensor | None = None
        self.values_BKLH: torch.Tensor | None = None

    def extend(
        self, k_BSKH: torch.Tensor, v_BSKH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values of this call; returns all so far, (B, longest, K, H)."""
        self.keys_BKLH = self._with_room(self.keys_BKLH, k_BSKH)
        self.values_BKLH = self._with_room(self.values_BKLH, v_BSKH)
        slot_BS, longest = self.cache.slot_BS, self.cache.longest
        row_B1 = torch.arange(len(slot_BS), device=slot_BS.device).unsqueeze(1)
        self.keys_BKLH[row_B1, :, slot_BS] = k_BSKH
        self.values_BKLH[row_B1, :, slot_BS] = v_BSKH
        keys_BKLH, values_BKLH = self.keys_BKLH[:, :, :longest], self.values_BKLH[:, :, :longest]
        return keys_BKLH.transpose(1, 2), values_BKLH.transpose(1, 2)

    def _with_room(self, stored_BKLH: torch.Tensor | None, x_BSKH: torch.Tensor) -> torch.Tensor:
        """Slots for the longest document: those there are, or a quarter more, with their values."""
        cache, there = self.cache, 0 if stored_BKLH is None else stored_BKLH.shape[2]
        if stored_BKLH is not None and there >= cache.longest:
            return stored_BKLH
        slots = max(cache.longest, min(cache.slots, there * 5 // 4 if there else cache.reserved))
        # zeros: masked slots have weight 0, and 0 · NaN is NaN
        rows, _, heads, width = x_BSKH.shape
        room_BKLH = x_BSKH.new_zeros(rows, heads, slots, width)
        if stored_BKLH is not None:
            room_BKLH[:, :, :there] = stored_BKLH
        return room_BKLH

    @property
    def nbytes(self) -> int:
        """See ``State``."""
        return sum(t.nbytes for t in (self.keys_BKLH, self.values_BKLH) if t is not None)

    def select(self, row_R: torch.Tensor) -> None:
        """See ``State``."""
        if self.keys_BKLH is not None and self.values_BKLH is not None:
            self.keys_BKLH = self.keys_BKLH[row_R]
            self.values_BKLH = self.values_BKLH[row_R]
