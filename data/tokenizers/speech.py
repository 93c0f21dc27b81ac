"""Speech as a medium: how its tokenizer is loaded or trained, and how good it is."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from earlyfuse.data.documents import decoding
from earlyfuse.data.media import Sampling
from earlyfuse.data.tokenizers.audio import waveform
from earlyfuse.data.tokenizers.image import code_usage
from earlyfuse.data.tokenizers.kmeans import one_thread
from earlyfuse.data.tokenizers.speech_kmeans import (
    RATE,
    SpeechTokenizer,
    check_speech_geometry,
    levels,
    log_mel_error,
)

if TYPE_CHECKING:
    from earlyfuse.data.prepare.progress import Progress
    from earlyfuse.data.prepare.spec import PrepareSpec

QUALITY = "log-mel dB"
_FRAMES = 1 << 16  # that a tokenizer sees


def load(path: Path) -> SpeechTokenizer:
    """See ``MediumModule``."""
    return SpeechTokenizer.load(path)


def check(spec: "PrepareSpec") -> None:
    """See ``MediumModule``."""
    check_speech_geometry(spec.speech_frame_ms, spec.speech_codes)
    if not spec.speech_seconds > 0:
        raise ValueError(
            f"speech_seconds ({spec.speech_seconds}) must be above 0: the longest utterance"
        )


def settings(spec: "PrepareSpec") -> dict[str, Any]:
    """See ``MediumModule``."""
    return {"frame_ms": spec.speech_frame_ms, "codes": spec.speech_codes, "seed": spec.seed}


def limits(spec: "PrepareSpec") -> dict[str, Any]:
    """A longer utterance is a bad sample: it is never truncated."""
    return {"longest": spec.speech_seconds}


def sampling(spec: "PrepareSpec") -> Sampling:
    """As many frames as the tokenizer profits from."""

    def read(encoded: bytes) -> np.ndarray:
        with decoding("corrupt-audio", "audio"):
            wave = waveform(encoded, RATE, spec.speech_seconds)
            return levels(wave, spec.speech_frame_ms // 10)

    return Sampling(_FRAMES, read, len)


def train(
    items: Sequence[np.ndarray], spec: "PrepareSpec", progress: "Progress"
) -> tuple[SpeechTokenizer, str]:
    """See ``MediumModule``."""
    seconds = sum(map(len, items)) * spec.speech_frame_ms / 1000
    progress.tell(
        f"speech tokenizer: kmeans of {spec.speech_codes} codes from {len(items)} utterances, "
        f"{seconds:.0f} s"
    )
    with one_thread():
        tokenizer = SpeechTokenizer.train(
            items, frame_ms=spec.speech_frame_ms, codes=spec.speech_codes, seed=spec.seed
        )
        features = np.concatenate(items)
        codes = tokenizer.encode(features)
    error = log_mel_error(tokenizer.squared_error(features, codes), features.size)
    used, perplexity = code_usage(np.bincount(codes, minlength=tokenizer.codes))
    return tokenizer, (
        f"log-mel error {error:.1f} dB, {used} of {tokenizer.codes} codes used, "
        f"perplexity {perplexity:.0f}"
    )


def quality(mean_squared_error: float) -> float:
    """Root mean square error of log-mel levels in dB."""
    return log_mel_error(mean_squared_error, 1)
