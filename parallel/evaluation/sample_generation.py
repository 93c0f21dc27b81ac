"""Generates samples during training, from a fixed set of held-out prompts at each validation.

``validation/prompts.json`` of a data folder lists pairs of a caption and an image,
``{"prompts": [{"caption", "image"}]}``, images as base64 of PNG, JPEG or the like. An image is
generated from each caption, and a caption from each image.

All ranks generate together, as their layers communicate; the tokens of rank 0 count. Seeds belong
to the prompts, so generation changes no other random numbers of the run.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torchtitan.config import Configurable

from earlyfuse.data.json_files import read_json
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.generate.session import Sampling, generate
from earlyfuse.models.routing.router import check_causal, usable_rules
from earlyfuse.models.vocabulary import Modality, Vocabulary
from earlyfuse.parallel.evaluation.eval_tasks import decoded, media_tokenizer, media_tokens
from earlyfuse.parallel.reporting import rank_log
from earlyfuse.parallel.strategies.pipeline import Pipeline

PROMPTS = Path("validation") / "prompts.json"
_REMEDY = "copy it again, remove it, or turn samples off: --sampler.no-enable"


@dataclass(frozen=True)
class Pair:
    """A held-out caption and image (H, W, 3) uint8, and their tokens without bos."""

    caption: str
    pixels: np.ndarray
    caption_tokens: list[int]
    image_tokens: list[int]


@dataclass(frozen=True)
class Sample:
    """A pair, the image generated from its caption, and the caption generated from its image."""

    pair: Pair
    image: np.ndarray
    caption: str


class Sampler(Configurable):
    """Generates samples from a fixed set of prompts; ``pairs`` is empty if it is off."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        enable: bool = True
        """Generate samples at each validation, if the data folder has prompts."""

        number: int = 12
        """Number of prompts of validation/prompts.json to use."""

        temperature: float = 0.7
        """Temperature for images and captions; 0 takes the most likely tokens."""

        top_p: float = 1.0
        """Nucleus sampling: draw from the fewest tokens with this total probability."""

        guidance: float = 2.0
        """Classifier-free guidance for images; 1 is off."""

        caption_tokens: int = 32
        """Maximal length of a generated caption."""

        data_folder: str = ""
        """Filled in from data.folder."""

    def __init__(self, config: Config, *, model: Decoder | Pipeline, seq_len: int):
        self.config = config
        self.pairs: list[Pair] = []
        self.tokenizers: Tokenizers | None = None
        if config.enable:
            box = [self._load(seq_len) if dist.get_rank() == 0 else []]
            if dist.get_world_size() > 1:  # others may not see the file
                dist.broadcast_object_list(box, src=0)
            self.pairs = box[0]
        if self.pairs and (reason := _cannot_generate(model)):
            self.pairs = []
            if dist.get_rank() == 0:
                rank_log.tell(f"no samples are generated: {reason}")

    def write(
        self, model: Decoder | Pipeline, vocabulary: Vocabulary, seq_len: int
    ) -> list[Sample]:
        """Samples of all pairs on rank 0, [] on others. All ranks call it."""
        assert isinstance(model, Decoder), "pipelines are turned off"
        if not usable_rules(model):  # before the first step
            if dist.get_rank() == 0:
                rank_log.tell("no samples yet: the model's thresholds are not measured")
            return []
        config, block = self.config, len(self.pairs[0].image_tokens)

        def generated(prompts: list[list[int]], mode: str, new_tokens: int) -> list[list[int]]:
            return generate(
                model,
                vocabulary,
                [[vocabulary.bos, *prompt] for prompt in prompts],
                new_tokens=new_tokens,
                mode=mode,
                sampling=Sampling(config.temperature, config.top_p, guidance=config.guidance),
                unused=() if self.tokenizers is None else self.tokenizers.unused,
                agree=_broadcast,
            )

        images = generated([pair.caption_tokens for pair in self.pairs], "image", block)
        length = min(config.caption_tokens, seq_len - block - 1)
        captions = generated([pair.image_tokens for pair in self.pairs], "text", length)
        if self.tokenizers is None or self.tokenizers.image is None:
            return []
        start = vocabulary.medium(Modality.IMAGE).start
        pixels = self.tokenizers.image.decode(np.array([t[1:-1] for t in images]) - start)
        return [
            Sample(pair, image, self.tokenizers.text.decode(caption))
            for pair, image, caption in zip(self.pairs, pixels, captions, strict=True)
        ]

    def _load(self, seq_len: int) -> list[Pair]:
        folder = Path(self.config.data_folder)
        if not (folder / PROMPTS).exists():
            return []
        self.tokenizers = Tokenizers.load(folder / "tokenizers")
        if self.tokenizers.image is not None and not self.tokenizers.image.decodes:
            rank_log.tell("no samples are generated: the image tokenizer has no decoder")
            return []
        # with begin and end of the document
        fitting = [
            pair
            for pair in load_pairs(folder / PROMPTS, self.tokenizers)
            if len(pair.caption_tokens) + len(pair.image_tokens) + 2 <= seq_len
        ]
        if not fitting:
            rank_log.tell(f"no samples are generated: no prompt fits training.seq_len ({seq_len})")
        return fitting[: self.config.number]


def load_pairs(path: Path, tokenizers: Tokenizers) -> list[Pair]:
    """The pairs of a ``prompts.json``; ``ValueError`` naming file and field if it is damaged."""
    tokenizer = media_tokenizer("image", tokenizers, str(path))
    prompts = read_json(path, _REMEDY).objects("prompts")
    captions = [prompt.field("caption", str) for prompt in prompts]
    pixels = [decoded(prompt, "image", tokenizer.features) for prompt in prompts]
    try:
        words = [tokenizers.text.encode(caption) for caption in captions]
    except ValueError as error:  # UnicodeEncodeError too
        raise ValueError(f"{path}: a caption is not valid text ({error}); {_REMEDY}") from error
    blocks = media_tokens("image", pixels, tokenizers) if pixels else []
    return list(map(Pair, captions, pixels, words, blocks))


def _cannot_generate(model: Decoder | Pipeline) -> str | None:
    """Reason that ``model`` cannot generate; None if it can."""
    if isinstance(model, Pipeline):
        return (
            "parallelism.pipeline_parallel_degree is above 1, and pipelines do not decode; use "
            "python -m earlyfuse.tools.generate on a checkpoint"
        )
    try:
        model.config.check_use("decoding", "the model cannot generate")
        check_causal(model)
        return None
    except ValueError as error:
        return str(error)


def _broadcast(tokens_B: torch.Tensor) -> torch.Tensor:
    # ranks that draw other tokens, by rounding, would call their layers differently
    if dist.get_world_size() > 1:
        dist.broadcast(tokens_B, src=0)
    return tokens_B
