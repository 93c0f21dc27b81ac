"""Overrides of any field of a config on the command line of ``train.py``, and its long help."""

import ast
import inspect
import io
import os
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stderr
from copy import deepcopy
from dataclasses import fields, is_dataclass
from functools import cache, reduce
from itertools import zip_longest
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import tyro
from torchtitan.config.manager import ConfigManager, custom_registry

from earlyfuse.configs.base import RECOMPUTE
from earlyfuse.configs.listing import LONG_HELP
from earlyfuse.data.console import near_names
from earlyfuse.parallel.trainer import Trainer
from earlyfuse.parallel.training.config_checks import FILLED_IN, HYPERPARAMETERS, UNREAD

DRY_RUN = "--dry-run"
# short name → what it sets, for the long help
SHORT_NAMES = {
    "optimizer.lr": "peak learning rate of all parameter groups, but those with 0",
    "optimizer.weight_decay": "weight decay of all parameter groups, but those with 0",
    "recompute": f"activation checkpointing: {', '.join(RECOMPUTE)}",
}
FLAG = "FLAG"
_NOT_OFFERED = ("model_spec", "tokenizer", *UNREAD, *FILLED_IN)


def override(config: Trainer.Config, arguments: list[str]) -> Trainer.Config:
    """``config`` with ``--section.field value`` applied; ``ValueError`` for a wrong word.

    Short names are applied first, wherever they stand, so that full names refine them.
    """
    config, rest = deepcopy(config), list(arguments)
    _set_short_names(config, rest)
    ConfigManager()  # registers torchtitan's rules for its own field types
    message = io.StringIO()
    try:
        with redirect_stderr(message):
            found, unknown = tyro.cli(
                type(config),
                args=rest,
                default=config,
                registry=custom_registry,
                prog="train.py",
                config=(tyro.conf.AvoidSubcommands,),
                return_unknown_args=True,
                add_help=False,
            )
    except SystemExit:
        raise ValueError(_refusal(message.getvalue(), config, rest)) from None
    if unknown:
        raise ValueError(_unknown(unknown[0], config))
    return found


def value_of(config: Trainer.Config, field: str) -> Any:
    """The value of a field or short name, such as ``training.steps``."""
    if field == "recompute":
        policy = config.activation_checkpoint
        names = {kind: name for name, kind in RECOMPUTE.items()}
        return names.get(policy and type(policy), type(policy).__qualname__)
    if field in SHORT_NAMES:
        name = field.rpartition(".")[2]
        groups = [group.optimizer_kwargs.get(name) for group in config.optimizer.param_groups]
        return " ".join(f"{value:g}" for value in dict.fromkeys(groups) if value) or 0
    return reduce(getattr, field.split("."), config)


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


# ---------------------------------------------------------------- short names


def _set_short_names(config: Trainer.Config, arguments: list[str]) -> None:
    """Removes short names from ``arguments`` and applies them to ``config``."""
    recompute = _take("recompute", arguments)
    if recompute is not None:
        kind = recompute.replace("_", "-").lower()
        if kind not in RECOMPUTE:
            raise ValueError(
                f"--recompute ({recompute}) must be one of {', '.join(RECOMPUTE)}"
                f"{near_names(kind, RECOMPUTE)}"
            )
        policy = RECOMPUTE[kind]
        # a policy that the config has already keeps its options
        if policy is None or type(config.activation_checkpoint) is not policy:
            config.activation_checkpoint = policy and policy()
    for field in ("optimizer.lr", "optimizer.weight_decay"):
        if (given := _take(field, arguments)) is not None:
            _set_in_groups(config, field, given)


def _set_in_groups(config: Trainer.Config, field: str, given: str) -> None:
    try:
        value = float(given)
    except ValueError:
        raise ValueError(f"--{field} ({given}) must be a number; change it") from None
    name = field.rpartition(".")[2]
    HYPERPARAMETERS[name].check(f"--{field}", value)
    groups = [group.optimizer_kwargs for group in config.optimizer.param_groups]
    # a 0 is meant: norms without weight decay, parameters that do not learn
    chosen = [kwargs for kwargs in groups if kwargs.get(name) != 0]
    if value and not chosen:
        raise ValueError(
            f"--{field} ({given}) would change nothing: every parameter group of the config has 0; "
            f"set --optimizer.param_groups.0.optimizer_kwargs.{name}"
        )
    for kwargs in chosen:
        kwargs[name] = value


def _take(field: str, arguments: list[str]) -> str | None:
    """Removes ``--field VALUE`` or ``--field=VALUE`` and returns the last value; None without."""
    option, value, at = f"--{field}".replace("_", "-"), None, 0
    while at < len(arguments):
        name, equals, rest = arguments[at].partition("=")
        if name.replace("_", "-") != option:
            at += 1
            continue
        del arguments[at]
        if not equals:
            if at == len(arguments):
                raise ValueError(f"--{field} must be followed by a value")
            rest = arguments.pop(at)
        value = rest
    return value


# ---------------------------------------------------------------- refusals in one line


