"""Image tokenizer by k-means over pixel patches: the deterministic default.

Codewords are patches of whole 8-bit values, and all sums are of whole numbers that the arithmetic
holds exactly. Fitting and encoding therefore give the same bytes on every machine, with any number
of threads and any batch; decoding followed by encoding gives the codes back.

N images, P patches an image, D values in a patch (patch · patch · 3), U distinct patches, K codes.
"""

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import torch

from earlyfuse.data.tokenizers.image import check_image_geometry, pack_tokenizer
from earlyfuse.data.tokenizers.pixels import image_pixels

# patches compared at a time: scores of 4096 × K floats stay in the cache's neighbourhood
_CHUNK = 4096
# 2·x·c − |c|² of 8-bit values stays below 2^24, exact in float32, up to this many values in a patch
_EXACT_IN_FLOAT32 = 128


class KMeansTokenizer:
    """Nearest codeword for each patch. ``codebook_KD``: distinct rows, uint8."""

    kind = "kmeans"
    decodes = True

    def __init__(self, codebook_KD: np.ndarray, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.image_size, self.patch = settings["image_size"], settings["patch"]
        self.codes = settings["codes"]
        check_image_geometry(self.image_size, self.patch, self.codes)
        expected = (self.codes, self.patch**2 * 3)
        if codebook_KD.shape != expected or codebook_KD.dtype != np.uint8:
            raise ValueError(
                f"codebook ({codebook_KD.dtype} {codebook_KD.shape}) must be uint8 "
                f"{expected} for settings {settings}; the file is damaged"
            )
        self.codebook_KD = codebook_KD
        self.block = (self.image_size // self.patch) ** 2
        self.sha256 = hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def train(
        cls,
        images: np.ndarray,
        *,
        patch: int,
        codes: int,
        seed: int = 0,
        patches: int = 65536,
        iterations: int = 20,
    ) -> "KMeansTokenizer":
        """Fit to ``images``, uint8 (N, H, H, 3), or to ``patches`` of their patches by ``seed``.

        Raises ``ValueError`` when the images hold fewer distinct patches than ``codes``.
        """
        check_image_geometry(images.shape[1], patch, codes)
        rng = np.random.default_rng(seed)
        sample = to_patches(images, patch).reshape(-1, patch**2 * 3)
        if len(sample) > patches:
            sample = sample[np.sort(rng.choice(len(sample), patches, replace=False))]
        distinct_UD, weight_U = _distinct(sample)
        if len(distinct_UD) < codes:
            raise ValueError(
                f"codes ({codes}) must not exceed the distinct {patch}×{patch} patches of the "
                f"training images ({len(distinct_UD)}); lower codes or give more images"
            )
        codebook_KD = _seed_codebook(distinct_UD, weight_U, codes, rng)
        codebook_KD = _lloyd(distinct_UD, weight_U, codebook_KD, iterations)
        settings = {"image_size": images.shape[1], "patch": patch, "codes": codes, "seed": seed}
        return cls(codebook_KD, settings)

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, torch.Tensor], settings: dict[str, Any]
    ) -> "KMeansTokenizer":
        """Inverse of ``to_bytes``, given what it holds."""
        return cls(tensors["codebook"].numpy(), settings)

    def to_bytes(self) -> bytes:
        """See ``ImageTokenizer``."""
        return pack_tokenizer(
            self.kind, self.settings, {"codebook": torch.from_numpy(self.codebook_KD)}
        )

    def pixels(self, encoded: bytes) -> np.ndarray:
        """See ``ImageTokenizer``."""
        return image_pixels(encoded, self.image_size)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, H, 3) → int64 (N, P)."""
        patches = to_patches(images, self.patch)
        nearest, _ = _nearest(patches.reshape(-1, self.codebook_KD.shape[1]), self.codebook_KD)
        return nearest.reshape(len(images), self.block)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """int64 (N, P) → uint8 (N, H, H, 3)."""
        side, patch = self.image_size // self.patch, self.patch
        patches = self.codebook_KD[codes].reshape(-1, side, side, patch, patch, 3)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(-1, self.image_size, self.image_size, 3)


def to_patches(images: np.ndarray, patch: int) -> np.ndarray:
    """(N, H, W, 3) → (N, P, D), patches in raster order. ``ValueError`` unless they tile."""
    count, height, width, channels = images.shape
    if height % patch or width % patch:
        raise ValueError(
            f"images of {height}×{width} must divide into patches of {patch}; resize them"
        )
    grid = images.reshape(count, height // patch, patch, width // patch, patch, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(count, -1, patch * patch * channels)


def _distinct(rows_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows in order of appearance and how often each occurs; faster than by sorting."""
    width = rows_ND.shape[1]
    content = rows_ND.tobytes()
    counts = Counter(content[start : start + width] for start in range(0, len(content), width))
    distinct_UD = np.frombuffer(bytearray().join(counts), dtype=np.uint8).reshape(-1, width)
    return distinct_UD, np.fromiter(counts.values(), dtype=np.int64, count=len(counts))


