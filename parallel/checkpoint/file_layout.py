"""File layout of runs, checkpoints and exported models: names, steps, the latest checkpoint.

================================  =================================================================
in a run                          content
================================  =================================================================
``run.json``                      the resolved config (``reporting/run_folder.py``)
``checkpoint/step-300/``          a complete checkpoint: DCP's files, ``config.json`` and
                                  ``manifest.json``
``checkpoint/step-600.partial/``  being written, or left by a killed run
``checkpoint/step-9.discarded/``  being deleted, or left by a killed run
``checkpoint/latest``             the name of the checkpoint completed last
================================  =================================================================

================================  =================================================================
in an exported model              content
================================  =================================================================
``config.json``                   format, version, model, vocabulary, source
``model-0000k-of-0000N…``         safetensors, with ``model.safetensors.index.json``
``tokenizers/``                   the tokenizers of the data, if known
``vqmodel.safetensors``           image tokenizer of a Hugging Face folder, unchanged
``huggingface/``                  other files of a Hugging Face folder, unchanged
================================  =================================================================
"""

import re
from pathlib import Path

from earlyfuse.data.json_files import shown
from earlyfuse.parallel.reporting.run_folder import DESCRIPTION, read_config

LATEST, PARTIAL, DISCARDED = "latest", ".partial", ".discarded"
VQ_FILE, HUGGINGFACE = "vqmodel.safetensors", "huggingface"
_MOST_LATEST = 100  # bytes


def is_run(folder: Path) -> bool:
    """True if ``folder`` is a run's."""
    return (folder / DESCRIPTION).is_file()


def run_of(checkpoint: Path) -> Path:
    """Returns the run folder of a checkpoint that has not been moved."""
    return checkpoint.absolute().parent.parent


def checkpoints_of(run: Path) -> Path:
    """Returns the folder of a run's checkpoints; ``ValueError`` if ``run.json`` is damaged."""
    return run / read_config(run).object("checkpoint").field("folder", str)


def step_of(name: str) -> int | None:
    """Returns the step in the name of a checkpoint's folder; None for any other name."""
    match = re.fullmatch(r"step-(0|[1-9]\d{0,17})", name, re.ASCII)
    return int(match[1]) if match else None


def steps_in(root: Path) -> list[int]:
    """Lists the steps of the checkpoints in ``root``, ascending."""
    if not root.is_dir():
        return []
    try:
        found = [step_of(path.name) for path in root.iterdir() if path.is_dir()]
    except OSError as error:
        reason = f"{root} cannot be read ({error.strerror}); let this user read it"
        raise ValueError(reason) from error
    return sorted(step for step in found if step is not None)


def read_latest(root: Path) -> int | None:
    """Returns the step in ``latest``, None without one; ``ValueError`` if it is damaged."""
    path = root / LATEST
    if not path.exists():
        return None
    remedy = f"write the name of the newest good checkpoint into it (there: {names_in(root)})"
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_LATEST + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    step = step_of(content.decode("ascii", "replace").removesuffix("\n"))
    if step is None:
        raise ValueError(
            f"{path} ({shown(content)}) must name the checkpoint completed last, step-N; {remedy}"
        )
    return step


def latest_checkpoint(root: Path) -> Path:
    """Returns the checkpoint completed last in ``root``; ``ValueError`` if it is gone."""
    step, steps = read_latest(root), steps_in(root)
    if step is None and not steps:
        raise ValueError(f"{root} has no complete checkpoint yet; give a folder that has one")
    if step is None:
        step = steps[-1]  # killed before ``latest`` was written for the first time
    if step not in steps:
        raise ValueError(
            f"{root / LATEST} names step-{step}, which is not there (there: {names_in(root)}); "
            "restore its folder, or give another one by its name"
        )
    return root / f"step-{step}"


def names_in(root: Path) -> str:
    """Names the checkpoints in ``root``, for messages."""
    return ", ".join(f"step-{step}" for step in steps_in(root)) or "none"
