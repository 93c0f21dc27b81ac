"""Decode state of a depth-routed block.

B rows, S slots of this call.
"""

import torch

from earlyfuse.models.blocks.cache import DecodeCache


class KeptCache:
    """The decode cache of a depth-routed block: counts the tokens that it kept of each row, and
    allocates slots for these alone.
    """

    def __init__(self, outer: DecodeCache):
        self.outer = outer
        self.cache = DecodeCache(outer.rows, outer.slots, reserved=0)

    def start_step(self, real_BS: torch.Tensor) -> None:
        """Before the block: which of this call's kept slots are real."""
        assert self.outer.read_B is not None, "start_step comes before a forward"
        restart_B = self.outer.read_B == 0
        real_B = real_BS.sum(1)
        before_B = self.cache.tokens(real_B).masked_fill(restart_B, 0)
        # slots of tokens that only fill up are written too, and overwritten later
        longest = int((before_B + real_BS.shape[1]).max())
        self.cache.start_step(real_B, longest, restart_B, self.outer.kept)

    def select(self, row_R: torch.Tensor) -> None:
        """See ``State``."""
        self.cache.select(row_R)

    @property
    def nbytes(self) -> int:
        """See ``State``."""
        return self.cache.nbytes
