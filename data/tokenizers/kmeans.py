"""k-means over rows of 8-bit values, with the same result on every machine.

Codewords are rows of 8-bit integers, and all sums are of integers that floats represent exactly.
Fitting and searching therefore give the same bytes with any number of threads and any batch. Used
for image patches and for frames of log-mel levels.

N rows, D values in a row, U distinct rows, K codes.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_ITERATIONS = 20
# rows compared at a time: scores of 4096 × K floats stay in the cache's neighbourhood
_CHUNK = 4096
_EXACT_IN_FLOAT32 = 1 << 24  # whole numbers up to here


def learn(
    rows_ND: np.ndarray, codes: int, *, seed: int, most: int, option: str, rows: str
) -> np.ndarray:
    """uint8 (K, D): a codebook for ``rows_ND``, or for ``most`` of them drawn by ``seed``.

    k-means++ chooses the first codewords, Lloyd's iterations move them. ``ValueError``, naming the
    ``option`` for K and the kind of ``rows``, where fewer rows are distinct.
    """
    rng = np.random.default_rng(seed)
    if len(rows_ND) > most:
        rows_ND = rows_ND[np.sort(rng.choice(len(rows_ND), most, replace=False))]
    distinct_UD, weight_U = _distinct_rows(rows_ND)
    if len(distinct_UD) < codes:
        raise ValueError(
            f"{option} ({codes}) must not exceed the distinct {rows} ({len(distinct_UD)}); lower "
            f"{option} or give more of them"
        )
    codebook_KD = _seed_codebook(distinct_UD, weight_U, codes, rng)
    return _lloyd(distinct_UD, weight_U, codebook_KD)


def check_codebook(codebook_KD: np.ndarray, codes: int, width: int) -> None:
    """``ValueError`` unless it has ``codes`` rows of ``width`` 8-bit values."""
    if codebook_KD.shape != (codes, width) or codebook_KD.dtype != np.uint8:
        raise ValueError(
            f"codebook ({codebook_KD.dtype} {codebook_KD.shape}) must be uint8 "
            f"{(codes, width)} for its settings; the file is damaged"
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread: fitting takes seconds, and more would contend with the text
    tokenizer, which is trained at the same time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def nearest(rows_ND: np.ndarray, codebook_KD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest codeword (the first among equals) and squared distance to it, both int64 (N,)."""
    exact = _exact_dtype(rows_ND, codebook_KD)
    codes_DK = torch.from_numpy(codebook_KD).to(exact).T.contiguous()
    norm_K = codes_DK.square().sum(0)
    found, distance = [], []
    for start in range(0, len(rows_ND), _CHUNK):
        part = torch.from_numpy(rows_ND[start : start + _CHUNK]).to(exact)
        # |x − c|² = |x|² − (2·x·c − |c|²)
        score = torch.addmm(norm_K, part, codes_DK, beta=-1, alpha=2).numpy()
        best = score.argmax(1)
        found.append(best)
        norm = part.square().sum(1).numpy()
        distance.append((norm - score[np.arange(len(best)), best]).astype(np.int64))
    return np.concatenate(found), np.concatenate(distance)


def _distinct_rows(rows_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows in order of appearance and how often each occurs; faster than by sorting."""
    width = rows_ND.shape[1]
    content = rows_ND.tobytes()
    counts = Counter(content[start : start + width] for start in range(0, len(content), width))
    distinct_UD = np.frombuffer(bytearray().join(counts), dtype=np.uint8).reshape(-1, width)
    return distinct_UD, np.fromiter(counts.values(), dtype=np.int64, count=len(counts))


def _exact_dtype(*rows: np.ndarray) -> torch.dtype:
    """The smallest dtype in which 2·x·c, the largest number met, is exact for these rows."""
    largest = max((int(part.max()) for part in rows if part.size), default=0)
    exact = 2 * rows[0].shape[1] * largest**2 <= _EXACT_IN_FLOAT32
    return torch.float32 if exact else torch.float64


def _seed_codebook(
    distinct_UD: np.ndarray, weight_U: np.ndarray, codes: int, rng: np.random.Generator
) -> np.ndarray:
    """k-means++: each next codeword is a row drawn in proportion to weight · squared distance."""
    points_UD = torch.from_numpy(distinct_UD).to(_exact_dtype(distinct_UD))
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


def _lloyd(distinct_UD: np.ndarray, weight_U: np.ndarray, codebook_KD: np.ndarray) -> np.ndarray:
    """Move codewords to the rounded mean of their rows until nothing moves.

    A codeword that would repeat another, or that no row chooses, moves to the worst served row.
    """
    codes = len(codebook_KD)
    weighted_UD = distinct_UD.astype(np.float64) * weight_U[:, None]
    for _ in range(_ITERATIONS):
        nearest_U, distance_U = nearest(distinct_UD, codebook_KD)
        total_KD = torch.zeros(codes, distinct_UD.shape[1], dtype=torch.float64)
        total_KD.index_add_(0, torch.from_numpy(nearest_U), torch.from_numpy(weighted_UD))
        weight_K = np.bincount(nearest_U, weights=weight_U, minlength=codes)
        moved_KD = np.rint(total_KD.numpy() / np.maximum(weight_K, 1)[:, None]).astype(np.uint8)
        _replace_repeats(moved_KD, weight_K == 0, distinct_UD, distance_U * weight_U)
        if np.array_equal(moved_KD, codebook_KD):
            break
        codebook_KD = moved_KD
    return codebook_KD


def _replace_repeats(
    codebook_KD: np.ndarray, unused_K: np.ndarray, distinct_UD: np.ndarray, error_U: np.ndarray
) -> None:
    """Replace unused and repeated rows of ``codebook_KD`` by the rows of largest error."""
    taken: set[bytes] = set()
    vacant = []
    for code, row in enumerate(codebook_KD):
        if unused_K[code] or row.tobytes() in taken:
            vacant.append(code)
        else:
            taken.add(row.tobytes())
    worst = iter(np.argsort(-error_U, kind="stable").tolist() if vacant else [])
    for code in vacant:
        # there are at least K distinct rows, so one is free
        row = next(distinct_UD[i] for i in worst if distinct_UD[i].tobytes() not in taken)
        taken.add(row.tobytes())
        codebook_KD[code] = row
