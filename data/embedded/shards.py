"""Documents as WebDataset tars of lists in step: ``json``, and a member for each medium."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from earlyfuse.data.embedded.compose import Parts, Utterance


def write_shards(folder: Path, documents: Sequence[Parts], per_shard: int) -> None:
    """``folder/000000.tar`` …, ``per_shard`` samples each. Bytes depend on the documents alone."""
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, len(documents), per_shard)):
        shard = folder / f"{number:06d}.tar"
        with tarfile.open(shard, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for offset, parts in enumerate(documents[start : start + per_shard], start):
                _add_sample(tar, f"{offset:08d}", parts)


def _add_sample(tar: tarfile.TarFile, key: str, parts: Parts) -> None:
    texts: list[str | None] = []
    names: list[str | None] = []
    spoken: list[str | None] = []
    images: list[tuple[str, bytes]] = []
    audio: list[tuple[str, bytes]] = []
    for part in parts:
        if isinstance(part, bytes):
            images.append((f"{len(images)}.png", part))
        elif isinstance(part, Utterance):
            audio.append((f"{len(audio)}.flac", part.flac))
        texts.append(part if isinstance(part, str) else None)
        names.append(images[-1][0] if isinstance(part, bytes) else None)
        spoken.append(audio[-1][0] if isinstance(part, Utterance) else None)
    lists = {"texts": texts, "images": names} | ({"audio": spoken} if audio else {})
    fields = json.dumps(lists, ensure_ascii=False)
    for name, data in (("json", fields.encode()), *images, *audio):
        entry = tarfile.TarInfo(f"{key}.{name}")  # owner, group and time stay 0, mode 0644
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
