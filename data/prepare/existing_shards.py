"""Protects the data in a prepared folder, before anything in it is written.

A source is identified by the SHA-256 of the raw shards that its manifest and records name. A source
made from other raw shards is replaced only on request, and no shard is in both training and
validation, whichever command put it there.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from earlyfuse.data.console import printable
from earlyfuse.data.prepare.spec import SPLITS, PrepareSpec, Source
from earlyfuse.data.raw.shard import RawShard
from earlyfuse.data.shards.manifest import MANIFEST, read_manifest
from earlyfuse.data.shards.writer import ShardRecord


@dataclass(frozen=True)
class ExistingShard:
    """A tokenised shard: name and SHA-256 of its raw shard, SHA-256 of its tokens, whether it has
    bad samples, and whether a manifest names it.
    """

    raw: str
    raw_sha256: str
    sha256: str
    dropped: bool
    finished: bool


def existing_shards(folder: Path) -> list[ExistingShard]:
    """Shards with documents in the folder of a source, from its manifest and records.

    Raises ``ValueError`` naming a damaged manifest.
    """
    found: dict[str, ExistingShard] = {}
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        for shard in manifest["shards"]:
            if shard["documents"]:
                dropped = shard["raw"] in manifest["drops_by_shard"]
                hashes = shard["raw_sha256"], shard["sha256"]
                found[shard["name"]] = ExistingShard(shard["raw"], *hashes, dropped, finished=True)
    for path in sorted(folder.glob("shard-*.json")):
        number = path.stem.removeprefix("shard-")
        record = ShardRecord.read(folder, int(number)) if number.isdecimal() else None
        if record is not None and record.documents and record.name not in found:
            hashes, dropped = (record.raw_sha256, record.sha256), bool(record.drops)
            found[record.name] = ExistingShard(record.raw, *hashes, dropped, finished=False)
    return list(found.values())


def raw_hashes(shards: Sequence[RawShard]) -> dict[RawShard, str]:
    """SHA-256 of each raw shard."""
    with ThreadPoolExecutor() as threads:
        return dict(zip(shards, threads.map(lambda s: s.sha256(), shards), strict=True))


def check_replaced(
    spec: PrepareSpec,
    source: Source,
    existing: Sequence[ExistingShard],
    hashes: Mapping[RawShard, str],
) -> None:
    """Raise ``ValueError`` if ``source`` exists, made from raw shards not among ``hashes``.

    More shards may be added. Of an unfinished source, a shard with bad samples may be mended.
    """
    asked = set(hashes.values())
    lost = [
        shard
        for shard in existing
        if shard.raw_sha256 not in asked and (shard.finished or not shard.dropped)
    ]
    if not lost or spec.replace:
        return
    raise ValueError(
        f"source {source.label} is in {spec.out} already, made of {len(existing)} raw shards, of "
        f"which {len(lost)} ({printable(lost[0].raw)}{', …' if len(lost) > 1 else ''}) are not "
        f"among the {len(hashes)} asked for ({printable(str(source.shards[0]))}"
        f"{', …' if len(hashes) > 1 else ''}): it would be lost. Give another source name or "
        f"--out, or remove {spec.out / source.split / source.name}, or pass --replace"
    )


class SplitGuard:
    """Raises ``ValueError`` for validation on a copy of a training shard, or the reverse.

    ``others``: shards by label (``train/text``) of sources in the folder that are not built now.
    Two shards are copies if their files are equal, or all their tokens (compressed differently).
    """

    def __init__(self, others: Mapping[str, Iterable[ExistingShard]]) -> None:
        self._seen: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
        for label, shards in others.items():
            for shard in shards:
                self._note(label, shard.raw, shard.raw_sha256, shard.sha256)

    def check_raw(self, source: Source, hashes: Mapping[RawShard, str]) -> None:
        """Check the raw shards of ``source`` before tokenising; ``hashes``: SHA-256 of each."""
        for raw, shard in zip(source.raw_names, source.shards, strict=True):
            self._refuse(source, raw, hashes[shard], "bytes")

    def check(self, source: Source, raw: str, raw_sha256: str, sha256: str) -> None:
        """Check a tokenised shard of ``source`` that has documents."""
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
