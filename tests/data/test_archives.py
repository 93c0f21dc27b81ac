"""Shards as archives: whatever is damaged, foreign or too large costs what it must, by name."""

import gzip
import io
import os
import pickle
import shutil
import subprocess
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from raw_shards import write_tar

from earlyfuse.data.documents import BadSample, LostSamples
from earlyfuse.data.raw import archive
from earlyfuse.data.raw.archive import Sample, read_samples
from earlyfuse.data.raw.safety import member_problem


def texts(count, begin=0, words=40):
    """Samples of one text each, all different."""
    return [
        (f"{n:04d}.txt", (f"text {n} " + f"{n * 7919 % 1000} " * words).encode())
        for n in range(begin, begin + count)
    ]


def read(shard):
    """Members of good samples by key, then the bad ones."""
    found = list(read_samples(shard))
    good = {s.key: s.members for s in found if isinstance(s, Sample) and s.problem is None}
    bad = [s if isinstance(s, BadSample) else s.problem for s in found]
    return good, [problem for problem in bad if problem is not None]


def read_bytes(tmp_path, *parts):
    """Keys of good samples, and causes of bad ones, of a shard with these bytes."""
    (tmp_path / "bytes.tar").write_bytes(b"".join(parts))
    good, bad = read(tmp_path / "bytes.tar")
    return list(good), [problem.cause for problem in bad]


def flips(content, places):
    """``content`` with each bit of ``places`` flipped in turn."""
    for place in places:
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            yield bytes(damaged)


