"""English text from Python: the language reference and the docstrings of the standard library.

Docstrings are parsed from source with ``ast``; nothing is imported or run.
"""

import ast
import inspect
import pydoc_data.topics as reference
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_SHORTEST = 60  # characters of a useful docstring
_LONGEST = 4000  # characters of one document; the reference's topics are cut at blank lines
_NO_PROSE = frozenset(
    "encodings ensurepip idlelib lib2to3 pydoc_data test this tkinter turtledemo".split()
)  # tkinter: some distributions lack it
_RULE = re.compile(r"^[ \t]*([*=^~\"-])\1{2,}[ \t]*$\n?", re.MULTILINE)
_CONTROL = re.compile(r"[^\n\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]")
_GAP = re.compile(r"\n{3,}")


def documents(scale: float = 1.0) -> list[tuple[str, str]]:
    """(name of the work, text) in a fixed order; a work may span several documents.

    ``scale`` in (0, 1] selects every ``1 / scale``-th topic and module. Names are
    ``reference/<topic>`` or the dotted name of the documented object. Raises ``FileNotFoundError``
    for an interpreter without the source of its library.
    """
    step = round(1 / scale)
    found = [
        (f"reference/{topic}", part)
        for topic, text in sorted(reference.topics.items())[::step]
        for part in _parts(_clean(text))
    ]
    seen: set[str] = set()
    for name, docstring in _docstrings(step):
        text = _clean(docstring)
        if len(text) >= _SHORTEST and text not in seen:
            seen.add(text)
            found += [(name, part) for part in _parts(f"{name}\n\n{text}")]
    if not seen:
        raise FileNotFoundError(
            f"no library source in {_library()}; use a Python that has its .py files installed"
        )
    return found


def frequent_words(texts: list[str], count: int, shortest: int = 3, longest: int = 6) -> list[str]:
    """The most frequent lower-case ASCII words, ties in alphabetical order."""
    counts: Counter[str] = Counter()
    pattern = re.compile(rf"(?<![\w.])[a-z]{{{shortest},{longest}}}(?![\w(])")
    for text in texts:
        counts.update(pattern.findall(text))
    return sorted(counts, key=lambda word: (-counts[word], word))[:count]


def _docstrings(step: int) -> Iterator[tuple[str, str]]:
    """Dotted name and raw docstring of modules, classes and functions, by module name."""
    library = _library()
    public = sorted(n for n in sys.stdlib_module_names - _NO_PROSE if not n.startswith("_"))
    for top in public[::step]:
        single = library / f"{top}.py"
        files = [single] if single.is_file() else sorted((library / top).rglob("*.py"))
        for file in files:
            module = file.relative_to(library).with_suffix("").parts
            if {"test", "tests", "site-packages"}.isdisjoint(module):
                name = ".".join(part for part in module if part != "__init__")
                yield from _walk(name, ast.parse(file.read_bytes()))


def _walk(
    name: str, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
) -> Iterator[tuple[str, str]]:
    if docstring := ast.get_docstring(node, clean=False):
        yield name, docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(f"{name}.{child.name}", child)


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _clean(text: str) -> str:
    """Remove indentation, ruled lines under headings and control characters."""
    text = _CONTROL.sub("", inspect.cleandoc(text))
    text = "\n".join(line.rstrip() for line in _RULE.sub("", text).split("\n"))
    return _GAP.sub("\n\n", text).strip()


def _parts(text: str) -> list[str]:
    """``text`` split at blank lines into parts of ``_LONGEST`` characters where possible."""
    parts = [""]
    for paragraph in text.split("\n\n"):
        if parts[-1] and len(parts[-1]) + len(paragraph) + 2 > _LONGEST:
            parts.append("")
        parts[-1] += ("\n\n" if parts[-1] else "") + paragraph
    return [part for part in parts if part.strip()]
