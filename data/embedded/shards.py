"""Writes documents as WebDataset tars of interleaved samples: ``json``, and its media members."""

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from webdataset import TarWriter

from earlyfuse.data.embedded.compose import Clip, Parts


def write_shards(folder: Path, documents: Sequence[Parts], per_shard: int) -> None:
    """Write ``folder/000000.tar`` …, ``per_shard`` samples each; their bytes depend on the
    documents alone.
    """
    folder.mkdir(parents=True)
    # nothing of this machine or time
    header = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "format": tarfile.USTAR_FORMAT}
    for number, start in enumerate(range(0, len(documents), per_shard)):
        with TarWriter(str(folder / f"{number:06d}.tar"), encoder=False, **header) as tar:
            for offset, parts in enumerate(documents[start : start + per_shard], start):
                tar.write({"__key__": f"{offset:08d}", **_members(parts)})


def _members(parts: Parts) -> dict[str, bytes]:
    lists: dict[str, list[str | list[str] | None]] = {
        name: [None] * len(parts) for name in ("texts", "images", "audio", "frames")
    }
    images: dict[str, bytes] = {}
    audio: dict[str, bytes] = {}
    for place, part in enumerate(parts):
        if isinstance(part, str):
            lists["texts"][place] = part
        elif isinstance(part, bytes):
            lists["images"][place] = name = f"{len(images)}.png"
            images[name] = part
        elif isinstance(part, Clip):
            names = [f"{len(images) + number}.png" for number in range(len(part.frames))]
            lists["frames"][place] = list(names)
            images |= zip(names, part.frames, strict=True)
        else:
            lists["audio"][place] = name = f"{len(audio)}.flac"
            audio[name] = part.flac
    for optional in ("audio", "frames"):
        if not any(lists[optional]):
            del lists[optional]
    return {"json": json.dumps(lists, ensure_ascii=False).encode(), **images, **audio}
