"""Parameters and FLOPs in closed form, per modality: sums over the branches of a model.

Convention: a multiply-add is 2 FLOPs. Counted are matrix products, Mamba's convolutions and scans,
and the head; not norms, softmax, routing sorts and the embedding lookup. Attention counts the full
S × S square, as in PaLM's appendix B. Training is 3 × the matrix products of the forward pass,
without recomputation, less the gradient that causal routers do not give to their input, and
convolutions and scans both ways (kernels/*/README.md). With expert choice a token gets c experts on
average, c the capacity factor, with token choice its top k; routers score every token. The second
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
    active = [config.dim + head for _ in config.modalities]
    for layer in config.layers:
        norms = len(layer.branches) * config.dim
        total += norms * layer.norm_groups
        total += sum(branch.parameters() for branch in layer.branches.values())
        for group in range(len(active)):
            branches = layer.branches.values()
            active[group] += norms + sum(branch.parameters(group) for branch in branches)
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
    found = [products(float(config.vocab_size * config.dim)) for _ in config.modalities]
    for _, branch in config.named_branches():
        found = [flops + branch.flops(seq_len, group) for group, flops in enumerate(found)]
    return found
