"""Specification of a preparation, and the refusals that precede any writing."""

import os
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from earlyfuse.data.media import MEDIA, Medium
from earlyfuse.data.prepare.bad_samples import POLICIES
from earlyfuse.data.prepare.frames import LONG_VIDEO
from earlyfuse.data.prepare.shard_files import Paths, find_shards, unused_files
from earlyfuse.data.raw.shard import TEXT_UNITS, RawShard, ReadOptions
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
    shards: tuple[RawShard, ...]
    unused: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """``train/text``."""
        return f"{self.split}/{self.name}"

    @property
    def raw_names(self) -> list[str]:
        """Names of the shards in manifests: paths relative to their common folder."""
        shared = os.path.commonpath([shard.path.parent for shard in self.shards])
        return [
            Path(os.path.relpath(shard.path, shared)).as_posix() + shard.suffix
            for shard in self.shards
        ]

    def expected_sizes(self) -> list[float]:
        """For each shard, the median size of the source's shards over its own size, at least 1;
        compressed shards are compared with compressed ones. Row groups state their rows: 1.
        """
        sizes = [max(1, shard.size) for shard in self.shards]
        packed = [shard.path.name.lower().endswith(("gz", ".zst")) for shard in self.shards]
        pairs = list(zip(sizes, packed, strict=True))
        usual = {
            kind: statistics.median(size for size, own in pairs if own == kind)
            for kind in set(packed)
        }
        return [
            1.0 if shard.kind == "parquet" else max(1.0, usual[kind] / size)
            for shard, (size, kind) in zip(self.shards, pairs, strict=True)
        ]


@dataclass(frozen=True)
class PrepareSpec:
    """A whole preparation. Raises ``ValueError`` on values out of range, when it is built.

    ``train`` and ``validation``: source name → files, folders or patterns (glob, braces).
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
    ``layout``, ``image_first``, ``media_root``, ``text_unit``: see ``ReadOptions``. ``columns``:
    role (text, images, audio) → column of parquet files, where they are not to be recognised;
    ``SOURCE:role`` is of one source, whose other entries do not count then.
    ``on_bad``: "skip" counts bad samples, up to the share ``max_bad_rate`` of a source, and
    stops at a shard that cannot be read to its end; "skip-shards" counts the samples that such a
    shard lost, by estimate and outside that rate; "stop" stops at the first bad sample.
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
    media_root: Path | None = None
    text_unit: str = "file"
    columns: Mapping[str, str] = field(default_factory=dict)
    on_bad: str = "skip"
    max_bad_rate: float = 0.01
    workers: int = min(8, os.cpu_count() or 1)
    seed: int = 0
    replace: bool = False

    def __post_init__(self) -> None:
        check_vocabulary_size(self.text_vocab)
        for name, known in (
            ("on_bad", POLICIES),
            ("long_video", LONG_VIDEO),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be one of {', '.join(known)}"
                )
        if not 0 <= self.max_bad_rate <= 1:
            raise ValueError(f"max_bad_rate ({self.max_bad_rate}) must lie in [0, 1]")
        _ = self.reading  # raises for its values
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
        self._check_columns()
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

    def _check_columns(self) -> None:
        roles = ("text", *(medium.list_name for medium in MEDIA.values()))
        names = {*self.train, *self.validation}
        for key in self.columns:
            source, colon, role = key.rpartition(":")
            if role not in roles or (colon and source not in names):
                raise ValueError(
                    f"columns names {key!r}; a role is {', '.join(roles)}, or SOURCE:ROLE with one "
                    f"of the sources {', '.join(sorted(names))}"
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
    def reading(self) -> ReadOptions:
        """Options of reading raw shards."""
        return ReadOptions(self.layout, self.image_first, self.media_root, self.text_unit)

    def reading_of(self, source: str) -> ReadOptions:
        """Options of reading the raw shards of a source."""
        columns = sorted(self.columns.items())
        split = [(*key.rpartition(":")[::2], column) for key, column in columns]
        own = tuple((role, column) for of, role, column in split if of == source)
        common = tuple((role, column) for of, role, column in split if not of)
        return replace(self.reading, columns=own or common)

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
        self._check_columns_used(found)
        kinds = {shard.kind for source in found for shard in source.shards}
        if self.media_root is not None and kinds <= {"tar", "files", *TEXT_UNITS}:
            raise ValueError(
                f"media_root ({self.media_root}) means nothing to these sources: only rows, as of "
                "parquet, JSON lines and tables, name files; leave it out"
            )
        if self.text_unit != "file" and self.text_unit not in kinds:
            raise ValueError(
                f"text_unit ({self.text_unit}) means nothing to these sources: none is plain text "
                "(.txt); leave it out"
            )
        trained = {
            path.resolve()
            for source in found
            if source.split == "train"
            for shard in source.shards
            for path in shard.paths
        }
        for source in found:
            if source.split == "train":
                continue
            paths = [path for shard in source.shards for path in shard.paths]
            if shared := [path for path in paths if path.resolve() in trained]:
                raise ValueError(
                    f"shard {shared[0]} of {source.label} is a training shard too; "
                    "validate on data that training does not see"
                )
        return found

    def _check_columns_used(self, found: list[Source]) -> None:
        tables = {s.name for s in found if any(shard.kind == "parquet" for shard in s.shards)}
        for key in self.columns:
            source = key.rpartition(":")[0]
            if source not in tables if source else not tables:
                where = f"source {source} has none" if source else "no source has any"
                raise ValueError(f"columns ({key}) are of parquet files, and {where}; leave it out")

    def _source(self, split: str, name: str, paths: Paths) -> Source:
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(
                f"source name ({name!r}) must be letters, digits, '_' and '-': it names a folder"
            )
        label = f"{split}/{name}"
        failed, reading = self.on_bad == "skip-shards", self.reading_of(name)
        shards = find_shards(label, paths, reading, failed=failed)
        source = Source(split, name, shards, tuple(unused_files(paths)))
        for raw_name in source.raw_names:
            try:
                raw_name.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{label}: shard {raw_name!r} has a name that is not UTF-8; rename it"
                ) from error
        return source
