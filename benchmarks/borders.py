"""python -m benchmarks.borders [--package DIR]: how often a request passes from file to file.

A *move* is control that passes from a frame of one file of the package to a frame of another one,
by a call or by a return, on the thread of the broker's loop.  Frames of other packages between the
two are skipped, and calls of C functions have none.  A step lasts from the client's call until its
reply has come and the loop sleeps again:

    put, first borrow of a name, the same borrow again, return, retire(wait=True)

For each step and file the output says how often the file was called into from another one, and how
often control came to it in any way.  An *upward* call goes against the imports: the caller's file
does not import the file that it calls, not even indirectly, so it was given the function.

As root, the client has a uid that a rule admits and holds to a quota; else it has the broker's own.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

UID = 60_001  # of the client
IDLE = 0.2  # seconds, after which the loop sleeps again
PATIENCE = 60  # seconds
CONFIG = f"""
[server]
mode = "0666"

[[rule]]
uid = {UID}
verbs = ["borrow", "put", "retire", "list"]
quota = {{ sessions = 64, loans = 512 }}
"""


class Move(NamedTuple):
    when: int  # nanoseconds, CLOCK_MONOTONIC
    event: str  # "call" or "return"
    file: str  # that control left
    function: str
    to_file: str
    to_function: str


# --- the processes that have the measured package on their path ------------------------------


def broker(package: str, record: str, *command: str) -> None:
    """Run the command `fdbroker`, and write down the moves of this thread when it has ended."""
    from fdbroker import cli

    inside = os.path.join(package, "fdbroker", "")
    moves: list[tuple[int, str, CodeType, CodeType]] = []

    def note(frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        file = code.co_filename
        if event not in ("call", "return") or not file.startswith(inside):
            return
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(inside):
            caller = caller.f_back
        if caller is not None and caller.f_code.co_filename != file:
            now = time.monotonic_ns()
            if event == "call":
                moves.append((now, event, caller.f_code, code))
            else:
                moves.append((now, event, code, caller.f_code))

    def place(code: CodeType) -> tuple[str, str]:
        return code.co_filename.removeprefix(inside), code.co_qualname

    sys.setprofile(note)
    try:
        cli.main(list(command))
    finally:
        sys.setprofile(None)
        told = [Move(when, event, *place(left), *place(to)) for when, event, left, to in moves]
        Path(record).write_text(json.dumps(told))


def client(address: str) -> None:
    """Do each step, and print its name, and when it began and ended."""
    from fdbroker import Client

    number, _ = os.pipe()
    steps: list[tuple[str, int, int]] = []

    def step(name: str, do: Callable[[], Any]) -> Any:
        time.sleep(IDLE)
        began = time.monotonic_ns()
        result = do()
        time.sleep(IDLE)
        steps.append((name, began, time.monotonic_ns()))
        return result

    def all_steps() -> None:
        with Client(address) as client:
            client.put("other", number)  # the first put opens a session of its own
            client.borrow("other").close()
            step("put", lambda: client.put("x", number))
            loan = step("first borrow", lambda: client.borrow("x"))
            loan.close()
            loan = step("borrow again", lambda: client.borrow("x"))
            step("return", loan.close)
            client.retire("other", wait=True)
            step("retire and wait", lambda: client.retire("x", wait=True))

    all_steps()  # imports what both import late, while this process may still read it
    if os.geteuid() == 0:
        os.setresuid(UID, UID, UID)
    steps.clear()
    all_steps()
    print(json.dumps(steps))


def record(package: Path) -> dict[str, list[Move]]:
    """The moves of each step."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # the client must reach the socket
        config, moves, address = (f"{folder}/{name}" for name in ("config", "moves", "socket"))
        Path(config).write_text(CONFIG)
        itself = [sys.executable, "-P", __file__]
        serve = ["serve", "--socket", address, "--config", config, "--ready-fd", "1"]
        environment = os.environ | {"PYTHONPATH": str(package)}
        with subprocess.Popen(
            [*itself, "broker", str(package), moves, *serve],
            env=environment,
            stdout=subprocess.PIPE,
        ) as process:
            try:
                assert process.stdout is not None
                if not process.stdout.read(1):
                    raise RuntimeError("the broker did not start")
                told = subprocess.check_output(
                    [*itself, "client", address], env=environment, timeout=PATIENCE
                )
            finally:
                process.terminate()
                process.wait(PATIENCE)
        all_moves = [Move(*move) for move in json.loads(Path(moves).read_text())]
    return {
        name: [move for move in all_moves if began <= move.when < ended]
        for name, began, ended in json.loads(told)
    }


