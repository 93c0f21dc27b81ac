"""Specification of a preparation, and the refusals that precede any writing."""

import os
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from earlyfuse.data.media import MEDIA, Medium
from earlyfuse.data.prepare.bad_samples import POLICIES
from earlyfuse.data.prepare.frames import LONG_VIDEO
from earlyfuse.data.prepare.shard_files import Paths, check_kinds, find_shards, unused_files
from earlyfuse.data.raw import LAYOUTS
from earlyfuse.data.tokenizers import TEXT_FILES, text_file
from earlyfuse.data.tokenizers.animation import MOST_FRAMES
from earlyfuse.data.tokenizers.text import check_vocabulary_size

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Source:
    """A folder to write, ``<out>/<split>/<name>``, and the raw shards it is made from.

    ``unused``: descriptions of the other files in the folders of the shards.
    """

    split: str
    name: str
    shards: tuple[Path, ...]
    unused: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """``train/text``."""
        return f"{self.split}/{self.name}"

    @property
    def raw_names(self) -> list[str]:
        """Names of the shards in manifests: paths relative to their common folder."""
        shared = os.path.commonpath([shard.parent for shard in self.shards])
        return [Path(os.path.relpath(shard, shared)).as_posix() for shard in self.shards]

    def expected_sizes(self) -> list[float]:
        """For each shard, the median size of the source's shards over its own size, at least 1;
        compressed shards are compared with compressed ones.
        """
        sizes = [max(1, shard.stat().st_size) for shard in self.shards]
        packed = [shard.name.lower().endswith("gz") for shard in self.shards]
        pairs = list(zip(sizes, packed, strict=True))
        usual = {
            kind: statistics.median(size for size, own in pairs if own == kind)
            for kind in set(packed)
        }
        return [max(1.0, usual[kind] / size) for size, kind in pairs]


