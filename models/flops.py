"""Parameters and FLOPs in closed form, per modality.

Convention: a multiply-add is 2 FLOPs; matrix products count, and Mamba's convolutions and scans (no
norms, softmax, routing sort); the head counts, the embedding lookup does not; attention is counted
over the full S × S square, as in PaLM's appendix B, without the causal half; training is 3 × the
matrix products of the forward pass, without recomputation, less the gradient that causal routers do
not give to their input, and what convolutions and scans take both ways (kernels/*/README.md).
Expert choice: a pool of E experts with capacity factor c gives its tokens c experts on average; its
routers, main and causal, score every token of the batch. Token choice gives each token its top k.
In a second stage, where all but the causal routers is frozen, a step takes about two thirds of what
is counted here.

S positions, D width, N heads of width H; of Mamba: I inner width, N states, W taps.
"""

from dataclasses import dataclass

from earlyfuse.kernels.selective_scan.op import BACKWARD_FLOPS as SCAN_BACKWARD_FLOPS
from earlyfuse.kernels.selective_scan.op import FORWARD_FLOPS as SCAN_FORWARD_FLOPS
from earlyfuse.models.blocks.attention import Attention
from earlyfuse.models.blocks.experts import ExpertPool, MixtureOfExperts
from earlyfuse.models.blocks.feed_forward import FeedForward
from earlyfuse.models.blocks.mamba import Mamba
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.routing.expert_choice import ExpertChoice
from earlyfuse.models.routing.token_choice import TokenChoice


@dataclass(frozen=True)
class Parameters:
    """``total`` of the model; ``active`` of a token by group, with embedding row and full head."""

    total: int
    active: tuple[int, ...]


def count_parameters(config: Decoder.Config) -> Parameters:
    """Parameters of the model and those that one token of each modality group meets."""
    groups = range(len(config.modalities))
    total = 2 * config.vocab_size * config.dim + config.dim
    active = [config.dim + config.vocab_size * config.dim + config.dim for _ in groups]
    for layer in config.layers:
        norms = len(layer.branches) * config.dim
        total += norms * layer.norm_groups
        shared = norms
        if layer.attention is not None:
            attention = _attention_parameters(layer.attention)
            total += attention * layer.attention.groups
            shared += attention
        if layer.mamba is not None:
            total += _mamba_total(layer.mamba)
            shared += sum(_mamba_matrices(layer.mamba).values()) + _mamba_vectors(layer.mamba)
        if layer.feed_forward is not None:
            total += _feed_forward_parameters(layer.feed_forward)
        for group in groups:
            active[group] += shared
            if layer.feed_forward is not None:
                active[group] += _active_feed_forward(layer.feed_forward, group)
    return Parameters(total, tuple(active))


def forward_flops(config: Decoder.Config, seq_len: int) -> tuple[float, ...]:
    """Forward FLOPs of one token of each modality group in rows of ``seq_len``."""
    return tuple(
        2 * _products(config, seq_len, group) + _recurrences(config, backward=False)
        for group in range(len(config.modalities))
    )


def _products(config: Decoder.Config, seq_len: int, group: int) -> float:
    """Multiply-adds in matrix products of one token."""
    products = float(config.vocab_size * config.dim)
    for layer in config.layers:
        if layer.attention is not None:
            attention = layer.attention
            products += _attention_matrices(attention)
            products += 2 * seq_len * attention.heads * attention.head_dim
        if layer.mamba is not None:
            products += sum(_mamba_matrices(layer.mamba).values())
        if layer.feed_forward is not None:
            products += _matrices_met(layer.feed_forward, group)
    return products


def _recurrences(config: Decoder.Config, *, backward: bool) -> int:
    """FLOPs of one token in convolutions and scans, forward or backward."""
    flops = 0
    for mamba in (layer.mamba for layer in config.layers if layer.mamba is not None):
        scan = SCAN_BACKWARD_FLOPS if backward else SCAN_FORWARD_FLOPS
        # backward, once each: of the inputs, of the taps, and what SiLU's derivative needs again
        convolutions = 3 if backward else 1
        flops += scan * mamba.inner_dim * mamba.states
        flops += convolutions * 2 * mamba.inner_dim * mamba.conv_width
    return flops


