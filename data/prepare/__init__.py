"""Raw shards → a prepared folder: tokenizers once, then one tokenised shard for each raw shard.

::

    <out>/tokenizers/        text.model or text.json, image.safetensors, speech.safetensors,
                             vocabulary.json
    <out>/<split>/<source>/  manifest.json and shards (data/shards/writer.py);
                             split: train, validation

Every file appears whole or not at all, and says what it was made from; so the process may be killed
at any moment, and the same call goes on where it ended, with the same bytes as without the
interruption. Tokenizers learn from training data only, and stay once made: more sources can join a
folder later, and more shards a source. Nothing that is there is replaced unasked.

The parts: ``spec`` (what to prepare, and what is refused), ``present`` (what is there already),
``tokenizers`` (which there are to be), ``learn`` (making them), ``tokenise`` (the work on one
shard), ``pool`` (processes), ``report`` (what is in a prepared folder).
"""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from earlyfuse.data.atomic import TEMPORARY_SUFFIX, remove_temporaries, sha256_file
from earlyfuse.data.console import printable
from earlyfuse.data.documents import Tally
from earlyfuse.data.folder_lock import FolderLock
from earlyfuse.data.media import MEDIA
from earlyfuse.data.prepare.bad_samples import lost, skipped
from earlyfuse.data.prepare.existing_shards import (
    SplitGuard,
    check_replaced,
    made_shards,
    raw_hashes,
)
from earlyfuse.data.prepare.progress import Progress
from earlyfuse.data.prepare.spec import SPLITS, PrepareSpec, Source
from earlyfuse.data.prepare.tokenise import ShardJob, recipe_of, tokenise_shard
from earlyfuse.data.prepare.tokenizers import check_existing, make_tokenizers
from earlyfuse.data.prepare.worker_pool import ProcessPool
from earlyfuse.data.shards.manifest import MANIFEST, write_manifest
from earlyfuse.data.shards.writer import ShardRecord, shard_name
from earlyfuse.data.tokenizers import Tokenizers

__all__ = ["PrepareSpec", "prepare"]

# a rate of bad samples means something from this many samples on, or at the end of a source
_SAMPLES_TO_JUDGE = 1000
_NAMED_SHARDS = 5


def prepare(
    spec: PrepareSpec, progress: Progress | None = None, *, wait: bool = False
) -> dict[str, dict[str, Any]]:
    """Make ``spec.out`` what ``spec`` says. Returns ``{"train/text": manifest, …}``.

    ``wait``: for another prepare that is writing there to end, in place of refusing.

    Raises before anything is written: ``FileNotFoundError`` for shards that are not there,
    ``ValueError`` for a folder prepared with other tokenizers, ``PermissionError`` or another
    ``OSError`` for one that cannot be written, ``RuntimeError`` for one that another prepare is
    writing, or that has a source of the same name from other raw shards. Raises later:
    ``ValueError`` on too many bad samples, too little data for a tokenizer, or a validation shard
    that is a copy of a training shard of this call or an earlier one.
    """
    progress = progress or Progress()
    sources = spec.sources()
    check_existing(spec)
    _check_writable(spec.out)
    with _only_one(spec.out, progress, wait), ProcessPool(spec.workers) as pool:
        hashes, guard = _check_present(spec, sources)
        remove_temporaries(spec.out)
        for source in sources:
            for line in source.unused:
                progress.tell(f"{source.label}: not read, in {line}")
        tokenizers = make_tokenizers(spec, sources, pool, progress)
        jobs = {source.label: _jobs(spec, source, tokenizers) for source in sources}
        done = {
            source.label: _complete_shards(jobs[source.label], hashes[source.label])
            for source in sources
        }
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
            for source in sources:
                records = []
                bad_rate = _BadRate(spec, source)
                for job in jobs[source.label]:
                    record = done[source.label].get(job.number)
                    if record is None:
                        record = next(fresh)
                        documents += record.documents
                        advance(1, f"{documents} documents")
                    records.append(record)
                    bad_rate.check(record)
                    if record.documents:
                        _keep_apart(guard, source, record, job.folder)
                _tell_lost(source, records, progress)
                folder = spec.out / source.split / source.name
                manifests[source.label] = write_manifest(
                    folder,
                    tokenizers.vocabulary,
                    tokenizers.hashes,
                    records,
                    tokenizers.vectors,
                )
    return manifests


