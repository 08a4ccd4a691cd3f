"""A machine for the instructions of pickles that can make plain values and call what it is given.

It does what Python's own does for the instructions that torch writes, and refuses the others. It
never imports, sets attributes on nothing, hashes nothing but numbers and texts, and stops when a
program makes more than any file of weights needs.
"""

import io
import pickletools
from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

__all__ = ["Malformed", "StandIn", "run"]

# Instructions, and items of containers that are copied. The longest pickle of a real checkpoint,
# with the state of an optimizer, has some 500,000; each makes 100 bytes or so.
_BUDGET = 1_000_000
_SET = 4  # an empty set weighs as much as so many others
_LONGEST_NUMBER = 64  # bytes
_MOST_PARTS = 8  # of a tuple that is a key

_VALUES = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NEW: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = frozenset({"PROTO", "FRAME"})
_PLAIN_KEYS = (str, int, float, bytes, type(None))

Find = Callable[[str, str], Any]


class Malformed(Exception):  # noqa: N818, it is turned into a CheckpointError that names the file
    """A program does what no file of weights does."""


@dataclass(frozen=True, eq=False)
class StandIn:
    """Where an object of a class stood that is of no use here, or the class itself.

    Attributes:
        name: Of the class.
    """

    name: str


@runtime_checkable
class Stateful(Protocol):
    """An object that a program may give a state."""

    def set_state(self, state: Any) -> None:
        """Take it."""
        ...


class _Mark:
    """Where the items of a container begin on the stack."""


_MARK = _Mark()


def run(program: bytes, find: Find, load: Callable[[Any], Any]) -> tuple[Any, int]:
    """Run a pickle.

    Args:
        program: Begins with the pickle; what comes after its end is not looked at.
        find: From the module and the name of what the program wants to a function it may call,
            a `StandIn` or a value; raises if the program may not have it.
        load: From a persistent id to what it stands for.

    Returns:
        What it makes, and how many bytes it took.

    Raises:
        Malformed: If it has an instruction that torch does not write, makes too much, or does
            with a value what cannot be done with it. Other exceptions tell of damage.
    """
    machine = _Machine(find, load)
    file = io.BytesIO(program)
    for instruction, argument, _ in pickletools.genops(file):
        if instruction.name == "STOP":
            return machine.pop(), file.tell()
        machine.step(instruction.name, argument)
    raise Malformed("it has no end")


