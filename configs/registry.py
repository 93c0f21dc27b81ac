"""Finds configs by name: this project's, or a user's own as ``FILE.py:NAME``.

Imports torch only to build a config or list those of a module: names alone are in ``listing``.
"""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from earlyfuse.data.console import near_names
from earlyfuse.data.json_files import shown

if TYPE_CHECKING:
    from earlyfuse.parallel.trainer import Trainer

ConfigFunction: TypeAlias = "Callable[[], Trainer.Config]"

DEFAULT, DEFAULT_WITH_START = "moma_4t4i", "pretrained"
# of earlyfuse.configs
MODULES = (
    "embedded",
    "presets.moma",
    "presets.mixture_of_mamba",
    "presets.mixture_of_transformers",
    "presets.mixture_of_depths",
    "presets.transfusion",
    "presets.chameleon",
    "presets.pretrained",
)


def load_config(name: str) -> "Trainer.Config":
    """The config called ``name``; ``ValueError`` if there is none, or it is not a config."""
    from earlyfuse.parallel.trainer import Trainer

    file, function_name = split_name(name)
    if not file:
        configs = catalogue()
        check_known(name, configs)
        return configs[name]()
    module = import_file(Path(file))
    function = getattr(module, "CONFIGS", {}).get(
        function_name, getattr(module, function_name or "", None)
    )
    if not callable(function):
        configs = _configs_of(module)
        raise ValueError(
            f"config ({name}) must name a function of {file}"
            f"{near_names(function_name, configs) or ';'} {file} has "
            f"{', '.join(f'{file}:{known}' for known in configs) or 'none'}"
        )
    if required := _required_parameters(function):
        raise ValueError(
            f"config ({name}) must be a function without required arguments, and it requires "
            f"{', '.join(required)}; give them defaults, or write a function that passes them"
        )
    config = _run_user_code(file, function)
    if not isinstance(config, Trainer.Config):
        raise ValueError(
            f"config ({name}) must return a Trainer.Config, and returned {shown(config)}; return "
            "the config that it builds"
        )
    return config


def sections(file: str = "") -> dict[str, dict[str, ConfigFunction]]:
    """Title → configs by name, of each module of this project or of the Python file ``file``."""
    if file:
        module = import_file(Path(file))
        named = {f"{file}:{name}": function for name, function in _configs_of(module).items()}
        return {_first_line(module) or file: named}
    modules = [importlib.import_module(f"earlyfuse.configs.{name}") for name in MODULES]
    return {_first_line(module): _configs_of(module) for module in modules}


def catalogue() -> dict[str, ConfigFunction]:
    """This project's configs by name."""
    return {name: function for configs in sections().values() for name, function in configs.items()}


def title(name: str) -> str:
    """``name`` and the first line of its function's docstring."""
    file, _ = split_name(name)
    for configs in (sections(file) if file else sections()).values():
        if name in configs:
            return f"{name}: {_first_line(configs[name])}".removesuffix(": ")
    return name


def split_name(name: str) -> tuple[str, str]:
    """Python file and function of ``FILE.py:NAME``; no file for a config of this project."""
    if name.endswith(".py"):
        return name, ""
    file, _, function = name.rpartition(":")
    return (file, function) if file.endswith(".py") else ("", name)


def check_known(name: str, configs: Iterable[str]) -> None:
    """``ValueError`` with near names unless ``name`` is one of ``configs``."""
    if name not in (known := list(configs)):
        raise ValueError(
            f"config ({name!r}) is unknown{near_names(name, known) or ';'} `train.py --list` names "
            "all, and FILE.py:NAME is one of your own"
        )


def _first_line(documented: Any) -> str:
    return (documented.__doc__ or "").strip().partition("\n")[0]


def _configs_of(module: ModuleType) -> dict[str, ConfigFunction]:
    """The public functions of ``module`` that require no argument, and its ``CONFIGS``."""
    functions = {
        name: function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
        and not name.startswith("_")
        and not _required_parameters(function)
    }
    return functions | getattr(module, "CONFIGS", {})


def _required_parameters(function: Callable[..., Any]) -> list[str]:
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in optional
    ]


def import_file(path: Path) -> ModuleType:
    """Imports a user's file once; modules beside it can be imported by name or relatively."""
    if not path.is_file():
        raise ValueError(
            f"config file ({path}) does not exist; give its path from the current folder, as in "
            "path/to/my_runs.py:my_config"
        )
    folder = path.resolve().parent
    package = f"user_configs_{sha256(str(folder).encode()).hexdigest()[:8]}"
    name = f"{package}.{path.stem.replace('.', '_')}"
    if name in sys.modules:
        return sys.modules[name]
    if package not in sys.modules:
        sys.modules[package] = parent = ModuleType(package)
        parent.__path__ = [str(folder)]
        sys.path.append(str(folder))  # last: a neighbour must not hide an installed package
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    loader = spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        _run_user_code(str(path), lambda: loader.exec_module(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _run_user_code(file: str, action: Callable[[], Any]) -> Any:
    """Calls ``action``; errors of a user's code become a ``ValueError`` with file and line."""
    try:
        return action()
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError):
            line = error.lineno
        else:
            frames = traceback.extract_tb(error.__traceback__)
            own = [f.lineno for f in frames if Path(f.filename) == Path(file).resolve()]
            line = own[-1] if own else None
        raise ValueError(
            f"{file}, line {line}, raised {type(error).__name__}: {error}; correct the file"
        ) from error
