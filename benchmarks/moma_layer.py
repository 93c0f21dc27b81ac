"""A MoMa layer beside a dense one of the same FLOPs, and beside other ways to write it (row 1).

    python benchmarks/moma_layer.py

Forward and backward of ``MixtureOfExperts`` with four text and four image experts and static
budgets; routers, selection and dispatch are timed too. The expert rivals (``experts.py``) compute
the same function of the same parameters, with routing in plain torch; outputs and all gradients
are compared before timing. torchtitan's layer chooses by token, so it cannot reproduce expert
choice: it runs with its own balanced round-robin routes (the same work) and is checked against our
kernel on those. Its experts cast to bf16, which is slow on CPUs; here they compute in fp32.

T tokens, D width, F inner width, E experts, K tokens an expert takes, R = E·K rows.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from experts import EXPERTS, POOL, ExpertProblem
from torch import nn
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

from earlyfuse.kernels.grouped_gemm import grouped_swiglu
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.blocks.experts import ExpertPool, MixtureOfExperts
from earlyfuse.models.blocks.feed_forward import FeedForward
from earlyfuse.models.context import ForwardContext
from earlyfuse.models.routing.expert_choice import ExpertChoice
from harness import Report, Rival, Timing, at_most, compare, differentiated, ours_over, verify

ROWS = 4
TOLERANCE = 1e-5

OURS, NAIVE = "ours: MixtureOfExperts", "loop over experts, w[e]"
DENSE, DENSE_OURS = "dense SwiGLU, nn.Linear", "dense SwiGLU, our FeedForward"
BMM, GROUPED = "gather, bmm per modality, index_add", "gather, F.grouped_mm, index_add"
TITAN = "torchtitan MoE in fp32, balanced token choice"
EXPERT_RIVALS = (NAIVE, BMM, GROUPED, TITAN)
GOALS = {DENSE: 1.05, "best expert rival": 1.00, NAIVE: 0.75}


@dataclass(frozen=True)
class Setting:
    """Sizes, and the share of tokens that are text."""

    tokens: int
    dim: int
    hidden_dim: int
    text_share: float

    @property
    def flops(self) -> float:
        """Forward and backward, of the experts' matrices or of the dense layer's."""
        return 3 * 2 * 3 * self.tokens * self.dim * self.hidden_dim


SETTINGS = tuple(
    Setting(tokens, dim, hidden_dim, text_share)
    for tokens, dim, hidden_dim in ((4096, 512, 2048), (2048, 256, 704))
    for text_share in (0.5, 0.8)
)


class Problem(ExpertProblem):
    """The experts' inputs and parameters, and the modalities as our module reads them."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting.tokens, setting.dim, setting.hidden_dim, setting.text_share)
        self.setting = setting
        image_BS = self.image_T.to(torch.uint8).view(ROWS, -1)
        batch = MixedBatch.of(torch.zeros_like(image_BS, dtype=torch.int64), image_BS)
        self.layout = ForwardContext.build(batch, modalities=(0, 1), head_dim=2, rope_theta=1e4)

    def rival(
        self,
        name: str,
        layer: Callable[[torch.Tensor], torch.Tensor],
        parameters: Sequence[torch.Tensor],
        same_as: str | None = None,
    ) -> Rival:
        """Output, gradients of ``x`` and of each parameter; stacked ones a modality at a time."""

        def run() -> list[torch.Tensor]:
            leaves = [self.x_TD, *parameters]
            y_TD, dx_TD, *gradients = differentiated(layer(self.x_TD), leaves, self.dy_TD)
            parts = [g.split(POOL) if len(g) == EXPERTS else [g] for g in gradients]
            return [y_TD, dx_TD, *chain.from_iterable(parts)]

        return Rival(name, run, same_as)


# ---------------------------------------------------------------- ours and dense


def ours(problem: Problem) -> Rival:
    """The module as models use it, with the shared parameters."""
    setting = problem.setting
    module = MixtureOfExperts.Config(
        pools=[
            ExpertPool.Config(
                name=name,
                dim=setting.dim,
                hidden_dim=setting.hidden_dim,
                experts=POOL,
                groups=(group,),
                share=share,
                router=ExpertChoice.Config(routing_rows=ROWS),
            )
            for group, (name, share) in enumerate(
                (("text", setting.text_share), ("image", 1 - setting.text_share))
            )
        ]
    ).build()
    names = ("router.weight", "experts.w1", "experts.w3", "experts.w2")
    for name, stacked in zip(names, problem.parameters, strict=True):
        for pool, part in zip(module.pools, stacked.split(POOL), strict=True):
            pool.get_parameter(name).data.copy_(part.detach())
    parameters = [pool.get_parameter(name) for name in names for pool in module.pools]
    return problem.rival(OURS, lambda x_TD: module(x_TD, problem.layout), parameters)


