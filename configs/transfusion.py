"""Transfusion by composition: any decoder with vectors, and the objectives of the recipes.

Two recipes: the Transfusion paper's, ε with the cosine schedule on latents (arXiv 2408.11039), and
JiT's on pixels, x-prediction with the loss on v over rectified flow (arXiv 2511.13720).
"""

import math
from dataclasses import replace
from typing import Any

from earlyfuse.models.blocks.vector_adapters import VectorAdapters
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.objectives.diffusion import Diffusion
from earlyfuse.models.objectives.transfusion import TransfusionObjective

PAPER = Diffusion.Config(schedule="cosine", predicts="epsilon")
# times count from data to noise here, the other way round in the paper: its mean is -0.8
JIT = Diffusion.Config(schedule="flow", predicts="x", min_denominator=0.05, data_range=1.0)


def with_vectors(
    model: Decoder.Config, width: int, diffusion: Diffusion.Config = PAPER, **adapters: Any
) -> Decoder.Config:
    """``model`` for text and vectors of ``width``; ``adapters``: fields of ``VectorAdapters``."""
    return replace(
        model, vectors=VectorAdapters.Config(width=width, diffusion=diffusion, **adapters)
    )


def paper_loss(**fields: Any) -> TransfusionObjective.Config:
    """Transfusion's objective: λ = 5, ε, noise up to 500 of 1000 steps before captions."""
    return TransfusionObjective.Config(**fields)


def jit_loss(**fields: Any) -> TransfusionObjective.Config:
    """JiT's objective: the loss on v, logit-normal times."""
    return TransfusionObjective.Config(
        loss_in="v", times="logit_normal", times_mean=0.8, times_std=0.8, **fields
    )


def shift_of(numbers: int) -> float:
    """The shift of a flow for images of so many numbers: √(numbers / 4096) (arXiv 2510.11690)."""
    return math.sqrt(numbers / 4096)
