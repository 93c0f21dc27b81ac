"""Parameters and FLOPs in closed form, per modality.

Convention: a multiply-add is 2 FLOPs; only matrix products count (no norms, softmax, routing sort);
the head counts, the embedding lookup does not; attention is counted over the full S × S square, as
in PaLM's appendix B, without the causal half; training is 3 × the forward pass, without
recomputation, less the gradient that causal routers do not give to their input. Expert choice: a
pool of E experts with capacity factor c gives its tokens c experts on average; its routers, main
and causal, score every token of the batch. Token choice gives each token its top k. In a second
stage, where all but the causal routers is frozen, a step takes about two thirds of what is counted
here.

S positions, D width, N heads of width H.
"""

from dataclasses import dataclass

from earlyfuse.models.blocks.attention import Attention
from earlyfuse.models.blocks.experts import ExpertPool, MixtureOfExperts
from earlyfuse.models.blocks.feed_forward import FeedForward
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
        attention = _attention_parameters(layer.attention)
        norms = 2 * config.dim
        total += attention * layer.attention.groups + norms * layer.norm_groups
        total += _feed_forward_parameters(layer.feed_forward)
        for group in groups:
            active[group] += attention + norms + _active_feed_forward(layer.feed_forward, group)
    return Parameters(total, tuple(active))


def forward_flops(config: Decoder.Config, seq_len: int) -> tuple[float, ...]:
    """Forward FLOPs of one token of each modality group in rows of ``seq_len``."""
    flops = []
    for group in range(len(config.modalities)):
        matrices = float(config.vocab_size * config.dim)
        scores = 0.0
        for layer in config.layers:
            attention = layer.attention
            matrices += _attention_matrices(attention) + _matrices_met(layer.feed_forward, group)
            scores += 2 * seq_len * attention.heads * attention.head_dim
        flops.append(2 * (matrices + scores))
    return tuple(flops)


def training_flops(config: Decoder.Config, seq_len: int) -> tuple[float, ...]:
    """Forward and backward FLOPs of one token of each modality group: 3 × forward, less the
    gradient that causal routers do not give to their input.
    """
    spared = 2 * sum(
        pool.dim * (pool.dim // 2)
        for layer in config.layers
        for pool in _pools(layer.feed_forward)
        if _has_causal(pool)
    )
    return tuple(3 * flops - spared for flops in forward_flops(config, seq_len))


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


def _pools(config: FeedForward.Config | MixtureOfExperts.Config) -> list[ExpertPool.Config]:
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
