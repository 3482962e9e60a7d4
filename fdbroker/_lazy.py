"""What the start of ``fdbroker exec`` saves: imports that wait, and small copies of the library.

The start of a server waits for ``fdbroker exec``, and to import `typing` and `contextlib` takes
as long as everything else that it does.  So the modules that exec needs take
`suppress` and `NamedTuple` from here; all other modules take the original ones.  For a type checker
they are the original ones everywhere.

`exported` is for the ``__init__`` of a package whose names load their modules when they are first
used.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import suppress
    from typing import Any, NamedTuple
else:

    class _Maker(type):
        """Makes a named tuple of the annotations of a class, with its methods and defaults."""

        def __new__(cls, name: str, bases: tuple[type, ...], scope: dict[str, Any]) -> type:
            if not bases:
                return super().__new__(cls, name, bases, scope)
            from collections import namedtuple  # `import fdbroker` needs none

            fields = scope.get("__annotations__", {})
            defaults = [scope[field] for field in fields if field in scope]
            made = namedtuple(name, fields, defaults=defaults, module=scope["__module__"])
            for key in scope.keys() - {*fields, "__annotations__", "__module__", "__qualname__"}:
                setattr(made, key, scope[key])
            return made

    class NamedTuple(metaclass=_Maker):
        """The base of a class that only has annotations, and is a named tuple of them."""

    class suppress:  # noqa: N801 - as it is called there
        """A block that ends quietly when one of the given exceptions is raised in it."""

        __slots__ = ("_kinds",)

        def __init__(self, *kinds: type[BaseException]) -> None:
            self._kinds = kinds

        def __enter__(self) -> None:
            pass

        def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
            return kind is not None and issubclass(kind, self._kinds)


__all__ = ["NamedTuple", "exported", "suppress"]


def exported(
    package: str, homes: Mapping[str, str | None]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and ``__dir__`` of a package that exports names lazily.

    homes: for each exported name the module that defines it, or None for a module of the package
    that has this name itself.
    """
    module = sys.modules[package]

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        from importlib import import_module

        home = homes[name]
        if home is None:
            value: Any = import_module(f"{package}.{name}")
        else:
            value = getattr(import_module(home), name)
        setattr(module, name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(module), *homes})

    return load, names