class _Machine:
    def __init__(self, find: Find, load: Callable[[Any], Any]) -> None:
        self._find, self._load = find, load
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._spent = 0

    def pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise Malformed("it takes what is not there")
        return self._stack.pop()

    def step(self, name: str, argument: Any) -> None:
        self._spend(1)
        if name in _VALUES:
            if isinstance(argument, int) and argument.bit_length() > 8 * _LONGEST_NUMBER:
                raise Malformed(f"a whole number of more than {_LONGEST_NUMBER} bytes")
            self._push(bytes(argument) if isinstance(argument, bytearray) else argument)
        elif name in _CONSTANTS:
            self._push(_CONSTANTS[name])
        elif name in _NEW:
            self._spend(_SET if name == "EMPTY_SET" else 0)
            self._push(_NEW[name]())
        elif name in _TUPLES:
            items = [self.pop() for _ in range(_TUPLES[name])]
            self._push(tuple(reversed(items)))
        elif name not in _IGNORED:
            method = getattr(self, f"_do_{name.lower()}", None)
            if method is None:
                raise Malformed(
                    f"refused: it has the instruction {name}, which torch does not write"
                )
            method(argument)

    def _spend(self, amount: int) -> None:
        self._spent += amount
        if self._spent > _BUDGET:
            raise Malformed(
                f"refused: it makes more than {_BUDGET:,} objects, as no checkpoint does"
            )

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _top(self) -> Any:
        value = self.pop()
        self._stack.append(value)
        return value

    def _items(self) -> list[Any]:
        """Take what stands above the last mark, and the mark."""
        for place in range(len(self._stack) - 1, -1, -1):
            if self._stack[place] is _MARK:
                items = self._stack[place + 1 :]
                del self._stack[place:]
                return items
        raise Malformed("it takes what is not there")

    def _do_mark(self, _: Any) -> None:
        self._push(_MARK)

    def _do_pop(self, _: Any) -> None:
        if self._stack and self._stack[-1] is _MARK:
            self._stack.pop()
        else:
            self.pop()

    def _do_pop_mark(self, _: Any) -> None:
        self._items()

    def _do_put(self, place: int) -> None:
        self._memo[place] = self._top()

    _do_binput = _do_long_binput = _do_put

    def _do_memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._top()

    def _do_get(self, place: int) -> None:
        if place not in self._memo:
            raise Malformed(f"it remembers nothing under {place}")
        self._push(self._memo[place])

    _do_binget = _do_long_binget = _do_get

    def _do_list(self, _: Any) -> None:
        self._push(self._items())

    def _do_tuple(self, _: Any) -> None:
        self._push(tuple(self._items()))

    def _do_dict(self, _: Any) -> None:
        found: dict[Any, Any] = {}
        _set_items(found, self._items())
        self._push(found)

    def _do_frozenset(self, _: Any) -> None:
        self._spend(_SET)
        self._push(frozenset(map(_key, self._items())))

    def _do_append(self, _: Any) -> None:
        item = self.pop()
        _extend(self._top(), [item])

    def _do_appends(self, _: Any) -> None:
        items = self._items()
        _extend(self._top(), items)

    def _do_additems(self, _: Any) -> None:
        items, target = self._items(), self._top()
        if isinstance(target, set):
            cast(set[Any], target).update(map(_key, items))
        elif not isinstance(target, StandIn):
            raise Malformed(f"it adds to a {type(target).__name__}")

    def _do_setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        _set_items(self._top(), [key, value])

    def _do_setitems(self, _: Any) -> None:
        items = self._items()
        _set_items(self._top(), items)

    def _do_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push(self._find(module, name))

    def _do_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Malformed("it names something by no text")
        self._push(self._find(module, name))

    def _do_binpersid(self, _: Any) -> None:
        self._push(self._load(self.pop()))

    def _do_reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        self._call(function, arguments)

    def _do_newobj(self, _: Any) -> None:
        arguments, kind = self.pop(), self.pop()
        self._call(kind, arguments)

    def _do_newobj_ex(self, _: Any) -> None:
        self.pop()  # named arguments, which nothing here takes
        self._do_newobj(None)

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(arguments, tuple):
            raise Malformed("it calls with something else than arguments")
        given = cast(tuple[Any, ...], arguments)
        self._spend(sum(len(a) for a in given if isinstance(a, Sized)))
        if isinstance(function, StandIn):
            self._push(StandIn(function.name))
        elif callable(function):
            self._push(function(*given))
        else:
            raise Malformed(f"it calls a {type(function).__name__}")

    def _do_build(self, _: Any) -> None:
        state, target = self.pop(), self._top()
        if isinstance(target, Stateful):
            target.set_state(state)
        # OrderedDict has its _metadata so, and stand-ins all that they are
        elif type(target) not in (dict, StandIn):
            raise Malformed(f"it changes a {type(target).__name__}")


def _key(value: Any) -> Any:
    """Let what is to be hashed be flat, so that hashing it takes no time and no depth."""
    if isinstance(value, (*_PLAIN_KEYS, StandIn)):
        return value
    if isinstance(value, tuple):
        parts = cast(tuple[Any, ...], value)
        if len(parts) <= _MOST_PARTS and all(isinstance(part, _PLAIN_KEYS) for part in parts):
            return parts
    raise Malformed(f"a {type(value).__name__} where only a number or a text can stand")


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        cast(list[Any], target).extend(items)
    elif not isinstance(target, StandIn):
        raise Malformed(f"it appends to a {type(target).__name__}")


def _set_items(target: Any, items: list[Any]) -> None:
    if len(items) % 2:
        raise Malformed("a key without a value")
    if isinstance(target, dict):
        found = cast(dict[Any, Any], target)
        for key, value in zip(items[::2], items[1::2], strict=True):
            found[_key(key)] = value
    elif not isinstance(target, StandIn):
        raise Malformed(f"it sets items of a {type(target).__name__}")
