"""Media: one row for each kind of content besides text, with everything that differs between them.

Readers of raw shards, tokenizers, ``prepare``, the stream, generation, plots and the command lines
loop over ``MEDIA``. Items of a *discrete* medium are codes of its tokenizer; items of a
*continuous* one are vectors at repetitions of one placeholder id. docs/data.md says how to add one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from earlyfuse.models.vocabulary import Modality

if TYPE_CHECKING:
    import numpy as np

    from earlyfuse.data.prepare.progress import Progress
    from earlyfuse.data.prepare.spec import PrepareSpec


class VectorType(NamedTuple):
    """``width`` P and ``dtype`` ("float16", "float32") of the vectors of a continuous medium.

    ``channels``: the last, fastest axis of a vector (of an image: a square of pixels or latents,
    row by row); 0: all of it.
    """

    width: int
    dtype: str
    channels: int = 0


class Vectors(NamedTuple):
    """Vectors of a prepared source: their type, the labels of the continuous media, and ``mean``
    and ``std`` of each channel over all vectors, () until they are counted.
    """

    width: int
    dtype: str
    channels: int
    media: tuple[str, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class MediaTokenizer(Protocol):
    """Items of one medium ↔ codes or vectors.

    ``codes``: number of ids, 1 if continuous; ``block``: positions of an item, 0 if items vary;
    ``vectors``: their type, None if discrete; ``decodes``: True if ``to_file`` works; ``batch``:
    number of items to encode in one call; ``settings``: plain values it was made with; ``sha256``:
    of its file, recorded by manifests and checkpoints.
    """

    kind: str
    sha256: str

    @property
    def codes(self) -> int: ...
    @property
    def block(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def decodes(self) -> bool: ...
    @property
    def vectors(self) -> VectorType | None: ...
    @property
    def settings(self) -> dict[str, Any]: ...

    @property
    def features(self) -> "Callable[..., np.ndarray]":
        """(bytes of a file, **limits) → features. ``BadSample`` for an unusable file."""
        ...

    def encode_items(self, items: "Sequence[np.ndarray]") -> "list[np.ndarray]":
        """Features of items → int64 (n,) codes in [0, codes) each, or float (n, P) vectors."""
        ...

    def error(
        self, items: "Sequence[np.ndarray]", codes: "Sequence[np.ndarray]", measured: int
    ) -> tuple[int, int]:
        """Squared error of (some of) ``items`` and its number of values; ``measured``: values
        counted before in this shard.
        """
        ...

    def to_file(self, codes: "np.ndarray") -> bytes:
        """int64 (n,) codes of an item → a file. ``ValueError`` unless it ``decodes``."""
        ...

    def to_bytes(self) -> bytes:
        """The tokenizer's own file."""
        ...


class Sampling(NamedTuple):
    """Training data of a tokenizer: items until their ``size`` sums to ``budget``."""

    budget: int
    read: "Callable[[bytes], np.ndarray]"
    size: "Callable[[np.ndarray], int]"


class MediumModule(Protocol):
    """The code of a medium: the module that a row of ``MEDIA`` imports on first use."""

    QUALITY: str  # heading of ``quality`` in reports

    def quality(self, mean_squared_error: float) -> float:
        """A tokenizer's error in the medium's own unit."""
        ...

    def load(self, path: Path) -> MediaTokenizer:
        """The tokenizer in a file. ``ValueError`` naming file and field for another file."""
        ...

    def ready(self, path: Path, spec: "PrepareSpec") -> MediaTokenizer:
        """``load``, also for a foreign folder that the medium can import with the sizes of
        ``spec``.
        """
        ...

    def check(self, spec: "PrepareSpec") -> None:
        """Raise ``ValueError`` for invalid options of this medium."""
        ...

    def settings(self, spec: "PrepareSpec") -> dict[str, Any]:
        """Settings of a tokenizer trained by ``spec``."""
        ...

    def limits(self, spec: "PrepareSpec") -> dict[str, Any]:
        """Keyword arguments of ``MediaTokenizer.features``; they decide the tokens."""
        ...

    def sampling(self, spec: "PrepareSpec") -> Sampling:
        """Training data for a new tokenizer."""
        ...

    def train(
        self, items: "Sequence[np.ndarray]", spec: "PrepareSpec", progress: "Progress"
    ) -> tuple[MediaTokenizer, str]:
        """A new tokenizer, and a line about its quality."""
        ...


def _image() -> MediumModule:
    from earlyfuse.data.tokenizers import image

    return image


def _speech() -> MediumModule:
    from earlyfuse.data.tokenizers import speech

    return speech


@dataclass(frozen=True)
class Medium:
    """A row of ``MEDIA``.

    ====================  ======================================================================
    ``modality``          id and label
    ``payload``           name of its bytes in messages and causes (``corrupt-audio``)
    ``item``              name of one of them
    ``suffixes``          of members in raw shards
    ``list_name``         its list in the JSON of interleaved samples
    ``video_list``        the list of its videos there, each a list of frames; "": it has none
    ``caption_fields``    JSON fields with the caption of a pair, in order of preference
    ``sentinels``         control pieces of a text tokenizer, around a block
    ``module``            imports its code; at the top of a file, so that worker processes find it
    ``kinds``             of tokenizer that ``prepare`` makes
    ``foreign``           folders of others' tokenizers that ``ready`` imports, for ``--help``
    ``default``           choice of ``prepare``: one of ``kinds`` or "none"
    ``written``           suffix of the files that generation writes
    ``colour``            in plots
    ``always``            True if text tokenizers have its sentinels even where it is not used
    ====================  ======================================================================
    """

    modality: Modality
    payload: str
    item: str
    suffixes: tuple[str, ...]
    list_name: str
    caption_fields: tuple[str, ...]
    sentinels: tuple[str, str]
    module: Callable[[], MediumModule]
    kinds: tuple[str, ...]
    default: str
    written: str
    colour: str
    always: bool = False
    video_list: str = ""
    foreign: str = ""

    @property
    def label(self) -> str:
        """``image``: in manifests, options (``--image-tokenizer``) and metrics."""
        return self.modality.label

    @property
    def file(self) -> str:
        """Its tokenizer in a tokenizers folder."""
        return f"{self.label}.safetensors"


MEDIA: dict[str, Medium] = {
    medium.label: medium
    for medium in (
        Medium(
            modality=Modality.IMAGE,
            payload="image",
            item="image",
            suffixes=("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
            list_name="images",
            caption_fields=("caption",),
            sentinels=("<image>", "</image>"),
            module=_image,
            kinds=("kmeans", "vqvae", "pixels", "vae"),
            default="kmeans",
            written="png",
            colour="#c8553d",
            always=True,
            video_list="frames",
            foreign="vae folder of a diffusers model (AutoencoderKL)",
        ),
        Medium(
            modality=Modality.SPEECH,
            payload="audio",
            item="utterance",
            suffixes=("wav", "flac", "mp3", "ogg", "opus"),
            list_name="audio",
            caption_fields=("caption", "text"),
            sentinels=("<speech>", "</speech>"),
            module=_speech,
            kinds=("kmeans",),
            default="none",
            written="wav",
            colour="#5b8c5a",
        ),
    )
}


def medium_of(modality: int) -> Medium:
    """The row of a modality's id."""
    return MEDIA[Modality(modality).label]
