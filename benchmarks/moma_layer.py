"""A MoMa layer beside a dense one of the same FLOPs, and beside other ways to write it (row 1).

    python benchmarks/moma_layer.py

Forward and backward of ``MixtureOfExperts`` with four text and four image experts and static
budgets: routers, selection and dispatch are in the time. The expert rivals compute the same
function of the same parameters, all eight experts in one stacked tensor, with routing in plain
torch; outputs and all gradients are compared before timing. torchtitan's layer chooses by token, so
it cannot reproduce expert choice: it runs with its own balanced round-robin routes (the same work)
and is checked against our kernel on those. Its experts cast to bf16, which CPUs crawl in; here they
compute in fp32.

T tokens, D width, F inner width, E experts, K tokens an expert takes, R = E·K rows.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import torchtitan
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
from harness import Report, Rival, Timing, at_most, compare, verify

POOLS, EXPERTS_PER_POOL = ("text", "image"), 4
EXPERTS = len(POOLS) * EXPERTS_PER_POOL
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
    """Sizes, and the part of the tokens that is text."""

    tokens: int
    dim: int
    hidden_dim: int
    text_share: float

    @property
    def shares(self) -> tuple[float, float]:
        return self.text_share, 1 - self.text_share

    @property
    def budgets(self) -> tuple[int, ...]:
        """K of each expert."""
        return tuple(
            round(share * self.tokens / EXPERTS_PER_POOL)
            for share in self.shares
            for _ in range(EXPERTS_PER_POOL)
        )

    @property
    def flops(self) -> float:
        """Forward and backward, of the experts' matrices or of the dense layer's."""
        return 3 * 2 * 3 * self.tokens * self.dim * self.hidden_dim


SETTINGS = tuple(
    Setting(tokens, dim, hidden_dim, text_share)
    for tokens, dim, hidden_dim in ((4096, 512, 2048), (2048, 256, 704))
    for text_share in (0.5, 0.8)
)


class Problem:
    """Input, gradient, modalities and parameters that all rivals share."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) * std

        tokens, dim, hidden = setting.tokens, setting.dim, setting.hidden_dim
        self.x_TD = normal(tokens, dim).requires_grad_()
        self.dy_TD = normal(tokens, dim)
        image_T = torch.randperm(tokens, generator=generator) >= setting.text_share * tokens
        self.image_T = image_T
        image_BS = image_T.to(torch.uint8).view(ROWS, -1)
        batch = MixedBatch.of(torch.zeros_like(image_BS, dtype=torch.int64), image_BS)
        self.layout = ForwardContext.build(batch, modalities=(0, 1), head_dim=2, rope_theta=1e4)
        self.router_ED = normal(EXPERTS, dim, std=dim**-0.5).requires_grad_()
        self.w1_EFD = normal(EXPERTS, hidden, dim, std=dim**-0.5).requires_grad_()
        self.w3_EFD = normal(EXPERTS, hidden, dim, std=dim**-0.5).requires_grad_()
        self.w2_EDF = normal(EXPERTS, dim, hidden, std=hidden**-0.5).requires_grad_()

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [self.router_ED, self.w1_EFD, self.w3_EFD, self.w2_EDF]

    def rival(
        self,
        name: str,
        layer: Callable[[torch.Tensor], torch.Tensor],
        parameters: Sequence[torch.Tensor],
        same_as: str | None = None,
    ) -> Rival:
        """Output, gradients of ``x`` and of each parameter; stacked ones a pool at a time."""

        def run() -> list[torch.Tensor]:
            y_TD = layer(self.x_TD)
            dx_TD, *gradients = torch.autograd.grad(y_TD, [self.x_TD, *parameters], self.dy_TD)
            parts = [
                part
                for gradient in gradients
                for part in (
                    gradient.split(EXPERTS_PER_POOL) if len(gradient) == EXPERTS else [gradient]
                )
            ]
            return [y_TD.detach(), dx_TD, *parts]

        return Rival(name, run, same_as)


# ---------------------------------------------------------------- ours and dense


def ours(problem: Problem) -> Rival:
    """The module as the models use it, holding the shared parameters."""
    setting = problem.setting
    module = MixtureOfExperts.Config(
        pools=[
            ExpertPool.Config(
                name=name,
                dim=setting.dim,
                hidden_dim=setting.hidden_dim,
                experts=EXPERTS_PER_POOL,
                groups=(group,),
                share=setting.shares[group],
                router=ExpertChoice.Config(routing_rows=ROWS),
            )
            for group, name in enumerate(POOLS)
        ]
    ).build()
    names = ("router.weight", "experts.w1", "experts.w3", "experts.w2")
    for name, stacked in zip(names, problem.parameters, strict=True):
        for pool, part in zip(module.pools, stacked.split(EXPERTS_PER_POOL), strict=True):
            pool.get_parameter(name).data.copy_(part.detach())
    parameters = [pool.get_parameter(name) for name in names for pool in module.pools]
    return problem.rival(OURS, lambda x_TD: module(x_TD, problem.layout), parameters)