def _unknown(word: str, config: Trainer.Config) -> str:
    """The refusal of a word that the command line does not know."""
    name = word.partition("=")[0]
    if name.startswith("activation-checkpoint:"):  # torchtitan's own command line
        return f"{name} is not read; give --recompute {name.partition(':')[2]}"
    if not name.startswith("-"):
        return f"{word!r} belongs to no option; give --FIELD VALUE, as in --training.steps 100"
    path = name.lstrip("-").replace("-", "_")
    known = [f"--{path}" for path in (*SHORT_NAMES, *(f.path for f in offered_fields(config)))]
    alike = [option for option in known if option.endswith(f".{path}")][:3]  # --steps
    near = f"; did you mean {' or '.join(alike)}?" if alike else near_names(f"--{path}", known)
    return f"{name} is unknown{near or ';'} `train.py CONFIG {LONG_HELP}` names all fields"


def _refusal(box: str, config: Trainer.Config, arguments: list[str]) -> str:
    """The cause in one of tyro's boxes, without its frame and the help below it."""
    rows = [row.strip("│ ") for row in box.splitlines()[1:]]
    end = next((at for at, row in enumerate(rows) if row.startswith(("──", "╰"))), len(rows))
    cause = (
        " ".join(rows[:end]).strip().removeprefix("Error parsing ").removeprefix("Config: ")
        or "wrong command line"
    )
    option, _, _ = cause.partition(":")
    numbers = {"INTEGER": "a whole number", "NUMBER": "a number", "NUMBER|INTEGER": "a number"}
    for field in offered_fields(config):
        if field.option.replace("_", "-") == option and field.kind in numbers:
            given = _take(field.path, list(arguments))
            return f"{field.option} ({given}) must be {numbers[field.kind]}; change it"
    return cause


# ---------------------------------------------------------------- the long help


class Field(NamedTuple):
    """A field that the command line offers: its place, values and meaning."""

    path: str
    kind: str
    value: Any
    about: str

    @property
    def option(self) -> str:
        """The field as it is typed."""
        return f"--{self.path}"


def offered_fields(config: Any, path: str = "") -> Iterator[Field]:
    """Every field of ``config`` that this trainer reads."""
    section_class: Any = type(config)
    hints, documented = get_type_hints(section_class), _field_docs(section_class)
    for entry in fields(config):
        name = f"{path}.{entry.name}".lstrip(".")
        value = getattr(config, entry.name)
        if name in _NOT_OFFERED:
            continue
        parts = value if isinstance(value, list) and value and is_dataclass(value[0]) else None
        if is_dataclass(value):
            yield from offered_fields(value, name)
        elif parts:
            for place, part in enumerate(parts):
                yield from offered_fields(part, f"{name}.{place}")
        elif entry.name == "optimizer_kwargs":
            for key, inner in value.items():
                kind = "A B …" if isinstance(inner, tuple) else _kind(type(inner))
                yield Field(f"{name}.{key}", kind, inner, "")
        elif kind := _kind(hints[entry.name]):
            yield Field(name, kind, value, documented.get(entry.name, ""))


def long_help(name: str, config: Trainer.Config) -> str:
    """Every field of ``config`` with its type, value and meaning."""
    lines = [f"Fields of {name}, with their values. Short names:", ""]
    width = int(os.environ.get("COLUMNS") or 100)
    for short, about in SHORT_NAMES.items():
        lines.append(f"  --{short}  {about} [{value_of(config, short)}]")
    indent = " " * 6
    before = None
    # the run's own fields first; else in the order of the config
    for field in sorted(offered_fields(config), key=lambda field: "." in field.path):
        if (section := field.path.rpartition(".")[0]) != before:
            before = section
            lines += ["", section or "the run"]
        last = field.path.rpartition(".")[2]
        kind = f"| --{section}{'.' * bool(section)}no-{last}" if field.kind == FLAG else field.kind
        lines.append(f"  {field.option} {kind} [{_shown(field.value)}]")
        lines += textwrap.wrap(field.about, width, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={inner}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)


def _kind(hint: Any) -> str:
    """The values that a field takes, from its annotation; empty if no command line can give it."""
    if hint == dict[str, float]:
        return "NAME=NUMBER …"
    if get_origin(hint) is list:
        return "A,B,…" if get_args(hint) == (str,) else "A B …"
    inner = [part for part in get_args(hint) if part is not type(None)]
    if inner and all(isinstance(part, str) for part in inner):
        return "{" + ",".join(inner) + "}"
    if inner:
        kinds = [_kind(part) for part in inner]
        return "|".join(kinds) if all(kinds) else ""
    return {bool: FLAG, str: "TEXT", int: "INTEGER", float: "NUMBER"}.get(hint, "")


@cache
def _field_docs(cls: Any) -> dict[str, str]:
    """Field → the string below it in the source of ``cls`` or its parents."""
    found: dict[str, str] = {}
    parents: list[Any] = [parent for parent in reversed(cls.__mro__) if is_dataclass(parent)]
    for parent in parents:
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(parent))).body
        assert isinstance(body, ast.ClassDef), "a dataclass is a class"
        for entry, below in zip_longest(body.body, body.body[1:]):
            if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
                text = below.value if isinstance(below, ast.Expr) else None
                about = text.value if isinstance(text, ast.Constant) else ""
                found[entry.target.id] = " ".join(str(about).split())
    return found


# ---------------------------------------------------------------- values of shares


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