def raw_member(name, data, kind=b"0", size=None, **fields):
    """Header and padded data of one member, also of a type or size that nothing writes."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data) if size is None else size, kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def pax(**records):
    """A pax header block with ``records`` as they are given."""
    content = b""
    for key, value in records.items():
        body = b" " + key.replace("__", ".").encode() + b"=" + value + b"\n"
        length = len(body) + len(str(len(body)))
        length = len(body) + len(str(length))
        content += str(length).encode() + body
    return raw_member("pax", content, b"x")


END = bytes(1024)


# ---------------------------------------------------------------- gzip


def test_no_flipped_bit_of_a_gzip_reaches_a_document(tmp_path):
    """Headers, data, checksums of two members: what is read is right, or nothing is."""
    plain = write_tar(tmp_path / "a.tar", texts(4, words=3)).read_bytes().rstrip(b"\0") + bytes(
        1500
    )
    half = len(plain) // 2
    content = gzip.compress(plain[:half], mtime=0)
    half_length = len(content)
    content += gzip.compress(plain[half:], mtime=0)
    shard = tmp_path / "a.tar.gz"
    shard.write_bytes(content)
    whole, bad = read(shard)
    assert len(whole) == 4 and not bad
    refused = 0
    inside = range(10, len(content) - 8, 4)
    places = [*range(2, 10), *inside, *range(half_length - 8, half_length + 10)]
    for damaged in flips(content, [*places, *range(len(content) - 8, len(content))]):
        shard.write_bytes(damaged)
        good, bad = read(shard)
        assert good == (whole if not bad else {})
        refused += bool(bad)
    assert refused > 6 * len(places)


def test_a_cut_gzip_gives_nothing_and_knows_how_much_it_held(tmp_path):
    content = gzip.compress(write_tar(tmp_path / "a.tar", texts(600)).read_bytes(), 1)
    shard = tmp_path / "a.tar.gz"
    for share in (0.25, 0.5, 0.99):
        shard.write_bytes(content[: int(share * len(content))])
        (lost,) = read_samples(shard)
        assert lost.cause == "truncated" and "gzip" in lost.message
        assert lost.samples() == pytest.approx(600 * share, rel=0.15)
        assert lost.samples(1 / share) == pytest.approx(600, rel=0.15)
    damaged = bytearray(content)
    damaged[-5] ^= 1  # of the checksum
    shard.write_bytes(damaged)
    (lost,) = read_samples(shard)
    assert lost.cause == "corrupt-tar" and lost.samples() == pytest.approx(600, rel=0.02)


def test_gzip_members_end_to_end_are_read_and_garbage_behind_them_is_not(tmp_path):
    parts = [write_tar(tmp_path / "p.tar", texts(3, n * 3)).read_bytes() for n in range(3)]
    shard = tmp_path / "a.tar.gz"
    content = b"".join(map(gzip.compress, parts))
    for padding in (b"", bytes(7000)):
        shard.write_bytes(content + padding)
        good, bad = read(shard)
        assert len(good) == 9 and not bad
    assert read_bytes(tmp_path, content, b"garbage") == ([], ["corrupt-tar"])
    # a stream that is whole around an archive that is not keeps the samples before the break
    shard.write_bytes(gzip.compress(parts[0][:1600]))
    good, (lost,) = read(shard)
    assert list(good) == ["0000"] and lost.cause == "truncated"


# ---------------------------------------------------------------- members


def test_a_member_beyond_the_bound_costs_its_sample_and_no_memory(tmp_path, monkeypatch):
    """By its stated size, before a byte is read: in a file with a hole and in a small gzip."""
    asked = []
    reading = archive.ArchiveStream.read
    monkeypatch.setattr(
        archive.ArchiveStream, "read", lambda self, n: asked.append(n) or reading(self, n)
    )
    shard = tmp_path / "a.tar"
    with open(shard, "wb") as file:
        file.write(raw_member("0.txt", b"small") + raw_member("1.jpg", b"", size=3 << 30))
        file.seek(3 << 30, os.SEEK_CUR)
        file.write(raw_member("1.txt", b"its text") + raw_member("2.txt", b"behind it") + END)
    good, (bad,) = read(shard)
    assert list(good) == ["0", "2"] and bad.cause == "too-large"
    assert "'1.jpg'" in bad.message and "3,221,225,472" in bad.message
    assert max(asked) < 1 << 10, "nothing of the large member was read"
    monkeypatch.setattr(archive, "MOST_SAMPLE_BYTES", 1 << 20)
    packed = tmp_path / "a.tar.gz"
    large = raw_member("1.jpg", bytes(5 << 20)) + raw_member("1.txt", b"its text")
    packed.write_bytes(
        gzip.compress(raw_member("0.txt", b"small") + large + raw_member("2.txt", b"x") + END)
    )
    asked.clear()
    good, (bad,) = read(packed)
    assert list(good) == ["0", "2"] and bad.cause == "too-large"
    assert max(asked) <= 1 << 20, "in chunks"
    assert packed.stat().st_size < 1 << 14


def test_many_members_of_one_sample_are_bounded_together(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MOST_SAMPLE_BYTES", 10_000)
    shard = write_tar(
        tmp_path / "a.tar",
        [(f"0.{n}.txt", b"x" * 600) for n in range(20)] + [(f"1.{n}", b"") for n in range(20)]
        + [("2.txt", b"fine")],
    )  # fmt: skip
    assert read_bytes(tmp_path, shard.read_bytes()) == (["2"], ["too-large"] * 2)


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_damage_in_arrays_is_their_samples_fault(kind):
    """Every bit of small files: a problem with its cause, or none, and never another error."""
    file = io.BytesIO()
    if kind == "npy":
        np.save(file, np.arange(3))
    else:
        np.savez_compressed(file, a=np.arange(3), b=np.zeros((2, 2)))
    content = file.getvalue()
    assert member_problem(kind, content) is None
    found = {member_problem(kind, damaged) for damaged in flips(content, range(len(content)))}
    found |= {member_problem(kind, content[:cut]) for cut in range(len(content))}
    causes = {problem[0] for problem in found - {None}}
    assert {"corrupt-array"} <= causes <= {"corrupt-array", "unsafe-member"}


def zipped(names_and_data, method=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as entries:
        for name, data in names_and_data:
            entries.writestr(name, data)
    return file.getvalue()


def test_archives_of_arrays_that_swell_are_read_by_their_headers_only():
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 25,)}
    )
    bomb = zipped([("a.npy", header.getvalue() + bytes(1 << 25))])
    assert len(bomb) < 1 << 16 and member_problem("x.npz", bomb) is None
    swollen = b"\x93NUMPY\x02\0" + (1 << 25).to_bytes(4, "little") + b" " * (1 << 25)
    bombs = [zipped([("a.npy", swollen)]), bomb]
    tracemalloc.start()
    found = [member_problem("npz", content) for content in bombs]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[0][0] == "corrupt-array" and found[1] is None and peak < 1 << 22
    many = zipped([(f"{n}.npy", b"") for n in range(10_001)])
    assert "10000 arrays" in member_problem("npz", many)[1]
    other = zipped([("a.npy", b"x")], zipfile.ZIP_LZMA)
    assert member_problem("npz", other)[0] == "corrupt-array"
    array = io.BytesIO()
    np.save(array, np.arange(9))
    assert member_problem("x.npy.gz", gzip.compress(array.getvalue())) is None
    assert member_problem("x.npy.gz", zlib.compress(array.getvalue()))[0] == "corrupt-array"


# ---------------------------------------------------------------- headers


def test_pax_records_name_and_size_their_members(tmp_path):
    """``path`` and ``size`` hold, empty ones do not, and large ones of others are passed over."""
    shard = tmp_path / "a.tar"
    shard.write_bytes(
        pax(path="ä/0.txt".encode()) + raw_member("cut", b"zero")
        + pax(size=b"1500") + raw_member("1.txt", b"y" * 1500, size=0)
        + pax(SCHILY__xattr__user=bytes(range(256)) * 12_000) + raw_member("2.txt", b"two")
        + pax(path=b"", size=b"") + raw_member("3.txt", b"three")
        + raw_member("g", b"18 path=all/4.txt\n", b"g") + raw_member("x", b"four")
        + END
    )  # fmt: skip
    good, bad = read(shard)
    assert good == {
        "ä/0": {"txt": b"zero"}, "1": {"txt": b"y" * 1500}, "2": {"txt": b"two"},
        "3": {"txt": b"three"}, "all/4": {"txt": b"four"},
    }  # fmt: skip
    assert not bad


@pytest.mark.parametrize(
    "headers",
    [
        pax(path=b"long/1.txt").replace(b"19 path", b"18 path"),
        pax(size=b"12x"),
        raw_member("pax", b"no records", b"x"),
        raw_member("pax", bytes(17 << 20), b"x"),
        raw_member("name", b"n" * (17 << 20), b"L"),
    ],
    ids=["length", "size", "no records", "large pax", "large name"],
)
def test_a_member_without_a_readable_name_costs_its_neighbours_and_not_the_shard(tmp_path, headers):
    """It may have belonged to the sample before it or to the one behind it."""
    members = [raw_member(f"{n}.{kind}", b"x") for n in range(4) for kind in ("jpg", "txt")]
    good, bad = read_bytes(tmp_path, *members[:4], headers, *members[4:], END)
    assert good == ["0", "3"] and set(bad) == {"corrupt-header"}
    assert read_bytes(tmp_path, headers, members[0], END) == ([], ["corrupt-header"])


@pytest.mark.parametrize(
    ("member", "cause"),
    [
        (pax(GNU__sparse__major=b"1", GNU__sparse__name=b"1.txt")
         + raw_member("GNUSparseFile.7/1.txt", b"y" * 900), "unsupported-member"),
        (raw_member("1.txt", b"y" * 900, b"S"), "unsupported-member"),
        (raw_member("1.txt", b"y" * 900, b"M"), "unsupported-member"),
        (raw_member("1.txt", b"y" * 900, b"Q"), "unsupported-member"),
        (raw_member("1.txt", b"", b"2", linkname="0.txt"), "unsafe-member"),
        (raw_member("label", b"", b"V"), None),
        (raw_member("folder/", b"y" * 900, b"D"), None),
        (raw_member("folder/", b"", b"5"), None),
    ],
    ids=["pax sparse", "sparse", "volume", "unknown", "link", "label", "dumpdir", "folder"],
)  # fmt: skip
def test_members_that_are_no_files_leave_the_rest_of_the_shard(tmp_path, member, cause):
    around = raw_member("0.txt", b"x"), member, raw_member("2.txt", b"z"), END
    assert read_bytes(tmp_path, *around) == (["0", "2"], [cause] if cause else [])


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar command")
@pytest.mark.parametrize("form", ["v7", "ustar", "oldgnu", "gnu", "pax"])
def test_archives_of_gnu_tar_are_read_as_tarfile_reads_them(tmp_path, form):
    folder = tmp_path / "files"
    long = "d" * 90 if form in ("v7", "ustar") else "d" * 120 + "/" + "é" * 90
    for name, content in texts(5):
        path = folder / ("x" if form == "v7" else long) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    sparse = form in ("oldgnu", "gnu", "pax")
    if sparse:  # more holes than a header has room for
        with open(folder / "hole.txt", "wb") as file:
            for _ in range(30):
                file.seek(1 << 16, os.SEEK_CUR)
                file.write(b"x" * 4096)
    shard = tmp_path / "a.tar"
    options = ["--sparse"] if sparse else []
    command = ["tar", f"--format={form}", *options, "--sort=name", "-cf", shard, "-C", folder, "."]
    subprocess.run(command, check=True)
    good, bad = read(shard)
    with tarfile.open(shard) as tar:
        wanted = {
            m.name.removesuffix(".txt"): {"txt": tar.extractfile(m).read()}
            for m in tar
            if m.isfile() and not m.issparse()
        }
    assert good == wanted and len(good) == 5
    assert [b.cause for b in bad] == ["unsupported-member"] * sparse
    for option in ("--label=shard", "--null") if form == "gnu" else ():
        subprocess.run([*command[:-3], option, "-C", folder, long], check=True)
        good, bad = read(shard)
        assert len(good) == 5 and not bad


@pytest.mark.skipif(shutil.which("git") is None, reason="no git command")
def test_archives_of_git_are_read(tmp_path):
    for name, content in texts(3):
        (tmp_path / name).write_bytes(content)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    subprocess.run(
        [*git, "archive", "--prefix=p/", "-o", "a.tar", "HEAD"], cwd=tmp_path, check=True
    )
    good, bad = read(tmp_path / "a.tar")
    assert good == {f"p/{name[:4]}": {"txt": content} for name, content in texts(3)} and not bad


# ---------------------------------------------------------------- breaks


def test_no_flipped_bit_of_a_header_gives_another_document(tmp_path):
    content = write_tar(tmp_path / "a.tar", texts(3, words=3)).read_bytes()
    shard = tmp_path / "b.tar"
    shard.write_bytes(content)
    whole, _ = read(shard)
    for header in range(0, 3072, 1024):
        for damaged in flips(content, range(header, header + 512, 7)):
            shard.write_bytes(damaged)
            good, bad = read(shard)
            assert good.items() <= whole.items()
            if good != whole:  # a bit of the checksum's padding says nothing
                assert len(good) == max(0, header // 1024 - 1)
                assert isinstance(bad[-1], LostSamples)


def test_what_lies_behind_a_break_is_estimated_by_its_bytes(tmp_path):
    content = write_tar(tmp_path / "a.tar", texts(600)).read_bytes()
    shard = tmp_path / "b.tar"
    damaged = bytearray(content)
    damaged[300 * 1024 : 300 * 1024 + 8] = b"\xff" * 8
    shard.write_bytes(damaged)
    good, (lost,) = read(shard)
    assert len(good) == 299 and lost.cause == "corrupt-tar" and "byte 307,200" in lost.message
    assert lost.samples() == pytest.approx(301, abs=12)
    shard.write_bytes(content[: 300 * 1024])
    good, (lost,) = read(shard)
    assert len(good) == 299 and lost.cause == "truncated" and "byte 307,200" in lost.message
    assert lost.samples() == 1
    assert lost.samples(len(content) / (300 * 1024)) == pytest.approx(301, abs=12)
    copy = pickle.loads(pickle.dumps(lost))  # between processes
    assert str(copy) == str(lost) and copy.samples(2.0) == lost.samples(2.0)


def test_zeros_in_place_of_data_are_no_end(tmp_path):
    """Neither a sector lost in the middle nor a download for which room was made beforehand."""
    content = write_tar(tmp_path / "a.tar", texts(40)).read_bytes()
    shard = tmp_path / "b.tar"
    shard.write_bytes(content[:10_240] + bytes(1536) + content[11_776:])
    good, bad = read(shard)
    assert len(good) == 10 and isinstance(bad[-1], LostSamples)
    with open(shard, "wb") as file:
        file.write(content[:10_240])
        file.truncate(64 << 20)
    good, bad = read(shard)
    assert len(good) == 10 and [b.cause for b in bad] == ["truncated"]
