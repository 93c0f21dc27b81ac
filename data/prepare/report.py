"""Describes a prepared folder as a page of text."""

from pathlib import Path
from typing import Any

import numpy as np

from earlyfuse.data.console import printable
from earlyfuse.data.documents import LOST_CAUSES, Tally
from earlyfuse.data.media import MEDIA
from earlyfuse.data.prepare.bad_samples import lost
from earlyfuse.data.prepare.spec import SPLITS
from earlyfuse.data.shards.manifest import MANIFEST, read_manifest, vectors_of
from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.tokenizers import VOCABULARY_FILE, Tokenizers
from earlyfuse.data.tokenizers.tokenizer_file import code_usage
from earlyfuse.data.vocabulary import check_same
from earlyfuse.models.vocabulary import Modality, Vocabulary

_WORST_SHARDS = 10


def describe(out: Path) -> str:
    """Documents, tokens per modality, drops by cause and shard, tokenizers and their quality.

    Raises ``FileNotFoundError`` if ``out`` was not prepared, ``ValueError`` for a damaged file.
    """
    folders = [folder for split in SPLITS for folder in sorted((out / split).glob("*/"))]
    if not (out / "tokenizers").is_dir() or not folders:
        raise FileNotFoundError(
            f"{out} holds no prepared data; name the folder given to build as --out"
        )
    tokenizers = Tokenizers.load(out / "tokenizers")
    done = [(folder, read_manifest(folder)) for folder in folders if (folder / MANIFEST).exists()]
    for folder, manifest in done:
        data = Vocabulary.from_dict(manifest["vocabulary"])
        path = out / "tokenizers" / VOCABULARY_FILE
        check_same(path, tokenizers.vocabulary, data, folder / MANIFEST)
    lines = [*_tokenizer_lines(tokenizers), "", *_id_lines(tokenizers.vocabulary, done), ""]
    rows = [_row(folder, manifest, tokenizers) for folder, manifest in done]
    lines += _table([_heading(tokenizers), *rows])
    lines += _vector_lines(done)
    lines += [
        f"{f.parent.name}/{f.name}: unfinished" for f in folders if not (f / MANIFEST).exists()
    ]
    for folder, manifest in done:
        lines += _drop_lines(f"{folder.parent.name}/{folder.name}", manifest)
    return "\n".join(map(printable, lines))


def _tokenizer_lines(tokenizers: Tokenizers) -> list[str]:
    text = tokenizers.text
    lines = [f"text   {text.kind}, {text.size} pieces, sha256 {text.sha256}"]
    for label, tokenizer in tokenizers.media.items():
        plain = {k: v for k, v in tokenizer.settings.items() if not isinstance(v, dict)}
        about = [tokenizer.kind, *(f"{key} {value}" for key, value in plain.items())]
        about += [f"block {tokenizer.block}"] if tokenizer.block else []
        if vectors := tokenizer.vectors:
            about.append(f"vectors of {vectors.width} {vectors.dtype}")
        separator = tokenizers.vocabulary.medium(Modality[label]).separator
        about += [] if separator is None else [f"frame separator {separator}"]
        lines.append(f"{label:6} {', '.join(about)}, sha256 {tokenizer.sha256}")
    return lines


def _id_lines(vocabulary: Vocabulary, done: list[tuple[Path, dict[str, Any]]]) -> list[str]:
    """The data as models see them: ids, sentinels, blocks, and the rows that hold these. Runs take
    all of it from here, whatever their config says.
    """
    sentinels = f"begin {vocabulary.bos}, end {vocabulary.eos}, padding {vocabulary.pad}"
    lines, rows = [f"ids    {vocabulary.size:,}; documents: {sentinels}"], 2
    for medium in vocabulary.media:
        label = medium.modality.label
        longest = max((m.get("longest", {}).get(label, 0) for _, m in done), default=0)
        block = medium.block or longest
        rows = max(rows, block + 2)
        last = medium.start + medium.count - 1
        codes = f"placeholder {last}" if medium.continuous else f"codes {medium.start}-{last}"
        kind = "blocks" if medium.block else "blocks of up to"
        separator = "" if medium.separator is None else f", frame separator {medium.separator}"
        lines.append(
            f"{label:6} {codes}, begin {medium.begin}, end {medium.end}{separator}; {kind} {block} "
            f"tokens, {block + 2} with begin and end"
        )
    return [*lines, f"rows   training.seq_len must be at least {rows}, to hold the longest block"]


