"""Builds the embedded corpus and prepares it."""

from pathlib import Path
from typing import Any

from earlyfuse.data.atomic import atomic_write_bytes
from earlyfuse.data.console import printable
from earlyfuse.data.embedded.builder import CORPUS_FILE, CorpusPaths, build_corpus, sources_of
from earlyfuse.data.prepare import prepare
from earlyfuse.data.prepare.progress import Progress
from earlyfuse.data.prepare.spec import SPLITS, PrepareSpec

SPEECH_CODES = 256  # of the corpus: an hour of two dozen synthetic voices


def prepare_corpus(
    out: Path,
    *,
    scale: float = 1.0,
    speech: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> CorpusPaths:
    """Build raw shards in ``<out>/raw`` and prepare ``out``; quick if that is done already.

    ``scale``: share of the corpus to build; ``speech``: with spoken names, tokenised unless
    ``options`` say otherwise. ``options``: fields of ``PrepareSpec``. Returns the raw corpus, for
    its task checks and prompts.

    Raises ``ValueError``, before anything is written, for a folder that holds anything else, and
    what ``build_corpus`` and ``prepare`` raise.
    """
    _check_own(out)
    if speech and "tokenizers" not in options:
        options = {"speech_tokenizer": "kmeans", "speech_codes": SPEECH_CODES, **options}
    progress = progress or Progress()
    if not (out / "raw" / CORPUS_FILE).exists():
        progress.tell(f"building the embedded corpus in {out} (once; some minutes)")
    paths = build_corpus(
        out / "raw",
        seed=options.get("seed", PrepareSpec.seed),
        scale=scale,
        image_size=options.get("image_size", PrepareSpec.image_size),
        with_speech=speech,
        progress=progress.file.isatty(),
    )
    splits: dict[str, Any] = {
        split: {name: paths.shards(split, name) for name in sources_of(speech)} for split in SPLITS
    }
    # of runs that start together and need the same corpus, one makes it
    prepare(PrepareSpec(out=out, **splits, **options), progress, wait=True)
    # the trainer expects task checks and prompts beside the validation sources; the oldest corpora
    # have no prompts
    for path in (paths.tasks, paths.prompts):
        if path.exists() and not (out / "validation" / path.name).exists():
            atomic_write_bytes(out / "validation" / path.name, path.read_bytes())
    return paths


def _check_own(out: Path) -> None:
    """Raise ``ValueError`` unless ``out`` is the corpus, finished or not, or is empty."""
    if not out.exists() or (out / "raw" / CORPUS_FILE).is_file():
        return
    if not out.is_dir():
        raise ValueError(f"out ({out}) must be a folder; it is a file")
    # a corpus whose building was interrupted leaves .raw-*
    others = [path.name for path in out.iterdir() if not path.name.startswith(".raw-")]
    if others:
        raise ValueError(
            f"out ({out}) holds {printable(min(others))} and no raw/{CORPUS_FILE}, so it is not "
            "the embedded corpus; give a new or an empty one"
        )