def training_flops(config: Decoder.Config, seq_len: int) -> tuple[float, ...]:
    """Forward and backward FLOPs of one token of each modality group."""
    spared = 2 * sum(
        pool.dim * (pool.dim // 2)
        for layer in config.layers
        for pool in _pools(layer.feed_forward)
        if _has_causal(pool)
    )
    recurrences = _recurrences(config, backward=False) + _recurrences(config, backward=True)
    return tuple(
        6 * _products(config, seq_len, group) - spared + recurrences
        for group in range(len(config.modalities))
    )


def mean_training_flops(config: Decoder.Config, seq_len: int) -> float:
    """Training FLOPs of a mean token, modality groups weighed alike."""
    flops = training_flops(config, seq_len)
    return sum(flops) / len(flops)


def _attention_matrices(config: Attention.Config) -> int:
    width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return config.dim * (2 * width + 2 * kv_width)


def _attention_parameters(config: Attention.Config) -> int:
    norms = 2 * (config.heads + config.kv_heads) * config.head_dim if config.qk_norm else 0
    return _attention_matrices(config) + norms


def _mamba_matrices(config: Mamba.Config) -> dict[str, int]:
    """Parameters of one set of each projection."""
    inner = config.inner_dim
    return {
        "in_proj": config.dim * 2 * inner,
        "x_proj": inner * (config.dt_rank + 2 * config.states),
        "dt_proj": config.dt_rank * inner,
        "out_proj": inner * config.dim,
    }


def _mamba_vectors(config: Mamba.Config) -> int:
    """Convolution with its bias, A, D and the bias of one modality's step sizes."""
    return config.inner_dim * (config.conv_width + 1 + config.states + 1 + 1)


def _mamba_total(config: Mamba.Config) -> int:
    matrices = sum(
        size * getattr(config, f"{name}_groups") for name, size in _mamba_matrices(config).items()
    )
    return matrices + _mamba_vectors(config) + (config.dt_proj_groups - 1) * config.inner_dim


def _feed_forward_parameters(config: FeedForward.Config | MixtureOfExperts.Config) -> int:
    if isinstance(config, FeedForward.Config):
        return 3 * config.dim * config.hidden_dim * config.groups
    pools = sum(pool.experts * _expert(pool) + _routers(pool) for pool in config.pools)
    return pools + sum(_feed_forward_parameters(shared) for shared in config.shared)


def _active_feed_forward(config: FeedForward.Config | MixtureOfExperts.Config, group: int) -> int:
    """Parameters met by a token: all routers of its pools, its experts of each, shared ones."""
    return round(_matrices_met(config, group, routers_of_all=False))


def _matrices_met(
    config: FeedForward.Config | MixtureOfExperts.Config, group: int, routers_of_all: bool = True
) -> float:
    if isinstance(config, FeedForward.Config):
        return 3 * config.dim * config.hidden_dim
    met = float(sum(3 * shared.dim * shared.hidden_dim for shared in config.shared))
    for pool in config.pools:
        serves = not pool.groups or group in pool.groups
        if serves:
            met += _experts_met(pool) * _expert(pool)
        if serves or routers_of_all:  # every pool scores every token of the batch
            met += _routers(pool)
    return met


def _pools(config: FeedForward.Config | MixtureOfExperts.Config | None) -> list[ExpertPool.Config]:
    return config.pools if isinstance(config, MixtureOfExperts.Config) else []


def _routers(pool: ExpertPool.Config) -> int:
    """Parameters of a pool's router, and of its causal router."""
    causal = _has_causal(pool) * (pool.dim // 2) * (pool.dim + pool.experts)
    return pool.experts * pool.dim + causal


def _has_causal(pool: ExpertPool.Config) -> bool:
    return isinstance(pool.router, ExpertChoice.Config) and pool.router.causal is not None


def _experts_met(pool: ExpertPool.Config) -> float:
    """Experts of a pool that a token takes, on average."""
    router = pool.router
    return router.top_k if isinstance(router, TokenChoice.Config) else router.capacity_factor


def _expert(pool: ExpertPool.Config) -> int:
    return 3 * pool.dim * pool.hidden_dim
