"""Denoising: turns noise into the vectors of an image, in steps from time 1 to 0.

The loop knows no model: ``predict`` gives what the model predicts of noised vectors at a time
(``models/objectives/diffusion.py``). Nothing is random but the noise it begins with, a hash of a
document's seed and the number of the image in the document.

B documents, n vectors of an image, P numbers in a vector.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from earlyfuse.models.field_checks import check_choices
from earlyfuse.models.hashed_noise import key_of, normal
from earlyfuse.models.objectives.diffusion import METHODS, Diffusion, Method, Values

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Denoising:
    """Settings of denoising.

    ``steps``, ``method``: "ddim" and "euler" read the model once a step, "heun" twice, except in
    the last step (see ``Diffusion.step``). ``guided_until``: the time up to which guidance is on,
    from 0, the data, to 1, noise; JiT (arXiv 2511.13720): 0.9.
    """

    steps: int = 50
    method: Method = "ddim"
    guided_until: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self, method=METHODS)
        if self.steps < 1:
            raise ValueError(f"steps ({self.steps}) of denoising must be at least 1")
        if not 0 <= self.guided_until <= 1:
            raise ValueError(
                f"guided_until ({self.guided_until}) must be a time in [0, 1]; 1 is always"
            )

    def guides(self, time: torch.Tensor) -> bool:
        """True if guidance is on at ``time``, of one element."""
        return float(time) <= self.guided_until


def denoise(
    predict: Predict, z_BnP: torch.Tensor, diffusion: Diffusion, denoising: Denoising
) -> torch.Tensor:
    """The vectors (B, n, P) that noise ``z_BnP`` becomes; ``predict(z, time)``, ``time`` of one
    element, predicts all of them.
    """
    method = denoising.method
    times = diffusion.grid(denoising.steps, method)

    def values(z_BnP: torch.Tensor, time: torch.Tensor) -> Values:
        time_Bn = time.to(z_BnP.device).expand(z_BnP.shape[:2])
        found = diffusion.values(predict(z_BnP, time), z_BnP, time_Bn)
        return diffusion.clipped(found, z_BnP, time_Bn)

    for time, to in pairwise(times[:-1]):
        first = values(z_BnP, time)
        moved_BnP = diffusion.step(first, z_BnP, time, to, method)
        if method == "heun":
            second = values(moved_BnP, to)
            moved_BnP = (moved_BnP + diffusion.step(second, z_BnP, time, to, method)) / 2
        z_BnP = moved_BnP
    # by any method the last step ends at x, where σ is 0
    return values(z_BnP, times[-2]).x


def noise(
    seeds: Sequence[int], images: Sequence[int], shape: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Standard normal (B, n, P), a function of each document's seed and its image's number."""
    keys = [key_of("image", seed, image) for seed, image in zip(seeds, images, strict=True)]
    key_B11 = torch.tensor(keys, device=device)[:, None, None]
    index_nP = torch.arange(shape[0] * shape[1], device=device).view(shape)
    return normal(key_B11, index_nP)
