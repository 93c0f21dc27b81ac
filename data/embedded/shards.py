"""Writes documents as WebDataset tars of parallel lists: ``json``, and a member for each medium."""

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from webdataset import TarWriter

from earlyfuse.data.embedded.compose import Parts, Utterance


def write_shards(folder: Path, documents: Sequence[Parts], per_shard: int) -> None:
    """``folder/000000.tar`` …, ``per_shard`` samples each. Bytes depend on the documents alone."""
    folder.mkdir(parents=True)
    # no names and times of this machine
    alike = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "format": tarfile.USTAR_FORMAT}
    for number, start in enumerate(range(0, len(documents), per_shard)):
        with TarWriter(str(folder / f"{number:06d}.tar"), encoder=False, **alike) as tar:
            for offset, parts in enumerate(documents[start : start + per_shard], start):
                tar.write({"__key__": f"{offset:08d}", **_members(parts)})


def _members(parts: Parts) -> dict[str, bytes]:
    texts: list[str | None] = []
    names: list[str | None] = []
    spoken: list[str | None] = []
    images: dict[str, bytes] = {}
    audio: dict[str, bytes] = {}
    for part in parts:
        texts.append(part if isinstance(part, str) else None)
        names.append(f"{len(images)}.png" if isinstance(part, bytes) else None)
        spoken.append(f"{len(audio)}.flac" if isinstance(part, Utterance) else None)
        if isinstance(part, bytes):
            images[f"{len(images)}.png"] = part
        elif isinstance(part, Utterance):
            audio[f"{len(audio)}.flac"] = part.flac
    lists = {"texts": texts, "images": names} | ({"audio": spoken} if audio else {})
    return {"json": json.dumps(lists, ensure_ascii=False).encode(), **images, **audio}
