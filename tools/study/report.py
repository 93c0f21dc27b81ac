"""Compares the runs of a study: held-out losses at FLOPs that all of them have reached.

P points of a curve, S seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from earlyfuse.data.atomic import atomic_write_bytes, atomic_write_json
from earlyfuse.models.vocabulary import Modality
from earlyfuse.parallel.reporting.metrics_file import TRAIN, VALIDATION
from earlyfuse.parallel.reporting.plots import plot_study

Curve = dict[str, np.ndarray]
"""``flops`` (P,), and losses (S, P) by modality, as "text" or "image diffusion", and under rules of
inference, as "text, causal"; NaN where a run has none."""

# how validation names losses → what follows the modality here
_KINDS = {"loss/": "", "diffusion_loss/": " diffusion"}
_RULES = {"": "", "causal_": ", causal", "threshold_": ", threshold"}
_NAMES = {
    rule + kind: named + ruled for kind, named in _KINDS.items() for rule, ruled in _RULES.items()
}


def curves(runs: Sequence[Sequence[dict[str, Any]]]) -> Curve:
    """The curve of one config from the logged lines of its seeds.

    The points are the first seed's validations within the FLOPs that all seeds have; the others'
    losses are interpolated there. A loss that is not finite is a gap.
    """
    seeds = [_validations(lines) for lines in runs]
    first = max(flops_P[0] for flops_P, _ in seeds)
    last = min(flops_P[-1] for flops_P, _ in seeds)
    flops_P = np.unique(np.clip(seeds[0][0], first, last))
    known = [m.label + name for m in Modality for name in _NAMES.values()]
    labels = [label for label in known if all(label in losses for _, losses in seeds)]
    return {"flops": flops_P} | {
        label: np.stack([_at(flops_P, own_P, losses[label]) for own_P, losses in seeds])
        for label in labels
    }


def _validations(lines: Sequence[dict[str, Any]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """FLOPs of all modalities at each validation of a run, and its losses by modality."""
    trained = sorted((x for x in lines if x["kind"] == TRAIN), key=lambda x: x["step"])
    held_out = sorted((x for x in lines if x["kind"] == VALIDATION), key=lambda x: x["step"])
    if not trained or not held_out:
        raise ValueError("a run has logged no validation; train it to its end, or start it again")
    # validations of earlier versions have no FLOPs: those of the training lines around them
    known = {
        line["step"]: sum(value for key, value in line.items() if key.startswith("flops/"))
        for line in sorted([*trained, *held_out], key=lambda line: line["step"])
        if any(key.startswith("flops/") for key in line)
    }
    flops_P = np.interp([line["step"] for line in held_out], [*known], [*known.values()])
    keys = {
        key: key.removeprefix(prefix) + name
        for line in held_out
        for key in line
        for prefix, name in _NAMES.items()
        if key.startswith(prefix)
    }
    return flops_P, {
        label: np.array([line.get(key, np.nan) for line in held_out]) for key, label in keys.items()
    }


def _at(flops: Any, own_P: np.ndarray, losses_P: np.ndarray) -> np.ndarray:
    """Losses at ``flops``, between points linearly; NaN beyond the points, and beside a gap."""
    found = np.interp(flops, own_P, losses_P, left=np.nan, right=np.nan)
    place = np.searchsorted(own_P, flops).clip(max=len(own_P) - 1)
    return np.where(own_P[place] == flops, losses_P[place], found)


@dataclass(frozen=True)
class Comparison:
    """Curves of all configs by name, the baseline first."""

    found: dict[str, Curve]

    @property
    def baseline(self) -> str:
        """The first config."""
        return next(iter(self.found))

    @property
    def labels(self) -> list[str]:
        """The modalities that all configs have losses of, and the diffusion losses."""
        known = (m.label + kind for m in Modality for kind in _KINDS.values())
        return [name for name in known if all(name in curve for curve in self.found.values())]

    def ruled(self, label: str) -> list[str]:
        """The losses of a modality under rules of inference that any config has."""
        names = (label + rule for rule in _RULES.values() if rule)
        return [name for name in names if any(name in curve for curve in self.found.values())]

    @property
    def flops(self) -> float:
        """The most that all runs have reached."""
        return float(min(curve["flops"][-1] for curve in self.found.values()))

    def losses_S(self, config: str, label: str) -> np.ndarray:
        """Loss of each seed, interpolated at ``flops``; NaN where it has no loss on both sides."""
        curve = self.found[config]
        return np.array([float(_at(self.flops, curve["flops"], row_P)) for row_P in curve[label]])


def flops_to_reach(curve: Curve, label: str, target: float) -> float | None:
    """FLOPs at which the mean held-out loss first is ``target``, between validations linearly;
    None if it never is.
    """
    mean, flops = curve[label].mean(0), curve["flops"]
    below = np.flatnonzero(mean <= target)
    if not len(below):
        return None
    at = below[0]
    if at == 0 or not np.isfinite(mean[at - 1]):
        return float(flops[at])
    share = (mean[at - 1] - target) / (mean[at - 1] - mean[at])
    return float(flops[at - 1] + share * (flops[at] - flops[at - 1]))


def report(out: Path, found: dict[str, Curve]) -> None:
    """Write ``study.json``, ``study.md`` and ``study.png`` into ``out``, and print the table."""
    compared = Comparison(found)
    if not compared.labels:
        raise ValueError(f"configs ({' '.join(found)}) have no modality in common to compare")
    seeds = len(found[compared.baseline][compared.labels[0]])
    table = "\n".join(f"| {' | '.join(row)} |" for row in _rows(compared))
    text = (
        f"Held-out loss (nats per token; diffusion: squared error) after {compared.flops:.3g} "
        "training FLOPs, the most that all runs have reached (linear between validations), mean of "
        f"{seeds} seeds (least-most).\n\n{table}\n"
    )
    if any(map(compared.ruled, compared.labels)):
        text += (
            "\nExperts and depth routers choose by the batch, later tokens included; where a rule "
            "of inference is named, from each token alone. –: the model has no such rule, or "
            "routes nothing.\n"
        )
    if gaps := _gaps(compared):
        text += f"\nNot finite, or not validated there: {'; '.join(gaps)}.\n"
    atomic_write_bytes(out / "study.md", text.encode())
    atomic_write_json(out / "study.json", _values(compared))
    plot_study(found, compared.labels, out / "study.png", compared.flops)
    print(f"{text}\n{out / 'study.png'}")


def _rows(compared: Comparison) -> list[list[str]]:
    baseline, flops = compared.baseline, compared.flops
    ends = {config: curve["flops"][-1] for config, curve in compared.found.items()}
    header = ["config"]
    for label in compared.labels:
        header += [f"{label} loss", *compared.ruled(label), f"FLOPs to {baseline}'s {label}"]
    apart = max(ends.values()) > 1.001 * flops  # seeds differ a little: in their documents
    if apart:
        header += ["FLOPs at the end", *(f"{label} loss there" for label in compared.labels)]
    rows = [header, ["---"] * len(header)]
    for config, curve in compared.found.items():
        row = [config]
        for label in compared.labels:
            target = float(compared.losses_S(baseline, label).mean())
            reached = flops_to_reach(curve, label, target)
            row += [
                _spread(compared.losses_S(config, label)),
                *(
                    _spread(compared.losses_S(config, name)) if name in curve else "–"
                    for name in compared.ruled(label)
                ),
                "not reached" if reached is None else f"{reached / flops:.1%}",
            ]
        if apart:
            row += [f"{ends[config]:.3g}"]
            row += [_spread(curve[label][:, -1]) for label in compared.labels]
        rows.append(row)
    return rows


def _spread(losses_S: np.ndarray) -> str:
    if not np.isfinite(losses_S).all():
        return "none"
    return f"{losses_S.mean():.3f} ({losses_S.min():.3f}-{losses_S.max():.3f})"


def _gaps(compared: Comparison) -> list[str]:
    """The losses that curves lack, in words."""
    words = []
    for config, curve in compared.found.items():
        for label in compared.labels:
            missing = int((~np.isfinite(curve[label])).sum())
            if missing:
                words.append(f"{missing} of {curve[label].size} {label} losses of {config}")
            elif not np.isfinite(compared.losses_S(config, label)).all():
                words.append(f"{label} of {config}, whose first validation is later")
    return words


def _values(compared: Comparison) -> dict[str, Any]:
    """Curves, and what the table has of them, as strict JSON: null is a loss that is missing."""
    return {
        config: {name: _plain(values) for name, values in curve.items()}
        | {
            "at_equal_flops": {"flops": compared.flops}
            | {
                name: _plain(compared.losses_S(config, name))
                for label in compared.labels
                for name in (label, *compared.ruled(label))
                if name in curve
            }
        }
        for config, curve in compared.found.items()
    }


def _plain(values: Any) -> Any:
    if isinstance(values, np.ndarray):
        return [_plain(value) for value in values.tolist()]
    if isinstance(values, list):
        return [_plain(value) for value in values]
    return float(values) if np.isfinite(values) else None
