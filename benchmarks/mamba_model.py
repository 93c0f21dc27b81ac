"""Whole Mamba models, forward and backward: ours beside mambapy's and transformers' (row 13).

    python benchmarks/mamba_model.py

A run is one batch: forward, cross entropy over all logits, backward. AdamW is timed by itself: a
mixture has twice the parameters to update, however few tokens there are. All models have the
parameters of our dense one, the mixture in each of its two sets; logits and the gradients of
embedding and head are compared before timing, with rates of decay and step sizes at which the scan
contributes to them.

mambapy runs its parallel scan; transformers' Mamba runs that too (``use_mambapy``) and, where
sequences are short, its own loop over tokens, quadratic in backward. Rivals that are not installed
are left out. One document a row.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from earlyfuse.configs import mamba_decoders
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.decoder import Decoder
from harness import Report, at_least, compare_models, speed

DENSE, MIXTURE = "ours, dense Mamba", "ours, Mixture-of-Mamba"
MAMBAPY = "mambapy LM, pscan"
TRANSFORMERS, SEQUENTIAL = "transformers, pscan of mambapy", "transformers, sequential"
GOAL_OVER_DENSE, GOAL_OVER_MAMBAPY = 0.95, 2.0
LONGEST_SLICED = 256
RUN = 128
PACKAGES = ("mambapy", "transformers")
# names of the parameters whose gradients are compared: embedding and head
EMBEDDINGS = ("tok_embeddings.weight", "embedding.weight", "embeddings.weight")
COMPARED = (*EMBEDDINGS, "lm_head.weight")


@dataclass(frozen=True)
class Setting:
    """Sizes of all models; a batch is ``rows`` x ``seq_len`` tokens, half of them text."""

    blocks: int
    dim: int
    vocab_size: int
    rows: int
    seq_len: int
    rounds: int

    @property
    def shape(self) -> mamba_decoders.MambaShape:
        """The same for our configs."""
        return mamba_decoders.MambaShape(self.dim, self.blocks // 2, self.vocab_size)


SETTINGS = (
    Setting(12, 256, 2048, rows=2, seq_len=512, rounds=9),
    Setting(12, 256, 2048, rows=2, seq_len=128, rounds=5),
)


# ---------------------------------------------------------------- models


def dense(setting: Setting) -> Decoder:
    """Our decoder with larger scans: at their initial values they are under 1 % of the output."""
    model = Decoder(mamba_decoders.mamba(setting.shape))
    model.init_states()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter -= 1.5
            elif name.endswith("dt_bias"):
                parameter += 2.0
            elif name.endswith("x_proj.weight"):
                parameter *= 4.0
    return model


def mixture(setting: Setting, parent: Decoder) -> Decoder:
    """Mixture-of-Mamba, all four projections untied, each set a copy of ``parent``'s."""
    model = Decoder(mamba_decoders.mixture_of_mamba(setting.shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parent.get_parameter(name))
    return model


class MambapyModel(nn.Module):
    """mambapy's blocks between embedding and head; its own ``lm`` imports mamba_ssm."""

    def __init__(self, setting: Setting) -> None:
        from mambapy.mamba import Mamba, MambaConfig, RMSNorm

        super().__init__()
        self.embedding = nn.Embedding(setting.vocab_size, setting.dim)
        self.mamba = Mamba(MambaConfig(setting.dim, setting.blocks))
        self.norm_f = RMSNorm(setting.dim)
        self.lm_head = nn.Linear(setting.dim, setting.vocab_size, bias=False)

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """(B, S) → logits (B, S, V)."""
        return self.lm_head(self.norm_f(self.mamba(self.embedding(tokens_BS))))


def mambapy(setting: Setting, parent: Decoder) -> nn.Module:
    """mambapy's with ``parent``'s parameters."""
    stems = {"tok_embeddings": "embedding", "layers": "mamba.layers", "norm": "norm_f"}
    return load(MambapyModel(setting), parent, stems)


def transformers(setting: Setting, parent: Decoder, use_mambapy: bool) -> nn.Module:
    """transformers' with ``parent``'s parameters."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=setting.vocab_size,
        hidden_size=setting.dim,
        num_hidden_layers=setting.blocks,
        tie_word_embeddings=False,
        use_cache=False,
        use_mambapy=use_mambapy,
    )
    stems = {
        "tok_embeddings": "backbone.embeddings",
        "layers": "backbone.layers",
        "norm": "backbone.norm_f",
    }
    return load(MambaForCausalLM(config), parent, stems)


def load(model: nn.Module, parent: Decoder, stems: dict[str, str]) -> nn.Module:
    """Loads ``parent``'s parameters under public names; ``stems``: their prefixes. Strict."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    state = {}
    for name, parameter in parent.named_parameters():
        stem, rest = name.split(".", 1)
        rest = rest.replace("mamba_norm", "norm").replace("scan.dt_bias", "dt_proj.bias")
        rest = rest.replace("mamba.", "mixer.").replace("scan.", "").replace("conv.", "conv1d.")
        public = f"{stems.get(stem, stem)}.{rest}"
        state[public] = parameter.detach().view(shapes[public])
    model.load_state_dict(state)
    return model


def models_of(setting: Setting) -> dict[str, nn.Module]:
    """Ours, and the rivals that are installed and fast enough at this length."""
    parent = dense(setting)
    models: dict[str, nn.Module] = {DENSE: parent, MIXTURE: mixture(setting, parent)}
    installed = [name for name in PACKAGES if importlib.util.find_spec(name)]
    if "mambapy" in installed:
        models[MAMBAPY] = mambapy(setting, parent)
    if "transformers" in installed:
        if "mambapy" in installed:
            models[TRANSFORMERS] = transformers(setting, parent, use_mambapy=True)
        if setting.seq_len <= LONGEST_SLICED:
            models[SEQUENTIAL] = transformers(setting, parent, use_mambapy=False)
    return models


# ---------------------------------------------------------------- work


def training(model: nn.Module, setting: Setting) -> Callable[[], list[torch.Tensor]]:
    """One batch, forward and backward: logits, gradients of embedding and head."""
    generator = torch.Generator().manual_seed(0)
    shape = (setting.rows, setting.seq_len + 1)
    tokens_BS = torch.randint(setting.vocab_size, shape, generator=generator)
    run_length = min(RUN, setting.seq_len // 2)
    image_BS = (torch.arange(setting.seq_len) // run_length % 2).expand(setting.rows, -1)
    modality_BS = image_BS.to(torch.uint8)
    inputs_BS, labels_BS = tokens_BS[:, :-1], tokens_BS[:, 1:]
    compared = [p for name, p in model.named_parameters() if name.endswith(COMPARED)]

    def run() -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        batch = MixedBatch.of(inputs_BS, modality_BS)
        found = model(batch) if isinstance(model, Decoder) else model(inputs_BS)
        logits_BSV = found if isinstance(found, torch.Tensor) else found.logits
        F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten()).backward()
        return [logits_BSV.detach(), *(p.grad for p in compared if p.grad is not None)]

    return run


def main() -> None:
    """Times all models and writes ``results/mamba_model.{jsonl,md}``."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers would look for kernels there
    title = "Whole Mamba models, forward and backward (row 13)"
    report = Report("mamba_model", title, PACKAGES)
    pages = []
    for setting in SETTINGS:
        table, timings = compare_models(
            report,
            {"dtype": "fp32"} | vars(setting),
            setting.rows * setting.seq_len,
            models_of(setting),
            partial(training, setting=setting),
            rounds=setting.rounds,
            same=True,
        )
        pairs = [(MIXTURE, DENSE, GOAL_OVER_DENSE)]
        if MAMBAPY in timings:
            pairs += [(name, MAMBAPY, GOAL_OVER_MAMBAPY) for name in (DENSE, MIXTURE)]
        goals = [
            at_least(f"{name} / {rival}, tokens/s", speed(timings[name], timings[rival]), goal)
            for name, rival, goal in pairs
        ]
        pages.append("\n".join([table, *goals, ""]))
        print(pages[-1], flush=True)
    report.write("\n".join(pages))


if __name__ == "__main__":
    main()
