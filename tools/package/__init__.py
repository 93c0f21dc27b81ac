"""The import package ``earlyfuse``: its version.

Its folders stand at the top of the source tree and have no ``__init__.py``, so that an editable
installation finds them only on the path of their parent.
"""

from importlib.metadata import version
from pathlib import Path

_TREE = Path(__file__).resolve().parents[2]
if (_TREE / "tools" / "package" / "__init__.py").is_file():  # not in an installed copy
    __path__.append(str(_TREE))


def __getattr__(name: str) -> str:
    if name == "__version__":  # on demand: not every process pays for reading it
        return version("earlyfuse")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
