"""Raw shards → a prepared folder: tokenizers once, then one tokenised shard for each raw shard.

::

    <out>/tokenizers/        text.model or text.json, image.safetensors, speech.safetensors,
                             vocabulary.json
    <out>/<split>/<source>/  manifest.json and shards (data/shards/writer.py);
                             split: train, validation

Every file is written atomically and records what it was made from; so the process may be killed at
any moment, and repeating the call resumes and ends with the same bytes as without the interruption.
Tokenizers are trained on training data only and never retrained: more sources can be added to a
folder later, and more shards to a source. Existing data are replaced only on request.

The parts: ``spec`` (specification and its refusals), ``existing_shards`` (protects earlier data),
``tokenizers`` and ``train_tokenizers``, ``tokenise`` (work on one shard), ``worker_pool``,
``report`` (description of a prepared folder).
"""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from earlyfuse.data.atomic import TEMPORARY_SUFFIX, remove_temporaries
from earlyfuse.data.console import printable
from earlyfuse.data.documents import Tally
from earlyfuse.data.folder_lock import FolderLock
from earlyfuse.data.media import MEDIA
from earlyfuse.data.prepare.bad_samples import lost, skipped
from earlyfuse.data.prepare.existing_shards import (
    SplitGuard,
    check_replaced,
    existing_shards,
    raw_hashes,
)
from earlyfuse.data.prepare.frames import FrameRule
from earlyfuse.data.prepare.progress import Progress
from earlyfuse.data.prepare.spec import SPLITS, PrepareSpec, Source
from earlyfuse.data.prepare.tokenise import ShardJob, recipe_of, tokenise_shard
from earlyfuse.data.prepare.tokenizers import check_existing, make_tokenizers
from earlyfuse.data.prepare.worker_pool import ProcessPool
from earlyfuse.data.raw.shard import RawShard
from earlyfuse.data.shards.manifest import MANIFEST, write_manifest
from earlyfuse.data.shards.writer import ShardRecord, shard_name
from earlyfuse.data.tokenizers import Tokenizers

__all__ = ["PrepareSpec", "prepare"]

# samples from which on a rate of bad samples is judged before the end of a source
_SAMPLES_TO_JUDGE = 1000
_NAMED_SHARDS = 5


def prepare(
    spec: PrepareSpec, progress: Progress | None = None, *, wait: bool = False
) -> dict[str, dict[str, Any]]:
    """Prepare ``spec.out`` as ``spec`` says. Returns ``{"train/text": manifest, …}``.

    ``wait``: wait for another prepare that is writing there, instead of refusing.

    Raises before anything is written: ``FileNotFoundError`` for missing shards, ``ValueError`` for
    a folder prepared with other tokenizers or a source made from other raw shards,
    ``PermissionError`` or another ``OSError`` for an unwritable folder, ``RuntimeError`` for one
    that another prepare is writing. Raises later: ``ValueError`` on too many bad samples, too
    little data for a tokenizer, or a validation shard that is a copy of a training shard of this
    call or an earlier one.
    """
    progress = progress or Progress()
    sources = spec.sources()
    check_existing(spec)
    _check_writable(spec.out)
    with _only_one(spec.out, progress, wait), ProcessPool(spec.workers) as pool:
        hashes, guard = _check_sources(spec, sources)
        remove_temporaries(spec.out)
        for source in sources:
            for line in source.unused:
                progress.tell(f"{source.label}: not read, in {line}")
        tokenizers = make_tokenizers(spec, sources, pool, progress)
        jobs = {source.label: _jobs(spec, source, tokenizers) for source in sources}
        done = {
            label: _complete_shards(jobs[label], hashes[label], spec.max_bad_rate) for label in jobs
        }
        missing = [job for label in jobs for job in jobs[label] if job.number not in done[label]]
        new_records = pool.map(tokenise_shard, missing)
        shards = sum(map(len, jobs.values()))
        if len(missing) < shards:
            progress.tell(f"{shards - len(missing)} of {shards} shards are complete already")
        manifests = {}
        documents = 0
        with progress.bar("tokenising", max(1, len(missing)), "shard") as advance:
            for source in sources:
                records = []
                bad_rate = _BadRate(spec, source)
                for job in jobs[source.label]:
                    record = done[source.label].get(job.number)
                    if record is None:
                        record = next(new_records)
                        documents += record.documents
                        advance(1, f"{documents} documents")
                    records.append(record)
                    bad_rate.check(record)
                    if record.documents:
                        _check_split(guard, source, record, job.folder)
                _tell_lost(source, records, progress)
                manifests[source.label] = write_manifest(
                    spec.out / source.split / source.name,
                    tokenizers.vocabulary,
                    tokenizers.hashes,
                    records,
                    tokenizers.vectors,
                )
    return manifests


def _check_sources(
    spec: PrepareSpec, sources: list[Source]
) -> tuple[dict[str, dict[RawShard, str]], SplitGuard]:
    """Raise ``ValueError`` for what would replace or repeat data of ``spec.out``.

    Returns the SHA-256 of the raw shards of sources that exist already, and the guard of the
    splits for new shards.
    """
    asked = {source.label: source for source in sources}
    hashes: dict[str, dict[RawShard, str]] = {label: {} for label in asked}
    others = {}
    for split in SPLITS:
        for folder in sorted((spec.out / split).glob("*/")):
            label, existing = f"{split}/{folder.name}", existing_shards(folder)
            source = asked.get(label)
            if source is None:
                others[label] = [shard for shard in existing if shard.finished]
            elif existing:
                hashes[label] = raw_hashes(source.shards)
                check_replaced(spec, source, existing, hashes[label])
    guard = SplitGuard(others)
    for source in sources if others else ():
        hashes[source.label] = hashes[source.label] or raw_hashes(source.shards)
        guard.check_raw(source, hashes[source.label])
    return hashes, guard


