"""Raw shards → a prepared folder: tokenizers once, then one tokenised shard for each raw shard.

::

    <out>/tokenizers/        text.model or text.json, image.safetensors, speech.safetensors,
                             vocabulary.json
    <out>/<split>/<source>/  manifest.json and shards (data/tokenised.py); split: train, validation

Every file appears whole or not at all, and says what it was made from; so the process may be killed
at any moment, and the same call goes on where it ended, with the same bytes as without the
interruption. Tokenizers learn from training data only, and stay once made: more shards can join a
folder later.

The parts: ``spec`` (what to prepare, and what is refused), ``tokenizers`` (which there are to be),
``learn`` (making them), ``tokenise`` (the work on one shard), ``pool`` (processes), ``report``
(what is in a prepared folder).
"""

import fcntl
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from earlyfuse.data.atomic import TEMPORARY_SUFFIX, remove_temporaries, sha256_file
from earlyfuse.data.documents import Tally
from earlyfuse.data.prepare.pool import ProcessPool
from earlyfuse.data.prepare.progress import Progress
from earlyfuse.data.prepare.spec import PrepareSpec, Source
from earlyfuse.data.prepare.tokenise import ShardJob, recipe_of, tokenise_shard
from earlyfuse.data.prepare.tokenizers import check_existing, make_tokenizers
from earlyfuse.data.tokenised import (
    MANIFEST,
    SHARD_SUFFIXES,
    ShardRecord,
    shard_name,
    write_manifest,
)
from earlyfuse.data.tokenizers import Tokenizers

__all__ = ["PrepareSpec", "prepare"]

# a rate of bad samples means something from this many samples on, or at the end of a source
_SAMPLES_TO_JUDGE = 1000


def prepare(
    spec: PrepareSpec, progress: Progress | None = None, *, wait: bool = False
) -> dict[str, dict[str, Any]]:
    """Make ``spec.out`` what ``spec`` says. Returns ``{"train/text": manifest, …}``.

    ``wait``: for another prepare that is writing there to end, in place of refusing.

    Raises before anything is written: ``FileNotFoundError`` for shards that are not there,
    ``ValueError`` for a folder prepared with other tokenizers, ``PermissionError`` or another
    ``OSError`` for one that cannot be written, ``RuntimeError`` for one that another prepare is
    writing. Raises later: ``ValueError`` on too many bad samples, too little data for a tokenizer,
    or a validation shard that is a copy of a training shard.
    """
    progress = progress or Progress()
    sources = spec.sources()
    check_existing(spec)
    _check_writable(spec.out)
    with _only_one(spec.out, progress, wait), ProcessPool(spec.workers) as pool:
        remove_temporaries(spec.out)
        train = [shard for source in sources if source.split == "train" for shard in source.shards]
        tokenizers = make_tokenizers(spec, train, pool, progress)
        jobs = {source.label: _jobs(spec, source, tokenizers) for source in sources}
        done = {source.label: _complete_shards(source, jobs[source.label]) for source in sources}
        waiting = [
            job
            for source in sources
            for job in jobs[source.label]
            if job.number not in done[source.label]
        ]
        fresh = pool.map(tokenise_shard, waiting)
        manifests = {}
        shards = sum(len(source.shards) for source in sources)
        if len(waiting) < shards:
            progress.tell(f"{shards - len(waiting)} of {shards} shards are complete already")
        with progress.bar("tokenising", max(1, len(waiting)), "shard") as advance:
            documents = 0
            trained: dict[str, str] = {}  # SHA-256 of raw shards → where training has them
            for source in sources:
                records = []
                for job in jobs[source.label]:
                    record = done[source.label].get(job.number)
                    if record is None:
                        record = next(fresh)
                        documents += record.documents
                        advance(1, f"{documents} documents")
                    records.append(record)
                    _check_bad_rate(spec, source, records)
                    _check_apart(source, record, trained)
                folder = spec.out / source.split / source.name
                manifests[source.label] = write_manifest(
                    folder, tokenizers.vocabulary, tokenizers.hashes, records
                )
    return manifests


