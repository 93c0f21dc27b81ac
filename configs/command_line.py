"""The command line of ``train.py``: a short help with defaults, and overrides of any field."""

import io
import os
from contextlib import redirect_stderr
from itertools import zip_longest
from typing import Any

import tyro
from torchtitan.config.manager import ConfigManager, custom_registry

from earlyfuse.configs.registry import DEFAULT, sections
from earlyfuse.parallel.trainer import Trainer

DRY_RUN = "--dry-run"

# the fields that people change; --help-all shows every one
COMMON_FIELDS = (
    ("dump_folder", "run folder: checkpoints, metrics, curves; the same folder resumes"),
    ("data.folder", "prepared data (python -m earlyfuse.tools.prepare); none: the config's own"),
    ("data.shares", "NAME=SHARE of the tokens for each source; none: in proportion to size"),
    ("training.steps", "optimizer steps"),
    ("training.seq_len", "positions in a row"),
    ("training.local_batch_size", "rows per rank and micro-batch"),
    ("training.global_batch_size", "rows per step over all ranks; -1: no accumulation"),
    ("training.max_norm", "gradient clipping"),
    ("lr_scheduler.warmup_steps", "steps of linear warm-up"),
    ("lr_scheduler.decay_type", "linear, cosine, sqrt or exponential; decay_ratio: share of steps"),
    ("dataloader.seed", "order of the documents"),
    ("debug.seed", "initial values and dropout"),
    ("ema.decay", "average of the weights, to validate, generate and export; 0: off"),
    ("checkpoint.interval", "steps between checkpoints"),
    ("validator.freq", "steps between validations"),
    ("sampler.number", "held-out prompts continued at each validation; --sampler.no-enable: none"),
    ("metrics.log_freq", "steps between logged lines"),
    ("compile.enable", "torch.compile per block"),
)


def list_text(file: str = "") -> str:
    """One line per config, by module or of a user's ``file``: name and docstring's first line."""
    parts = sections(file)
    width = max((len(name) for configs in parts.values() for name in configs), default=0)
    lines: list[str] = []
    for title, configs in parts.items():
        lines += ["", title]
        for name, function in configs.items():
            about = (function.__doc__ or "").strip().partition("\n")[0]
            lines.append(f"  {name:<{width}}  {about}".rstrip())
    return "\n".join(lines[1:])


def help_text(name: str, config: Trainer.Config) -> str:
    """The short help for one config."""
    width = max(len(field) for field, _ in COMMON_FIELDS) + 2
    lines = [
        "usage: python train.py [CONFIG] [--FIELD VALUE ...]",
        "",
        f"Trains CONFIG (default {DEFAULT}) on GPUs or CPU; the same command resumes.",
        "CONFIG is a name of --list, or FILE.py:NAME for a function of your own (docs/presets.md).",
        f"Fields most often changed, with their values in {name}:",
        "",
    ]
    lines += [
        f"  --{field:<{width}}{meaning} [{_value(config, field)}]"
        for field, meaning in COMMON_FIELDS
    ]
    lines += [
        "",
        "  --list [FILE.py]     list the configs, or those in a file of your own",
        "  --help-all           every field of the config",
        "  --dry-run [RANKS]    estimate the run on so many ranks without starting it",
    ]
    return "\n".join(lines)


def take_dry_run(arguments: list[str]) -> int | None:
    """Removes ``--dry-run [RANKS]`` from ``arguments`` and returns the ranks, by default the
    launcher's; None without it.
    """
    if DRY_RUN not in arguments:
        return None
    at = arguments.index(DRY_RUN)
    del arguments[at]
    given = arguments.pop(at) if at < len(arguments) and arguments[at][0] != "-" else None
    ranks = given or os.environ.get("WORLD_SIZE", "1")
    if not ranks.isdecimal() or not int(ranks):
        raise ValueError(f"{DRY_RUN} ({ranks}) must be followed by a number of ranks, or nothing")
    return int(ranks)


@custom_registry.primitive_rule
def _shares(
    field_type: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[dict[str, float]] | None:
    """``--data.shares NAME=SHARE …`` replaces all shares of the config; tyro alone would offer each
    as a field.
    """
    if field_type.type != dict[str, float]:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=SHARE ...",
        instance_from_str=_named_shares,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda shares: [f"{name}={share}" for name, share in shares.items()],
    )


def _named_shares(words: list[str]) -> dict[str, float]:
    if words and not any("=" in word for word in words):  # NAME SHARE NAME SHARE …
        words = [f"{name}={share}" for name, share in zip_longest(words[::2], words[1::2])]
    shares = {}
    for word in words:
        name, _, share = word.rpartition("=")
        if not name or name in shares:
            raise ValueError(f"give each source once, as NAME=SHARE, not {word!r}")
        try:
            shares[name] = float(share)
        except ValueError as error:
            raise ValueError(f"the share of {name} ({share}) must be a number") from error
    return shares


def override(config: Trainer.Config, arguments: list[str]) -> Trainer.Config:
    """``config`` with ``--section.field value`` applied; exits with a message on a wrong one.

    Under a launcher raises the message as ``ValueError``, for one rank to report.
    """
    ConfigManager()  # registers torchtitan's rules for its own field types
    options: dict[str, Any] = {"registry": custom_registry, "prog": "train.py"}
    if "RANK" not in os.environ:
        return tyro.cli(type(config), args=arguments, default=config, **options)
    message = io.StringIO()
    try:
        with redirect_stderr(message):
            return tyro.cli(type(config), args=arguments, default=config, **options)
    except SystemExit as end:
        if end.code:
            raise ValueError(message.getvalue().strip()) from None
        raise


def _value(config: Any, path: str) -> Any:
    for part in path.split("."):
        config = getattr(config, part)
    return config
