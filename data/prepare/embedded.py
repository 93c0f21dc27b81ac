"""The embedded corpus, built and prepared like anybody's data."""

from pathlib import Path
from typing import Any

from earlyfuse.data.atomic import atomic_write_bytes
from earlyfuse.data.corpus import CorpusPaths, build_corpus, sources_of
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
    """Raw shards in ``<out>/raw``, the rest as ``prepare`` lays it out. Quick when it is there.

    ``scale``: share of the corpus to build; ``speech``: with spoken names, tokenised unless
    ``options`` say how. ``options``: fields of ``PrepareSpec``. Returns the raw corpus, for its
    task checks and prompts. Raises what ``build_corpus`` and ``prepare`` raise.
    """
    if speech and "tokenizers" not in options:
        options = {"speech_tokenizer": "kmeans", "speech_codes": SPEECH_CODES, **options}
    progress = progress or Progress()
    image_size = options.get("image_size", PrepareSpec.image_size)
    if not (out / "raw" / "corpus.json").exists():
        progress.tell(f"making the embedded corpus in {out} (once; some minutes)")
    paths = build_corpus(
        out / "raw",
        seed=options.get("seed", PrepareSpec.seed),
        scale=scale,
        image_size=image_size,
        with_speech=speech,
        progress=progress.file.isatty(),
    )
    splits: dict[str, Any] = {
        split: {name: paths.shards(split, name) for name in sources_of(speech)} for split in SPLITS
    }
    # runs that start together need the same corpus: one of them makes it
    prepare(PrepareSpec(out=out, **splits, **options), progress, wait=True)
    # the trainer looks for task checks and prompts beside the validation sources
    for path in (paths.tasks, paths.prompts):
        atomic_write_bytes(out / "validation" / path.name, path.read_bytes())
    return paths