def _jobs(spec: PrepareSpec, source: Source, tokenizers: Tokenizers) -> list[ShardJob]:
    recipe = recipe_of(tokenizers, spec.layout, spec.image_first, spec.speech_seconds)
    return [
        ShardJob(
            raw=raw,
            raw_name=name,
            number=number,
            folder=spec.out / source.split / source.name,
            tokenizers=spec.out / "tokenizers",
            recipe=recipe,
            layout=spec.layout,
            image_first=spec.image_first,
            speech_seconds=spec.speech_seconds,
            on_bad=spec.on_bad,
        )
        for number, (raw, name) in enumerate(zip(source.shards, source.raw_names, strict=True))
    ]


def _complete_shards(source: Source, jobs: list[ShardJob]) -> dict[int, ShardRecord]:
    """Shards of an earlier call that were made from the same bytes in the same way, by number.

    Everything else that an earlier call left in the folder goes, the manifest first: from here
    until the new one is written the folder is not a data set.
    """
    folder = jobs[0].folder
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as threads:
        records = list(threads.map(_usable_record, jobs))
    complete = {job.number: record for job, record in zip(jobs, records, strict=True) if record}
    wanted = {f"{shard_name(n)}{suffix}" for n in complete for suffix in SHARD_SUFFIXES}
    found = {path.name for path in folder.glob("shard-*")}
    if len(complete) < len(jobs) or found != wanted:
        (folder / MANIFEST).unlink(missing_ok=True)
    remove_temporaries(folder)
    for name in sorted(found - wanted):
        (folder / name).unlink(missing_ok=True)
    return complete


def _usable_record(job: ShardJob) -> ShardRecord | None:
    record = ShardRecord.load(job.folder, job.number)
    if record is None or record.recipe != job.recipe or record.raw != job.raw_name:
        return None
    if job.on_bad == "stop" and record.drops:
        return None  # skipped then, to be met now
    if record.raw_bytes != job.raw.stat().st_size or record.raw_sha256 != sha256_file(job.raw):
        return None
    return record


def _check_bad_rate(spec: PrepareSpec, source: Source, records: list[ShardRecord]) -> None:
    """Raises ``ValueError`` naming the worst shard when too many of the samples so far are bad."""
    bad = sum(sum(record.drops.values()) for record in records)
    seen = bad + sum(record.documents for record in records)
    last = len(records) == len(source.shards)
    if bad <= spec.max_bad_rate * seen or not (last or seen >= _SAMPLES_TO_JUDGE):
        return
    worst = max(records, key=lambda record: sum(record.drops.values()))
    causes = Tally(worst.drops, worst.examples)
    raise ValueError(
        f"{source.label}: {bad} of {seen} samples are bad, a rate of {bad / seen:.3f}, above "
        f"max_bad_rate ({spec.max_bad_rate}); most are in shard {worst.raw}: {causes}. "
        "Mend it, or raise max_bad_rate"
    )


def _check_apart(source: Source, record: ShardRecord, trained: dict[str, str]) -> None:
    """Raises ``ValueError`` for validation on a copy of what training sees, under any name."""
    if not record.documents:
        return
    if source.split == "train":
        trained[record.raw_sha256] = f"{record.raw} of {source.label}"
    elif record.raw_sha256 in trained:
        raise ValueError(
            f"shard {record.raw} of {source.label} has the bytes of training shard "
            f"{trained[record.raw_sha256]}; validate on data that training does not see"
        )


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f"writable.{os.getpid()}{TEMPORARY_SUFFIX}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise type(error)(
            f"out ({out}) cannot be written ({error.strerror}); choose another folder"
        ) from error


@contextmanager
def _only_one(out: Path, progress: Progress, wait: bool) -> Iterator[None]:
    """Refuse a second prepare on the folder, or let it ``wait``; the lock goes with the process,
    however it ends.
    """
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        if not wait:
            os.close(descriptor)
            raise RuntimeError(
                f"out ({out}) is being written by another prepare; wait for it to end"
            ) from error
        progress.tell(f"waiting for another process that prepares {out}")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:  # some network file systems
        progress.tell(
            f"no lock on {out} ({error.strerror}): see that no other prepare writes there"
        )
    try:
        yield
    finally:
        os.close(descriptor)
