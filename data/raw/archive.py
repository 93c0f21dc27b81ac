"""Samples of a WebDataset tar: members grouped by key, and only groups known to be complete.

``webdataset`` hands on a last sample that lacks members when its shard was cut. Here a sample is
handed on only when the header of another sample, or the block of zeros that ends an archive, has
been read after it; whatever ends otherwise ends with one ``LostSamples``.

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

# bytes of a sample that are held in memory; an hour of CD audio or a scanned book stay below it
MOST_SAMPLE_BYTES = 1 << 30
_MEMBER_COST = 512  # of a member that holds nothing


@dataclass
class Sample:
    """Members with one key: ``members`` maps what follows a file name's first dot to the bytes.

    ``problem`` is set when the sample must not be used, whatever its layout; its members are not
    held then. ``bytes``: what all its members need.
    """

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    problem: BadSample | None = None
    bytes: int = 0


def read_samples(shard: Path) -> Iterator[Sample | BadSample]:
    """Samples in file order, and one ``LostSamples`` at the end for what lies behind a break.

    Causes of the break: ``truncated`` (the file ends before the archive does) and ``corrupt-tar``;
    of a gzip file either takes the whole shard. A sample that cannot be used while the shard goes
    on carries its ``problem`` instead: ``unsafe-member``, ``duplicate-key``, ``too-large``,
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
        yield _whole_loss(shard, cause, message)
    else:
        yield LostSamples(cause, message, size, 0, 0)


def _whole_loss(shard: Path, cause: str, message: str) -> LostSamples:
    """A gzip file that nothing is taken from, and how much it would have been."""
    count = good_bytes = 0
    with open_unverified(shard) as stream:
        try:
            for _ in _samples(stream, shard):
                count, good_bytes = count + 1, stream.offset
        except BrokenArchive:
            pass
        size = stream.offset / max(stream.share_read, 1e-9)
    return LostSamples(cause, message, size, 0, good_bytes / count if count else 0)


def _samples(stream: ArchiveStream, shard: Path) -> Iterator[Sample | BadSample]:
    """Complete samples in order. Raises ``BrokenArchive`` in place of the one that is not."""
    finished: set[str] = set()
    sample: Sample | None = None
    nameless: BadSample | None = None  # a member that no sample has answered for yet
    for member in read_members(stream):
        if member is not None and member.name is None:
            # it may belong to the sample before it or to the one behind it
            nameless = _at(shard, member)
            if sample is not None:
                _spoil(sample, nameless)
            continue
        key, name = _split_name(member.name) if member and member.name else (None, "")
        if sample is not None and (member is None or key not in (None, sample.key)):
            yield sample
            finished.add(sample.key)
            if member is None and sample.problem is nameless:
                nameless = None
            sample = None
        if member is None and nameless is not None:
            yield nameless
            nameless = None
        if member is None or key is None:
            continue
        if sample is None:
            sample = Sample(key)
            if key in finished:
                _spoil(sample, _duplicate(shard, f"key {key!r} occurs again"))
        if nameless is not None:
            _spoil(sample, nameless)
            nameless = None
        _add(sample, name, member, stream, shard)


def _add(sample: Sample, name: str, member: Member, stream: ArchiveStream, shard: Path) -> None:
    where = f"{shard}: member {member.name!r}"
    sample.bytes += member.size + _MEMBER_COST
    if member.problem is not None:
        _spoil(sample, _at(shard, member))
    elif not name:
        what = f"{where} has no extension, so it belongs to no sample"
        _spoil(sample, BadSample("foreign-layout", what))
    elif name in sample.members:
        _spoil(sample, _duplicate(shard, f"member {member.name!r} occurs twice"))
    elif sample.bytes > MOST_SAMPLE_BYTES:
        what = f"{where} has {member.size:,} bytes; a sample may have {MOST_SAMPLE_BYTES:,} in all"
        _spoil(sample, BadSample("too-large", what))
    elif sample.problem is None:
        data = stream.read(member.size)
        sample.members[name] = data
        if problem := member_problem(name, data):
            cause, reason = problem
            _spoil(sample, BadSample(cause, f"{where} {reason}; remove it from the shard"))


def _spoil(sample: Sample, problem: BadSample) -> None:
    """Mark ``sample`` as unusable, for the first problem that it has, and let go of its bytes."""
    sample.problem = sample.problem or problem
    sample.members.clear()


def _at(shard: Path, member: Member) -> BadSample:
    problem = member.problem
    assert problem is not None, "a member without a name has a problem"
    return BadSample(problem.cause, f"{shard}: {problem.message}")


def _duplicate(shard: Path, what: str) -> BadSample:
    return BadSample(
        "duplicate-key",
        f"{shard}: {what}; members of one sample must follow one another, and samples must not be "
        "mixed: sort the tar by name, or rename one of them",
    )


def _split_name(path: str) -> tuple[str | None, str]:
    """Key and member name, cut at the file's first dot; no key for hidden or ``__meta__`` files.

    Names of members are in lower case, as webdataset reads them: ``JPG`` is ``jpg``.
    """
    folder, slash, file = path.rpartition("/")
    stem, _, name = file.partition(".")
    if not stem or (stem.startswith("__") and stem.endswith("__")):
        return None, name
    return folder + slash + stem, name.lower()
