"""Generates samples during training, from a fixed set of held-out prompts at each validation.

``validation/prompts.json`` of a data folder lists pairs of a caption and an image,
``{"prompts": [{"caption", "image"}]}``, images as base64 of PNG, JPEG or the like. An image is
generated from each caption, and a caption from each image. Images are codes or vectors, whatever
the data's are; vectors are denoised.

All ranks generate together, as their layers communicate; the tokens and vectors of rank 0 count.
Seeds belong to the prompts, so generation changes no other random numbers of the run.

N images of n codes or vectors of P numbers, H pixels a side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torchtitan.config import Configurable

from earlyfuse.data.json_files import read_json
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.generate.constrained import Draft, Prompt
from earlyfuse.models.generate.denoising import Denoising
from earlyfuse.models.generate.session import NotFinite, Sampling, write_documents
from earlyfuse.models.routing.router import check_causal, usable_rules
from earlyfuse.models.vocabulary import Modality, Vocabulary
from earlyfuse.parallel.evaluation.eval_tasks import decoded, media_tokenizer
from earlyfuse.parallel.evaluation.image_checks import LABELLED, ImageChecks
from earlyfuse.parallel.reporting import rank_log
from earlyfuse.parallel.strategies.pipeline import Pipeline

PROMPTS = Path("validation") / "prompts.json"
_REMEDY = "copy it again, remove it, or turn samples off: --sampler.no-enable"
_BATCH = 64  # images generated at once


@dataclass(frozen=True)
class Pair:
    """A held-out caption and image (H, W, 3) uint8, and their tokens without bos; of an image of
    vectors also these, (n, P).
    """

    caption: str
    pixels: np.ndarray
    caption_tokens: list[int]
    image_tokens: list[int]
    image_vectors: np.ndarray | None = None


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

        guided_until: float = 1.0
        """Time (0 is data, 1 is noise) up to which images of vectors are guided; JiT: 0.9."""

        denoising_steps: int = 50
        """Steps that turn noise into an image of vectors."""

        denoising_method: Literal["ddim", "euler", "heun"] = "ddim"
        """Method of these steps; heun reads the model twice in each."""

        caption_tokens: int = 32
        """Maximal length of a generated caption."""

        checked_images: int = 0
        """Images to generate at each validation from captions of labels, for image checks: do they
        show what their captions say? At least 2, or 0: none. Needs data with such captions
        (validation/labelled.json)."""

        data_folder: str = ""
        """Filled in from data.folder."""

    def __init__(self, config: Config, *, model: Decoder | Pipeline, seq_len: int):
        self.config = config
        self.denoising = Denoising(
            config.denoising_steps, config.denoising_method, config.guided_until
        )
        self.pairs: list[Pair] = []
        self.tokenizers: Tokenizers | None = None
        if config.enable:
            box = [self._load(seq_len) if dist.get_rank() == 0 else []]
            if dist.get_world_size() > 1:  # others may not see the file
                dist.broadcast_object_list(box, src=0)
            self.pairs = box[0]
        self.checks: ImageChecks | None = None
        self.captions: list[tuple[str, list[int]]] = []  # of the checks, and their tokens
        if config.checked_images and not self.pairs and dist.get_rank() == 0:
            rank_log.tell("no image checks: no samples are generated")
        if self.pairs and config.checked_images:
            captions = [self._load_checks() if dist.get_rank() == 0 else []]
            if dist.get_world_size() > 1:
                dist.broadcast_object_list(captions, src=0)
            self.captions = captions[0]
        if self.pairs and (reason := _cannot_generate(model)):
            self.pairs, self.captions = [], []
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
        try:
            return self._write(model, vocabulary, seq_len)
        except NotFinite as error:  # on all ranks; the run decides by itself whether it goes on
            if dist.get_rank() == 0:
                rank_log.tell(f"no samples: {error}")
            return []

    def check(self, model: Decoder | Pipeline, vocabulary: Vocabulary) -> dict[str, float]:
        """Scores of images generated from ``captions`` (``image_checks.py``) on rank 0, {} on
        others and where there are none. All ranks call it.
        """
        if not self.captions or not isinstance(model, Decoder) or not usable_rules(model):
            return {}
        config = self.config
        try:
            drafts = draw_images(
                model,
                vocabulary,
                [tokens for _, tokens in self.captions],
                () if self.tokenizers is None else self.tokenizers.unused,
                sampling=Sampling(config.temperature, config.top_p, guidance=config.guidance),
                denoising=self.denoising,
            )
        except NotFinite:  # ``write`` says so
            return {}
        if self.checks is None or self.tokenizers is None:
            return {}
        images = decode_images(drafts, self.tokenizers)
        return self.checks.score([caption for caption, _ in self.captions], images)

    def _write(self, model: Decoder, vocabulary: Vocabulary, seq_len: int) -> list[Sample]:
        config, block = self.config, len(self.pairs[0].image_tokens)
        sampling = Sampling(config.temperature, config.top_p, guidance=config.guidance)
        unused = () if self.tokenizers is None else self.tokenizers.unused
        captions = [pair.caption_tokens for pair in self.pairs]
        drafts = draw_images(
            model, vocabulary, captions, unused, sampling=sampling, denoising=self.denoising
        )
        texts = write_documents(
            model,
            vocabulary,
            [_prompt_of(pair, vocabulary) for pair in self.pairs],
            new_tokens=min(config.caption_tokens, seq_len - block - 1),
            mode="text",
            sampling=sampling,
            denoising=self.denoising,
            unused=unused,
            agree=_broadcast,
        )
        if self.tokenizers is None or self.tokenizers.image is None:
            return []
        return [
            Sample(pair, image, self.tokenizers.text.decode(text.written))
            for pair, image, text in zip(
                self.pairs, decode_images(drafts, self.tokenizers), texts, strict=True
            )
        ]

    def _load_checks(self) -> list[tuple[str, list[int]]]:
        self.checks = ImageChecks.load(self.config.data_folder)
        if self.checks is None or self.tokenizers is None:
            rank_log.tell(f"no image checks: {self.config.data_folder} has no {LABELLED}")
            return []
        encode = self.tokenizers.text.encode
        captions = self.checks.captions(self.config.checked_images, seed=0)
        return [(caption, encode(caption)) for caption in captions]

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
    blocks = [tokenizers.block_of("image", image) for image in pixels]
    return [
        Pair(caption, image, tokens, *block)
        for caption, image, tokens, block in zip(captions, pixels, words, blocks, strict=True)
    ]


def images_from_captions(
    model: Decoder,
    tokenizers: Tokenizers,
    captions: Sequence[str],
    *,
    sampling: Sampling | None = None,
    denoising: Denoising | None = None,
    batch_size: int = _BATCH,
    first_seed: int = 0,
) -> np.ndarray:
    """An image for each caption, uint8 (N, H, H, 3), by a model of codes or of vectors.

    The seeds are ``first_seed`` and the numbers after it. All ranks call it with the same captions.
    """
    words = [tokenizers.text.encode(caption) for caption in captions]
    drafts = draw_images(
        model,
        tokenizers.vocabulary,
        words,
        tokenizers.unused,
        sampling=sampling,
        denoising=denoising,
        batch_size=batch_size,
        first_seed=first_seed,
    )
    return decode_images(drafts, tokenizers)


def draw_images(
    model: Decoder,
    vocabulary: Vocabulary,
    captions: Sequence[Sequence[int]],
    unused: Sequence[int] = (),
    *,
    sampling: Sampling | None = None,
    denoising: Denoising | None = None,
    batch_size: int = _BATCH,
    first_seed: int = 0,
) -> list[Draft]:
    """Documents of a caption, given as tokens without bos, and an image that the model writes."""
    room = vocabulary.medium(Modality.IMAGE).block + 2
    drafts: list[Draft] = []
    for start in range(0, len(captions), batch_size):
        batch = captions[start : start + batch_size]
        drafts += write_documents(
            model,
            vocabulary,
            [Prompt([vocabulary.bos, *caption]) for caption in batch],
            new_tokens=room,
            mode="image",
            sampling=sampling,
            denoising=denoising,
            seeds=range(first_seed + start, first_seed + start + len(batch)),
            unused=unused,
            agree=_broadcast,
        )
    return drafts


def decode_images(drafts: Sequence[Draft], tokenizers: Tokenizers) -> np.ndarray:
    """The image that each document ends with, uint8 (N, H, H, 3)."""
    image, medium = tokenizers.image, tokenizers.vocabulary.medium(Modality.IMAGE)
    assert image is not None, "there is an image tokenizer"
    if medium.continuous:
        items = [draft.items[-1].vectors.numpy() for draft in drafts]
    else:
        items = [np.array(draft.tokens[-medium.block - 1 : -1]) - medium.start for draft in drafts]
    return image.decode(np.stack(items))


def _prompt_of(pair: Pair, vocabulary: Vocabulary) -> Prompt:
    """The image of a pair at the beginning of a document."""
    vectors = None if pair.image_vectors is None else torch.from_numpy(pair.image_vectors)
    return Prompt([vocabulary.bos, *pair.image_tokens], vectors)


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


def _broadcast(values: torch.Tensor) -> torch.Tensor:
    # ranks that draw other tokens, by rounding, would call their layers differently
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(values, src=0)
    return values
