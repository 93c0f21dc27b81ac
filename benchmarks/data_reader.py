"""Reading tokenised documents: tokens per CPU-second of the project's reader and of its rivals.

    python benchmarks/data_reader.py

Real text (the source files of Python's standard library and of torch) is tokenised once, as long
documents (whole files, 16 MB of tokens) and as short ones (their top-level functions and classes).
Every rival reads the same documents from its natural layout: webdataset and tarfile from a tar with
one ``.npy`` a document, ours from a prepared shard, memmap from one flat file with offsets, raw
read from our shard without locating documents. All copy what they read to one buffer and open their
files in every pass, except in "open before", the cost of a run from its second epoch on; ours and
memmap read in shuffled order. "packed" is the whole stream: order, rows, labels, positions,
modality, spans. Readers are checked token by token before timing. A last table is the time to the
first batch when a run resumes in the middle of an epoch.

Files are in the page cache: this measures the software, not the disk.
"""

import io
import re
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset

from earlyfuse.data.shards.manifest import write_manifest
from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.shards.writer import ShardRecord, shard_name, write_shard
from earlyfuse.data.stream.batches import LaneStream
from earlyfuse.data.stream.mixture import Mixture, Shuffle
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.models.vocabulary import Vocabulary
from harness import Report, Rival, Timing, at_least, compare

LONG_TOKENS = 8 << 20  # 16 MB of uint16
SHORT_DOCUMENTS = 8000
ROWS, SEQ_LEN = 8, 512
OURS, OURS_OPEN = "ours, shuffled", "ours, shuffled, shard open before"
PACKED = f"ours, packed rows of {SEQ_LEN}"
GOALS = {"webdataset decode": 10.0, "raw sequential read": 0.5}


