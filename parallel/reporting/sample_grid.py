"""Draws samples of a run: held-out captions and images beside generated ones."""

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from earlyfuse.data.atomic import atomic_write
from earlyfuse.parallel.evaluation.sample_generation import Sample

COLUMNS = 4
_LINE, _LINES = 26, 2  # characters of a line, lines of a caption


def draw_samples(samples: Sequence[Sample], step: int, weights: str | None = None) -> np.ndarray:
    """All samples of ``step`` in one picture, uint8 (H, W, 3); ``weights``: which ones, if said."""
    columns = min(COLUMNS, len(samples))
    rows = -(-len(samples) // columns)
    figure = Figure(figsize=(2.6 * columns, 0.7 + 2.2 * rows), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(
        f"step {step}{f' ({weights} weights)' if weights else ''}: held-out image, image generated "
        "from its caption (above);\n"
        "below: caption generated from the held-out image",
        fontsize=8,
    )
    for axis in (axes := figure.subplots(rows, columns, squeeze=False)).flat:
        axis.axis("off")
    for axis, sample in zip(axes.flat, samples, strict=False):
        axis.imshow(_side_by_side(sample), interpolation="nearest")
        axis.set_title(_lines(sample.pair.caption), fontsize=7, parse_math=False)
        below = _lines(sample.caption) or "(nothing)"
        colour = "#2e7d32" if sample.caption == sample.pair.caption else "#777777"
        style = {"ha": "center", "va": "top", "fontsize": 7, "color": colour, "parse_math": False}
        axis.text(0.5, -0.04, below, transform=axis.transAxes, **style)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font lacks are drawn as boxes
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_picture(pixels: np.ndarray, path: Path) -> None:
    """Write ``pixels`` to ``path`` as PNG."""
    with atomic_write(path) as file:
        Image.fromarray(pixels).save(file, "PNG")


def as_table(samples: Sequence[Sample]) -> str:
    """Held-out and generated captions as a Markdown table, for TensorBoard."""
    rows = [f"| {_cell(s.pair.caption)} | {_cell(s.caption)} |" for s in samples]
    return "\n".join(["| caption | generated from the image |", "|---|---|", *rows])


def _side_by_side(sample: Sample) -> np.ndarray:
    true, written = sample.pair.pixels, sample.image
    gap = np.full((len(true), max(1, len(true) // 8), 3), 255, np.uint8)
    pair = np.concatenate([true, gap, written], axis=1)
    # a frame: images are often white to their edge
    return np.pad(pair, ((1, 1), (1, 1), (0, 0)), constant_values=200)


def _lines(text: str) -> str:
    return "\n".join(textwrap.wrap(text, _LINE, max_lines=_LINES, placeholder=" …"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
