"""Reads a pickle as data: nothing it names is imported, nothing it asks for is called.

A pickle is a program for a stack machine whose instructions can import and call anything. This machine knows only the
instructions that plain containers, tensors and objects need, and for the names in a closed list it makes either a plain
container, a value by a function of ours, or an `Inert`: a stand-in that stores what it is given and can do nothing.
Every other name is refused before anything is done with it. The standard library only splits the bytes into
instructions (pickletools, which executes nothing).
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from sivae_dist.errors import UserError

MOST_BYTES = 64 << 20  # of one pickle: a checkpoint's tensors lie outside it, names and numbers take far less
MOST_INSTRUCTIONS = 5_000_000

Name = tuple[str, str]  # module, name within it
Call = Callable[..., Any]
Names = dict[Name, Call | None]  # what a known name makes of its arguments; None for an inert stand-in


class DamagedError(ValueError):
    """The bytes are no pickle of the expected kind: cut off, garbled, or of another sort."""


class Named:
    """A known class or function, while it is on the stack."""

    def __init__(self, name: Name, call: Call | None) -> None:
        self.name, self.call = name, call

    def __call__(self, *args: Any) -> Any:
        """The plain value it stands for, or an Inert."""
        return self.call(*args) if self.call is not None else Inert(self.name, args)


@dataclass(eq=False)
class Inert:
    """In place of an object of a class of the training code: its arguments and its attributes, no behaviour."""

    name: Name
    args: tuple[Any, ...]
    state: Any = None

    def get(self, attribute: str) -> Any:
        """The stored attribute, or None."""
        return self.state.get(attribute) if isinstance(self.state, dict) else None


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...
    def readline(self) -> bytes: ...


class _Bounded:
    """The file, up to a number of bytes: a length claimed in a damaged file must not make us allocate it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.left = file, MOST_BYTES

    def read(self, size: int) -> bytes:
        if size > self.left:
            raise DamagedError("an item is longer than a pickle of a checkpoint can be")
        data = self.file.read(size)
        self.left -= len(data)
        return data

    def readline(self) -> bytes:
        data = self.file.readline(min(self.left, 4096))
        self.left -= len(data)
        return data


class _Mark:
    """Where a run of items on the stack begins."""


_PUSHED = {
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINSTRING SHORT_BINSTRING"
    " BINBYTES SHORT_BINBYTES BINBYTES8": lambda argument: argument,
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_DICT": lambda _: {},
    "EMPTY_SET": lambda _: set(),
    "MARK": lambda _: _Mark(),
}
PUSHES: dict[str, Callable[[Any], Any]] = {code: make for codes, make in _PUSHED.items() for code in codes.split()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
PUTS, GETS = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}


def read(file: BinaryIO, names: Names, persistent: Callable[[Any], Any]) -> Any:
    """One pickle from `file`, which is left right behind it.

    names: what may be named. persistent: turns the identifiers of things stored outside the pickle into values.
    Raises UserError naming anything else the pickle asks for, DamagedError when the bytes make no sense.
    """
    machine = _Machine(names, persistent)
    for count, (instruction, argument, _) in enumerate(pickletools.genops(_readable(file))):
        if count > MOST_INSTRUCTIONS:
            raise DamagedError(f"more than {MOST_INSTRUCTIONS} instructions")
        if instruction.name == "STOP":
            break
        machine.run(instruction.name, argument)
    return machine.pop()


def _readable(file: BinaryIO) -> Any:
    bounded: _Readable = _Bounded(file)
    return bounded


