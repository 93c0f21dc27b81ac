"""Speech as a medium, and its tokenizer: k-means units of log-mel frames.

An utterance becomes one code for each ``frame_ms`` (40: 25 Hz). A frame is the levels of its 10 ms
hops side by side (``log_mel.py``); k-means over them is exact (``kmeans.py``), hence the same units
in any process and batch. ``decode`` synthesises a signal with the levels of the codewords; pitch
and voice are lost.

U frames (units), D values of a frame (hops · mel bands), K codes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from earlyfuse.data.documents import decoding
from earlyfuse.data.media import Sampling
from earlyfuse.data.tokenizers import kmeans
from earlyfuse.data.tokenizers.audio import wav_file, waveform
from earlyfuse.data.tokenizers.log_mel import MELS, RATE, STEP_DB, levels, signal_of
from earlyfuse.data.tokenizers.tokenizer_file import (
    LARGEST_CODEBOOK,
    FileTokenizer,
    TokenizerFile,
    check_codes,
    code_usage,
    load_tokenizer,
)

if TYPE_CHECKING:
    from earlyfuse.data.prepare.progress import Progress
    from earlyfuse.data.prepare.spec import PrepareSpec

QUALITY = "log-mel dB"
LONGEST_FRAME_MS = 200
_FRAMES = 1 << 16  # given to the training of a tokenizer, which draws half of them
_DECODED_RMS = 0.1


class SpeechTokenizer(FileTokenizer):
    """Nearest codeword for each frame. ``codebook_KD``: distinct rows, uint8."""

    file_format = "earlyfuse-speech-tokenizer/1"
    kind = "kmeans"
    decodes = True
    vectors = None
    block = 0
    batch = 1024  # utterances; encoding them together gains nothing

    def __init__(self, codebook_KD: np.ndarray, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.frame_ms, self.codes = settings["frame_ms"], settings["codes"]
        check_speech_geometry(self.frame_ms, self.codes)
        self.hops = self.frame_ms // 10
        kmeans.check_codebook(codebook_KD, self.codes, self.hops * MELS)
        self.codebook_KD = codebook_KD

    @classmethod
    def train(
        cls, utterances: Sequence[np.ndarray], *, frame_ms: int, codes: int, seed: int = 0
    ) -> Self:
        """Fit to ``features`` of utterances, uint8 (U, D) each, or to 2^15 of their frames by
        ``seed``.

        Raises ``ValueError`` when they hold fewer distinct frames than ``codes``.
        """
        check_speech_geometry(frame_ms, codes)
        codebook_KD = kmeans.learn(
            np.concatenate([np.zeros((0, frame_ms // 10 * MELS), np.uint8), *utterances]),
            codes,
            seed=seed,
            most=1 << 15,
            option="speech_codes",
            rows=f"frames of {frame_ms} ms of the training speech",
        )
        return cls(codebook_KD, {"frame_ms": frame_ms, "codes": codes, "seed": seed})

    @classmethod
    def from_file(cls, file: TokenizerFile) -> Self:
        """See ``FileTokenizer``."""
        settings = file.settings
        frame_ms = settings.field("frame_ms", int, least=10, most=LONGEST_FRAME_MS)
        codes = settings.field("codes", int, least=2, most=LARGEST_CODEBOOK)
        settings.field("seed", int)
        codebook = torch.empty(codes, frame_ms // 10 * MELS, dtype=torch.uint8, device="meta")
        tensors = file.tensors({"codebook": codebook})
        return cls(tensors["codebook"].numpy(), settings.values)

    def tensors(self) -> dict[str, torch.Tensor]:
        """See ``FileTokenizer``."""
        return {"codebook": torch.from_numpy(self.codebook_KD)}

    def features(self, payload: bytes, longest: float = float("inf")) -> np.ndarray:
        """An audio file → uint8 (U, D). ``BadSample`` as ``waveform`` and ``levels``."""
        return levels(waveform(payload, RATE, longest), self.hops)

    def encode(self, features_UD: np.ndarray) -> np.ndarray:
        """uint8 (U, D) → int64 (U,), each in [0, codes)."""
        return kmeans.nearest(features_UD, self.codebook_KD)[0]

    def encode_items(self, items: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See ``MediaTokenizer``."""
        return [self.encode(features_UD) for features_UD in items]

    def error(
        self, items: Sequence[np.ndarray], codes: Sequence[np.ndarray], measured: int
    ) -> tuple[int, int]:
        """See ``MediaTokenizer``; in levels, over all frames of all utterances."""
        difference = [
            features_UD.astype(np.int64) - self.codebook_KD[codes_U]
            for features_UD, codes_U in zip(items, codes, strict=True)
        ]
        return sum(int((part**2).sum()) for part in difference), sum(map(np.size, difference))

    def decode(self, codes_U: np.ndarray) -> np.ndarray:
        """int64 (U,) → float64 (U · frame_ms · 16,) at ``RATE``, full scale ±1."""
        wave = signal_of(self.codebook_KD[codes_U].reshape(-1, MELS))
        wave *= _DECODED_RMS / max(float(np.sqrt(np.mean(wave**2))), 1e-9)
        return wave / max(1.0, float(np.abs(wave).max(initial=0.0)))

    def to_file(self, codes: np.ndarray) -> bytes:
        """int64 (U,) → a WAV file."""
        return wav_file(self.decode(codes), RATE)


def check_speech_geometry(frame_ms: int, codes: int) -> None:
    """``ValueError`` unless frames are whole hops and the codebook has a sensible size."""
    if not 10 <= frame_ms <= LONGEST_FRAME_MS or frame_ms % 10:
        raise ValueError(
            f"speech_frame_ms ({frame_ms}) must be a multiple of 10 in [10, {LONGEST_FRAME_MS}]; "
            "40 is usual"
        )
    check_codes("speech_codes", codes)


def load(path: Path) -> SpeechTokenizer:
    """See ``MediumModule``."""
    return load_tokenizer("speech", path, (SpeechTokenizer,))


def ready(path: Path, spec: "PrepareSpec") -> SpeechTokenizer:
    """See ``MediumModule``; nothing foreign is imported."""
    return load(path)


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
    """Number of frames to train on: as many as improve the tokenizer."""

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
    with kmeans.one_thread():
        tokenizer = SpeechTokenizer.train(
            items, frame_ms=spec.speech_frame_ms, codes=spec.speech_codes, seed=spec.seed
        )
        codes = tokenizer.encode_items(items)
    error, values = tokenizer.error(items, codes, 0)
    used, perplexity = code_usage(np.bincount(np.concatenate(codes), minlength=tokenizer.codes))
    return tokenizer, (
        f"log-mel error {quality(error / values):.1f} dB, {used} of {tokenizer.codes} codes used, "
        f"perplexity {perplexity:.0f}"
    )


def quality(mean_squared_error: float) -> float:
    """Root mean square error of log-mel levels in dB."""
    return STEP_DB * float(np.sqrt(mean_squared_error))
