"""Plots losses and task accuracy of a run over tokens, and losses of several runs over FLOPs."""

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

COLOURS = {"text": "#1b6ca8", **{label: medium.colour for label, medium in MEDIA.items()}}


def plot_curves(folder: Path) -> Path:
    """Draw ``folder``/loss_curves.png from the run's metrics; returns its path."""
    lines = read_metrics(folder / METRICS_FILE)
    train = [line for line in lines if line["kind"] == TRAIN]
    validation = [line for line in lines if line["kind"] == VALIDATION]
    labels = [label for label in COLOURS if any(f"loss/{label}" in line for line in train)]
    tasks = sorted({key for line in validation for key in line if key.startswith("task/")})

    sums = added_sums(validation or train)

    panels = len(labels) + len(sums) + bool(tasks)
    figure, axes = plt.subplots(
        1, max(panels, 1), figsize=(4.6 * max(panels, 1), 3.6), squeeze=False
    )
    tokens_at = {line["step"]: _tokens(line) for line in train}
    for axis, label in zip(axes[0], labels, strict=False):
        _draw_losses(axis, label, train, validation, tokens_at)
    for axis, name in zip(axes[0][len(labels) :], sums, strict=False):
        _draw_sum(axis, name, train, validation, tokens_at)
    if tasks:
        _draw_tasks(axes[0][-1], tasks, validation, tokens_at)
    for axis in axes[0]:
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(EngFormatter())
    _save(figure, folder / CURVES)
    return folder / CURVES


def added_sums(lines: list[dict[str, Any]]) -> list[str]:
    """Sums of an objective beside its loss, of which a modality has a part; without the z-loss."""
    keys = dict.fromkeys(key for line in lines for key in line)
    names = dict.fromkeys(
        key.removesuffix(f"/{label}")
        for label in COLOURS
        for key in keys
        if key.endswith(f"/{label}")
    )
    known = ("loss", "z_loss")
    return [n for n in names if n in keys and n.removeprefix("causal_") not in known]


def plot_study(
    found: Mapping[str, Mapping[str, np.ndarray]],
    labels: Sequence[str],
    picture: Path,
    equal_flops: float,
) -> None:
    """Draw the held-out losses of several configs over FLOPs, a panel for each of ``labels``.

    ``found``: config → ``flops`` (P,) and label → losses (seeds, P); lines are means, bands span
    the seeds. A dotted line marks ``equal_flops``, at which they are compared.
    """
    figure, axes = plt.subplots(1, len(labels), figsize=(4.6 * len(labels), 3.6), squeeze=False)
    for axis, label in zip(axes[0], labels, strict=True):
        for config, curve in found.items():
            losses, flops = curve[label], curve["flops"]
            later = flops > 0.05 * flops[-1]  # the first steps would hide all else
            mean = losses.mean(0)
            (line,) = axis.plot(
                flops[later],
                mean[later],
                marker="o",
                markersize=3,
                label=f"{config} ({mean[-1]:.3f} at its end)",
            )
            low, high = losses.min(0)[later], losses.max(0)[later]
            axis.fill_between(flops[later], low, high, color=line.get_color(), alpha=0.2)
        axis.axvline(equal_flops, color="grey", linestyle=":", linewidth=1)
        axis.set_title(label)
        axis.set_xlabel("training FLOPs")
        axis.set_ylabel(f"held-out {label} loss (nats per token)")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.legend(frameon=False, fontsize=8)
    _save(figure, picture)


def _save(figure: Any, picture: Path) -> None:
    figure.tight_layout()
    try:
        with atomic_write(picture) as file:
            figure.savefig(file, format="png", dpi=110)
    finally:
        plt.close(figure)


def _tokens(line: dict[str, Any]) -> float:
    return sum(value for key, value in line.items() if key.startswith("tokens/"))


def _draw_losses(
    axis: Any,
    label: str,
    train: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    tokens_at: dict[int, float],
) -> None:
    key, colour = f"loss/{label}", COLOURS[label]
    points = [(tokens_at[line["step"]], line[key]) for line in train if key in line]
    axis.plot(*zip(*points, strict=True), color=colour, alpha=0.35, linewidth=1, label="training")
    held_out = [
        (tokens_at[x["step"]], x[key]) for x in validation if key in x and x["step"] in tokens_at
    ]
    if held_out:
        axis.plot(
            *zip(*held_out, strict=True), color=colour, marker="o", markersize=3, label="held out"
        )
        causal = [
            (tokens_at[x["step"]], x[f"causal_{key}"])
            for x in validation
            if f"causal_{key}" in x and x["step"] in tokens_at
        ]
        if causal:
            axis.plot(
                *zip(*causal, strict=True), color=colour, linestyle="--", label="held out, causal"
            )
        unigram = validation[-1].get(f"unigram_entropy/{label}")
        if unigram:
            axis.axhline(
                unigram, color="grey", linestyle=":", label=f"unigram entropy {unigram:.2f}"
            )
        axis.set_title(f"{label}: held-out loss {held_out[-1][1]:.2f} nats")
    axis.set_xlabel("tokens")
    axis.set_ylabel(f"{label} loss (nats per token)")
    axis.legend(frameon=False, fontsize=8)


def _draw_sum(
    axis: Any,
    name: str,
    train: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    tokens_at: dict[int, float],
) -> None:
    for lines, style in ((train, "-"), (validation, "o")):
        for label, colour in COLOURS.items():
            key = f"{name}/{label}"
            points = [
                (tokens_at[x["step"]], x[key]) for x in lines if key in x and x["step"] in tokens_at
            ]
            if points:
                held_out = ", held out" if lines is validation else ""
                axis.plot(
                    *zip(*points, strict=True), style, color=colour, label=f"{label}{held_out}"
                )
    axis.set_title(name.replace("_", " "))
    axis.set_xlabel("tokens")
    axis.set_ylabel(f"{name} per label")
    axis.legend(frameon=False, fontsize=8)


def _draw_tasks(
    axis: Any, tasks: list[str], validation: list[dict[str, Any]], tokens_at: dict[int, float]
) -> None:
    for task in tasks:
        points = [
            (tokens_at[x["step"]], 100 * x[task])
            for x in validation
            if task in x and x["step"] in tokens_at
        ]
        if not points:  # their lines were lost on a full disk
            continue
        name = task.removeprefix("task/")
        (line,) = axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        chance = validation[-1].get(f"chance/{name}")
        if chance:
            axis.axhline(100 * chance, color=line.get_color(), linestyle=":", linewidth=1)
    axis.set_title("held-out tasks (dotted: chance)")
    axis.set_xlabel("tokens")
    axis.set_ylabel("% right")
    axis.set_ylim(0, 100)
    axis.legend(frameon=False, fontsize=8)
