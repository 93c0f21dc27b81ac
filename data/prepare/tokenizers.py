"""The tokenizers of a prepared folder: made once, from training data, and never replaced."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from earlyfuse.data.atomic import atomic_write_bytes, atomic_write_json, remove_temporaries
from earlyfuse.data.media import MEDIA, MediaTokenizer, Medium
from earlyfuse.data.prepare.progress import Progress
from earlyfuse.data.prepare.spec import PrepareSpec, Source
from earlyfuse.data.prepare.train_tokenizers import TrainingShards, train_medium, train_text
from earlyfuse.data.prepare.worker_pool import ProcessPool
from earlyfuse.data.shards.manifest import MANIFEST, read_manifest
from earlyfuse.data.tokenizers import (
    TEXT_FILES,
    VOCABULARY_FILE,
    Tokenizers,
    load_media,
    text_file,
    with_separator,
)
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.data.vocabulary import check_same, load_vocabulary
from earlyfuse.models.vocabulary import Vocabulary


def check_existing(spec: PrepareSpec) -> None:
    """Raise ``ValueError``, naming both, for a folder prepared with other tokenizers than ``spec``
    asks for; writes nothing.
    """
    folder = spec.out / "tokenizers"
    asked: dict[str, MediaTokenizer] = {}
    if spec.tokenizers is not None:
        ready = Tokenizers.load(spec.tokenizers)
        asked_text: TextTokenizer | None = ready.text
        asked = ready.media
        wanted = list(asked)
        stored = folder / VOCABULARY_FILE
        if stored.exists() and load_vocabulary(stored) != ready.vocabulary:
            raise ValueError(
                f"out ({spec.out}) was prepared with another vocabulary ({stored}) than that of "
                f"tokenizers ({spec.tokenizers}); ask for the same, or choose another folder"
            )
        if spec.video_frames and not _has_separator(ready.vocabulary):
            raise ValueError(
                f"video_frames ({spec.video_frames}) needs a frame separator, which the "
                f"vocabulary of tokenizers ({spec.tokenizers}) lacks; leave it out, or give "
                "tokenizers of data with videos"
            )
    else:
        wanted = [medium.label for medium in spec.media]
        given = spec.text_tokenizer
        asked_text = None if given is None else TextTokenizer.load(given, wanted)
        for medium in spec.media:
            if spec.tokenizer_of(medium) not in medium.kinds:
                path = Path(spec.tokenizer_of(medium))
                asked[medium.label] = medium.module().ready(path, spec)
    if text_file(folder).exists():
        text = TextTokenizer.load(text_file(folder), wanted)
        if asked_text is not None and asked_text.sha256 != text.sha256:
            _refuse(spec, "text", text.sha256, asked_text.sha256)
        if asked_text is None and text.size != spec.text_vocab:
            made_with = f"{text.sha256} of {text.size} pieces"
            _refuse(spec, "text", made_with, f"one of {spec.text_vocab} pieces")
    if (folder / VOCABULARY_FILE).exists():
        _check_videos(spec, load_vocabulary(folder / VOCABULARY_FILE))
    existing = load_media(folder)
    for label, tokenizer in existing.items():
        _check_medium(spec, MEDIA[label], tokenizer, asked.get(label))
    for path in sorted(spec.out.glob(f"*/*/{MANIFEST}")):
        _check_manifest(spec, path.parent, folder, existing, wanted)


def _check_medium(
    spec: PrepareSpec, medium: Medium, existing: MediaTokenizer, asked: MediaTokenizer | None
) -> None:
    """``asked``: a ready tokenizer; without one ``spec`` names a kind to train, or none."""
    kind = spec.tokenizer_of(medium)
    if asked is not None:
        same, wanted = asked.sha256 == existing.sha256, asked.sha256
    elif spec.tokenizers is not None:
        same, wanted = False, f"none ({spec.tokenizers})"
    elif kind == "none":
        same, wanted = False, kind
    else:
        settings = medium.module().settings(spec)
        same = existing.kind == kind and settings.items() <= existing.settings.items()
        wanted = f"{kind}, {settings}"
    if not same:
        made_with = f"{existing.sha256} ({existing.kind}, {existing.settings})"
        _refuse(spec, medium.label, made_with, wanted)


def make_tokenizers(
    spec: PrepareSpec, sources: Sequence[Source], pool: ProcessPool, progress: Progress
) -> Tokenizers:
    """Load ``<out>/tokenizers``; missing ones are copied there or trained on ``sources`` first."""
    folder = spec.out / "tokenizers"
    folder.mkdir(exist_ok=True)
    remove_temporaries(folder)
    if spec.tokenizers is not None:
        files = [medium.file for medium in MEDIA.values()]
        for name in (*TEXT_FILES, *files, VOCABULARY_FILE):
            if (spec.tokenizers / name).exists() and not (folder / name).exists():
                atomic_write_bytes(folder / name, (spec.tokenizers / name).read_bytes())
        return _with_vocabulary(folder)
    train = [source for source in sources if source.split == "train"]
    shards = TrainingShards(
        shards=tuple(shard for source in train for shard in source.shards),
        expected_sizes=tuple(size for source in train for size in source.expected_sizes()),
        on_bad=spec.on_bad,
        reading=spec.reading,
    )
    text_ready: Callable[[], None] | None = None
    if not text_file(folder).exists():
        if spec.text_tokenizer is not None:
            ready = TextTokenizer.load(spec.text_tokenizer)
            ready.save(folder / ready.file_name)
        else:
            progress.tell(f"text tokenizer: training {spec.text_vocab} pieces")
            labels = tuple(medium.label for medium in spec.media)
            job = (shards, spec.text_vocab, labels, text_file(folder))
            text_ready = pool.start(train_text, job)
    for medium in spec.media:
        if not (folder / medium.file).exists():
            if (kind := spec.tokenizer_of(medium)) in medium.kinds:
                tokenizer = train_medium(medium, spec, shards, progress)
            else:
                tokenizer = medium.module().ready(Path(kind), spec)
            atomic_write_bytes(folder / medium.file, tokenizer.to_bytes())
    if text_ready is not None:
        text_ready()
    return _with_vocabulary(folder, videos=spec.video_frames > 0)


def _with_vocabulary(folder: Path, videos: bool = False) -> Tokenizers:
    """Load the tokenizers of ``folder`` and store their vocabulary beside them; a new one of data
    with ``videos`` gets a frame separator.
    """
    tokenizers = Tokenizers.load(folder)
    if videos and not (folder / VOCABULARY_FILE).exists():
        tokenizers = replace(tokenizers, vocabulary=with_separator(tokenizers.vocabulary))
    atomic_write_json(folder / VOCABULARY_FILE, tokenizers.vocabulary.to_dict())
    return tokenizers


def _check_manifest(
    spec: PrepareSpec,
    folder: Path,
    tokenizers: Path,
    media: dict[str, MediaTokenizer],
    wanted: Sequence[str],
) -> None:
    """``media``: existing tokenizers; ``wanted``: labels of the media that ``spec`` asks for."""
    manifest, stored = read_manifest(folder), tokenizers / VOCABULARY_FILE
    recorded = manifest["tokenizers"]
    data = Vocabulary.from_dict(manifest["vocabulary"])
    _check_videos(spec, data)
    if stored.exists():
        check_same(stored, load_vocabulary(stored), data, folder / MANIFEST)
    text = text_file(tokenizers)
    if not text.exists():
        _refuse(spec, "text", recorded["text"], "a new one, as the tokenizers folder is gone")
    for label in wanted:
        if label not in media:
            option = spec.tokenizers or spec.tokenizer_of(MEDIA[label])
            _refuse(spec, label, f"none ({folder})", str(option))
    hashes = {"text": TextTokenizer.load(text).sha256}
    hashes |= {label: tokenizer.sha256 for label, tokenizer in media.items()}
    for kind in sorted(recorded.keys() | hashes.keys()):
        if recorded.get(kind) != hashes.get(kind):
            made_with = f"{recorded.get(kind)} ({folder})"
            _refuse(spec, kind, made_with, f"{hashes.get(kind)} ({tokenizers})")


def _has_separator(vocabulary: Vocabulary) -> bool:
    return any(medium.separator is not None for medium in vocabulary.media)


def _check_videos(spec: PrepareSpec, existing: Vocabulary) -> None:
    """``ValueError`` unless the vocabulary of ``spec.out`` is for videos as ``spec`` is."""
    if spec.tokenizers is None and _has_separator(existing) != (spec.video_frames > 0):
        was = "for videos" if _has_separator(existing) else "without videos"
        raise ValueError(
            f"out ({spec.out}) was prepared {was}, but asked for is video_frames "
            f"({spec.video_frames}); ask for the same, or choose another folder"
        )


def _refuse(spec: PrepareSpec, kind: str, made_with: str, asked: str) -> None:
    raise ValueError(
        f"out ({spec.out}) was prepared with {kind} tokenizer {made_with}, but asked for is "
        f"{asked}; ask for the same, or choose another folder"
    )
