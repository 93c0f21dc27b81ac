"""What a prepared folder holds already, before anything in it is written: never another's data.

A source is known by the SHA-256 of the raw shards that its manifest and records name. One made of
others than are asked for is not replaced unasked, and no shard is in training and validation,
whichever command put it there.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from earlyfuse.data.atomic import sha256_file
from earlyfuse.data.console import printable
from earlyfuse.data.prepare.spec import SPLITS, PrepareSpec, Source
from earlyfuse.data.shards.manifest import MANIFEST, read_manifest
from earlyfuse.data.shards.writer import ShardRecord


@dataclass(frozen=True)
class Made:
    """A tokenised shard that is there: the SHA-256 of its raw shard and of its tokens."""

    raw: str
    raw_sha256: str
    sha256: str
    dropped: bool
    finished: bool


def made_shards(folder: Path) -> list[Made]:
    """Shards of the source in ``folder`` that hold documents, as manifest and records say.

    ``ValueError`` naming the manifest if that is damaged.
    """
    found: dict[str, Made] = {}
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        for shard in manifest["shards"]:
            if shard["documents"]:
                dropped = shard["raw"] in manifest["drops_by_shard"]
                found[shard["name"]] = Made(
                    shard["raw"], shard["raw_sha256"], shard["sha256"], dropped, True
                )
    for path in sorted(folder.glob("shard-*.json")):
        number = path.stem.removeprefix("shard-")
        record = ShardRecord.read(folder, int(number)) if number.isdecimal() else None
        if record is not None and record.documents and record.name not in found:
            found[record.name] = Made(
                record.raw, record.raw_sha256, record.sha256, bool(record.drops), False
            )
    return list(found.values())


def raw_hashes(shards: Sequence[Path]) -> dict[Path, str]:
    """SHA-256 of each raw shard."""
    with ThreadPoolExecutor() as threads:
        return dict(zip(shards, threads.map(sha256_file, shards), strict=True))


def check_replaced(
    spec: PrepareSpec, source: Source, made: Sequence[Made], hashes: Mapping[Path, str]
) -> None:
    """``ValueError`` if ``source`` is there, made of raw shards that are not among those asked for.

    More shards may join it. Of an unfinished source, a shard with bad samples may be mended.
    """
    asked = set(hashes.values())
    lost = [
        shard
        for shard in made
        if shard.raw_sha256 not in asked and (shard.finished or not shard.dropped)
    ]
    if not lost or spec.replace:
        return
    folder = spec.out / source.split / source.name
    raise ValueError(
        f"source {source.label} is in {spec.out} already, made of {len(made)} raw shards, of which "
        f"{len(lost)} ({printable(lost[0].raw)}{', …' if len(lost) > 1 else ''}) are not among the "
        f"{len(hashes)} asked for ({printable(str(source.shards[0]))}"
        f"{', …' if len(hashes) > 1 else ''}): it would be lost. Give another source name or "
        f"another --out, or remove {folder}, or pass --replace"
    )


class SplitGuard:
    """Raises ``ValueError`` for validation on a copy of what training sees, under any name.

    ``others``: shards by label (``train/text``) of sources in the folder that are not made now. Two
    shards are copies if their files are, or all their tokens (one packed otherwise).
    """

    def __init__(self, others: Mapping[str, Iterable[Made]]) -> None:
        self._seen: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
        for label, shards in others.items():
            for shard in shards:
                self._note(label, shard.raw, shard.raw_sha256, shard.sha256)

    def check_raw(self, source: Source, hashes: Mapping[Path, str]) -> None:
        """The raw shards of ``source``, before any is tokenised; ``hashes``: SHA-256 of each."""
        for raw, shard in zip(source.raw_names, source.shards, strict=True):
            self._refuse(source, raw, hashes[shard], "bytes")

    def check(self, source: Source, raw: str, raw_sha256: str, sha256: str) -> None:
        """A tokenised shard of ``source``; one of no documents need not be shown."""
        self._refuse(source, raw, raw_sha256, "bytes")
        self._refuse(source, raw, sha256, "documents")
        self._note(source.label, raw, raw_sha256, sha256)

    def _refuse(self, source: Source, raw: str, sha: str, what: str) -> None:
        (other,) = (split for split in SPLITS if split != source.split)
        if sha in self._seen[other]:
            raise ValueError(
                f"shard {printable(raw)} of {source.label} has the {what} of "
                f"{'training' if other == 'train' else 'validation'} shard "
                f"{self._seen[other][sha]}; validate on data that training does not see"
            )

    def _note(self, label: str, raw: str, raw_sha256: str, sha256: str) -> None:
        where = f"{printable(raw)} of {label}"
        self._seen[label.partition("/")[0]] |= {raw_sha256: where, sha256: where}
