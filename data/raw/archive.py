"""Samples of a WebDataset tar: members grouped by key, and only groups known to be complete.

``webdataset`` also returns the last sample of a truncated shard, without some of its members. Here
a sample is returned only once the header of another sample, or the zero block that ends an archive,
has been read after it; an archive that ends in any other way yields one ``LostSamples`` at the end.

Left out: random access, sparse members, compression other than gzip, and unpacking to disk.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from earlyfuse.data.documents import BadSample, LostSamples
from earlyfuse.data.raw.archive_stream import (
    ArchiveStream,
    BrokenArchive,
    open_archive,
    open_unverified,
)
from earlyfuse.data.raw.file_kinds import is_gzip, other_kind
from earlyfuse.data.raw.safety import member_problem
from earlyfuse.data.raw.tar_members import Member, read_members

# bytes of a sample in memory; an hour of CD audio or a scanned book stay below it
MOST_SAMPLE_BYTES = 1 << 30
_MEMBER_COST = 512  # counted for each member beside its bytes


@dataclass
class Sample:
    """Members with one key: ``members`` maps what follows a file name's first dot to the bytes.

    ``problem``: why the sample must not be used, whatever its layout; it has no members then.
    ``bytes``: size of all its members. ``root``: folder of the files that a row of JSON lines or of
    a table names; none for samples of a tar, which name their members.
    ``absent``: (cause, message) of listed media that were not found, where the rest of the sample
    is used.
    """

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    problem: BadSample | None = None
    bytes: int = 0
    root: Path | None = None
    absent: list[tuple[str, str]] = field(default_factory=list)

    def spoil(self, problem: BadSample) -> None:
        """Mark the sample as unusable, for the first problem that it has, and free its bytes."""
        self.problem = self.problem or problem
        self.members.clear()


def read_samples(shard: Path) -> Iterator[Sample | BadSample]:
    """Samples in file order, and one ``LostSamples`` at the end if the shard is broken.

    Causes of the break: ``truncated`` (the file ends before the archive does) and ``corrupt-tar``;
    of a gzip file either loses the whole shard. A sample that cannot be used while the rest of the
    shard can has a ``problem`` instead: ``unsafe-member``, ``duplicate-key``, ``too-large``,
    ``unsupported-member``, ``corrupt-header``, ``corrupt-array``.
    """
    count = good_bytes = size = 0
    try:
        with open_archive(shard) as stream:
            size = stream.size or 0
            for sample in _samples(stream, shard):
                count, good_bytes = count + 1, stream.offset
                yield sample
            return
    except BrokenArchive as broken:
        cause, message = broken.cause, f"{shard}: {broken}"
    if count:
        yield LostSamples(cause, message, size, good_bytes, good_bytes / count)
    elif what := other_kind(shard):
        yield LostSamples(cause, f"{shard} is {what.text}", size, 0, 0)
    elif is_gzip(shard):
        yield LostSamples(cause, message, *_gzip_loss(shard))
    else:
        yield LostSamples(cause, message, size, 0, 0)


def _gzip_loss(shard: Path) -> tuple[float, int, float]:
    """Estimated size, good bytes and bytes of a sample of a gzip file that is lost as a whole."""
    count = good_bytes = 0
    with open_unverified(shard) as stream:
        try:
            for _ in _samples(stream, shard):
                count, good_bytes = count + 1, stream.offset
        except BrokenArchive:
            pass
        size = stream.offset * shard.stat().st_size / max(1, stream.file.tell())
    return size, 0, good_bytes / count if count else 0


def _samples(stream: ArchiveStream, shard: Path) -> Iterator[Sample | BadSample]:
    """Complete samples in order. Raises ``BrokenArchive`` in place of the first incomplete one."""
    finished: set[str] = set()
    sample: Sample | None = None
    nameless: BadSample | None = None  # a member without a name, of the sample before or after it
    for member in read_members(stream):
        if member is None:  # the end of an archive
            if sample is not None:
                yield sample
                finished.add(sample.key)
            if nameless is not None and (sample is None or sample.problem is not nameless):
                yield nameless
            sample = nameless = None
            continue
        if member.name is None:
            nameless = _at(shard, member)
            if sample is not None:
                sample.spoil(nameless)
            continue
        key, name = _split_name(member.name)
        if key is None:
            continue
        if sample is not None and key != sample.key:
            yield sample
            finished.add(sample.key)
            sample = None
        if sample is None:
            sample = Sample(key)
            if key in finished:
                sample.spoil(_duplicate(shard, f"key {key!r} occurs again"))
        if nameless is not None:
            sample.spoil(nameless)
            nameless = None
        _add(sample, name, member, stream, shard)


def _add(sample: Sample, name: str, member: Member, stream: ArchiveStream, shard: Path) -> None:
    where = f"{shard}: member {member.name!r}"
    sample.bytes += member.size + _MEMBER_COST
    if member.problem is not None:
        sample.spoil(_at(shard, member))
    elif not name:
        what = f"{where} has no extension, so it belongs to no sample"
        sample.spoil(BadSample("foreign-layout", what))
    elif name in sample.members:
        sample.spoil(_duplicate(shard, f"member {member.name!r} occurs twice"))
    elif sample.bytes > MOST_SAMPLE_BYTES:
        what = f"{where} has {member.size:,} bytes; a sample may have {MOST_SAMPLE_BYTES:,} in all"
        sample.spoil(BadSample("too-large", what))
    elif sample.problem is None:
        data = stream.read(member.size)
        sample.members[name] = data
        if problem := member_problem(name, data):
            cause, reason = problem
            sample.spoil(BadSample(cause, f"{where} {reason}; remove it from the shard"))


def _at(shard: Path, member: Member) -> BadSample:
    problem = member.problem
    assert problem is not None, "a member without a name has a problem"
    return BadSample(problem.cause, f"{shard}: {problem.message}")


def _duplicate(shard: Path, what: str) -> BadSample:
    remedy = "members of one sample must be adjacent: sort the tar by name, or rename one of them"
    return BadSample("duplicate-key", f"{shard}: {what}; {remedy}")


def _split_name(path: str) -> tuple[str | None, str]:
    """Key and member name, split at the file's first dot; no key for hidden or ``__meta__`` files.

    Member names are in lower case, as webdataset reads them: ``JPG`` is ``jpg``.
    """
    folder, slash, file = path.rpartition("/")
    stem, _, name = file.partition(".")
    if not stem or (stem.startswith("__") and stem.endswith("__")):
        return None, name
    return folder + slash + stem, name.lower()
