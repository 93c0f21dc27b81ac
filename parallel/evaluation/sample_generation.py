"""What the model writes while it trains: a fixed set of held-out prompts at each validation.

``validation/prompts.json`` of a data folder lists pairs of a caption and its image,
``{"prompts": [{"caption", "image"}]}`` with images as base64 of PNG, JPEG or the like. From each
caption an image is written, and from each image a caption.

Every rank writes the same: their layers compute together, and the tokens of rank 0 decide. Seeds
are those of the prompts, so nothing else that is random in a run is touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torchtitan.config import Configurable

from earlyfuse.data.json_files import read_json
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.generate.session import Sampling, generate
from earlyfuse.models.routing.router import check_causal
from earlyfuse.models.vocabulary import Modality, Vocabulary
from earlyfuse.parallel.evaluation.eval_tasks import decoded
from earlyfuse.parallel.reporting import rank_log
from earlyfuse.parallel.strategies.pipeline import Pipeline

PROMPTS = Path("validation") / "prompts.json"
_REMEDY = "copy it again, remove it, or turn samples off: --sampler.no-enable"


@dataclass(frozen=True)
class Pair:
    """A held-out caption and its image, as text and pixels (H, W, 3) uint8, and as tokens without
    begin-of-document.
    """

    caption: str
    pixels: np.ndarray
    caption_tokens: list[int]
    image_tokens: list[int]


@dataclass(frozen=True)
class Sample:
    """A pair, and what the model wrote: an image from the caption, a caption from the image."""

    pair: Pair
    image: np.ndarray
    caption: str


class Sampler(Configurable):
    """Writes samples of a fixed set of prompts; ``pairs`` is empty where it is off."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        enable: bool = True
        """Write samples at each validation, where the data folder brings prompts."""

        number: int = 12
        """Prompts of validation/prompts.json to take."""

        temperature: float = 0.7
        """Of images and captions; 0 takes the most likely tokens."""

        top_p: float = 1.0
        """Draw from the fewest tokens that have this much of the probability."""

        guidance: float = 2.0
        """Classifier-free guidance of images; 1 is off."""

        caption_tokens: int = 32
        """Longest caption to write."""

        data_folder: str = ""
        """Filled in from data.folder."""

        def __post_init__(self) -> None:
            for name in ("number", "caption_tokens"):
                if getattr(self, name) < 1:
                    raise ValueError(
                        f"sampler.{name} ({getattr(self, name)}) must be at least 1; "
                        "--sampler.no-enable turns samples off"
                    )
            self.sampling()

        def sampling(self) -> Sampling:
            """Raises ``ValueError`` for what cannot be."""
            return Sampling(self.temperature, self.top_p, guidance=self.guidance)

    def __init__(self, config: Config, *, model: Decoder | Pipeline, seq_len: int):
        self.config = config
        self.pairs: list[Pair] = []
        self.tokenizers: Tokenizers | None = None
        if config.enable:
            self.pairs = self._broadcast(self._load(seq_len) if _rank() == 0 else ())
        reason = _reason_against(model) if self.pairs else None
        if reason is not None:
            self.pairs = []
            if _rank() == 0:
                rank_log.tell(f"no samples are written: {reason}")

    def write(
        self, model: Decoder | Pipeline, vocabulary: Vocabulary, seq_len: int
    ) -> list[Sample]:
        """Samples of all pairs, on rank 0; nothing on others. To be called on all ranks."""
        assert isinstance(model, Decoder), "pipelines are turned off"
        bos, block = [vocabulary.bos], len(self.pairs[0].image_tokens)
        # rank 0, which decides, has them
        unused = () if self.tokenizers is None else self.tokenizers.unused
        images = generate(
            model,
            vocabulary,
            [bos + pair.caption_tokens for pair in self.pairs],
            new_tokens=block,
            mode="image",
            sampling=self.config.sampling(),
            unused=unused,
            agree=_first_rank_decides,
        )
        captions = generate(
            model,
            vocabulary,
            [bos + pair.image_tokens for pair in self.pairs],
            new_tokens=min(self.config.caption_tokens, seq_len - block - 1),
            mode="text",
            sampling=self.config.sampling(),
            unused=unused,
            agree=_first_rank_decides,
        )
        if self.tokenizers is None or self.tokenizers.image is None:
            return []
        start = vocabulary.medium(Modality.IMAGE).start
        codes = np.array([tokens[1:-1] for tokens in images]) - start
        decoded = self.tokenizers.image.decode(codes)
        return [
            Sample(pair, pixels, self.tokenizers.text.decode(caption))
            for pair, pixels, caption in zip(self.pairs, decoded, captions, strict=True)
        ]

    def _load(self, seq_len: int) -> list[Pair]:
        folder = Path(self.config.data_folder)
        if not (folder / PROMPTS).exists():
            return []
        self.tokenizers = Tokenizers.load(folder / "tokenizers")
        if self.tokenizers.image is not None and not self.tokenizers.image.decodes:
            rank_log.tell("no samples are written: the image tokenizer has no decoder")
            return []
        # a row holds caption, image, begin and end of the document
        fitting = [
            pair
            for pair in load_pairs(folder / PROMPTS, self.tokenizers)
            if len(pair.caption_tokens) + len(pair.image_tokens) + 2 <= seq_len
        ]
        if not fitting:
            rank_log.tell(f"no samples are written: no prompt fits training.seq_len ({seq_len})")
        return fitting[: self.config.number]

    def _broadcast(self, pairs: Sequence[Pair]) -> list[Pair]:
        """What rank 0 has read; others may not see the file yet, or have none."""
        box: list[Any] = [list(pairs)]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]


def load_pairs(path: Path, tokenizers: Tokenizers) -> list[Pair]:
    """The pairs of a ``prompts.json``; ``ValueError`` naming the file for what is no such pair."""
    images, vocabulary = tokenizers.image, tokenizers.vocabulary
    if images is None:
        raise ValueError(
            f"{path} has images, but the data folder has no image tokenizer; remove the file or "
            "prepare with images"
        )
    prompts = read_json(path, _REMEDY).objects("prompts")
    captions = [prompt.field("caption", str) for prompt in prompts]
    pixels = [decoded(prompt, "image", images.features) for prompt in prompts]
    try:
        tokens = [tokenizers.text.encode(caption) for caption in captions]
    except ValueError as error:  # UnicodeEncodeError too
        raise ValueError(f"{path}: a caption is no text ({error}); {_REMEDY}") from error
    if not pixels:
        return []
    medium = vocabulary.medium(Modality.IMAGE)
    codes = (images.encode(np.stack(pixels)) + medium.start).tolist()
    return [
        Pair(caption, image, words, [medium.begin, *block, medium.end])
        for caption, image, words, block in zip(captions, pixels, tokens, codes, strict=True)
    ]


def _reason_against(model: Decoder | Pipeline) -> str | None:
    """Why ``model`` cannot write, if so."""
    if isinstance(model, Pipeline):
        return (
            "parallelism.pipeline_parallel_degree is above 1, and tokens are not written one by "
            "one through a pipeline; use python -m earlyfuse.tools.generate on a checkpoint"
        )
    try:
        model.config.check_use("decoding", "the model cannot generate")
        check_causal(model)
        return None
    except ValueError as error:
        return str(error)


def _first_rank_decides(tokens_B: torch.Tensor) -> torch.Tensor:
    # ranks that drew differently, by rounding, would no longer call their layers alike
    if dist.get_world_size() > 1:
        dist.broadcast(tokens_B, src=0)
    return tokens_B


def _rank() -> int:
    return dist.get_rank()