def _exact_dtype(values: int) -> torch.dtype:
    return torch.float32 if values <= _EXACT_IN_FLOAT32 else torch.float64


def _nearest(patches_UD: np.ndarray, codebook_KD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest codeword (the first among equals) and squared distance to it, both int64 (U,)."""
    exact = _exact_dtype(codebook_KD.shape[1])
    codes_DK = torch.from_numpy(codebook_KD).to(exact).T.contiguous()
    norm_K = codes_DK.square().sum(0)
    nearest, distance = [], []
    for start in range(0, len(patches_UD), _CHUNK):
        part = torch.from_numpy(patches_UD[start : start + _CHUNK]).to(exact)
        # |x − c|² = |x|² − (2·x·c − |c|²)
        score = torch.addmm(norm_K, part, codes_DK, beta=-1, alpha=2).numpy()
        best = score.argmax(1)
        nearest.append(best)
        norm = part.square().sum(1).numpy()
        distance.append((norm - score[np.arange(len(best)), best]).astype(np.int64))
    return np.concatenate(nearest), np.concatenate(distance)


def _seed_codebook(
    distinct_UD: np.ndarray, weight_U: np.ndarray, codes: int, rng: np.random.Generator
) -> np.ndarray:
    """k-means++: each next codeword is a patch drawn in proportion to weight · squared distance."""
    points_UD = torch.from_numpy(distinct_UD).to(_exact_dtype(distinct_UD.shape[1]))
    norm_U = points_UD.square().sum(1)
    chosen = [int(rng.integers(len(distinct_UD)))]
    distance_U = torch.full_like(norm_U, float("inf"))
    for _ in range(codes - 1):
        newest = points_UD[chosen[-1]]
        to_newest = torch.addmv(norm_U + norm_U[chosen[-1]], points_UD, newest, alpha=-2)
        distance_U = torch.minimum(distance_U, to_newest)
        mass = np.cumsum(distance_U.numpy().astype(np.int64) * weight_U)
        chosen.append(int(np.searchsorted(mass, rng.integers(mass[-1]), side="right")))
    return distinct_UD[np.array(chosen)]


def _lloyd(
    distinct_UD: np.ndarray, weight_U: np.ndarray, codebook_KD: np.ndarray, iterations: int
) -> np.ndarray:
    """Move codewords to the rounded mean of their patches until nothing moves.

    A codeword that would repeat another, or that no patch chooses, moves to the worst served patch.
    """
    codes = len(codebook_KD)
    weighted_UD = distinct_UD.astype(np.float64) * weight_U[:, None]
    for _ in range(iterations):
        nearest_U, distance_U = _nearest(distinct_UD, codebook_KD)
        total_KD = torch.zeros(codes, distinct_UD.shape[1], dtype=torch.float64)
        total_KD.index_add_(0, torch.from_numpy(nearest_U), torch.from_numpy(weighted_UD))
        weight_K = np.bincount(nearest_U, weights=weight_U, minlength=codes)
        moved_KD = np.rint(total_KD.numpy() / np.maximum(weight_K, 1)[:, None]).astype(np.uint8)
        moved_KD = _without_repeats(moved_KD, weight_K == 0, distinct_UD, distance_U * weight_U)
        if np.array_equal(moved_KD, codebook_KD):
            break
        codebook_KD = moved_KD
    return codebook_KD


def _without_repeats(
    codebook_KD: np.ndarray, unused_K: np.ndarray, distinct_UD: np.ndarray, error_U: np.ndarray
) -> np.ndarray:
    """``codebook_KD`` with unused and repeated rows replaced by the patches of largest error."""
    taken: set[bytes] = set()
    vacant = []
    for code, row in enumerate(codebook_KD):
        if unused_K[code] or row.tobytes() in taken:
            vacant.append(code)
        else:
            taken.add(row.tobytes())
    if not vacant:
        return codebook_KD
    worst = iter(np.argsort(-error_U, kind="stable"))
    for code in vacant:
        # there are at least K distinct patches, so one is free
        patch = next(distinct_UD[i] for i in worst if distinct_UD[i].tobytes() not in taken)
        taken.add(patch.tobytes())
        codebook_KD[code] = patch
    return codebook_KD
