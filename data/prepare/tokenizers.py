"""The tokenizers of a prepared folder: made there once, from training data, and then kept."""

from collections.abc import Callable, Sequence
from pathlib import Path

from earlyfuse.data.atomic import atomic_write_bytes, atomic_write_json, remove_temporaries
from earlyfuse.data.media import MEDIA, MediaTokenizer, Medium
from earlyfuse.data.prepare.progress import Progress
from earlyfuse.data.prepare.spec import PrepareSpec, Source
from earlyfuse.data.prepare.train_tokenizers import Sample, learn_medium, learn_text
from earlyfuse.data.prepare.worker_pool import ProcessPool
from earlyfuse.data.shards.manifest import MANIFEST, read_manifest
from earlyfuse.data.tokenizers import (
    TEXT_FILES,
    VOCABULARY_FILE,
    Tokenizers,
    load_media,
    text_file,
)
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.data.vocabulary import check_same, load_vocabulary
from earlyfuse.models.vocabulary import Vocabulary


def check_existing(spec: PrepareSpec) -> None:
    """Refuse a folder prepared with other tokenizers than ``spec`` asks for; writes nothing.

    Raises ``ValueError`` that names both.
    """
    folder = spec.out / "tokenizers"
    asked: dict[str, MediaTokenizer] = {}
    if spec.tokenizers is not None:
        ready = Tokenizers.load(spec.tokenizers)
        asked_text: TextTokenizer | None = ready.text
        asked = ready.media
        wanted = list(asked)
        _check_vocabulary(spec, folder / VOCABULARY_FILE, ready)
    else:
        wanted = [medium.label for medium in spec.media]
        given = spec.text_tokenizer
        asked_text = None if given is None else TextTokenizer.load(given, wanted)
        for medium in spec.media:
            if spec.tokenizer_of(medium) not in medium.kinds:
                asked[medium.label] = medium.module().load(Path(spec.tokenizer_of(medium)))
    if text_file(folder).exists():
        _check_text(spec, TextTokenizer.load(text_file(folder), wanted), asked_text)
    there = load_media(folder)
    for label, tokenizer in there.items():
        _check_medium(spec, MEDIA[label], tokenizer, asked.get(label))
    for path in sorted(spec.out.glob(f"*/*/{MANIFEST}")):
        _check_manifest(spec, path.parent, folder, there, wanted)


def _check_text(spec: PrepareSpec, there: TextTokenizer, asked: TextTokenizer | None) -> None:
    if asked is not None and asked.sha256 != there.sha256:
        _refuse(spec, "text", there.sha256, asked.sha256)
    if asked is None and there.size != spec.text_vocab:
        made = f"{there.sha256} of {there.size} pieces"
        _refuse(spec, "text", made, f"one of {spec.text_vocab} pieces")


def _check_medium(
    spec: PrepareSpec, medium: Medium, there: MediaTokenizer, asked: MediaTokenizer | None
) -> None:
    """``there``: the folder's tokenizer; ``asked``: a ready one, else ``spec`` has its kind."""
    made = f"{there.sha256} ({there.kind}, {there.settings})"
    kind = spec.tokenizer_of(medium)
    if asked is not None:
        if asked.sha256 != there.sha256:
            _refuse(spec, medium.label, made, asked.sha256)
    elif spec.tokenizers is not None:
        _refuse(spec, medium.label, made, f"none ({spec.tokenizers})")
    elif kind == "none":
        _refuse(spec, medium.label, made, kind)
    else:
        settings = medium.module().settings(spec)
        differs = any(there.settings.get(key) != value for key, value in settings.items())
        if there.kind != kind or differs:
            _refuse(spec, medium.label, made, f"{kind}, {settings}")


def make_tokenizers(
    spec: PrepareSpec, sources: Sequence[Source], pool: ProcessPool, progress: Progress
) -> Tokenizers:
    """Those in ``<out>/tokenizers``; absent ones are copied there or learnt from the training
    ``sources`` first.
    """
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
    sample = Sample(
        shards=tuple(shard for source in train for shard in source.shards),
        expected_sizes=tuple(size for source in train for size in source.expected_sizes()),
        on_bad=spec.on_bad,
        layout=spec.layout,
        image_first=spec.image_first,
    )
    text_ready: Callable[[], None] | None = None
    if not text_file(folder).exists():
        if spec.text_tokenizer is not None:
            ready = TextTokenizer.load(spec.text_tokenizer)
            ready.save(folder / ready.file_name)
        else:
            progress.tell(f"text tokenizer: learning {spec.text_vocab} pieces")
            labels = tuple(medium.label for medium in spec.media)
            job = (sample, spec.text_vocab, labels, text_file(folder))
            text_ready = pool.start(learn_text, job)
    for medium in spec.media:
        if not (folder / medium.file).exists():
            if (kind := spec.tokenizer_of(medium)) in medium.kinds:
                tokenizer = learn_medium(medium, spec, sample, progress)
            else:
                tokenizer = medium.module().load(Path(kind))
            atomic_write_bytes(folder / medium.file, tokenizer.to_bytes())
    if text_ready is not None:
        text_ready()
    return _with_vocabulary(folder)


def _with_vocabulary(folder: Path) -> Tokenizers:
    """The tokenizers of ``folder``, their vocabulary stored beside them."""
    tokenizers = Tokenizers.load(folder)
    atomic_write_json(folder / VOCABULARY_FILE, tokenizers.vocabulary.to_dict())
    return tokenizers


def _check_vocabulary(spec: PrepareSpec, stored: Path, asked: Tokenizers) -> None:
    if stored.exists() and load_vocabulary(stored) != asked.vocabulary:
        raise ValueError(
            f"out ({spec.out}) was prepared with another vocabulary ({stored}) than that of "
            f"tokenizers ({spec.tokenizers}); ask for the same, or choose another folder"
        )


def _check_manifest(
    spec: PrepareSpec,
    folder: Path,
    tokenizers: Path,
    media: dict[str, MediaTokenizer],
    wanted: Sequence[str],
) -> None:
    """``media``: tokenizers that are there; ``wanted``: media that ``spec`` has one for."""
    manifest, stored = read_manifest(folder), tokenizers / VOCABULARY_FILE
    recorded = manifest["tokenizers"]
    if stored.exists():
        data = Vocabulary.from_dict(manifest["vocabulary"])
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
            made = f"{recorded.get(kind)} ({folder})"
            _refuse(spec, kind, made, f"{hashes.get(kind)} ({tokenizers})")


def _refuse(spec: PrepareSpec, kind: str, made_with: str, asked: str) -> None:
    raise ValueError(
        f"out ({spec.out}) was prepared with {kind} tokenizer {made_with}, but asked for is "
        f"{asked}; ask for the same, or choose another folder"
    )
