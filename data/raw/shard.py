"""Raw shards, the units of work of ``prepare``, and the options of reading them."""

import hashlib
import os
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from earlyfuse.data.atomic import sha256_file

LAYOUTS = ("pairs", "interleaved", "mmc4", "turns", "text")
TEXT_UNITS = ("file", "paragraph", "line")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class RawShard:
    """A file, a part of one, or some files of a folder.

    ``path``: the file, or the folder of ``files``, whose names are relative to it. ``kind``: name
    of its row in ``kinds.KINDS``. ``part``: its number among the parts of ``path``, none for all of
    it. ``start``, ``stop``: the bytes of the file that it consists of. ``first``: number of lines
    or rows before it.
    """

    path: Path
    kind: str
    part: int | None = None
    start: int = 0
    stop: int | None = None
    first: int = 0
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        return str(self.path)

    @property
    def suffix(self) -> str:
        """``#3`` for part 3, empty for a whole file."""
        return "" if self.part is None else f"#{self.part}"

    @property
    def name(self) -> str:
        """``000.jsonl#3``."""
        return self.path.name + self.suffix

    @property
    def paths(self) -> list[Path]:
        """The files that it is made of."""
        return [self.path / name for name in self.files] if self.files else [self.path]

    @cached_property
    def size(self) -> int:
        """Its bytes on disk."""
        if self.stop is not None:
            return self.stop - self.start
        return sum(path.stat().st_size for path in self.paths)

    def sha256(self) -> str:
        """SHA-256 of its bytes, in hex; of files in a folder, of their names and hashes."""
        if self.files:
            hashes = [f"{name} {sha256_file(self.path / name)}\n" for name in self.files]
            return hashlib.sha256("".join(hashes).encode(errors="surrogateescape")).hexdigest()
        if self.stop is None:
            return sha256_file(self.path)
        digest, left = hashlib.sha256(), self.stop - self.start
        with open(self.path, "rb") as file:
            file.seek(self.start)
            while left > 0 and (piece := file.read(min(left, _CHUNK))):
                digest.update(piece)
                left -= len(piece)
        return digest.hexdigest()


@dataclass(frozen=True)
class ReadOptions:
    """Options of reading raw shards. Raises ``ValueError`` for values out of range.

    ``layout``: one of ``LAYOUTS``, or ``auto``: the layout of each sample is recognised.
    ``image_first``: share of pairs in which the image or utterance leads (Chameleon: 0.5); the hash
    of the key decides, so the choice does not depend on order or process.
    ``media_root``: folder of the files that JSON lines and tables name; none: that of each shard.
    ``columns``: (role, column) of parquet files; none: recognised (``parquet_columns``).
    ``text_unit``: what becomes a document of a plain text file, one of ``TEXT_UNITS``.
    """

    layout: str = "auto"
    image_first: float = 0.5
    media_root: Path | None = None
    text_unit: str = "file"
    columns: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name, known in (("layout", ("auto", *LAYOUTS)), ("text_unit", TEXT_UNITS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} ({value}) must be one of {', '.join(known)}")
        if not 0 <= self.image_first <= 1:
            raise ValueError(f"image_first ({self.image_first}) must lie in [0, 1]")
        if self.media_root is not None and not os.path.isdir(self.media_root):
            raise ValueError(
                f"media_root ({self.media_root}) must be the folder that the names of images and "
                "audio files in JSON lines and tables are relative to"
            )

    def recipe(self) -> list[str]:
        """Options that decide the tokens: the first two, and each other that is not its default."""
        others = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        return [
            self.layout,
            str(self.image_first),
            *(f"{name}={value}" for name, value, default in others[2:] if value != default),
        ]