def _jobs(spec: PrepareSpec, source: Source, tokenizers: Tokenizers) -> list[ShardJob]:
    limits = {label: MEDIA[label].module().limits(spec) for label in tokenizers.media}
    frames = FrameRule(spec.video_frames, spec.frame_stride, spec.long_video)
    recipe = recipe_of(tokenizers, spec.reading_of(source.name), limits, frames)
    return [
        ShardJob(
            raw=raw,
            raw_name=name,
            number=number,
            folder=spec.out / source.split / source.name,
            tokenizers=spec.out / "tokenizers",
            recipe=recipe,
            reading=spec.reading,
            limits=limits,
            frames=frames,
            on_bad=spec.on_bad,
            expected_size=expected,
        )
        for number, (raw, name, expected) in enumerate(
            zip(source.shards, source.raw_names, source.expected_sizes(), strict=True)
        )
    ]


def _complete_shards(
    jobs: list[ShardJob], hashes: dict[RawShard, str], max_bad_rate: float
) -> dict[int, ShardRecord]:
    """Records of shards that an earlier call made from the same bytes in the same way, by number.

    ``hashes``: SHA-256 of the raw shards, where they are known. All other files of an earlier call
    are deleted, the manifest first: until the new one is written the folder is not a data set.
    """
    folder = jobs[0].folder
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as threads:
        records = list(
            threads.map(lambda job: _usable_record(job, hashes.get(job.raw), max_bad_rate), jobs)
        )
    complete = {job.number: record for job, record in zip(jobs, records, strict=True) if record}
    wanted = {
        f"{shard_name(number)}{suffix}"
        for number, record in complete.items()
        for suffix in record.suffixes
    }
    found = {path.name for path in folder.glob("shard-*")}
    if len(complete) < len(jobs) or found != wanted:
        (folder / MANIFEST).unlink(missing_ok=True)
    remove_temporaries(folder)
    for name in sorted(found - wanted):
        (folder / name).unlink(missing_ok=True)
    return complete


def _usable_record(
    job: ShardJob, raw_sha256: str | None, max_bad_rate: float
) -> ShardRecord | None:
    record = ShardRecord.load(job.folder, job.number)
    if record is None or record.recipe != job.recipe or record.raw != job.raw_name:
        return None
    stops = {"stop": bool(record.drops), "skip": lost(record.drops) > 0}
    if stops.get(job.on_bad, False):
        return None  # dropped under another policy; this one is to stop at it
    absent = record.drops.get("missing-file", 0)
    if absent > max_bad_rate * (record.documents + skipped(record.drops)):
        return None  # files that rows name: they are no part of the shard, and may be there now
    return record if record.raw_sha256 == (raw_sha256 or job.raw.sha256()) else None


def _check_split(guard: SplitGuard, source: Source, record: ShardRecord, folder: Path) -> None:
    try:
        guard.check(source, record.raw, record.raw_sha256, record.sha256)
    except ValueError as error:
        (folder / record.name).with_suffix(".json").unlink()  # another shard may replace it
        raise ValueError(
            f"{error}. The source is unfinished, and runs refuse its folder: repeat the command "
            f"with other shards, or remove {printable(str(folder))}"
        ) from error


class _BadRate:
    """Raises ``ValueError`` naming the worst shard when too many samples of a source are bad."""

    def __init__(self, spec: PrepareSpec, source: Source) -> None:
        self.spec, self.source = spec, source
        self.bad = self.seen = self.shards = 0
        self.worst = ShardRecord("", "", "", 0, "")

    def check(self, record: ShardRecord) -> None:
        """Judge the next shard together with those before it."""
        own = skipped(record.drops)
        if own > skipped(self.worst.drops):
            self.worst = record
        self.bad += own
        self.seen += own + record.documents
        self.shards += 1
        last = self.shards == len(self.source.shards)
        most, bad, seen, worst = self.spec.max_bad_rate, self.bad, self.seen, self.worst
        if bad > most * seen and (last or seen >= _SAMPLES_TO_JUDGE):
            causes = printable(str(Tally(worst.drops, worst.examples)))
            raise ValueError(
                f"{self.source.label}: {bad} of {seen} samples are bad, a rate of "
                f"{bad / seen:.3f}, above max_bad_rate ({most}); most are in shard "
                f"{printable(worst.raw)}: {causes}. Mend it, or raise max_bad_rate"
            )


def _tell_lost(source: Source, records: list[ShardRecord], progress: Progress) -> None:
    broken = [record for record in records if lost(record.drops)]
    if broken:
        names = ", ".join(record.raw for record in broken[:_NAMED_SHARDS])
        samples = sum(lost(record.drops) for record in broken)
        progress.tell(
            f"{source.label}: {len(broken)} of {len(records)} shards end early, about {samples:,} "
            f"samples are lost: {names}{', …' if len(broken) > _NAMED_SHARDS else ''}"
        )


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f"writable.{os.getpid()}{TEMPORARY_SUFFIX}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        what = f"out ({out}) cannot be written ({error.strerror}); choose another folder"
        raise type(error)(what) from error


@contextmanager
def _only_one(out: Path, progress: Progress, wait: bool) -> Iterator[None]:
    """Lock the folder. ``RuntimeError`` if another prepare holds the lock, unless ``wait``."""
    lock = FolderLock(out, progress.tell)
    if not lock.acquire(math.inf if wait else 0.0):
        raise RuntimeError(f"out ({out}) is being written by another prepare; wait for it to end")
    try:
        yield
    finally:
        lock.release()
