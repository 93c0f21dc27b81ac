"""Parses pickles as data: nothing that a file names is imported, and nothing is called.

``pickle.load`` runs what the file asks for. Here a class or function in the file becomes a
``Named``, and a call of it a ``Made`` with its arguments; whoever reads the file decides what those
may be. Memory and time are linear in the length of the pickle. Only the operations that Python's
picklers write for plain values and dataclasses (protocols 2 to 5) are known; any other is refused.
"""

import gc
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_MOST_WAITING = 1_000_000  # values on the stack; picklers put down batches of 1,000
_BYTES_PER_OBJECT = 4  # DCP's have one in 8


@dataclass(frozen=True, slots=True)
class Named:
    """A class or function that the pickle names; never looked up."""

    module: str
    name: str


@dataclass(eq=False, slots=True)
class Made:
    """What calling ``of`` with ``arguments`` would give. ``state``: what it would be set to."""

    of: Named
    arguments: tuple[Any, ...]
    state: Any = None
    items: list[Any] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Stored:
    """A value that is beside the pickle, found by ``key``."""

    key: Any


class ForeignName(ValueError):
    """The pickle names a class or function that has no place in it."""


def parse(content: bytes, known: Callable[[Named], bool]) -> Any:
    """The value of a pickle; ``ValueError`` if it is damaged or holds other than plain data, and
    ``ForeignName`` if it names what is not ``known``.

    Plain data are None, bool, int, float, str, tuple, list and dict (with keys that are a str, an
    int or a ``Made``), and ``Named``, ``Made`` and ``Stored`` in them.
    """
    parser = _Parser(content, known)
    collecting = gc.isenabled()
    gc.disable()  # nothing becomes garbage here, and looking for it takes three times as long
    try:
        while not parser.done:
            code = content[parser.place]
            parser.place += 1
            _OPERATIONS[code](parser)
        (value,) = parser.stack
        return value
    except (_Refused, ForeignName):
        raise
    except KeyError as error:
        code = error.args[0]
        raise ValueError(f"it has the operation {code:#x}, which no plain data need") from error
    except (IndexError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"it is damaged or incomplete ({error})") from error
    finally:
        if collecting:
            gc.enable()


def plain(value: Any, most_nested: int = 20) -> Any:
    """``value``, if it is free of classes and calls and nested at most so deep."""
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


class _Refused(ValueError):
    pass


class _Parser:
    """The stack machine of the pickle format, without the operations that do something."""

    def __init__(self, content: bytes, known: Callable[[Named], bool]):
        self.known = known
        self.content, self.place, self.done = content, 0, False
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under each open mark
        self.memo: list[Any] = []
        self.objects_left = 1024 + len(content) // _BYTES_PER_OBJECT

    def take(self, size: int) -> bytes:
        begin, self.place = self.place, self.place + size
        if size < 0 or self.place > len(self.content):
            raise _Refused("it ends early")
        return self.content[begin : self.place]

    def line(self) -> str:
        end = self.content.index(b"\n", self.place)
        return self.take(end + 1 - self.place)[:-1].decode()

    def push(self, value: Any) -> None:
        if len(self.stack) >= _MOST_WAITING:
            raise _Refused(f"more than {_MOST_WAITING:,} values wait in it at once")
        self.stack.append(value)

    def push_new(self, value: Any) -> None:
        """Push what takes memory of its own."""
        self.objects_left -= 1
        if self.objects_left < 0:
            raise _Refused("it makes more objects than its length can hold")
        self.push(value)

    def remember(self, place: int) -> None:
        if place > len(self.memo):
            raise _Refused("it numbers its values in no order")
        self.memo[place : place + 1] = [self.stack[-1]]

    def to_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.below.pop()
        return values

    def open_mark(self) -> None:
        if len(self.below) >= 1000:
            raise _Refused("it is nested more than 1,000 levels deep")
        self.below.append(self.stack)
        self.stack = []

    def tuple_of(self, count: int) -> None:
        if count > len(self.stack):
            raise _Refused("it ends early")
        values = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self.push_new(values)

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise _Refused("it appends to what is no list")
        target += values

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        keys = values[::2]
        if len(values) % 2 or not all(type(key) in (str, int, Made) for key in keys):
            raise _Refused("a key in it is neither a name nor a number")
        if isinstance(target, dict):
            target.update(zip(keys, values[1::2], strict=True))
        elif isinstance(target, Made):
            target.items += zip(keys, values[1::2], strict=True)
        else:
            raise _Refused("it sets an item of what has none")

    def pair(self) -> list[Any]:
        value, key = self.stack.pop(), self.stack.pop()
        return [key, value]

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise _Refused("a name in it is no text")
        named = Named(module, name)
        if not self.known(named):
            raise ForeignName(f"it names {module}.{name}")
        self.push_new(named)

    def make(self) -> None:
        arguments, of = self.stack.pop(), self.stack.pop()
        if type(of) is not Named or type(arguments) is not tuple:
            raise _Refused("it calls what is no name")
        self.push_new(Made(of, arguments))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is not Made or target.state is not None:
            raise _Refused("it sets the state of what has none")
        target.state = state


def _number(form: str) -> Callable[[_Parser], None]:
    size = struct.calcsize(form)
    return lambda p: p.push(struct.unpack(form, p.take(size))[0])


def _text(size_bytes: int) -> Callable[[_Parser], None]:
    return lambda p: p.push(p.take(_size(p, size_bytes)).decode("utf-8", "surrogatepass"))


def _size(p: _Parser, size_bytes: int) -> int:
    return int.from_bytes(p.take(size_bytes), "little")


_OPERATIONS: dict[int, Callable[[_Parser], Any]] = {
    ord(code): operation
    for code, operation in {
        "\x80": lambda p: p.take(1),  # protocol
        "\x95": lambda p: p.take(8),  # frame
        ".": lambda p: setattr(p, "done", True),
        "(": _Parser.open_mark,
        "N": lambda p: p.push(None),
        "\x88": lambda p: p.push(True),
        "\x89": lambda p: p.push(False),
        "J": _number("<i"),
        "K": _number("<B"),
        "M": _number("<H"),
        "G": _number(">d"),
        "\x8a": lambda p: p.push(int.from_bytes(p.take(_size(p, 1)), "little", signed=True)),
        "\x8c": _text(1),
        "X": _text(4),
        "\x8d": _text(8),
        "q": lambda p: p.remember(_size(p, 1)),
        "r": lambda p: p.remember(_size(p, 4)),
        "\x94": lambda p: p.memo.append(p.stack[-1]),
        "h": lambda p: p.push(p.memo[_size(p, 1)]),
        "j": lambda p: p.push(p.memo[_size(p, 4)]),
        ")": lambda p: p.push(()),
        "t": lambda p: p.push_new(tuple(p.to_mark())),
        "\x85": lambda p: p.tuple_of(1),
        "\x86": lambda p: p.tuple_of(2),
        "\x87": lambda p: p.tuple_of(3),
        "]": lambda p: p.push_new([]),
        "a": lambda p: p.extend([p.stack.pop()]),
        "e": lambda p: p.extend(p.to_mark()),
        "}": lambda p: p.push_new({}),
        "s": lambda p: p.set_items(p.pair()),
        "u": lambda p: p.set_items(p.to_mark()),
        "c": lambda p: p.name(p.line(), p.line()),
        "\x93": lambda p: p.name(*p.pair()),
        "R": _Parser.make,
        "\x81": _Parser.make,
        "b": _Parser.build,
        "Q": lambda p: p.push_new(Stored(p.stack.pop())),
    }.items()
}
