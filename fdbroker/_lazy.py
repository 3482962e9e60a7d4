"""What the standard library has too, without what its import costs.

``fdbroker exec`` is waited for by whoever starts a server, and to import `typing` and `contextlib`
takes longer than all else that it does.  For a type checker these are the original ones.
"""

from __future__ import annotations

from collections import namedtuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import suppress
    from typing import Any, NamedTuple
else:

    class _Maker(type):
        """Makes a named tuple of the annotations of a class, with its methods and defaults."""

        def __new__(cls, name: str, bases: tuple[type, ...], scope: dict[str, Any]) -> type:
            if not bases:
                return super().__new__(cls, name, bases, scope)
            fields = scope.get("__annotations__", {})
            defaults = [scope[field] for field in fields if field in scope]
            made = namedtuple(name, fields, defaults=defaults, module=scope["__module__"])
            for key in scope.keys() - {*fields, "__annotations__", "__module__", "__qualname__"}:
                setattr(made, key, scope[key])
            return made

    class NamedTuple(metaclass=_Maker):
        """The base of a class that only has annotations, and is a named tuple of them."""

    class suppress:  # noqa: N801 - as it is called there
        """A block that such an exception ends quietly."""

        __slots__ = ("_kinds",)

        def __init__(self, *kinds: type[BaseException]) -> None:
            self._kinds = kinds

        def __enter__(self) -> None:
            pass

        def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
            return kind is not None and issubclass(kind, self._kinds)


__all__ = ["NamedTuple", "suppress"]