@dataclass(frozen=True)
class PrepareSpec:
    """A whole preparation. Raises ``ValueError`` on values out of range, when it is built.

    ``train`` and ``validation``: source name → shards, as files, folders of tars or patterns (glob,
    braces).
    ``tokenizers``: folder of ready tokenizers, as a prepared folder or an import has it; all of
    them are used, with their vocabulary. Else ``text_tokenizer``: a sentencepiece .model or a
    Hugging Face tokenizer.json; none: train one of ``text_vocab`` pieces.
    ``image_tokenizer``: "kmeans", "vqvae", "pixels", "vae", "none" (text only), the file of a ready
    one, or a folder of diffusers' ``AutoencoderKL``. It splits images of ``image_size`` pixels into
    patches of ``patch``: each becomes one of ``codes`` codes, or (the last three) a vector. A "vae"
    has ``vae_channels`` latents for each square of ``vae_factor`` pixels, ``vae_kl`` weighs the KL
    term against the squared error of pixels.
    ``speech_tokenizer``: "none", "kmeans" or the file of a ready one; a new one learns
    ``speech_codes`` codes of ``speech_frame_ms`` each. An utterance above ``speech_seconds`` is a
    bad sample: utterances are never split, and have to fit a row of training.
    ``video_frames``: most frames of a video, lists of frames and animated files alike; 0: videos
    are bad samples, animations their first frame. ``frame_stride``: take every n-th.
    ``long_video``: of a video with more frames take some at "even" distances or the "first", or
    "drop" the sample.
    ``media_tokenizers``: the same choice for media without a field of their own, by label.
    ``layout``, ``image_first``: see ``read_documents``. ``on_bad``: "skip" counts bad samples, up
    to the share ``max_bad_rate`` of a source, and stops at a shard that cannot be read to its end;
    "skip-shards" counts the samples such a shard lost, by estimate and outside that rate, and uses
    the rest; "stop" stops at the first bad sample.
    ``replace``: rebuild existing sources that were made from other raw shards.
    """

    out: Path
    train: Mapping[str, Paths]
    validation: Mapping[str, Paths] = field(default_factory=dict)
    tokenizers: Path | None = None
    text_tokenizer: Path | None = None
    text_vocab: int = 2048
    image_tokenizer: str = "kmeans"
    image_size: int = 16
    patch: int = 4
    codes: int = 512
    vq_steps: int = 1500
    vae_factor: int = 2
    vae_channels: int = 4
    vae_steps: int = 1500
    vae_kl: float = 1e-3
    speech_tokenizer: str = "none"
    speech_codes: int = 500
    speech_frame_ms: int = 40
    speech_seconds: float = 30.0
    video_frames: int = 0
    frame_stride: int = 1
    long_video: str = "even"
    media_tokenizers: Mapping[str, str] = field(default_factory=dict)
    layout: str = "auto"
    image_first: float = 0.5
    on_bad: str = "skip"
    max_bad_rate: float = 0.01
    workers: int = min(8, os.cpu_count() or 1)
    seed: int = 0
    replace: bool = False

    def __post_init__(self) -> None:
        check_vocabulary_size(self.text_vocab)
        for name, known in (
            ("layout", ("auto", *LAYOUTS)),
            ("on_bad", POLICIES),
            ("long_video", LONG_VIDEO),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be one of {', '.join(known)}"
                )
        for name in ("image_first", "max_bad_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must lie in [0, 1]")
        if self.workers < 1:
            raise ValueError(f"workers ({self.workers}) must be at least 1")
        if not self.train:
            raise ValueError("train names no source to train tokenizers on; give at least one")
        for medium in MEDIA.values():
            given, kinds = self.tokenizer_of(medium), (*medium.kinds, "none")
            folder = bool(medium.foreign) and Path(given).is_dir()
            if given not in kinds and not (folder or Path(given).is_file()):
                foreign = f", the {medium.foreign}" if medium.foreign else ""
                raise ValueError(
                    f"{medium.label}_tokenizer ({given}) must be one of {', '.join(kinds)}, an "
                    f"existing tokenizer file{foreign}"
                )
            medium.module().check(self)
        if unknown := self.media_tokenizers.keys() - MEDIA.keys():
            raise ValueError(
                f"media_tokenizers names {min(unknown)!r}; the media are {', '.join(MEDIA)}"
            )
        if self.text_tokenizer is not None and not Path(self.text_tokenizer).is_file():
            raise ValueError(
                f"text_tokenizer ({self.text_tokenizer}) must be an existing .model or "
                "tokenizer.json file"
            )
        self._check_video()
        if self.tokenizers is not None:
            self._check_tokenizers(self.tokenizers)

    def _check_video(self) -> None:
        if not 0 <= self.video_frames <= MOST_FRAMES:
            raise ValueError(f"video_frames ({self.video_frames}) must lie in [0, {MOST_FRAMES}]")
        if self.frame_stride < 1:
            raise ValueError(f"frame_stride ({self.frame_stride}) must be at least 1")
        if not self.video_frames:
            for name in ("frame_stride", "long_video"):
                if (value := getattr(self, name)) != self.__dataclass_fields__[name].default:
                    raise ValueError(f"{name} ({value}) needs video_frames above 0; set both")
        elif self.image_tokenizer == "none":
            raise ValueError(
                f"video_frames ({self.video_frames}) needs an image tokenizer; leave it out, or "
                "give another image_tokenizer than none"
            )

    def _check_tokenizers(self, folder: Path) -> None:
        if not text_file(folder).is_file():
            raise ValueError(
                f"tokenizers ({folder}) must be a folder with {' or '.join(TEXT_FILES)}; name the "
                "tokenizers folder of prepared data or of a converted checkpoint"
            )
        given: dict[str, object] = {}
        if self.text_tokenizer:
            given["text_tokenizer"] = self.text_tokenizer
        for medium in MEDIA.values():
            if (kind := self.tokenizer_of(medium)) != medium.default:
                given[f"{medium.label}_tokenizer"] = kind
        if given:
            others = " and ".join(f"{name} ({value})" for name, value in given.items())
            raise ValueError(f"tokenizers ({folder}) names all tokenizers; leave out {others}")

    def tokenizer_of(self, medium: Medium) -> str:
        """A kind, "none" or a file."""
        other = self.media_tokenizers.get(medium.label, medium.default)
        return getattr(self, f"{medium.label}_tokenizer", other)

    @property
    def media(self) -> list[Medium]:
        """Media that get a tokenizer; unknown where ``tokenizers`` brings them."""
        return [medium for medium in MEDIA.values() if self.tokenizer_of(medium) != "none"]

    def sources(self) -> list[Source]:
        """Both splits with their shards found.

        Raises ``FileNotFoundError`` where nothing matches, ``ValueError`` for a URL, a file that is
        no tar, an unfit name, or a shard that is in both splits.
        """
        found = [
            self._source(split, name, paths)
            for split in SPLITS
            for name, paths in getattr(self, split).items()
        ]
        trained = {
            s.resolve() for source in found if source.split == "train" for s in source.shards
        }
        for source in found:
            shared = [s for s in source.shards if s.resolve() in trained]
            if source.split == "validation" and shared:
                raise ValueError(
                    f"shard {shared[0]} of {source.label} is a training shard too; "
                    "validate on data that training does not see"
                )
        return found

    def _source(self, split: str, name: str, paths: Paths) -> Source:
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(
                f"source name ({name!r}) must be letters, digits, '_' and '-': it names a folder"
            )
        label = f"{split}/{name}"
        shards = find_shards(label, paths)
        check_kinds(label, shards, failed=self.on_bad == "skip-shards")
        source = Source(split, name, shards, tuple(unused_files(paths)))
        for raw_name in source.raw_names:
            try:
                raw_name.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{label}: shard {raw_name!r} has a name that is not UTF-8; rename it"
                ) from error
        return source
