"""Plots losses and task accuracy of a run over tokens, losses of several runs over FLOPs, and ranks
of attention maps over layers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, MaxNLocator

from earlyfuse.data.atomic import atomic_write
from earlyfuse.data.media import MEDIA
from earlyfuse.parallel.reporting.metrics_file import METRICS_FILE, TRAIN, VALIDATION, read_metrics
from earlyfuse.parallel.reporting.run_folder import CURVES

_TEXT_COLOUR = "#1b6ca8"
_BY_RULE = {"causal_": "--", "threshold_": "-."}  # losses by a causal rule, and their lines
_CHANCES = {"task": "chance", "generated_accuracy": "generated_chance"}  # of each accuracy
_DOTS = {"marker": "o", "markersize": 3}


def colours() -> dict[str, str]:
    """Label → colour of every modality."""
    return {"text": _TEXT_COLOUR} | {label: medium.colour for label, medium in MEDIA.items()}


def plot_curves(folder: Path) -> Path:
    """Draw ``folder``/loss_curves.png from the run's metrics; returns its path."""
    run = _Run(read_metrics(folder / METRICS_FILE))
    labels = [label for label in colours() if any(f"loss/{label}" in line for line in run.train)]
    sums = added_sums(run.validation or run.train)
    tasks = sorted(
        {key for line in run.validation for key in line if key.partition("/")[0] in _CHANCES}
    )
    figure, axes = _panels(len(labels) + len(sums) + bool(tasks))
    for axis, label in zip(axes, labels, strict=False):
        _draw_losses(axis, label, run)
    for axis, name in zip(axes[len(labels) :], sums, strict=False):
        _draw_sum(axis, name, run)
    if tasks:
        _draw_tasks(axes[-1], tasks, run)
    _save(figure, axes, "tokens", folder / CURVES)
    return folder / CURVES


def added_sums(lines: list[dict[str, Any]]) -> list[str]:
    """Sums by modality that an objective has beside loss and z-loss."""
    keys = dict.fromkeys(key for line in lines for key in line)
    names = dict.fromkeys(
        key.removesuffix(f"/{label}")
        for label in colours()
        for key in keys
        if key.endswith(f"/{label}")
    )
    known = [f"{rule}{name}" for rule in ("", *_BY_RULE) for name in ("loss", "z_loss")]
    return [name for name in names if name in keys and name not in known]


def plot_study(
    found: Mapping[str, Mapping[str, np.ndarray]],
    labels: Sequence[str],
    picture: Path,
    equal_flops: float,
) -> None:
    """Draw held-out losses of several configs over FLOPs, a panel for each of ``labels``.

    ``found``: config → ``flops`` (P,) and label → losses (seeds, P); lines are means, bands span
    the seeds; dashed: under the rule "causal", dotted: "threshold". A vertical line marks
    ``equal_flops``, at which configs are compared.
    """
    figure, axes = _panels(len(labels))
    for axis, label in zip(axes, labels, strict=True):
        for config, curve in found.items():
            losses, flops = curve[label], curve["flops"]
            later = flops > 0.05 * flops[-1]  # the first steps would set the scale
            mean = losses.mean(0)
            name = f"{config} ({mean[-1]:.3f} at its end)"
            (line,) = axis.plot(flops[later], mean[later], label=name, **_DOTS)
            low, high = losses.min(0)[later], losses.max(0)[later]
            axis.fill_between(flops[later], low, high, color=line.get_color(), alpha=0.2)
            for rule, style in ((", causal", "--"), (", threshold", ":")):
                if label + rule in curve:
                    ruled = curve[label + rule].mean(0)[later]
                    axis.plot(flops[later], ruled, style, color=line.get_color(), linewidth=1)
        axis.axvline(equal_flops, color="grey", linestyle=":", linewidth=1)
        unit = "squared error" if label.endswith("diffusion") else "nats per token"
        axis.set(title=label, ylabel=f"held-out {label} loss ({unit})")
    _save(figure, axes, "training FLOPs", picture)


def plot_ranks(
    found: Mapping[str, np.ndarray], routed: Sequence[int], title: str, picture: Path
) -> None:
    """Draw values of attention maps over layers, a panel for each name in ``found``.

    ``found``: name → (layers, samples), NaN in layers without attention; means over samples, bars
    are standard deviations. Layers in ``routed``, which become depth-routed, are filled.
    """
    figure, axes = _panels(len(found))
    for axis, (name, value_LP) in zip(axes, found.items(), strict=True):
        layer_L, mean_L, sd_L = np.arange(len(value_LP)), value_LP.mean(1), value_LP.std(1, ddof=1)
        (line,) = axis.plot(layer_L, mean_L, marker="o", markersize=5, markerfacecolor="white")
        bars = {"fmt": "none", "ecolor": line.get_color(), "alpha": 0.5, "capsize": 2}
        axis.errorbar(layer_L, mean_L, sd_L, **bars)
        if chosen := list(routed):
            style = {"color": line.get_color(), "label": "lowest ranks: depth-routed"}
            axis.plot(layer_L[chosen], mean_L[chosen], "o", markersize=5, **style)
        axis.set(title=title, ylabel=name)
    _save(figure, axes, "layer", picture, MaxNLocator(integer=True))