class _Machine:
    """Stack and memo."""

    def __init__(self, names: Names, persistent: Callable[[Any], Any]) -> None:
        self.names, self.persistent = names, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, code: str, argument: Any) -> None:
        """One instruction."""
        if code in PUSHES:
            self.stack.append(PUSHES[code](argument))
        elif code in PUTS:
            self.memo[argument] = self.top()
        elif code == "MEMOIZE":
            self.memo[len(self.memo)] = self.top()
        elif code in GETS:
            self.stack.append(self.memo[argument])
        elif code in TUPLES:
            self.stack.append(tuple([self.pop() for _ in range(TUPLES[code])][::-1]))
        elif code == "GLOBAL":
            module, _, name = argument.partition(" ")
            self.stack.append(self.named(module, name))
        elif code == "STACK_GLOBAL":
            name, module = self.pop(), self.pop()
            self.stack.append(self.named(module, name))
        elif code in ("REDUCE", "NEWOBJ"):
            args, callee = self.pop(), self.pop()
            if not isinstance(callee, Named) or not isinstance(args, tuple):
                raise DamagedError(f"{code} without a name and arguments")
            self.stack.append(callee(*args))
        elif code == "BINPERSID":
            self.stack.append(self.persistent(self.pop()))
        elif code == "POP":
            self.pop()
        elif code in ("PROTO", "FRAME"):
            pass
        else:
            self.fill(code)

    def fill(self, code: str) -> None:
        """The instructions that put items into what lies below them."""
        if code == "BUILD":
            state, target = self.pop(), self.top()
            if isinstance(target, Inert):
                target.state = state
            # Attributes of anything else (metadata of a state dict, flags of a parameter) are not needed.
        elif code == "TUPLE":
            self.stack.append(tuple(self.items()))
        elif code in ("APPEND", "APPENDS"):
            items = [self.pop()] if code == "APPEND" else self.items()
            self.target(list).extend(items)
        elif code in ("SETITEM", "SETITEMS"):
            items = [self.pop(), self.pop()][::-1] if code == "SETITEM" else self.items()
            put_all(self.target(dict), zip(items[::2], items[1::2], strict=True))
        elif code == "ADDITEMS":
            items = self.items()
            self.target(set).update(map(plain_key, items))
        else:
            raise UserError(
                f"the file uses the pickle instruction {code}, which no checkpoint needs", "take it for hostile"
            )

    def named(self, module: Any, name: Any) -> Named:
        if not isinstance(module, str) or not isinstance(name, str):
            raise DamagedError("a name that is no text")
        if (module, name) not in self.names:
            raise UserError(
                f"the file asks to import {shown(f'{module}.{name}')}, which no published checkpoint contains; "
                "nothing was imported or run",
                "do not open this file with torch.load; get the checkpoint from its publisher again",
            )
        return Named((module, name), self.names[module, name])

    def pop(self) -> Any:
        if not self.stack or isinstance(self.stack[-1], _Mark):
            raise DamagedError("an instruction finds too little on the stack")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack or isinstance(self.stack[-1], _Mark):
            raise DamagedError("an instruction finds too little on the stack")
        return self.stack[-1]

    def items(self) -> list[Any]:
        """Everything above the last mark, which goes too."""
        items: list[Any] = []
        while self.stack:
            item = self.stack.pop()
            if isinstance(item, _Mark):
                return items[::-1]
            items.append(item)
        raise DamagedError("a mark is missing")

    def target(self, kind: type) -> Any:
        found = self.top()
        if not isinstance(found, kind):
            raise DamagedError(f"items for a {type(found).__name__}")
        return found


def plain_key(key: Any) -> Hashable:
    """A key of a dict or set: text or number. Hashing nested tuples could take forever."""
    if not isinstance(key, str | int | float | bytes | None):
        raise DamagedError(f"a key that is a {type(key).__name__}")
    return key


def put_all(target: dict[Any, Any], pairs: Any) -> dict[Any, Any]:
    """Adds (key, value) pairs with plain keys."""
    for key, value in pairs:
        target[plain_key(key)] = value
    return target


def shown(text: str, most: int = 120) -> str:
    """Text from a stranger's file for a message: escaped, and not too long."""
    return ascii(text if len(text) <= most else text[:most] + "...")