@dataclass
class Layouts:
    """Documents in every rival's layout, the shared buffer, and the expected content."""

    documents: list[np.ndarray]
    folder: Path

    def __post_init__(self) -> None:
        self.tokens = sum(map(len, self.documents))
        self.buffer = np.empty(self.tokens, np.uint16)
        self.rival_tar, self.flat = self.folder / "rival.tar", self.folder / "flat.bin"
        self.expected = np.concatenate(self.documents)
        self.offsets = np.cumsum([0, *map(len, self.documents)])
        self.expected.tofile(self.flat)
        with tarfile.open(self.rival_tar, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, tokens in enumerate(self.documents):
                content = io.BytesIO()
                np.save(content, tokens)
                member = tarfile.TarInfo(f"{number:08d}.npy")
                member.size = content.tell()
                content.seek(0)
                tar.addfile(member, content)

    def fill(self, documents: Iterator[np.ndarray]) -> None:
        """Copies documents end to end to the buffer."""
        at = 0
        for tokens in documents:
            self.buffer[at : at + len(tokens)] = tokens
            at += len(tokens)
        if at != self.tokens:
            raise ValueError(f"read {at} tokens of {self.tokens}")

    def check(self, name: str, read: Callable[[], Iterator[np.ndarray]], order: np.ndarray) -> None:
        """Raises ``ValueError`` unless ``read`` yields the documents in ``order``."""
        for number, (tokens, place) in enumerate(zip(read(), order.tolist(), strict=True)):
            if not np.array_equal(tokens, self.documents[place]):
                raise ValueError(f"{name}: document {number} of its order is not document {place}")


def texts() -> Iterator[str]:
    """Source files of the standard library, then of torch, sorted by path."""
    library = Path(sysconfig.get_paths()["stdlib"])
    own = (path for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts)
    for path in (*own, *sorted(Path(torch.__file__).parent.rglob("*.py"))):
        text = path.read_text("utf-8", errors="ignore")
        if len(text) > 200:
            yield text


def tokenise(
    tokenizer: TextTokenizer, parts: Iterator[str], enough: Callable[[int, int], bool]
) -> list[np.ndarray]:
    """Documents (uint16 ids with bos and eos) until ``enough(documents, tokens)``."""
    documents, total = [], 0
    for text in parts:
        ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
        documents.append(np.array(ids, np.uint16))
        total += len(ids)
        if enough(len(documents), total):
            break
    return documents


def functions() -> Iterator[str]:
    """Top-level functions and classes, one document each."""
    for text in texts():
        for part in re.split(r"\n(?=def |class |async def |@)", text):
            if len(part) > 60:
                yield part


def prepare(folder: Path, documents: list[np.ndarray], vocabulary: Vocabulary) -> TokenSource:
    """The documents as a prepared source of one shard."""
    folder.mkdir()
    record = ShardRecord(f"{shard_name(0)}.tar", "", "python sources", 0, "")
    write_shard(folder, record, ((tokens, [len(tokens)]) for tokens in documents), vocabulary)
    write_manifest(folder, vocabulary, {"text": "benchmark"}, [record])
    return TokenSource(folder)


def webdataset_samples(layouts: Layouts) -> webdataset.WebDataset:
    return webdataset.WebDataset(str(layouts.rival_tar), shardshuffle=False)


def readers(layouts: Layouts, source: TokenSource) -> dict[str, tuple[Callable, np.ndarray]]:
    """Name → (documents of one pass, the order they come in)."""
    stored = np.arange(len(layouts.documents))
    order = Shuffle(len(stored), 0, source.name)(stored)
    header = 128  # of a .npy file of one dimension

    def ours(opened: TokenSource | None = None) -> Iterator[np.ndarray]:
        opened = opened or TokenSource(source.folder)
        numbers = Shuffle(len(opened), 0, opened.name)(np.arange(len(opened)))
        return (opened.document(number)[0] for number in numbers.tolist())

    def decode() -> Iterator[np.ndarray]:
        return (sample["npy"] for sample in webdataset_samples(layouts).decode())

    def own_decode() -> Iterator[np.ndarray]:
        samples = webdataset_samples(layouts)
        return (np.frombuffer(sample["npy"], np.uint16, offset=header) for sample in samples)

    def stdlib() -> Iterator[np.ndarray]:
        with tarfile.open(layouts.rival_tar, "r:") as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None, "the tar holds files only"
                yield np.frombuffer(file.read(), np.uint16, offset=header)

    def memmap() -> Iterator[np.ndarray]:
        flat, offsets = np.memmap(layouts.flat, np.uint16, "r"), layouts.offsets.tolist()
        return (flat[offsets[number] : offsets[number + 1]] for number in order.tolist())

    return {
        OURS: (ours, order),
        OURS_OPEN: (lambda: ours(source), order),
        "webdataset decode": (decode, stored),
        "webdataset, own npy decode": (own_decode, stored),
        "stdlib tarfile": (stdlib, stored),
        "memmap, shuffled": (memmap, order),
    }


def stream(source: TokenSource, state: np.ndarray | None = None) -> LaneStream:
    mixture = Mixture((source,), (1.0,))
    zeros = np.zeros((ROWS, mixture.state_size()), np.int64)
    return LaneStream(
        mixture, 0, range(ROWS), ROWS, SEQ_LEN, ROWS, zeros if state is None else state
    )


def reading(layouts: Layouts, source: TokenSource, rounds: int) -> list[Timing]:
    """Timings of one pass over all documents by every rival, verified first."""
    shard = source.folder / f"{shard_name(0)}.tar"
    raw = bytearray(shard.stat().st_size)

    def read_raw() -> list[torch.Tensor]:
        with open(shard, "rb", buffering=0) as file:
            assert file.readinto(raw) == len(raw), "short read"
        return []

    batches = -(-layouts.tokens // (ROWS * SEQ_LEN))
    running = stream(source)

    def packed() -> list[torch.Tensor]:
        for _ in range(batches):
            next(running)
        return []

    def one_pass(read: Callable[[], Iterator[np.ndarray]]) -> list[torch.Tensor]:
        layouts.fill(read())
        return []

    rivals: list[Rival] = []
    for name, (read, order) in readers(layouts, source).items():
        layouts.check(name, read, order)
        rivals.append(Rival(name, partial(one_pass, read)))
    rivals.insert(2, Rival(PACKED, packed))
    rivals.append(Rival("raw sequential read", read_raw))
    return compare(rivals, rounds=rounds)


def resuming(layouts: Layouts, source: TokenSource, rounds: int) -> list[Timing]:
    """Timings from start to the first batch in mid-epoch; webdataset reads up to it."""
    half = len(layouts.documents) // 2
    mixture = Mixture((source,), (1.0,))
    state = np.zeros((ROWS, mixture.state_size()), np.int64)
    state[:, 0] = half // ROWS

    def ours() -> list[torch.Tensor]:
        next(stream(TokenSource(source.folder), state))
        return []

    def skip() -> list[torch.Tensor]:
        next(islice(iter(webdataset_samples(layouts)), half, None))
        return []

    return compare(
        [Rival("ours, from the state", ours), Rival("webdataset, skipping", skip)], rounds=rounds
    )


def rates(tokens: int, timings: list[Timing]) -> str:
    """Markdown: million tokens per CPU-second, and speed of our shuffled reader over each."""
    lines = ["| reader | Mtok per CPU-s | ours is |", "|---|---:|---:|"]
    for timing in timings:
        times = "too noisy" if timing.cpu_ratio is None else f"{timing.cpu_ratio:.2f}x"
        lines.append(f"| {timing.name} | {tokens / timing.cpu / 1e6:.1f} | {times} |")
    goals = [
        at_least(f"ours / {timing.name}", timing.cpu_ratio, GOALS[timing.name])
        for timing in timings
        if timing.name in GOALS
    ]
    return "\n".join([*lines, "", *goals, ""])


def main(rounds: int = 15) -> None:
    """Runs all settings and writes ``results/data_reader.{jsonl,md}``."""
    tokenizer = TextTokenizer.train(islice(texts(), 150), 4096)
    vocabulary = Vocabulary(tokenizer.size, tokenizer.bos, tokenizer.eos, tokenizer.pad)
    title = "Reading tokenised documents (row 10)"
    report = Report("data_reader", title, ["numpy", "webdataset"])
    sets = {
        "long": tokenise(tokenizer, texts(), lambda _, tokens: tokens >= LONG_TOKENS),
        "short": tokenise(tokenizer, functions(), lambda count, _: count >= SHORT_DOCUMENTS),
    }
    extra = []
    for name, documents in sets.items():
        with tempfile.TemporaryDirectory() as place:
            source = prepare(Path(place) / "prepared", documents, vocabulary)
            layouts = Layouts(documents, Path(place))
            lengths = np.quantile([len(tokens) for tokens in documents], (0.25, 0.5, 0.75))
            setting = {
                "documents": f"{len(documents)} {name}",
                "tokens": layouts.tokens,
                "length quartiles": "/".join(str(int(length)) for length in lengths),
                "dtype": "uint16",
                "rounds": rounds,
            }
            timings = reading(layouts, source, rounds)
            report.add({"case": "one pass", **setting}, timings)
            extra.append(f"## {name.capitalize()} documents\n\n{rates(layouts.tokens, timings)}")
            print(extra[-1])
            report.add({"case": "resume", **setting}, resuming(layouts, source, rounds))
    report.write("\n".join(extra))


if __name__ == "__main__":
    main()
