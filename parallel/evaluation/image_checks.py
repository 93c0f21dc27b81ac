"""Image checks: do generated images show what their captions say?

``validation/labelled.json`` of a data folder has true labelled images of the training split and
held-out ones. A classifier learns from the former and is tested on the latter; generated images are
scored against the labels in their captions. The Fréchet distance (FD) compares generated with
held-out images as FID does (arXiv 1706.08500), by means and covariances of features.

An image is compared in grey at 16 × 16 pixels. Features of the FD: its first 16 principal
components over the training images (85 % of the variance of the embedded corpus's digits) and its
distance from what these describe, where noise shows; each has variance 1. A few hundred images
determine a covariance of so few numbers. The FD of finite samples is above 0 even between true
images, so that of as many training images is reported beside it.

N images, H pixels a side, F features.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from earlyfuse.data.json_files import JsonObject, read_json, shown
from earlyfuse.data.tokenizers.pixels import image_pixels
from earlyfuse.parallel.evaluation.eval_tasks import decoded

LABELLED = Path("validation") / "labelled.json"
_REMEDY = "copy it again, or remove it to go without image checks"
_SIDE, _COMPONENTS = 16, 16
_MOST_BYTES, _MOST_IMAGES = 32 << 20, 20_000  # 200 times the digits


@dataclass(frozen=True)
class Labelled:
    """True images as grey levels in [0, 1], (N, 16²), and their labels (N,)."""

    pixels: np.ndarray
    labels: np.ndarray


class ImageChecks:
    """Scores generated images by a classifier of true ones; ``load`` makes it from a data folder.

    ``prefix``: of a caption, before the label. The classifier is a support vector machine with a
    radial kernel on pixels.
    """

    def __init__(self, name: str, prefix: str, train: Labelled, held_out: Labelled):
        self.name, self.prefix = name, prefix
        self.train, self.held_out = train, held_out
        self.labels = sorted(set(train.labels.tolist()))

    @classmethod
    def load(cls, data_folder: Path | str) -> "ImageChecks | None":
        """The checks of a prepared data folder; None if it has none. ``ValueError`` naming file
        and field if they are damaged.
        """
        path = Path(data_folder) / LABELLED
        if not path.exists():
            return None
        fields = read_json(path, _REMEDY, _MOST_BYTES)
        fields.check_names(("name", "prefix", "train", "held_out"))
        name, prefix = (fields.field(field, str) for field in ("name", "prefix"))
        if not name or not name.isprintable():
            raise fields.wrong("name", "must be a name")
        train, held_out = (_labelled(fields, split) for split in ("train", "held_out"))
        if len(set(train.labels)) < 2:
            raise fields.wrong("train", "must have images of two or more labels")
        if unknown := sorted(set(held_out.labels) - set(train.labels)):
            raise fields.wrong("held_out", f"must have labels of train, not {shown(unknown[0])}")
        return cls(name, prefix, train, held_out)

    def captions(self, number: int, seed: int) -> list[str]:
        """``number`` captions with each label equally often, as far as it divides, in random
        order.
        """
        rng = random.Random(f"{seed}/image checks")
        labels: list[str] = []
        while len(labels) < number:
            labels += rng.sample(self.labels, len(self.labels))
        return [self.prefix + label for label in labels[:number]]

    def score(self, captions: Sequence[str], images_NHH3: np.ndarray) -> dict[str, float]:
        """Scores uint8 images, generated from ``captions``, as metrics ending in the check's name.

        ``generated_accuracy``, ``generated_fd``; for comparison ``true_accuracy`` of held-out
        images, ``true_fd`` of as many training images with these labels, ``generated_chance`` of
        always naming the most frequent label. ``ValueError`` for fewer than 2 images or other
        captions.
        """
        labels = [self._label(caption) for caption in captions]
        fits = images_NHH3.ndim == 4 and images_NHH3.shape[::3] == (len(labels), 3)
        if images_NHH3.dtype != np.uint8 or not fits or len(labels) < 2:
            raise ValueError(
                f"images ({images_NHH3.dtype} {images_NHH3.shape}) must be uint8 (N, H, H, 3), as "
                f"many as captions ({len(labels)}) and two or more"
            )
        pixels = np.stack([_grey(_resized(image)) for image in images_NHH3])
        right = self._classifier.predict(pixels) == np.array(labels)
        counts = Counter(labels)
        of_true = self._features(self.held_out.pixels)
        alike = self._features(self.train.pixels[self._training_images(counts)])
        metrics = {
            "generated_accuracy": float(right.mean()),
            "generated_fd": frechet_distance(self._features(pixels), of_true),
            "true_accuracy": self.true_accuracy,
            "true_fd": frechet_distance(alike, of_true),
            "generated_chance": max(counts.values()) / len(labels),
        }
        return {f"{metric}/{self.name}": value for metric, value in metrics.items()}

    @cached_property
    def true_accuracy(self) -> float:
        """Accuracy of the classifier on held-out images."""
        found = self._classifier.predict(self.held_out.pixels)
        return float((found == self.held_out.labels).mean())

    @cached_property
    def _classifier(self) -> Any:
        from sklearn.svm import SVC  # takes seconds

        return SVC(C=10.0).fit(self.train.pixels, self.train.labels)

    @cached_property
    def _features(self) -> "_Features":
        return _Features(self.train.pixels)

    def _label(self, caption: str) -> str:
        label = caption.removeprefix(self.prefix)
        if not caption.startswith(self.prefix) or label not in self.labels:
            raise ValueError(
                f"caption ({shown(caption)}) must be {self.prefix!r} and one of "
                f"{', '.join(self.labels)}; take those of captions()"
            )
        return label

    def _training_images(self, counts: Counter[str]) -> np.ndarray:
        """Indices of random training images with so many of each label, or all there are."""
        rng = np.random.default_rng(0)
        chosen = []
        for label, count in sorted(counts.items()):
            (there,) = np.nonzero(self.train.labels == label)
            chosen.append(rng.permutation(there)[:count])
        return np.concatenate(chosen)


class _Features:
    """Principal components of ``pixels`` and the distance from them, each of variance 1 there."""

    def __init__(self, pixels: np.ndarray):
        self.mean = pixels.mean(0)
        self.axes = np.linalg.svd(pixels - self.mean, full_matrices=False)[2][:_COMPONENTS]
        raw = self._raw(pixels)
        self.centre, self.scale = raw.mean(0), raw.std(0).clip(1e-3)  # some may not vary

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Grey levels (N, 16²) → (N, F)."""
        return (self._raw(pixels) - self.centre) / self.scale

    def _raw(self, pixels: np.ndarray) -> np.ndarray:
        centred = pixels - self.mean
        along = centred @ self.axes.T
        rest = np.linalg.norm(centred - along @ self.axes, axis=1, keepdims=True)
        return np.hstack([along, rest])


