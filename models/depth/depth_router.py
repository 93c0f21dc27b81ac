"""Depth routers: score tokens for a depth-routed block, and learn to decide without later tokens.

Where a decision is made from a token alone, as decoding needs, it comes from one of

    "predictor"   an auxiliary router that learns what the selection kept (MoMa, arXiv 2407.21770,
                  2.4; MoD, arXiv 2404.02258, 3.5)
    "logit"       the router's own score, which learns the same by ``bce``
    threshold     a running threshold (``models/routing/running_threshold.py``)

T tokens, D width, N rectangles of L tokens, R kept rows.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.protocols.module import Module

from earlyfuse.models.blocks.branch import Flops, products
from earlyfuse.models.context import ForwardContext, ForwardSettings, Rule
from earlyfuse.models.depth.selection import Decision
from earlyfuse.models.field_checks import check_choices
from earlyfuse.models.init_weights import Draw, constant, normal
from earlyfuse.models.precision import wide
from earlyfuse.models.routing.causal_router import CausalRouter, carry_loss
from earlyfuse.models.routing.router_stats import CausalStats, Statistics
from earlyfuse.models.routing.running_threshold import RunningThreshold

# weight (outputs, D) and bias (outputs,) of a router
Weights = tuple[torch.Tensor, torch.Tensor | None]


class Projection(Module):
    """The linear map of a depth router. Parameters: weight (1, D) or (2, D), and bias."""

    keeps_fp32 = True

    def __init__(self, config: "DepthRouter.Config", dim: int):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.outputs, dim))
        self.bias = nn.Parameter(torch.empty(config.outputs)) if config.bias else None

    def draws(self) -> dict[str, Draw]:
        draws = {"weight": normal() if self.config.init == "normal" else constant(0.0)}
        return draws if self.bias is None else draws | {"bias": constant(self.config.bias_init)}

    def forward(self) -> Weights:
        """The parameters as tensors that outlive this module's gathering by FSDP."""
        return self.weight.clone(), None if self.bias is None else self.bias.clone()


class Scores(NamedTuple):
    """Scores (T,) fp32 of tokens, and those of the predictor (T, 1), if it is needed."""

    logits_T: torch.Tensor
    predicted_T1: torch.Tensor | None


