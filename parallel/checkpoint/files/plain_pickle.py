"""Parses pickles as data: nothing that a file names is imported, and nothing is called.

``pickle.load`` runs what the file asks for. Here a class or function in the file becomes a
``Named``, and a call of it a ``Made`` with its arguments; the caller decides which are allowed.
Memory and time are linear in the length of the pickle. Supports only the operations that Python's
picklers write for plain values and dataclasses (protocols 2 to 5).
"""

import gc
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_MOST_WAITING = 1_000_000  # values on the stack; picklers write batches of 1,000
_MOST_MARKS = 1000
_BYTES_PER_OBJECT = 4  # DCP's have one in 8


@dataclass(frozen=True, slots=True)
class Named:
    """A class or function named by the pickle; never looked up."""

    module: str
    name: str


@dataclass(eq=False, slots=True)
class Made:
    """The result of calling ``of`` with ``arguments``, not called; ``state``: set afterwards."""

    of: Named
    arguments: tuple[Any, ...]
    state: Any = None
    items: list[Any] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Stored:
    """A value stored outside the pickle under ``key``."""

    key: Any


class ForeignName(ValueError):
    """The pickle names a class or function that is not allowed."""


class _Refused(ValueError):
    pass


def parse(content: bytes, known: Callable[[Named], bool]) -> Any:
    """Returns the value of a pickle; ``ValueError`` if it is damaged or holds more than plain data,
    ``ForeignName`` if it names what is not ``known``.

    Plain data are None, bool, int, float, str, tuple, list and dict (with keys that are a str, an
    int or a ``Made``), and ``Named``, ``Made`` and ``Stored`` in them.
    """
    parser = _Parser(len(content), known)
    collecting = gc.isenabled()
    gc.disable()  # nothing becomes garbage here, and collecting takes three times as long
    try:
        for operation, argument, _ in pickletools.genops(content):
            action = _OPERATIONS.get(operation.name)
            if action is None:
                raise _Refused(f"it has the operation {operation.name}, foreign to plain data")
            action(parser, argument)
        (value,) = parser.stack
        return value
    except (_Refused, ForeignName):
        raise
    except (IndexError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"it is damaged or incomplete ({error})") from error
    finally:
        if collecting:
            gc.enable()


def plain(value: Any, most_nested: int = 20) -> Any:
    """Returns ``value``; ``ValueError`` if it has classes or calls, or is nested too deep."""
    level = [value]
    for _ in range(most_nested):
        inner: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                inner += part.keys()
                inner += part.values()
            elif isinstance(part, tuple | list):
                inner += part
            elif not (part is None or isinstance(part, str | int | float)):
                raise ValueError(f"it names {_shown(part)}, where a plain value belongs")
            if len(inner) > _MOST_WAITING:
                raise ValueError(f"it has more than {_MOST_WAITING:,} values")
        level = inner
        if not level:
            return value
    raise ValueError(f"it is nested more than {most_nested} levels deep")


def _shown(part: Any) -> str:
    named = part.of if isinstance(part, Made) else part
    return f"{named.module}.{named.name}" if isinstance(named, Named) else "a stored value"


class _Parser:
    """The stack machine of the pickle format, without the operations that run code."""

    def __init__(self, length: int, known: Callable[[Named], bool]):
        self.known = known
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under each open mark
        self.memo: list[Any] = []
        self.objects_left = 1024 + length // _BYTES_PER_OBJECT

    def push(self, value: Any) -> None:
        if len(self.stack) >= _MOST_WAITING:
            raise _Refused(f"more than {_MOST_WAITING:,} values wait in it at once")
        self.stack.append(value)

    def push_new(self, value: Any) -> None:
        """Pushes a value that takes memory of its own."""
        self.objects_left -= 1
        if self.objects_left < 0:
            raise _Refused("it makes more objects than its length can hold")
        self.push(value)

    def remember(self, place: int) -> None:
        if place > len(self.memo):
            raise _Refused("it numbers its values out of order")
        self.memo[place : place + 1] = [self.stack[-1]]

    def to_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.below.pop()
        return values

    def open_mark(self) -> None:
        if len(self.below) >= _MOST_MARKS:
            raise _Refused(f"it is nested more than {_MOST_MARKS:,} levels deep")
        self.below.append(self.stack)
        self.stack = []

    def last(self, count: int) -> list[Any]:
        """Pops ``count`` values."""
        if count > len(self.stack):
            raise _Refused("it ends early")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise _Refused("it appends to something that is no list")
        target += values

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        keys = values[::2]
        if len(values) % 2 or not all(type(key) in (str, int, Made) for key in keys):
            raise _Refused("it has a key that is neither text nor a number")
        if isinstance(target, dict):
            target.update(zip(keys, values[1::2], strict=True))
        elif isinstance(target, Made):
            target.items += zip(keys, values[1::2], strict=True)
        else:
            raise _Refused("it sets an item of something that has none")

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise _Refused("it has a name that is no text")
        named = Named(module, name)
        if not self.known(named):
            raise ForeignName(f"it names {module}.{name}")
        self.push_new(named)

    def make(self) -> None:
        of, arguments = self.last(2)
        if type(of) is not Named or type(arguments) is not tuple:
            raise _Refused("it calls something that is no name")
        self.push_new(Made(of, arguments))

    def build(self) -> None:
        target, state = self.last(2)
        if type(target) is not Made or target.state is not None:
            raise _Refused("it sets the state of something that has none")
        target.state = state
        self.push(target)


_OPERATIONS: dict[str, Callable[[_Parser, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda p, _: None),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1")
        + ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        _Parser.push,
    ),
    "NONE": lambda p, _: p.push(None),
    "NEWTRUE": lambda p, _: p.push(True),
    "NEWFALSE": lambda p, _: p.push(False),
    "MARK": lambda p, _: p.open_mark(),
    "BINPUT": _Parser.remember,
    "LONG_BINPUT": _Parser.remember,
    "MEMOIZE": lambda p, _: p.memo.append(p.stack[-1]),
    "BINGET": lambda p, place: p.push(p.memo[place]),
    "LONG_BINGET": lambda p, place: p.push(p.memo[place]),
    "EMPTY_TUPLE": lambda p, _: p.push(()),
    "TUPLE": lambda p, _: p.push_new(tuple(p.to_mark())),
    "TUPLE1": lambda p, _: p.push_new(tuple(p.last(1))),
    "TUPLE2": lambda p, _: p.push_new(tuple(p.last(2))),
    "TUPLE3": lambda p, _: p.push_new(tuple(p.last(3))),
    "EMPTY_LIST": lambda p, _: p.push_new([]),
    "APPEND": lambda p, _: p.extend(p.last(1)),
    "APPENDS": lambda p, _: p.extend(p.to_mark()),
    "EMPTY_DICT": lambda p, _: p.push_new({}),
    "SETITEM": lambda p, _: p.set_items(p.last(2)),
    "SETITEMS": lambda p, _: p.set_items(p.to_mark()),
    "GLOBAL": lambda p, names: p.name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda p, _: p.name(*p.last(2)),
    "REDUCE": lambda p, _: p.make(),
    "NEWOBJ": lambda p, _: p.make(),
    "BUILD": lambda p, _: p.build(),
    "BINPERSID": lambda p, _: p.push_new(Stored(p.last(1)[0])),
}
