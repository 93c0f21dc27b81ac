"""Lists configs and prints the short help without torch, hence at once.

This project's configs are listed in ``list.txt``, with a digest of the files that it was made from;
an outdated list is made anew. A user's file is parsed, not run, unless it has a ``CONFIGS``.
"""

import ast
import inspect
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from earlyfuse.configs.registry import DEFAULT, check_known, sections, split_name
from earlyfuse.data.atomic import atomic_write_bytes

HELP, LONG_HELP, LIST = ("-h", "--help"), "--help-all", "--list"
FOLDER = Path(__file__).parent
LIST_FILE = FOLDER / "list.txt"

# the fields that people change; --help-all shows every one
COMMON_FIELDS = (
    ("dump_folder", "run folder: checkpoints, metrics, curves; the same folder resumes"),
    ("data.folder", "prepared data (python -m earlyfuse.tools.prepare); none: the config's own"),
    ("data.shares", "NAME=SHARE of the tokens for each source; none: in proportion to size"),
    ("start.model", "folder of a model to start from: a run, an export, Hugging Face's …"),
    ("start.upcycle", "form to give it: 1t1i, 4t4i, mot, mixture_of_mamba …; none: as it is"),
    ("training.steps", "optimizer steps"),
    ("training.seq_len", "positions in a row"),
    ("training.local_batch_size", "rows per rank and micro-batch"),
    ("training.global_batch_size", "rows per step over all ranks; -1: no accumulation"),
    ("training.max_norm", "gradient clipping"),
    ("optimizer.lr", "peak learning rate, of all parameter groups"),
    ("optimizer.weight_decay", "of all parameter groups but those without: norms and biases"),
    ("lr_scheduler.warmup_steps", "steps of linear warm-up"),
    ("lr_scheduler.decay_type", "linear, cosine, sqrt or exponential; decay_ratio: share of steps"),
    ("dataloader.seed", "order of the documents"),
    ("debug.seed", "initial values and dropout"),
    ("ema.decay", "average of the weights, to validate, generate and export; 0: off"),
    ("checkpoint.interval", "steps between checkpoints"),
    ("validator.freq", "steps between validations"),
    ("sampler.number", "held-out prompts continued at each validation; --sampler.no-enable: none"),
    ("metrics.log_freq", "steps between logged lines"),
    ("recompute", "activations: none, selective, full or memory-budget"),
    ("compile.enable", "torch.compile per block"),
    ("parallelism.data_parallel_shard_degree", "FSDP ranks; -1: all that are left"),
    ("parallelism.data_parallel_replicate_degree", "copies of these, as in HSDP"),
    ("parallelism.tensor_parallel_degree", "ranks that share each layer"),
    ("parallelism.expert_parallel_degree", "ranks that share the experts"),
    ("parallelism.context_parallel_degree", "ranks that share the positions of a row"),
    ("parallelism.pipeline_parallel_degree", "stages of layers"),
)


def answer(arguments: list[str]) -> str | None:
    """The text that a command line of ``train.py`` asks for, if it needs no config; else None.

    ``ValueError`` for the name of a config that does not exist.
    """
    name = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    files = [word for word in arguments if word.endswith(".py")]
    if LIST in arguments or (files and files == arguments):
        if files:
            return file_list(Path(files[0]))
        return project_list()
    if not name and any(flag in arguments for flag in HELP):
        return help_text()
    if name and not split_name(name)[0]:
        check_known(name, [line.split()[0] for line in project_list().splitlines() if _item(line)])
    return None


def help_text(name: str = "", value: Callable[[str], object] | None = None) -> str:
    """The short help; with the ``value`` of each field in the config ``name``."""
    width = max(len(field) for field, _ in COMMON_FIELDS) + 2
    lines = [
        "usage: python train.py [CONFIG] [--FIELD VALUE ...]",
        "",
        f"Trains CONFIG (default {DEFAULT}) on GPUs or CPU; the same command resumes.",
        "CONFIG is a name of --list, or FILE.py:NAME for a function of your own (docs/presets.md).",
        f"Fields most often changed{f', with their values in {name}' if name else ''}:",
        "",
    ]
    for field, meaning in COMMON_FIELDS:
        lines.append(f"  --{field:<{width}}{meaning}" + (f" [{value(field)}]" if value else ""))
    lines += [
        "",
        "  CONFIG --help        these fields with their values in CONFIG",
        "  CONFIG --help-all    every field, with its type, value and meaning",
        "  --list [FILE.py]     list the configs, or those in a file of your own",
        "  --dry-run [RANKS]    estimate the run on so many ranks without starting it",
    ]
    return "\n".join(lines)


def project_list() -> str:
    """One line per config of this project, by module: name and docstring's first line."""
    digest = sources_digest()
    with suppress(OSError, ValueError):
        found, _, text = LIST_FILE.read_text("utf-8").partition("\n")
        if found == digest:
            return text.rstrip("\n")
    text = _lines(
        {
            title: {name: inspect.getdoc(function) for name, function in configs.items()}
            for title, configs in sections().items()
        }
    )
    with suppress(OSError):  # of an installation that is read-only
        atomic_write_bytes(LIST_FILE, f"{digest}\n{text}\n".encode())
    return text


def sources_digest() -> str:
    """SHA-256 of all files of this folder, from which names and titles of configs follow."""
    files = {str(path.relative_to(FOLDER)): path for path in FOLDER.rglob("*.py")}
    contents = [f"{name}\n".encode() + files[name].read_bytes() for name in sorted(files)]
    return sha256(b"\n".join(contents)).hexdigest()


def file_list(file: Path) -> str:
    """The same of a user's file: its public functions that require no argument."""
    try:
        text = file.read_text("utf-8")
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError):
        tree, text = ast.Module([], []), "CONFIGS"  # the import says what is wrong
    if "CONFIGS" in text:
        found = {
            title: {name: inspect.getdoc(function) for name, function in configs.items()}
            for title, configs in sections(str(file)).items()
        }
        return _lines(found)
    functions = {
        f"{file}:{node.name}": ast.get_docstring(node)
        for node in sorted(
            (node for node in tree.body if isinstance(node, ast.FunctionDef)),
            key=lambda node: node.name,
        )
        if not node.name.startswith("_") and not _requires_arguments(node.args)
    }
    title = (ast.get_docstring(tree) or "").partition("\n")[0]
    return _lines({title or str(file): functions})


def _requires_arguments(arguments: ast.arguments) -> bool:
    positional = len(arguments.posonlyargs) + len(arguments.args)
    return positional > len(arguments.defaults) or None in arguments.kw_defaults


def _lines(parts: dict[str, dict[str, str | None]]) -> str:
    width = max((len(name) for configs in parts.values() for name in configs), default=0)
    lines: list[str] = []
    for title, configs in parts.items():
        lines += ["", title]
        for name, about in configs.items():
            lines.append(f"  {name:<{width}}  {(about or '').partition(chr(10))[0]}".rstrip())
    return "\n".join(lines[1:])


def _item(line: str) -> bool:
    return line.startswith("  ")