class SwiGLU(nn.Module):
    """SwiGLU as usually written."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """(T, D) → (T, D)."""
        return self.w2(F.silu(self.w1(x_TD)) * self.w3(x_TD))


def dense(problem: Problem) -> list[Rival]:
    """Dense layers of the experts' FLOPs."""
    setting = problem.setting
    plain = SwiGLU(setting.dim, setting.hidden_dim)
    own = FeedForward.Config(dim=setting.dim, hidden_dim=setting.hidden_dim).build()
    for mine, theirs in zip(own.parameters(), plain.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    return [
        problem.rival(DENSE, plain, list(plain.parameters())),
        problem.rival(
            DENSE_OURS, lambda x_TD: own(x_TD, problem.layout), list(own.parameters()), DENSE
        ),
    ]


# ---------------------------------------------------------------- torchtitan


class Fp32Experts(GroupedExperts):
    """torchtitan's experts without their cast to bf16."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        """(R, D) → (R, D)."""
        stop_E = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)

        def product(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return self._grouped_mm(A=a, B_t=w.transpose(-2, -1), offs=stop_E)

        h_RF = F.silu(product(x_RD, self.w1_EFD)) * product(x_RD, self.w3_EFD)
        return product(h_RF, self.w2_EDF)


def titan(problem: Problem) -> tuple[Rival, Rival]:
    """torchtitan's MoE, and our kernel on its routes, which it must reproduce."""
    setting = problem.setting
    module = MoE.Config(
        num_experts=EXPERTS,
        load_balance_coeff=None,
        router=TokenChoiceTopKRouter.Config(
            num_experts=EXPERTS,
            gate=Linear.Config(in_features=setting.dim, out_features=EXPERTS),
            _debug_force_load_balance=True,
        ),
        routed_experts=RoutedExperts.Config(
            inner_experts=Fp32Experts.Config(
                dim=setting.dim, hidden_dim=setting.hidden_dim, num_experts=EXPERTS
            ),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=1),
        ),
    ).build()
    experts = module.routed_experts.inner_experts
    parameters = [module.router.gate.weight, experts.w1_EFD, experts.w3_EFD, experts.w2_EDF]
    for mine, theirs in zip(parameters, problem.parameters, strict=True):
        mine.data.copy_(theirs.detach())

    # its router asks for autocast to fp32, which CPUs lack; everything is fp32 anyway
    warnings.filterwarnings("ignore", message="In CPU autocast")

    def layer(x_TD: torch.Tensor) -> torch.Tensor:
        return module(x_TD.unflatten(0, (ROWS, -1))).flatten(0, 1)

    def expected(x_TD: torch.Tensor) -> torch.Tensor:
        row_R = torch.arange(setting.tokens).view(-1, EXPERTS).t().flatten()
        offset_E1 = torch.arange(EXPERTS + 1) * (setting.tokens // EXPERTS)
        score_TE = F.linear(x_TD, problem.router_ED).sigmoid()
        score_R = score_TE[row_R, row_R % EXPERTS]
        return grouped_swiglu(
            x_TD, problem.w1_EFD, problem.w3_EFD, problem.w2_EDF, row_R, offset_E1, score_R
        )

    reference = problem.rival("our kernel on balanced routes", expected, problem.parameters)
    return problem.rival(TITAN, layer, parameters, reference.name), reference


# ---------------------------------------------------------------- the comparison


def rivals_of(problem: Problem) -> list[Rival]:
    """Ours first; torchtitan's is verified here, against a rival that is not timed."""
    theirs, reference = titan(problem)
    verify([reference, theirs], TOLERANCE)
    others = {NAIVE: problem.loop, BMM: problem.batched, GROUPED: problem.grouped}
    return [
        ours(problem),
        *dense(problem),
        *(problem.rival(name, layer, problem.parameters, OURS) for name, layer in others.items()),
        Rival(theirs.name, theirs.run),
    ]


def goals(setting: Setting, timings: list[Timing]) -> list[str]:
    """Markdown: our CPU time over each goal's rival."""
    over = ours_over(timings)
    ratios = [ratio for name in EXPERT_RIVALS if (ratio := over[name]) is not None]
    over["best expert rival"] = max(ratios, default=None)
    size = f"{setting.tokens} x {setting.dim} x {setting.hidden_dim}, text {setting.text_share:.0%}"
    return [at_most(f"{size}: ours / {name}", over[name], goal) for name, goal in GOALS.items()]


def main(rounds: int = 15) -> None:
    """Runs all settings and writes ``results/moma_layer.{jsonl,md}``."""
    title = "MoMa 4t4i layer, forward and backward (row 1)"
    report = Report("moma_layer", title, ["torchtitan"])
    for setting in SETTINGS:
        timings = compare(rivals_of(Problem(setting)), rounds=rounds, tolerance=TOLERANCE)
        shown = {"dtype": "fp32", "GFLOP": setting.flops / 1e9, "rounds": rounds}
        report.add(vars(setting) | shown, timings)
        for verdict in goals(setting, timings):
            report.judge(verdict)
    report.write()


if __name__ == "__main__":
    main()