class SwiGLU(nn.Module):
    """As it is usually written."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """(T, D) → (T, D)."""
        return self.w2(F.silu(self.w1(x_TD)) * self.w3(x_TD))


def dense(problem: Problem) -> list[Rival]:
    """The layers that the experts are measured against."""
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


# ---------------------------------------------------------------- the same experts, otherwise


def chosen(problem: Problem, x_TD: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids (4, K) and weights (4, K) of each modality's experts, in plain torch."""
    logits_ET = F.linear(problem.router_ED, x_TD)
    parts = []
    for group, logits_GT in enumerate(logits_ET.split(EXPERTS_PER_POOL)):
        foreign_T = problem.image_T if group == 0 else ~problem.image_T
        budget = problem.setting.budgets[group * EXPERTS_PER_POOL]
        values_GK, ids_GK = logits_GT.masked_fill(foreign_T, -torch.inf).topk(budget, dim=1)
        parts.append((ids_GK, values_GK.sigmoid()))
    return parts


def naive(problem: Problem, x_TD: torch.Tensor) -> torch.Tensor:
    """One expert after another."""
    y_TD = torch.zeros_like(x_TD)
    expert = 0
    for ids_GK, weights_GK in chosen(problem, x_TD):
        for ids_K, weights_K in zip(ids_GK, weights_GK, strict=True):
            x_KD = x_TD.index_select(0, ids_K)
            w1, w3, w2 = problem.w1_EFD[expert], problem.w3_EFD[expert], problem.w2_EDF[expert]
            y_KD = F.linear(F.silu(F.linear(x_KD, w1)) * F.linear(x_KD, w3), w2)
            y_TD.index_add_(0, ids_K, y_KD * weights_K[:, None])
            expert += 1
    return y_TD


def batched(problem: Problem, x_TD: torch.Tensor) -> torch.Tensor:
    """One batched product for the experts of a modality, whose budgets are equal."""
    y_TD = torch.zeros_like(x_TD)
    stacks = (w.split(EXPERTS_PER_POOL) for w in (problem.w1_EFD, problem.w3_EFD, problem.w2_EDF))
    for (ids_GK, weights_GK), w1, w3, w2 in zip(chosen(problem, x_TD), *stacks, strict=True):
        x_GKD = x_TD.index_select(0, ids_GK.flatten()).unflatten(0, ids_GK.shape)
        h_GKF = F.silu(x_GKD @ w1.transpose(1, 2)) * (x_GKD @ w3.transpose(1, 2))
        y_GKD = (h_GKF @ w2.transpose(1, 2)) * weights_GK[..., None]
        y_TD.index_add_(0, ids_GK.flatten(), y_GKD.flatten(0, 1))
    return y_TD


def grouped(problem: Problem, x_TD: torch.Tensor) -> torch.Tensor:
    """One grouped product for all experts."""
    parts = chosen(problem, x_TD)
    ids_R = torch.cat([ids_GK.flatten() for ids_GK, _ in parts])
    weights_R = torch.cat([weights_GK.flatten() for _, weights_GK in parts])
    stop_E = torch.tensor(problem.setting.budgets).cumsum(0, dtype=torch.int32)
    x_RD = x_TD.index_select(0, ids_R)
    gate_RF = F.grouped_mm(x_RD, problem.w1_EFD.transpose(1, 2), offs=stop_E)
    up_RF = F.grouped_mm(x_RD, problem.w3_EFD.transpose(1, 2), offs=stop_E)
    y_RD = F.grouped_mm(F.silu(gate_RF) * up_RF, problem.w2_EDF.transpose(1, 2), offs=stop_E)
    return torch.zeros_like(x_TD).index_add_(0, ids_R, y_RD * weights_R[:, None])


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

    # its router asks for autocast to fp32, which a CPU does not know; everything is fp32 anyway
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
    others = {NAIVE: naive, BMM: batched, GROUPED: grouped}
    return [
        ours(problem),
        *dense(problem),
        *(
            problem.rival(name, partial(layer, problem), problem.parameters, OURS)
            for name, layer in others.items()
        ),
        Rival(theirs.name, theirs.run),
    ]


def goals(setting: Setting, timings: list[Timing]) -> list[str]:
    """Markdown: our CPU time over each goal's rival."""
    over = {t.name: 1 / t.cpu_ratio for t in timings if t.cpu_ratio is not None}
    if rivals := [over[name] for name in EXPERT_RIVALS if name in over]:
        over["best expert rival"] = max(rivals)
    size = f"{setting.tokens} x {setting.dim} x {setting.hidden_dim}, text {setting.text_share:.0%}"
    return [at_most(f"{size}: ours / {name}", over.get(name), goal) for name, goal in GOALS.items()]


def main(rounds: int = 15) -> None:
    """Run all settings and write ``results/moma_layer.{jsonl,md}``."""
    torch.set_num_threads(1)
    report = Report("moma_layer", "MoMa 4t4i layer, forward and backward (row 1)")
    report.environment |= {"torchtitan": torchtitan.__version__}
    verdicts = []
    for setting in SETTINGS:
        timings = compare(rivals_of(Problem(setting)), rounds=rounds, tolerance=TOLERANCE)
        shown = {
            **vars(setting),
            "dtype": "fp32",
            "GFLOP": setting.flops / 1e9,
            "rounds": rounds,
        }
        report.add(shown, timings)
        verdicts += goals(setting, timings)
    conclusion = "\n".join(["## Goals (CPU time)", "", *verdicts, ""])
    print(conclusion)
    report.write(conclusion)


if __name__ == "__main__":
    main()