class _Run:
    """Logged lines of a run; ``points`` draws a metric over the tokens seen."""

    def __init__(self, lines: list[dict[str, Any]]):
        self.train = [line for line in lines if line["kind"] == TRAIN]
        self.validation = [line for line in lines if line["kind"] == VALIDATION]
        # validations of earlier versions have no tokens: those of the training line of their step
        self.tokens_at = {
            line["step"]: sum(value for key, value in line.items() if key.startswith("tokens/"))
            for line in lines
            if any(key.startswith("tokens/") for key in line)
        }

    def draw(
        self, axis: Any, lines: list[dict[str, Any]], key: str, *style: str, **options: Any
    ) -> Any:
        """Draw ``key`` of ``lines``; nothing, and None, without points (lines may be lost)."""
        points = [
            (self.tokens_at[line["step"]], line[key])
            for line in lines
            if key in line and line["step"] in self.tokens_at
        ]
        return axis.plot(*zip(*points, strict=True), *style, **options)[0] if points else None


def _draw_losses(axis: Any, label: str, run: _Run) -> None:
    key, colour = f"loss/{label}", colours()[label]
    run.draw(axis, run.train, key, color=colour, alpha=0.35, linewidth=1, label="training")
    if run.draw(axis, run.validation, key, color=colour, label="held out", **_DOTS):
        for rule, line in _BY_RULE.items():
            style = {"color": colour, "linestyle": line, "label": f"held out, {rule[:-1]}"}
            run.draw(axis, run.validation, f"{rule}{key}", **style)
        if unigram := run.validation[-1].get(f"unigram_entropy/{label}"):
            name = f"unigram entropy {unigram:.2f}"
            axis.axhline(unigram, color="grey", linestyle=":", label=name)
        last = [line[key] for line in run.validation if key in line][-1]
        axis.set_title(f"{label}: held-out loss {last:.2f} nats")
    axis.set_ylabel(f"{label} loss (nats per token)")


def _draw_sum(axis: Any, name: str, run: _Run) -> None:
    for lines, style, note in ((run.train, "-", ""), (run.validation, "o", ", held out")):
        for label, colour in colours().items():
            run.draw(axis, lines, f"{name}/{label}", style, color=colour, label=f"{label}{note}")
    axis.set(title=name.replace("_", " "), ylabel=f"{name} per label")


def _draw_tasks(axis: Any, tasks: list[str], run: _Run) -> None:
    for task in tasks:
        kind, _, name = task.partition("/")
        chance_of = f"{_CHANCES[kind]}/{name}"
        if kind != "task":
            name = f"generated {name}"
        line = run.draw(axis, run.validation, task, label=name, **_DOTS)
        chance = run.validation[-1].get(chance_of)
        if line is not None and chance:
            axis.axhline(chance, color=line.get_color(), linestyle=":", linewidth=1)
    axis.set(title="held-out tasks (dotted: chance)", ylabel="accuracy", ylim=(0, 1))


def _panels(count: int) -> tuple[Any, Sequence[Any]]:
    figure, axes = plt.subplots(1, max(count, 1), figsize=(4.6 * max(count, 1), 3.6), squeeze=False)
    return figure, axes[0]


_MOST_INSIDE = 6  # lines of a legend inside its axes


def _save(
    figure: Any, axes: Sequence[Any], over: str, picture: Path, ticks: MaxNLocator | None = None
) -> None:
    for axis in axes:
        axis.set_xlabel(over)
        axis.xaxis.set_major_locator(ticks or MaxNLocator(5))
        axis.xaxis.set_major_formatter(EngFormatter())
        labels = axis.get_legend_handles_labels()[0]
        if len(labels) > _MOST_INSIDE:  # they would hide the curves
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18)}
            axis.legend(frameon=False, fontsize=8, **place).set_in_layout(False)
        elif labels:
            axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    for axis in axes:
        if legend := axis.get_legend():
            legend.set_in_layout(True)  # room for it, but not at the cost of the axes
    try:
        with atomic_write(picture) as file:
            figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    finally:
        plt.close(figure)