class DepthRouter(Module):
    """A score per token, and the losses that teach it to decide.

    ``share``: fraction of all tokens that compete, which normalises the predictor's loss.
    """

    keeps_fp32 = True

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """Shape of a router, what it learns, and its rule of inference.

        ``outputs``     2: the score is the difference of two logits, whose softmax is its sigmoid
        ``reads``       the "residual", or the "normed" input of the block's first branch
        ``bias_init``   initial bias, which scores begin near; of 1 output
        ``shared``      one projection for all layers that set this, in ``Decoder``
        ``bce``         coefficient of the cross-entropy between sigmoid(score) and what was kept,
                        the mean over a step's tokens; its gradient reaches the block's input
        ``predictor``   an auxiliary router behind a stop-gradient
        ``threshold``   a running one: for ``ForwardSettings.rule`` "threshold", or for training too
        ``inference``   how rule "causal" decides: by the "predictor"; where the "logit" exceeds
                        ``at``; by the "selection" as in training, for media that are there as a
                        whole before the next token is written; None: not at all
        ``at_decoding`` the same for tokens after the prompt; None: ``at``
        ``decoding``    tokens after the prompt are "routed", or "all" are kept, as if forced
        """

        outputs: Literal[1, 2] = 1
        bias: bool = False
        bias_init: float = 0.0
        init: Literal["normal", "zero"] = "normal"
        reads: Literal["residual", "normed"] = "residual"
        shared: bool = False
        bce: float = 0.0
        predictor: CausalRouter.Config | None = None
        threshold: RunningThreshold.Config | None = None
        inference: Literal["selection", "predictor", "logit"] | None = None
        at: float = 0.0
        at_decoding: float | None = None
        decoding: Literal["routed", "all"] = "routed"

        def __post_init__(self) -> None:
            check_choices(
                self,
                init=("normal", "zero"),
                reads=("residual", "normed"),
                decoding=("routed", "all"),
            )
            if self.outputs not in (1, 2):
                raise ValueError(f"outputs ({self.outputs}) must be 1 or 2")
            if self.inference not in (None, "selection", "predictor", "logit"):
                raise ValueError(
                    f"inference ({self.inference!r}) must be selection, predictor, logit or None"
                )
            if (self.inference == "predictor") != (self.predictor is not None):
                raise ValueError(
                    f"inference ({self.inference!r}) must be predictor if and only if a predictor "
                    "is set: another would not be used"
                )
            if self.bias_init and not (self.bias and self.outputs == 1):
                raise ValueError(
                    f"bias_init ({self.bias_init}) needs bias, and outputs ({self.outputs}) 1"
                )
            if not 0 <= self.bce < math.inf:
                raise ValueError(f"bce ({self.bce}) must be at least 0 and finite")
            if self.inference != "logit" and (self.at, self.at_decoding) != (0.0, None):
                raise ValueError(
                    f"at ({self.at}) and at_decoding ({self.at_decoding}) need inference logit"
                )
            if self.inference == "selection" and self.decoding != "all":
                raise ValueError(
                    f"decoding ({self.decoding!r}) must be all with inference selection, which "
                    "decides about whole media of the prompt"
                )

        @property
        def causal_rules(self) -> tuple[Rule, ...]:
            """See ``Router.Config.causal_rules``."""
            causal: tuple[Rule, ...] = () if self.inference is None else ("causal",)
            by_threshold = self.threshold is not None or self.inference == "selection"
            return causal + (("threshold",) if by_threshold else ())

        @property
        def selecting_rules(self) -> tuple[Rule, ...]:
            """Rules of ``causal_rules`` under which it selects as in training: tokens of a medium
            are compared with later ones of it.
            """
            if self.inference != "selection":
                return ()
            return ("causal",) if self.threshold is not None else ("causal", "threshold")

        @property
        def needs_cache(self) -> bool:
            """True if tokens after the prompt are decided about in another way, which takes a
            decode cache to know: the first call reads the prompt.
            """
            return self.inference is not None and (
                self.decoding == "all" or self.at_decoding is not None
            )

        def parameters(self, dim: int) -> int:
            """Parameters of a layer: of a shared projection none."""
            own = 0 if self.shared else self.projection_parameters(dim)
            return own + (0 if self.predictor is None else dim // 2 * (dim + 1))

        def projection_parameters(self, dim: int) -> int:
            """Parameters of the projection."""
            return self.outputs * (dim + self.bias)

        def flops(self, dim: int) -> Flops:
            """FLOPs of a token; the predictor gives no gradient to its input."""
            found = products(self.outputs * dim)
            if self.predictor is not None:
                predictor = products(dim // 2 * (dim + 1))
                found += Flops(predictor.forward, predictor.backward - 2 * dim * (dim // 2))
            return found

    def __init__(self, config: Config, *, dim: int, share: float):
        super().__init__()
        self.config = config
        self.projection = None if config.shared else Projection(config, dim)
        sizes = {"dim": dim, "experts": 1, "share": share}
        self.causal = config.predictor.build(**sizes) if config.predictor is not None else None
        self.threshold = config.threshold.build(experts=1) if config.threshold is not None else None
        self.stats = DepthStats()
        self.agreement = CausalStats() if config.inference == "logit" else None

    def forward(self, x_TD: torch.Tensor, context: ForwardContext) -> Scores:
        """(T, D) → scores. All parameters are read here, where FSDP has gathered them."""
        weights = context.depth_weights if self.projection is None else self.projection()
        assert weights is not None, "the decoder has the shared projection"
        weight, bias = weights
        logits = F.linear(wide(x_TD), wide(weight), None if bias is None else wide(bias))
        logits_T = logits[:, 0] if self.config.outputs == 1 else logits[:, 1] - logits[:, 0]
        settings, predicted_T1 = context.settings, None
        if self.causal is not None:
            learns = settings.rule == "batch" and (self.training or settings.recording)
            if learns or settings.rule == "causal":
                predicted_T1 = self.causal(x_TD)
        return Scores(logits_T, predicted_T1)

    def decide(self, scores: Scores, rule: Rule, in_prompt_T: torch.Tensor | None) -> torch.Tensor:
        """(T,) bool: the decision for each token by itself.

        ``in_prompt_T`` bool: tokens read at the beginning of their document; None: all.
        """
        if rule == "threshold":
            assert self.threshold is not None, "checked by MixtureOfDepths"
            return self.threshold.above(scores.logits_T[:, None], None)[:, 0]
        if self.config.inference == "predictor":
            assert scores.predicted_T1 is not None, "computed under this rule"
            return scores.predicted_T1[:, 0] > 0
        at, at_decoding = self.config.at, self.config.at_decoding
        if in_prompt_T is None or at_decoding is None:
            return scores.logits_T > at
        return torch.where(in_prompt_T, scores.logits_T > at, scores.logits_T > at_decoding)

    def learn(
        self, scores: Scores, decision: Decision, weight_R: torch.Tensor, settings: ForwardSettings
    ) -> torch.Tensor:
        """``weight_R``, the weights of the kept rows, through which auxiliary losses join the
        graph. Each is a binary cross-entropy between a score and what was kept.
        """
        decided_T, row_R = decision.decided_T, decision.kept.row_R
        kept_T = torch.zeros_like(decided_T).scatter(0, row_R, decision.kept.real_R)
        member_T1 = (kept_T & decided_T)[:, None]
        if settings.recording:
            self.stats.record(decision, weight_R)
            if self.threshold is not None:
                self.threshold.compare(scores.logits_T[:, None], member_T1, decided_T)
        if self.causal is not None and scores.predicted_T1 is not None:
            weight_R = self.causal.teach(
                scores.predicted_T1, member_T1, decided_T, settings, weight_R
            )
        training = self.training and torch.is_grad_enabled() and self.config.bce > 0
        recording = settings.recording and self.agreement is not None
        if not (training or recording):
            return weight_R
        logits_T1 = scores.logits_T[:, None]
        bce_T1 = F.binary_cross_entropy_with_logits(
            logits_T1, member_T1.to(logits_T1.dtype), reduction="none"
        )
        bce_T1 = bce_T1 * decided_T[:, None]
        if recording:
            assert self.agreement is not None
            self.agreement.record(bce_T1, logits_T1 - self.config.at, member_T1, decided_T)
        if training:
            tokens = settings.step_tokens or len(decided_T)
            weight_R = carry_loss(weight_R, self.config.bce * bce_T1.sum() / tokens)
        return weight_R


class DepthStats(Statistics):
    """Tokens that a depth router kept.

    ``sums_K``: tokens of documents, those selected, slots, slots in use, weights in use, tokens
    decided about, their squared scores.
    """

    kind = "depth"

    def __init__(self) -> None:
        super().__init__(sums=7)

    @torch.no_grad()
    def record(self, decision: Decision, weight_R: torch.Tensor) -> None:
        """Add one forward; ``weight_R``: of the kept rows. No host synchronisation."""
        decided_T, real_R = decision.decided_T, decision.kept.real_R
        self.add(
            decided_T | decision.forced_T,
            decision.chosen_T,
            torch.ones_like(real_R),
            real_R,
            weight_R * real_R,
            decided_T,
            decision.logits_T.square() * decided_T,
        )

    def summary(self) -> dict[str, float]:
        """``kept``: share of all tokens that the block computes; ``dropped``: share of the selected
        ones that did not fit the budget; ``filled``: share of slots in use; ``weight``: mean of
        the kept tokens; ``logit_rms``.
        """
        tokens, chosen, slots, used, weight, decided, squares = self.sums_K.tolist()
        return {
            "kept": used / max(tokens, 1),
            "dropped": 1 - used / max(chosen, 1) if chosen else 0.0,
            "filled": used / max(slots, 1),
            "weight": weight / max(used, 1),
            "logit_rms": (squares / max(decided, 1)) ** 0.5,
        }
