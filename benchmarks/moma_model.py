"""Whole models, forward and backward: MoMa, its dense twin and torchtitan's MoE (row 12).

    python benchmarks/moma_model.py

A run is one batch: forward, cross entropy over all logits, backward. AdamW is timed by itself: an
MoE updates several times the parameters of a dense model, and the tokens per step decide how much
of a step that is.

Every model has the same width, depth, heads, inner width and vocabulary, hence the same FLOPs per
token up to its routers. torchtitan's is Qwen3 with 8 experts, one per token, balanced by its own
debugging switch, so that no expert waits for another; its experts compute in fp32 and its attention
is SDPA, as a CPU needs. One document a row: attention is plain causal everywhere.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.models.common import CosSinRoPE, Embedding, Linear
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
from torchtitan.models.common.moe import GroupedExperts, TokenChoiceTopKRouter
from torchtitan.models.qwen3 import Qwen3Model, _build_qwen3_moe_layers, _qwen3_norm

from earlyfuse.configs import decoders
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.vocabulary import Modality
from harness import Report, at_least, compare_models, speed
from moma_layer import Fp32Experts

EXPERTS_PER_MODALITY, SEGMENT = 4, 64
DENSE, MOMA, TITAN = "ours, dense Chameleon", "ours, MoMa 4t4i", "torchtitan Qwen3, 8 experts"
GOAL = 0.95


@dataclass(frozen=True)
class Setting:
    """Sizes of all models; a batch is ``rows`` x ``seq_len`` tokens, half of them text."""

    layers: int
    dim: int
    heads: int
    hidden_dim: int
    vocab_size: int
    rows: int
    seq_len: int

    @property
    def shape(self) -> decoders.Shape:
        """The same for our configs."""
        return decoders.Shape(
            self.dim, self.layers, self.heads, self.hidden_dim, self.vocab_size, norm_order="pre"
        )


SETTINGS = (
    Setting(6, 512, 8, 2048, 2048, rows=4, seq_len=1024),
    Setting(6, 256, 4, 768, 2048, rows=4, seq_len=512),
)


# ---------------------------------------------------------------- models


def ours(config: Decoder.Config) -> Decoder:
    """Our decoder with its initial values."""
    model = Decoder(config)
    model.init_states()
    return model


def moma(setting: Setting) -> Decoder:
    """Four experts for each modality, static budgets for half the tokens each."""
    experts = {Modality.TEXT: EXPERTS_PER_MODALITY, Modality.IMAGE: EXPERTS_PER_MODALITY}
    shares = {Modality.TEXT: 0.5, Modality.IMAGE: 0.5}
    return ours(decoders.moma(setting.shape, experts, shares, routing_rows=setting.rows))


def titan(setting: Setting) -> Qwen3Model:
    """torchtitan's MoE decoder of this size; its own initial values."""
    head_dim = setting.dim // setting.heads
    normal = {"weight": partial(nn.init.normal_, std=0.02)}
    config = Qwen3Model.Config(
        vocab_size=setting.vocab_size,
        dim=setting.dim,
        norm=_qwen3_norm(setting.dim),
        tok_embeddings=Embedding.Config(
            num_embeddings=setting.vocab_size, embedding_dim=setting.dim, param_init=normal
        ),
        lm_head=Linear.Config(
            in_features=setting.dim, out_features=setting.vocab_size, param_init=normal
        ),
        layers=_build_qwen3_moe_layers(
            n_layers=setting.layers,
            dim=setting.dim,
            n_heads=setting.heads,
            n_kv_heads=setting.heads,
            head_dim=head_dim,
            moe_hidden_dim=setting.hidden_dim,
            num_experts=2 * EXPERTS_PER_MODALITY,
            top_k=1,
            attn_backend="flex",
            moe_comm_backend="standard",
            rope=CosSinRoPE.Config(dim=head_dim, max_seq_len=setting.seq_len, theta=10_000.0),
        ),
    )
    swaps: list[tuple[type, Callable]] = [
        (FlexAttention.Config, lambda _: ScaledDotProductAttention.Config()),
        (GroupedExperts.Config, _in_fp32),
    ]
    for kind, swap in swaps:
        for _, found, parent, field in list(config.traverse(kind)):
            setattr(parent, field, swap(found))
    for _, router, _, _ in config.traverse(TokenChoiceTopKRouter.Config):
        router._debug_force_load_balance = True
    model = Qwen3Model(config)
    model.init_states()
    return model


def _in_fp32(found: GroupedExperts.Config) -> Fp32Experts.Config:
    return Fp32Experts.Config(
        dim=found.dim,
        hidden_dim=found.hidden_dim,
        num_experts=found.num_experts,
        param_init=found.param_init,
    )


# ---------------------------------------------------------------- work


def training(model: nn.Module, setting: Setting) -> Callable[[], list[torch.Tensor]]:
    """One batch, forward and backward; segments of text and image alternate."""
    generator = torch.Generator().manual_seed(0)
    shape = (setting.rows, setting.seq_len + 1)
    tokens_BS = torch.randint(setting.vocab_size, shape, generator=generator)
    inputs_BS, labels_BS = tokens_BS[:, :-1], tokens_BS[:, 1:]
    positions_BS = torch.arange(setting.seq_len).expand(setting.rows, -1)
    modality_BS = (positions_BS // SEGMENT % 2).to(torch.uint8)

    def run() -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        if isinstance(model, Decoder):
            logits_BSV = model(MixedBatch.of(inputs_BS, modality_BS))
        else:
            logits_BSV = model(inputs_BS, positions_BS)
        F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten()).backward()
        return []

    return run


def main(rounds: int = 15) -> None:
    """Times all models and writes ``results/moma_model.{jsonl,md}``."""
    logging.getLogger().setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="In CPU autocast")
    title = "Whole MoMa models, forward and backward (row 12)"
    report = Report("moma_model", title, ["torchtitan"])
    pages = []
    for setting in SETTINGS:
        models: dict[str, nn.Module] = {
            DENSE: ours(decoders.dense(setting.shape)),
            MOMA: moma(setting),
            TITAN: titan(setting),
        }
        table, timings = compare_models(
            report,
            {"dtype": "fp32", "rounds": rounds} | vars(setting),
            setting.rows * setting.seq_len,
            models,
            partial(training, setting=setting),
            rounds=rounds,
        )
        goals = [
            at_least("MoMa / dense, tokens/s", speed(timings[MOMA], timings[DENSE]), GOAL),
            at_least("MoMa / torchtitan's MoE, tokens/s", speed(timings[MOMA], timings[TITAN]), 1),
        ]
        pages.append("\n".join([table, *goals, ""]))
        print(pages[-1], flush=True)
    report.write("\n".join(pages))


if __name__ == "__main__":
    main()
