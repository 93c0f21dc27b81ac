"""What routers did, counted on the device and read when a step is logged.

T tokens, E experts, R routed rows.
"""

import torch
import torch.nn.functional as F
from torchtitan.protocols.module import Module

from earlyfuse.models.routes import Routes


class RouterStats(Module):
    """Sums over the forwards made while ``recording``: what the routers did, kept on the device.

    ``load_E`` counts real tokens taken by each expert. ``sums_6``: eligible tokens, eligible tokens
    that some expert took, rows, rows of real tokens, their weights, squared logits.
    """

    def __init__(self, experts: int, per_token: int = 1):
        super().__init__()
        self.per_token = per_token  # experts that a token takes
        self.recording = False
        self.register_buffer("load_E", torch.zeros(experts), persistent=False)
        self.register_buffer("sums_6", torch.zeros(6), persistent=False)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self.load_E.zero_()
        self.sums_6.zero_()

    @torch.no_grad()
    def record(
        self,
        logits_TE: torch.Tensor,
        eligible_T: torch.Tensor | None,
        routes: Routes,
        own_E: torch.Tensor | None = None,
    ) -> None:
        """Add one forward's routing; of some experts alone, if ``own_E`` numbers them, whose tokens
        are the eligible ones. No host synchronisation.
        """
        row_R, offset_G1, weight_R = routes
        assert weight_R is not None, "routers always weigh their rows"
        eligible = logits_TE.new_ones(len(logits_TE)) if eligible_T is None else eligible_T.float()
        real_R = eligible[row_R]
        reached_T = torch.zeros_like(eligible).index_fill_(0, row_R, 1.0) * eligible
        # experts may have different numbers of rows
        upto_R1 = F.pad(real_R.cumsum(0, dtype=torch.float64), (1, 0))
        load_E, rows_E = upto_R1[offset_G1].diff(), offset_G1.diff()
        if own_E is not None:
            logits_TE, load_E, rows_E = logits_TE[:, own_E], load_E[own_E], rows_E[own_E]
        squares = (logits_TE.square().mean(1) * eligible).sum()
        self.load_E += load_E
        weights = (weight_R * real_R).sum()
        self.sums_6 += torch.stack(
            [eligible.sum(), reached_T.sum(), rows_E.sum(), real_R.sum(), weights, squares]
        )

    def take(self) -> dict[str, float]:
        """Summary since the last call, and start anew.

        ``load_min``, ``load_max``: least and most loaded expert relative to an even share of what
        the eligible tokens take; ``reached``: share of eligible tokens with an expert; ``filled``:
        share of the budget used; ``weight``: mean weight of a chosen token; ``logit_rms``.
        """
        eligible, reached, rows, real, weight, squares = self.sums_6.tolist()
        even = max(eligible, 1) * self.per_token / len(self.load_E)
        load = (self.load_E / even).tolist()
        summary = {
            "load_min": min(load),
            "load_max": max(load),
            "reached": reached / max(eligible, 1),
            "filled": real / max(rows, 1),
            "weight": weight / max(real, 1),
            "logit_rms": (squares / max(eligible, 1)) ** 0.5,
        }
        self._init_self_buffers()
        return summary
