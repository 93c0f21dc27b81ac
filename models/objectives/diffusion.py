"""Diffusion: noise schedules, prediction targets, and the steps of samplers.

A noised vector is z = α(t) x + σ(t) ε, with x the data, ε standard normal noise, and t from 0, the
data, to 1, noise. A model predicts ε, x, or the velocity v = α' x + σ' ε; each of them follows from
the others and z.

- "cosine": α² + σ² = 1, as DDPM with the squared-cosine schedule (arXiv 2102.09672) in ``steps``
  steps; v = α ε - σ x (arXiv 2202.00512). Transfusion predicts ε (arXiv 2408.11039).
- "flow": α = 1 - t, σ = t, rectified flow; v = ε - x. ``shift`` moves times towards noise, as many
  dimensions need (arXiv 2403.03206, 5.3.2).

Predicting x on pixels, with the loss on v and ``min_denominator`` 0.05, is JiT's recipe (arXiv
2511.13720).
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torchtitan.config import Configurable

from earlyfuse.models.field_checks import check_choices

Target = Literal["epsilon", "v", "x"]
Method = Literal["ddim", "euler", "heun"]
METHODS = get_args(Method)
_LARGEST_BETA = 0.999  # of the squared-cosine schedule
_OFFSET = 0.008
_STEPS, _MOST_STEPS = 1000, 100_000
# the first time of samplers that divide by α, 0 or nearly so at 1: what a model gets wrong about
# noise would be multiplied by 20,000
_FIRST = 0.98


class Coefficients(NamedTuple):
    """α and σ of a time, and the coefficients α', σ' of the velocity: α σ' - σ α' is 1."""

    alpha: torch.Tensor
    sigma: torch.Tensor
    alpha_v: torch.Tensor
    sigma_v: torch.Tensor


class Values(NamedTuple):
    """x, ε and v of the same noised vector."""

    x: torch.Tensor
    epsilon: torch.Tensor
    v: torch.Tensor


class Diffusion(Configurable):
    """Noise schedule, prediction target and sampler steps of a model of vectors."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        """``steps``: T of the cosine schedule; ``shift``: that of flow. ``min_denominator``:
        α and σ are clamped to it where they divide a prediction. ``data_range``: data lie within ±
        this, and samplers clip x to it; 0: unbounded.
        """

        schedule: Literal["cosine", "flow"] = "cosine"
        predicts: Target = "epsilon"
        steps: int = _STEPS
        shift: float = 1.0
        min_denominator: float = 1e-5
        data_range: float = 0.0

        def __post_init__(self) -> None:
            check_choices(self, schedule=("cosine", "flow"), predicts=get_args(Target))
            if not 2 <= self.steps <= _MOST_STEPS:
                raise ValueError(
                    f"steps ({self.steps}) of a diffusion must lie in [2, {_MOST_STEPS}]"
                )
            if self.steps != _STEPS and self.schedule != "cosine":
                raise ValueError(
                    f'steps ({self.steps}) needs schedule "cosine", not {self.schedule!r}; '
                    "leave it out"
                )
            if not 0 < self.shift < math.inf:
                raise ValueError(f"shift ({self.shift}) must be positive and finite; 1 is off")
            if self.shift != 1 and self.schedule != "flow":
                raise ValueError(
                    f'shift ({self.shift}) needs schedule "flow", not {self.schedule!r}; '
                    "leave it at 1"
                )
            if not 0 < self.min_denominator < 1:
                raise ValueError(f"min_denominator ({self.min_denominator}) must lie in (0, 1)")
            if not 0 <= self.data_range < math.inf:
                raise ValueError(
                    f"data_range ({self.data_range}) must not be negative or infinite; 0 is off"
                )

    def __init__(self, config: Config):
        self.config = config

    def coefficients(self, time: torch.Tensor) -> Coefficients:
        """Coefficients of times in [0, 1], any shape, in fp32."""
        if self.config.schedule == "flow":
            time = time.float()
            one = torch.ones_like(time)
            return Coefficients(1 - time, time, -one, one)
        # in fp64: α is small where σ is nearly 1, and the reverse
        steps = self.config.steps
        step = (time.double() * steps).round().clamp(0, steps)
        last = step == steps
        angle = ((step - last.double()) / steps + _OFFSET) / (1 + _OFFSET) * math.pi / 2
        alpha = angle.cos() / math.cos(_OFFSET / (1 + _OFFSET) * math.pi / 2)
        alpha = torch.where(last, alpha * math.sqrt(1 - _LARGEST_BETA), alpha)
        sigma = (1 - alpha.square()).clamp(min=0).sqrt()
        alpha, sigma = alpha.float(), sigma.float()
        return Coefficients(alpha, sigma, -sigma, alpha)

    def times(self, uniform: torch.Tensor, largest: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Times of training, up to ``largest``, from numbers in (0, 1): 1/T … 1, or shifted."""
        if self.config.schedule == "flow":
            return self.shifted(uniform) * largest
        steps = self.config.steps
        return (uniform * largest * steps).floor().add(1).clamp(max=steps) / steps

    def shifted(self, time: torch.Tensor) -> torch.Tensor:
        """``time`` moved towards noise: s t / (1 + (s - 1) t)."""
        shift = self.config.shift
        return time if shift == 1 else shift * time / (1 + (shift - 1) * time)

    def noised(self, x: torch.Tensor, epsilon: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """z of vectors (…, P) at times (…)."""
        alpha, sigma, _, _ = self.coefficients(time.unsqueeze(-1))
        return alpha * x + sigma * epsilon

    def target(self, x: torch.Tensor, epsilon: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The prediction target of vectors (…, P) at times (…)."""
        if self.config.predicts == "v":
            _, _, alpha_v, sigma_v = self.coefficients(time.unsqueeze(-1))
            return alpha_v * x + sigma_v * epsilon
        return x if self.config.predicts == "x" else epsilon

    def values(self, predicted: torch.Tensor, z: torch.Tensor, time: torch.Tensor) -> Values:
        """x, ε and v that follow from a prediction for z (…, P) at times (…)."""
        at = self.coefficients(time.unsqueeze(-1))
        if self.config.predicts == "x":
            return self._of_x(predicted, z, at)
        alpha, sigma, alpha_v, sigma_v = at
        if self.config.predicts == "v":
            x, epsilon = sigma_v * z - sigma * predicted, alpha * predicted - alpha_v * z
            return Values(x, epsilon, predicted)
        alpha = alpha.clamp(min=self.config.min_denominator)
        return Values((z - sigma * predicted) / alpha, predicted, (alpha_v * z + predicted) / alpha)

    def clipped(self, values: Values, z: torch.Tensor, time: torch.Tensor) -> Values:
        """``values`` with x within ``data_range``, and the ε and v that follow from it and z."""
        if not self.config.data_range:
            return values
        x = values.x.clamp(-self.config.data_range, self.config.data_range)
        return self._of_x(x, z, self.coefficients(time.unsqueeze(-1)))

    def _of_x(self, x: torch.Tensor, z: torch.Tensor, at: Coefficients) -> Values:
        """The values of a z whose x is known."""
        alpha, sigma, _, sigma_v = at
        sigma = sigma.clamp(min=self.config.min_denominator)
        return Values(x, (z - alpha * x) / sigma, (sigma_v * z - x) / sigma)

    def grid(self, count: int, method: Method) -> torch.Tensor:
        """(count + 1,) fp32 times of a sampler, from noise to 0. Raises as ``check_method``.

        They begin at 1, or shortly before it where a step divides by α: predictions of ε, and
        "heun" on the cosine schedule. Of that schedule they are steps of the T, spaced evenly.
        """
        self.check_method(method, count)
        place = torch.arange(count, -1, -1, dtype=torch.float64) / count
        if self.config.schedule == "flow":
            return (self.shifted(place) * self._first(method)).float()
        steps = self.config.steps
        return ((place * self._first(method) * steps).round() / steps).float()

    def check_method(self, method: str, count: int) -> None:
        """``ValueError`` unless a sampler of ``count`` steps fits the schedule."""
        if method not in METHODS:
            raise ValueError(f"method ({method!r}) must be one of {', '.join(METHODS)}")
        cosine = self.config.schedule == "cosine"
        most = round(self._first(method) * self.config.steps) if cosine else _MOST_STEPS
        if not 1 <= count <= most:
            raise ValueError(
                f"denoising steps ({count}) must lie in [1, {most}]"
                + (", the steps of the cosine schedule" if cosine else "")
            )

    def _first(self, method: str) -> float:
        """The time at which a sampler begins."""
        steps, cosine = self.config.steps, self.config.schedule == "cosine"
        if self.config.predicts != "epsilon" and not (cosine and method == "heun"):
            return 1.0
        # the last step's α is tiny by the limit on β
        return min(_FIRST, (steps - 1) / steps) if cosine else _FIRST

    def step(
        self, values: Values, z: torch.Tensor, time: torch.Tensor, to: torch.Tensor, method: Method
    ) -> torch.Tensor:
        """z at the earlier time ``to``, from ``values`` at ``time``, both of one element.

        "ddim": α x + σ ε at the new time (arXiv 2010.02502, eta 0). "euler", and each half of
        "heun": along the velocity of flow; of the cosine schedule along ε, in z / α over σ / α
        (arXiv 2206.00364). One step of "euler" is one of "ddim".
        """
        alpha_to, sigma_to, _, _ = self.coefficients(to)
        if method == "ddim" or (method == "euler" and self.config.schedule == "cosine"):
            return alpha_to * values.x + sigma_to * values.epsilon
        if self.config.schedule == "flow":
            return z + (to - time) * values.v
        alpha, sigma, _, _ = self.coefficients(time)
        return alpha_to / alpha * (z - sigma * values.epsilon) + sigma_to * values.epsilon
