"""The tokenizers of a prepared folder: made there once, from training data, and then kept."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from earlyfuse.data.atomic import atomic_write_bytes, atomic_write_json, remove_temporaries
from earlyfuse.data.prepare.progress import Progress
from earlyfuse.data.prepare.spec import IMAGE_KINDS, SPEECH_KINDS, PrepareSpec, Source
from earlyfuse.data.prepare.train_tokenizers import Sample, learn_image, learn_speech, learn_text
from earlyfuse.data.prepare.worker_pool import ProcessPool
from earlyfuse.data.shards.writer import MANIFEST, read_manifest
from earlyfuse.data.tokenizers import (
    IMAGE_FILE,
    SPEECH_FILE,
    TEXT_FILES,
    VOCABULARY_FILE,
    Tokenizers,
    text_file,
)
from earlyfuse.data.tokenizers.image import (
    ImageTokenizer,
    load_image_tokenizer,
    save_image_tokenizer,
)
from earlyfuse.data.tokenizers.speech_kmeans import SpeechTokenizer
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.data.vocabulary import check_same, load_vocabulary
from earlyfuse.models.vocabulary import Vocabulary


def check_existing(spec: PrepareSpec) -> None:
    """Refuse a folder prepared with other tokenizers than ``spec`` asks for; writes nothing.

    Raises ``ValueError`` that names both.
    """
    folder = spec.out / "tokenizers"
    asked_image: ImageTokenizer | None = None
    asked_speech: SpeechTokenizer | None = None
    speech = spec.speech_tokenizer != "none"
    if spec.tokenizers is not None:
        asked = Tokenizers.load(spec.tokenizers)
        asked_text: TextTokenizer | None = asked.text
        asked_image, asked_speech = asked.image, asked.speech
        speech = asked_speech is not None
        _check_vocabulary(spec, folder / VOCABULARY_FILE, asked)
    else:
        ready = spec.text_tokenizer
        asked_text = None if ready is None else TextTokenizer.load(ready, speech)
        if spec.image_tokenizer not in IMAGE_KINDS:
            asked_image = load_image_tokenizer(Path(spec.image_tokenizer))
        if spec.speech_tokenizer not in SPEECH_KINDS:
            asked_speech = SpeechTokenizer.load(Path(spec.speech_tokenizer))
    if text_file(folder).exists():
        _check_text(spec, TextTokenizer.load(text_file(folder), speech), asked_text)
    if (folder / IMAGE_FILE).exists():
        there = load_image_tokenizer(folder / IMAGE_FILE)
        _check_medium(spec, "image", there, asked_image, spec.image_tokenizer, _image_settings)
    if (folder / SPEECH_FILE).exists():
        spoken = SpeechTokenizer.load(folder / SPEECH_FILE)
        _check_medium(spec, "speech", spoken, asked_speech, spec.speech_tokenizer, _speech_settings)
    of_folder = spec.tokenizers is not None
    wanted = {
        "image": asked_image is not None or not (of_folder or spec.image_tokenizer == "none"),
        "speech": speech,
    }
    for path in sorted(spec.out.glob(f"*/*/{MANIFEST}")):
        _check_manifest(spec, path.parent, folder, wanted)


def _check_text(spec: PrepareSpec, there: TextTokenizer, asked: TextTokenizer | None) -> None:
    if asked is not None and asked.sha256 != there.sha256:
        _refuse(spec, "text", there.sha256, asked.sha256)
    if asked is None and there.size != spec.text_vocab:
        made = f"{there.sha256} of {there.size} pieces"
        _refuse(spec, "text", made, f"one of {spec.text_vocab} pieces")


def _check_medium(
    spec: PrepareSpec,
    label: str,
    there: ImageTokenizer | SpeechTokenizer,
    asked: ImageTokenizer | SpeechTokenizer | None,
    kind: str,
    settings_of: Callable[[PrepareSpec], dict[str, Any]],
) -> None:
    """``there``: the tokenizer of the folder; ``asked``: a ready one, else ``kind`` is to be."""
    made = f"{there.sha256} ({there.kind}, {there.settings})"
    if asked is not None:
        if asked.sha256 != there.sha256:
            _refuse(spec, label, made, asked.sha256)
    elif spec.tokenizers is not None:
        _refuse(spec, label, made, f"none ({spec.tokenizers})")
    else:
        settings = settings_of(spec)
        differs = any(there.settings.get(key) != value for key, value in settings.items())
        if there.kind != kind or differs:
            _refuse(spec, label, made, f"{kind}, {settings}")


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
        for name in (*TEXT_FILES, IMAGE_FILE, SPEECH_FILE, VOCABULARY_FILE):
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
    speech = spec.speech_tokenizer != "none"
    if not text_file(folder).exists():
        if spec.text_tokenizer is not None:
            ready = TextTokenizer.load(spec.text_tokenizer)
            ready.save(folder / ready.file_name)
        else:
            progress.tell(f"text tokenizer: learning {spec.text_vocab} pieces")
            path = text_file(folder)
            text_ready = pool.start(learn_text, (sample, spec.text_vocab, speech, path))
    if spec.image_tokenizer != "none" and not (folder / IMAGE_FILE).exists():
        if spec.image_tokenizer in IMAGE_KINDS:
            image = learn_image(spec, sample, progress)
        else:
            image = load_image_tokenizer(Path(spec.image_tokenizer))
        save_image_tokenizer(image, folder / IMAGE_FILE)
    if speech and not (folder / SPEECH_FILE).exists():
        if spec.speech_tokenizer in SPEECH_KINDS:
            spoken = learn_speech(spec, sample, progress)
        else:
            spoken = SpeechTokenizer.load(Path(spec.speech_tokenizer))
        spoken.save(folder / SPEECH_FILE)
    if text_ready is not None:
        text_ready()
    return _with_vocabulary(folder)


def _with_vocabulary(folder: Path) -> Tokenizers:
    """The tokenizers of ``folder``, their vocabulary stored beside them."""
    tokenizers = Tokenizers.load(folder)
    atomic_write_json(folder / VOCABULARY_FILE, tokenizers.vocabulary.to_dict())
    return tokenizers


def _image_settings(spec: PrepareSpec) -> dict[str, Any]:
    settings = {
        "image_size": spec.image_size,
        "patch": spec.patch,
        "codes": spec.codes,
        "seed": spec.seed,
    }
    if spec.image_tokenizer == "vqvae":
        settings["steps"] = spec.vq_steps
    return settings


def _speech_settings(spec: PrepareSpec) -> dict[str, Any]:
    return {"frame_ms": spec.speech_frame_ms, "codes": spec.speech_codes, "seed": spec.seed}


def _check_vocabulary(spec: PrepareSpec, stored: Path, asked: Tokenizers) -> None:
    if stored.exists() and load_vocabulary(stored) != asked.vocabulary:
        raise ValueError(
            f"out ({spec.out}) was prepared with another vocabulary ({stored}) than that of "
            f"tokenizers ({spec.tokenizers}); ask for the same, or choose another folder"
        )


def _check_manifest(
    spec: PrepareSpec, folder: Path, tokenizers: Path, wanted: dict[str, bool]
) -> None:
    """``wanted``: which media ``spec`` has a tokenizer for."""
    manifest, stored = read_manifest(folder), tokenizers / VOCABULARY_FILE
    recorded = manifest["tokenizers"]
    if stored.exists():
        data = Vocabulary.from_dict(manifest["vocabulary"])
        check_same(stored, load_vocabulary(stored), data, folder / MANIFEST)
    text, image, speech = text_file(tokenizers), tokenizers / IMAGE_FILE, tokenizers / SPEECH_FILE
    if not text.exists():
        _refuse(spec, "text", recorded["text"], "a new one, as the tokenizers folder is gone")
    for label, path, option in (
        ("image", image, spec.image_tokenizer),
        ("speech", speech, spec.speech_tokenizer),
    ):
        if not path.exists() and wanted[label]:
            _refuse(spec, label, f"none ({folder})", str(spec.tokenizers or option))
    hashes = {"text": TextTokenizer.load(text).sha256}
    if image.exists():
        hashes["image"] = load_image_tokenizer(image).sha256
    if speech.exists():
        hashes["speech"] = SpeechTokenizer.load(speech).sha256
    for kind in sorted(recorded.keys() | hashes.keys()):
        if recorded.get(kind) != hashes.get(kind):
            _refuse(
                spec,
                kind,
                f"{recorded.get(kind)} ({folder})",
                f"{hashes.get(kind)} ({tokenizers})",
            )


def _refuse(spec: PrepareSpec, kind: str, made_with: str, asked: str) -> None:
    raise ValueError(
        f"out ({spec.out}) was prepared with {kind} tokenizer {made_with}, but asked for is "
        f"{asked}; ask for the same, or choose another folder"
    )