# --- the imports -----------------------------------------------------------------------------


def reachable(package: Path) -> dict[str, set[str]]:
    """By file, the files that it imports, also indirectly.

    An import for a type checker alone counts, unless that file imports this one in turn.
    """
    root = package / "fdbroker"
    files = {str(path.relative_to(root)): path for path in root.rglob("*.py")}
    arrows: dict[str, set[str]] = {name: set() for name in files}
    for_types: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for module, types_only in imports(ast.parse(path.read_text())):
            if file := home(module, files):
                (for_types if types_only else arrows)[name].add(file)
    at_run_time = {name: closure(name, arrows) for name in files}
    for name, others in for_types.items():
        arrows[name] |= {file for file in others if name not in at_run_time[file]}
    return {name: closure(name, arrows) for name in files}


def closure(name: str, arrows: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    left = [name]
    while left:
        new = arrows[left.pop()] - seen
        seen |= new
        left += new
    return seen


def imports(node: ast.AST, types_only: bool = False) -> Iterator[tuple[str, bool]]:
    """The modules that this code imports, and whether for a type checker alone.

    ``from a import b`` gives "a.b", which is a module or something in `a`.
    """
    if isinstance(node, ast.Import):
        yield from ((alias.name, types_only) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from ((f"{node.module}.{alias.name}", types_only) for alias in node.names)
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for statement in node.body:
            yield from imports(statement, types_only=True)
        for statement in node.orelse:
            yield from imports(statement, types_only)
    else:
        for child in ast.iter_child_nodes(node):
            yield from imports(child, types_only)


def home(module: str, files: Collection[str]) -> str | None:
    """The file of a module, or of the module that defines this name; None for other packages."""
    parts = module.split(".")
    if parts[0] != "fdbroker":
        return None
    for inner in (parts[1:], parts[1:-1]):
        stem = "/".join(inner)
        for file in (f"{stem}.py", f"{stem}/__init__.py".removeprefix("/")):
            if file in files:
                return file
    return None


# --- the output ------------------------------------------------------------------------------


def table(moves: list[Move], imported: dict[str, set[str]]) -> Iterator[str]:
    files = {file for move in moves for file in (move.file, move.to_file)}
    called = Counter(move.to_file for move in moves if move.event == "call")
    entered = Counter(move.to_file for move in moves)
    yield f"{len(moves)} moves over {len(files)} files"
    yield f"    {'file':34} called into  control came"
    for file in sorted(files, key=lambda file: (-entered[file], file)):
        yield f"    {file:34} {called[file]:11}  {entered[file]:12}"
    upward = Counter(
        f"{move.file} {move.function} -> {move.to_file} {move.to_function}"
        for move in moves
        if move.event == "call" and move.to_file not in imported[move.file]
    )
    yield f"    {upward.total()} of the {called.total()} calls are upward"
    yield from (f"        {count} x {call}" for call, count in upward.items())


def main() -> int:
    # The two processes above run this file too, without this folder on their path.
    from benchmarks.harness import ROOT, checkout

    parser = argparse.ArgumentParser(prog="python -m benchmarks.borders")
    parser.add_argument("--package", metavar="DIR", type=checkout, default=ROOT)
    package = parser.parse_args().package
    imported = reachable(package)
    for name, moves in record(package).items():
        print(name, *table(moves, imported), sep="\n", end="\n\n")
    return 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["broker", *rest]:
            broker(*rest)
        case ["client", address]:
            client(address)
        case _:
            sys.exit(main())