def frechet_distance(a_NF: np.ndarray, b_NF: np.ndarray) -> float:
    """Squared Fréchet distance of two normal distributions with the means and covariances of
    these samples: |μa - μb|² + tr(Ca + Cb - 2 (Ca Cb)^½).
    """
    shift = a_NF.mean(0) - b_NF.mean(0)
    a_FF, b_FF = np.cov(a_NF, rowvar=False), np.cov(b_NF, rowvar=False)
    values, vectors = np.linalg.eigh(a_FF)
    root_FF = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # (Ca Cb)^½ has the trace of (Ca^½ Cb Ca^½)^½, which is symmetric
    common = np.sqrt(np.linalg.eigvalsh(root_FF @ b_FF @ root_FF).clip(0)).sum()
    return float(max(0.0, shift @ shift + np.trace(a_FF) + np.trace(b_FF) - 2 * common))


def _labelled(fields: JsonObject, split: str) -> Labelled:
    items = fields.objects(split)
    if not 2 <= len(items) <= _MOST_IMAGES:
        raise fields.wrong(split, f"must be a list of 2 to {_MOST_IMAGES} images")
    for item in items:
        item.check_names(("image", "label"))
    labels = [item.field("label", str) for item in items]
    unfit = [label for label in labels if not label or not label.isprintable()]
    if unfit:
        raise fields.wrong(split, f"must have labels that are words, not {shown(unfit[0])}")
    pixels = [decoded(item, "image", lambda png: image_pixels(png, _SIDE)) for item in items]
    return Labelled(np.stack([_grey(image) for image in pixels]), np.array(labels))


def _grey(image: np.ndarray) -> np.ndarray:
    """uint8 (16, 16, 3) → (16²,) in [0, 1]."""
    return image.mean(-1).ravel() / 255


def _resized(image: np.ndarray) -> np.ndarray:
    """uint8 (H, H, 3) → (16, 16, 3), as ``image_pixels`` does."""
    if image.shape[:2] == (_SIDE, _SIDE):
        return image
    resized = Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return np.asarray(resized)
