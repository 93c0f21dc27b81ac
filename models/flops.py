"""Parameters and FLOPs in closed form, per modality: sums of what each branch says of itself.

Convention: a multiply-add is 2 FLOPs; matrix products count, and Mamba's convolutions and scans (no
norms, softmax, routing sort); the head counts, the embedding lookup does not; attention is counted
over the full S × S square, as in PaLM's appendix B, without the causal half; training is 3 × the
matrix products of the forward pass, without recomputation, less the gradient that causal routers do
not give to their input, and what convolutions and scans take both ways (kernels/*/README.md).
Expert choice: a pool of E experts with capacity factor c gives its tokens c experts on average; its
routers, main and causal, score every token of the batch. Token choice gives each token its top k.
In a second stage, where all but the causal routers is frozen, a step takes about two thirds of what
is counted here.
"""

from dataclasses import dataclass

from earlyfuse.models.blocks.branch import Flops, products
from earlyfuse.models.decoder import Decoder


@dataclass(frozen=True)
class Parameters:
    """``total`` of the model; ``active`` of a token by group, with embedding row and full head."""

    total: int
    active: tuple[int, ...]


def count_parameters(config: Decoder.Config) -> Parameters:
    """Parameters of the model and those that one token of each modality group meets."""
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
    for branch in config.branches():
        found = [flops + branch.flops(seq_len, group) for group, flops in enumerate(found)]
    return found