def _heading(tokenizers: Tokenizers) -> list[str]:
    labels = [modality.label for modality in tokenizers.vocabulary.modalities]
    heading = ["source", "shards", "documents", *(f"{label} tokens" for label in labels), "dropped"]
    for label, tokenizer in tokenizers.media.items():
        heading.append(MEDIA[label].module().QUALITY)
        heading += [] if tokenizer.vectors else [f"{label} codes", "perplexity"]
        heading += [] if tokenizer.block else ["longest"]
    return heading


def _row(folder: Path, manifest: dict[str, Any], tokenizers: Tokenizers) -> list[str]:
    labels = [modality.label for modality in tokenizers.vocabulary.modalities]
    row = [
        f"{folder.parent.name}/{folder.name}",
        str(len(manifest["shards"])),
        f"{manifest['documents']:,}",
        *(f"{manifest['tokens'][label]:,}" for label in labels),
        f"{sum(manifest['drops'].values()):,}",
    ]
    for label, tokenizer in tokenizers.media.items():
        error = manifest.get(f"{label}_squared_error")  # absent without a decoder
        row.append("-" if error is None else f"{MEDIA[label].module().quality(error):.1f}")
        if tokenizer.vectors is None:
            used = manifest["tokens"][label] > 0
            row += _usage(folder, manifest, label) if used else ("-", "-")
        if not tokenizer.block:
            row.append(str(manifest.get("longest", {}).get(label, "-")))
    return row


def _vector_lines(done: list[tuple[Path, dict[str, Any]]]) -> list[str]:
    """Mean and standard deviation of each channel of the vectors, for each source with some."""
    lines = []
    for folder, manifest in done:
        vectors = vectors_of(manifest)
        if vectors is not None and any(manifest["tokens"][label] for label in vectors.media):
            mean, std = (" ".join(f"{v:.2f}" for v in x) for x in (vectors.mean, vectors.std))
            lines.append(f"{folder.parent.name}/{folder.name} vectors: mean {mean}, std {std}")
    return ["", *lines] if lines else []


def _usage(folder: Path, manifest: dict[str, Any], label: str) -> tuple[str, str]:
    """Number of codes of a medium that occur in the source, and their perplexity."""
    codes = Vocabulary.from_dict(manifest["vocabulary"]).medium(Modality[label])
    counts = np.zeros(codes.count, dtype=np.int64)
    for tokens in TokenSource(folder).runs():
        own = tokens[(tokens >= codes.start) & (tokens < codes.start + codes.count)]
        counts += np.bincount(own.astype(np.int64) - codes.start, minlength=codes.count)
    used, perplexity = code_usage(counts)
    return f"{used} / {codes.count}", f"{perplexity:.0f}"


def _drop_lines(label: str, manifest: dict[str, Any]) -> list[str]:
    drops, examples = manifest["drops"], manifest.get("examples", {})
    lines = []
    if drops:
        lines += ["", f"{label} dropped: {_causes(drops)}"]
        lines += [
            f"  first {cause}: {examples[cause]}" for cause in sorted(drops.keys() & examples)
        ]
        by_shard = sorted(manifest["drops_by_shard"].items(), key=lambda item: -_total(item[1]))
        lines += [f"  {shard}: {_causes(own)}" for shard, own in by_shard[:_WORST_SHARDS]]
        hidden = len(by_shard) - _WORST_SHARDS
        lines += [f"  and {hidden} shards more"] if hidden > 0 else []
        if samples := lost(drops):
            broken = sum(lost(own) > 0 for _, own in by_shard)
            lines.append(
                f"  {broken} of {len(manifest['shards'])} shards end early: about {samples:,} "
                f"samples are lost, counted as {' or '.join(LOST_CAUSES)}"
            )
    if unused := manifest.get("unused"):
        lines += ["", f"{label} unused: {Tally(unused, examples)}"]
    return lines


def _causes(drops: dict[str, int]) -> str:
    return ", ".join(f"{cause} {count}" for cause, count in sorted(drops.items()))


def _total(drops: dict[str, int]) -> int:
    return sum(drops.values())


def _table(rows: list[list[str]]) -> list[str]:
    """Aligned columns: the first flush left, numbers flush right."""
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["  ".join([name.ljust(first), *map(str.rjust, cells, widths)]) for name, *cells in rows]