def _check_present(
    spec: PrepareSpec, sources: list[Source]
) -> tuple[dict[str, dict[Path, str]], SplitGuard]:
    """Refuse what would replace or repeat data of ``spec.out``.

    Returns SHA-256 of the raw shards of sources that are there already, and what watches over the
    splits from here on.
    """
    asked = {source.label: source for source in sources}
    hashes: dict[str, dict[Path, str]] = {label: {} for label in asked}
    others = {}
    for split in SPLITS:
        for folder in sorted((spec.out / split).glob("*/")):
            label, made = f"{split}/{folder.name}", made_shards(folder)
            source = asked.get(label)
            if source is None:
                others[label] = [shard for shard in made if shard.finished]
            elif made:
                hashes[label] = raw_hashes(source.shards)
                check_replaced(spec, source, made, hashes[label])
    guard = SplitGuard(others)
    for source in sources if others else ():
        hashes[source.label] = hashes[source.label] or raw_hashes(source.shards)
        guard.check_raw(source, hashes[source.label])
    return hashes, guard


def _jobs(spec: PrepareSpec, source: Source, tokenizers: Tokenizers) -> list[ShardJob]:
    limits = {label: MEDIA[label].module().limits(spec) for label in tokenizers.media}
    recipe = recipe_of(tokenizers, spec.layout, spec.image_first, limits)
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
            limits=limits,
            on_bad=spec.on_bad,
            expected_size=expected,
        )
        for number, (raw, name, expected) in enumerate(
            zip(source.shards, source.raw_names, source.expected_sizes(), strict=True)
        )
    ]


def _complete_shards(jobs: list[ShardJob], hashes: dict[Path, str]) -> dict[int, ShardRecord]:
    """Shards of an earlier call that were made from the same bytes in the same way, by number.
    ``hashes``: SHA-256 of the raw shards, if there are any of an earlier call.

    Everything else that an earlier call left in the folder goes, the manifest first: from here
    until the new one is written the folder is not a data set.
    """
    folder = jobs[0].folder
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as threads:
        records = list(threads.map(lambda job: _usable_record(job, hashes.get(job.raw)), jobs))
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


def _usable_record(job: ShardJob, raw_sha256: str | None) -> ShardRecord | None:
    record = ShardRecord.load(job.folder, job.number)
    if record is None or record.recipe != job.recipe or record.raw != job.raw_name:
        return None
    ends_it = {"stop": bool(record.drops), "skip": lost(record.drops) > 0}
    if ends_it.get(job.on_bad, False):
        return None  # skipped then, to be met now
    return record if record.raw_sha256 == (raw_sha256 or sha256_file(job.raw)) else None


def _keep_apart(guard: SplitGuard, source: Source, record: ShardRecord, folder: Path) -> None:
    try:
        guard.check(source, record.raw, record.raw_sha256, record.sha256)
    except ValueError as error:
        (folder / record.name).with_suffix(".json").unlink()  # another may take its place
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
        """The next shard: judged together with those before it."""
        own = skipped(record.drops)
        if own > skipped(self.worst.drops):
            self.worst = record
        self.bad += own
        self.seen += own + record.documents
        self.shards += 1
        last = self.shards == len(self.source.shards)
        spec, bad, seen, worst = self.spec, self.bad, self.seen, self.worst
        if bad <= spec.max_bad_rate * seen or not (last or seen >= _SAMPLES_TO_JUDGE):
            return
        causes = Tally(worst.drops, worst.examples)
        raise ValueError(
            f"{self.source.label}: {bad} of {seen} samples are bad, a rate of {bad / seen:.3f}, "
            f"above max_bad_rate ({spec.max_bad_rate}); most are in shard "
            f"{printable(worst.raw)}: {printable(str(causes))}. Mend it, or raise max_bad_rate"
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
        raise type(error)(
            f"out ({out}) cannot be written ({error.strerror}); choose another folder"
        ) from error


@contextmanager
def _only_one(out: Path, progress: Progress, wait: bool) -> Iterator[None]:
    """Refuse a second prepare on the folder, or let it ``wait``."""
    lock = FolderLock(out, progress.tell)
    if not lock.acquire(math.inf if wait else 0.0):
        raise RuntimeError(f"out ({out}) is being written by another prepare; wait for it to end")
    try:
        yield
    finally:
        lock.release()
