"""Take one limit after the other out of ``ipc/protocol/``, and see that it is found.

``python -m fuzz.limits`` in ``tests/`` prints, for each, what found it.  Each is taken out in a
process of its own, forked before anything of fdbroker was imported, and then comes the bounded run.

What is taken out is found in the table and the codec, so a limit that is new is among them:

    NAME                  a constant: its value becomes huge
    verb.field limit      the greatest value or length of a field of the table: any will do
    verb.field least      the least: any will do
    verb.field types      its types: any will do
    verb descriptors      whether it takes some: the opposite
    function: condition   a check: that part of its condition is gone, or one end of a range

What a peer must be granted (`Verb.right`) is no limit of the wire: tests/ipc/test_rules_forged.py.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

PROTOCOL = Path(__file__).parents[2] / "fdbroker" / "ipc" / "protocol"
TABLE, CODEC = "messages", "codec"
EXAMPLES = 300
HUGE = 2**70

CONSTANTS = {  # what each becomes: huge, but such that it still can be told to a system call
    "MESSAGE_BYTES": 2**20,
    "REPLY_BYTES": 2**62,
    "NAME_BYTES": HUGE,
    "NAMES": HUGE,
    "TICKET_BYTES": 2**12,
    "PURPOSE_BYTES": HUGE,
    "TIMEOUT_SECONDS": HUGE,
    "SEQ": HUGE,
    "CURSOR": HUGE,
    "PAGE_ROWS": HUGE,
    "PAGE_LOOKS": HUGE,
    "WHERE_CHARS": 2**20,
}
NO_LIMITS = {"VERSION": "a version"}

CANNOT_MATTER = {
    "hello.puts limit": "a bool is 0 or 1",
    "hello.puts types": "what is not true is False, as another version may say anything there",
    "retire.wait limit": "a bool is 0 or 1",
}
"""Of these nobody can tell whether they are there, and why."""


class Limit(NamedTuple):
    """One limit, and how to take it out: of the source, of the table that was made of it."""

    name: str
    rewrite: Callable[[ast.Module], object] = lambda tree: None
    patch: Callable[[Any], object] = lambda module: None
    module: str = TABLE


def limits() -> Iterator[Limit]:
    """All that there are."""
    yield from _constants(parse(TABLE))
    yield from _fields()
    yield from _checks(parse(CODEC))


def parse(module: str) -> ast.Module:
    return ast.parse((PROTOCOL / f"{module}.py").read_text())


def _constants(tree: ast.Module) -> Iterator[Limit]:
    for node in tree.body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        name = node.targets[0].id
        if name.startswith("_") or not set(ast.unparse(node.value)) <= set("0123456789*x ABCDEF"):
            continue
        if name not in NO_LIMITS:
            value = CONSTANTS[name]  # KeyError: say there what a new one becomes, or in NO_LIMITS
            yield Limit(name, lambda tree, set_to=(name, value): _set(tree, *set_to))


def _set(tree: ast.Module, name: str, value: int) -> None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            node.value = ast.copy_location(ast.Constant(value), node.value)


def _fields() -> Iterator[Limit]:
    """Of the table as it is: it is read by another process, since this one imports no fdbroker."""
    for code, verb, fields in in_fork(_read_table):
        for place, (field, has_least) in enumerate(fields):
            name = f"{verb}.{field}"
            yield Limit(f"{name} limit", patch=_patch(code, place, limit=HUGE))
            if has_least:
                yield Limit(f"{name} least", patch=_patch(code, place, least=-HUGE))
            yield Limit(f"{name} types", patch=_patch(code, place, types=_Anything()))
        yield Limit(f"{verb} descriptors", patch=lambda module, code=code: _flip(module, code))


class _Anything(tuple):  # type: ignore[type-arg]
    def __contains__(self, kind: object) -> bool:
        return True


def _read_table() -> list[Any]:
    from fdbroker.ipc.protocol.messages import VERBS

    return [
        (
            code,
            verb.name,
            # no length is below 0
            [(field.name, int in field.types or field.least != 0) for field in verb.fields],
        )
        for code, verb in VERBS.items()
    ]


def _patch(code: int, place: int, **change: Any) -> Callable[[Any], object]:
    def patch(module: Any) -> None:
        verb = module.VERBS[code]
        fields = list(verb.fields)
        fields[place] = fields[place]._replace(**change)
        module.VERBS[code] = verb._replace(fields=tuple(fields))

    return patch


def _flip(module: Any, code: int) -> None:
    verb = module.VERBS[code]
    module.VERBS[code] = verb._replace(takes_descriptor=not verb.takes_descriptor)


# --- the checks of the source ----------------------------------------------------------------


def _checks(tree: ast.Module) -> Iterator[Limit]:
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and function.name in CHECKS:
            for number, test in enumerate(_tests(function)):
                for part, said in _parts(test):
                    yield Limit(
                        f"{function.name}: {said}",
                        lambda tree, at=(function.name, number, part): _weaken(tree, *at),
                        module=CODEC,
                    )


CHECKS = ("_decode", "_check", "_check_names", "decode_request")


def _tests(function: ast.FunctionDef) -> list[ast.If]:
    """The conditions under which it refuses something."""
    return [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise)
    ]


def _operands(test: ast.If) -> list[ast.expr]:
    return test.test.values if isinstance(test.test, ast.BoolOp) else [test.test]


def _parts(test: ast.If) -> Iterator[tuple[tuple[int, int | None], str]]:
    """Each operand of an "or", and both ends of each range, with what it says."""
    for place, operand in enumerate(_operands(test)):
        yield (place, None), ast.unparse(operand)
        for node in ast.walk(operand):
            if isinstance(node, ast.Compare) and len(node.ops) == 2:
                for end in (0, 1):
                    yield (place, end), f"{ast.unparse(operand)}, its {('lower', 'upper')[end]} end"


def _weaken(tree: ast.Module, name: str, number: int, part: tuple[int, int | None]) -> None:
    (function,) = (
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name
    )
    test = _tests(function)[number]
    place, end = part
    operand = _operands(test)[place]
    if end is None:
        never = ast.copy_location(ast.Constant(False), operand)
        if isinstance(test.test, ast.BoolOp):
            test.test.values[place] = never
        else:
            test.test = never
        return
    for node in ast.walk(operand):
        if isinstance(node, ast.Compare) and len(node.ops) == 2:
            if end == 0:
                node.left = node.comparators.pop(0)
            else:
                node.comparators.pop()
            node.ops.pop(end)
            return


# --- a process without it --------------------------------------------------------------------


class Without(importlib.machinery.SourceFileLoader, importlib.abc.MetaPathFinder):
    """Loads the module without one limit."""

    def __init__(self, limit: Limit) -> None:
        self.source = str(PROTOCOL / f"{limit.module}.py")
        super().__init__(f"fdbroker.ipc.protocol.{limit.module}", self.source)
        self.limit = limit

    def find_spec(self, name: str, path: object, target: object = None) -> Any:
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def get_code(self, fullname: str) -> CodeType:
        tree = parse(self.limit.module)
        self.limit.rewrite(tree)
        return compile(ast.fix_missing_locations(tree), self.source, "exec")

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        self.limit.patch(module)


def in_fork(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns in a forked child; RuntimeError if it raises."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            try:
                answer = True, function(*arguments)
            except BaseException:
                answer = False, traceback.format_exc()
            with open(writer, "wb") as file:
                pickle.dump(answer, file)
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        good, answer = pickle.load(file)
    os.waitpid(pid, 0)
    if not good:
        raise RuntimeError(answer)
    return answer


def look_for(limit: Limit, with_corpus: bool, examples: int) -> tuple[str, str]:
    """(what found that it is gone, what it saw); ("", "") if nothing did."""
    assert not any(name == "fdbroker" or name.startswith("fdbroker.") for name in sys.modules)
    sys.meta_path.insert(0, Without(limit))
    from fuzz import bounded

    with bounded.player() as play:
        if with_corpus:
            # the likeliest first: of its verb, then the heads of messages
            verb = limit.name.partition(".")[0].partition(" ")[0]
            for name, it in sorted(
                bounded.corpus().items(),
                key=lambda kept: (not kept[0].startswith(verb), not kept[0].startswith("heads")),
            ):
                try:
                    play(it)
                except Exception as error:
                    return f"corpus/{name}", f"{type(error).__name__}: {error}"
        before = play.played
        try:
            bounded.search(play, examples, shrink=False)
        except Exception as error:
            return f"Hypothesis, input {play.played - before}", f"{type(error).__name__}: {error}"
    return "", ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a limit can be taken out and nobody sees it."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.limits", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--without-corpus", action="store_true", help="only what Hypothesis finds")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="of Hypothesis")
    parser.add_argument("--only", default="", help="those whose name has this in it")
    options = parser.parse_args(arguments)
    import hypothesis.strategies  # noqa: F401 - once, for all children

    missed, began = 0, time.monotonic()
    chosen = [limit for limit in limits() if options.only in limit.name]
    for limit in chosen:
        if limit.name in CANNOT_MATTER:
            print(f"{limit.name:60} cannot matter: {CANNOT_MATTER[limit.name]}")
            continue
        by, saw = in_fork(look_for, limit, not options.without_corpus, options.examples)
        missed += not by
        first, *others = saw.splitlines() or [""]
        said = f"{first[:100]} {' '.join(others[-1:])}"
        print(f"{limit.name:60} {by or 'NOT FOUND':28} {said}".rstrip(), flush=True)
    print(f"{len(chosen)} limits, {missed} not found, {time.monotonic() - began:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
