"""Parameters and FLOPs in closed form, per modality: sums over the branches of a model.

Convention: a multiply-add is 2 FLOPs. Counted are matrix products, Mamba's convolutions and scans,
and the head; not norms, softmax, routing sorts and the embedding lookup. Attention counts the full
S × S square, as in PaLM's appendix B. Training is 3 × the matrix products of the forward pass,
without recomputation, less the gradient that causal routers do not give to their input, and
convolutions and scans both ways (kernels/*/README.md). With expert choice a token gets c experts on
average, c the capacity factor, with token choice its top k; routers score every token. A
depth-routed block counts for the fraction of tokens that it keeps in expectation, its attention in
rows of as many; depth routers score every token. A vector passes both adapters and, as on a GPU,
the head. The second
stage, which trains causal routers alone, takes about two thirds of what is counted here.
"""

from dataclasses import dataclass

from earlyfuse.models.blocks.branch import Flops, products
from earlyfuse.models.decoder import Decoder


@dataclass(frozen=True)
class Parameters:
    """``total`` of the model; ``active`` per modality group, those that a token uses: its embedding
    row and the full head included.
    """

    total: int
    active: tuple[int, ...]


def count_parameters(config: Decoder.Config) -> Parameters:
    """Parameters of the model, and of one token of each modality group."""
    head = config.vocab_size * config.dim + config.dim  # with the last norm
    total = config.vocab_size * config.dim + head
    shared = config.shared_depth_routers()
    projection = shared[0].projection_parameters(config.dim) if shared else 0
    adapters = 0 if config.vectors is None else config.vectors.parameters(config.dim)
    total += adapters + projection + sum(layer.parameters() for layer in config.layers)
    active = (
        (adapters if _holds_vectors(config, group) else config.dim)
        + head
        + projection
        + sum(layer.parameters(group) for layer in config.layers)
        for group in range(len(config.modalities))
    )
    return Parameters(total, tuple(active))


def forward_flops(config: Decoder.Config, seq_len: int) -> tuple[float, ...]:
    """Forward FLOPs of one token of each modality group in rows of ``seq_len``."""
    return tuple(flops.forward for flops in _flops(config, seq_len))


def training_flops(config: Decoder.Config, seq_len: int) -> tuple[float, ...]:
    """Forward and backward FLOPs of one token of each modality group."""
    return tuple(flops.forward + flops.backward for flops in _flops(config, seq_len))


def mean_training_flops(config: Decoder.Config, seq_len: int) -> float:
    """Training FLOPs of a token, averaged over modality groups."""
    flops = training_flops(config, seq_len)
    return sum(flops) / len(flops)


def _flops(config: Decoder.Config, seq_len: int) -> list[Flops]:
    head, adapters = products(float(config.vocab_size * config.dim)), Flops(0, 0)
    if config.vectors is not None:
        adapters = config.vectors.flops(config.dim)
    return [
        sum(
            (layer.flops(seq_len, group) for layer in config.layers),
            head + adapters if _holds_vectors(config, group) else head,
        )
        for group in range(len(config.modalities))
    ]


def _holds_vectors(config: Decoder.Config, group: int) -> bool:
    return config.vectors is not None and config.modalities[group] in config.vectors.modalities
