"""Which mistakes can be made in a module: one small change of its text each.

What is changed:

    comparisons     < and <=, == and !=, is and is not, in and not in, ...
    arithmetic      + and -, * and //, << and >>, | and &, in assignments like += too
    conditions      negated; `and` and `or`; one operand of them left out; a `not` left out
    constants       a number one larger, True and False, a text or bytes one character longer
    values          what is returned is None; an f-string is empty; min and max, any and all
    arguments       one that is given by its name left out
    statements      left out: calls, raises, returns, deletions, jumps, and assignments to
                    anything but a local name, one target at a time

What is not: annotations, imports, docstrings, what only a type checker reads, and assertions,
which are there for it too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from copy import copy
from typing import NamedTuple

OPPOSITES: list[tuple[type[ast.AST], type[ast.AST]]] = [
    (ast.Lt, ast.LtE),
    (ast.Gt, ast.GtE),
    (ast.Eq, ast.NotEq),
    (ast.Is, ast.IsNot),
    (ast.In, ast.NotIn),
    (ast.And, ast.Or),
    (ast.Add, ast.Sub),
    (ast.Mult, ast.FloorDiv),
    (ast.LShift, ast.RShift),
    (ast.BitOr, ast.BitAnd),
]
OTHER = {one: other for pair in OPPOSITES for one, other in (pair, pair[::-1])}
OTHER |= {ast.Div: ast.Mult, ast.Mod: ast.Mult, ast.BitXor: ast.BitAnd}
NEGATED_BY_ITSELF = ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
FOR_READERS = {"__all__", "__slots__", "TYPE_CHECKING"}


class Mutant(NamedTuple):
    """`text` in place of the bytes from `start` to `end` of `file`."""

    file: str
    start: int
    end: int
    text: str
    lines: range  # of the statement it is in, without the statements in that one
    place: str  # the function it is in
    line: str  # how that line of the source reads, without its comment
    change: str

    @property
    def key(self) -> str:
        """What tells it apart from others of its file, wherever in the file that is."""
        return f"{self.place}: {self.line} | {self.change}"

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]


def mutants(file: str, source: bytes) -> list[Mutant]:
    """All mutants of a module, from its first line to its last."""
    found = {(one.start, one.end, one.text): one for one in _Finder(file, source).find()}
    return [found[place] for place in sorted(found)]


class _Finder:
    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source = file, source
        self.rows = source.splitlines(keepends=True)
        self.starts = [0]
        for row in self.rows:
            self.starts.append(self.starts[-1] + len(row))

    def find(self) -> Iterator[Mutant]:
        yield from self.block(ast.parse(self.source).body, "")

    def block(self, statements: list[ast.stmt], place: str) -> Iterator[Mutant]:
        for statement in statements:
            if not _is_for_readers(statement):
                yield from self.statement(statement, place)

    def statement(self, statement: ast.stmt, place: str) -> Iterator[Mutant]:
        name = getattr(statement, "name", "")
        inside = f"{place}.{name}".lstrip(".") if name else place
        blocks = [getattr(statement, block, []) for block in ("body", "orelse", "finalbody")]
        blocks += [handler.body for handler in getattr(statement, "handlers", [])]
        last = min([(statement.end_lineno or 0) + 1] + [b[0].lineno for b in blocks if b]) - 1
        self.lines = range(statement.lineno, max(last, statement.lineno) + 1)
        self.place = place or "the module"
        for text in _removals(statement):
            yield self.mutant(statement, text)
        for part in ast.iter_child_nodes(statement):
            if isinstance(part, ast.expr | ast.arguments | ast.withitem):
                yield from self.expression(part, statement)
        for block in blocks:
            yield from self.block(block, inside)

    def expression(self, node: ast.AST, parent: ast.AST) -> Iterator[Mutant]:
        annotation = getattr(parent, "annotation", None), getattr(parent, "returns", None)
        if node in annotation or node in getattr(parent, "decorator_list", ()):
            return
        if isinstance(node, ast.expr):
            for new in (*_changes(node), *_negated(node, parent)):
                text = ast.unparse(new)
                atomic = isinstance(new, ast.Constant | ast.Name | ast.Call)
                yield self.mutant(node, text if atomic else f"({text})")
        if isinstance(node, ast.JoinedStr):
            return  # positions within one are wrong before Python 3.12
        for part in ast.iter_child_nodes(node):
            yield from self.expression(part, node)

    def mutant(self, node: ast.expr | ast.stmt, text: str) -> Mutant:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self.starts[node.lineno - 1] + node.col_offset
        end = self.starts[node.end_lineno - 1] + node.end_col_offset
        old = " ".join(self.source[start:end].decode().split())
        line = self.rows[node.lineno - 1].decode().split("  #")[0].strip()
        new = " ".join(text.split())
        change = "left out" if new == "pass" else f"{old} -> {new}"
        return Mutant(self.file, start, end, text, self.lines, self.place, line, change)


def _is_for_readers(statement: ast.stmt) -> bool:
    match statement:
        case ast.Expr(ast.Constant()) | ast.Assert() | ast.Import() | ast.ImportFrom():
            return True
        case ast.Assign([ast.Name(name)]) | ast.If(ast.Name(name)):
            return name in FOR_READERS
    return False


def _removals(statement: ast.stmt) -> Iterator[str]:
    """Texts in place of a statement."""
    match statement:
        case ast.Return(None | ast.Constant(None)):
            yield "pass"
        case ast.Return():
            yield "return None"
        case ast.Expr() | ast.AugAssign() | ast.Delete() | ast.Raise() | ast.Break():
            yield "pass"
        case ast.Continue():
            yield "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "pass"
        case ast.Assign(targets=[ast.Tuple(targets)], value=ast.Tuple(values)):
            for number, target in enumerate(targets):
                if not isinstance(target, ast.Name):
                    fewer = [*values[:number], *values[number + 1 :]]
                    others = [*targets[:number], *targets[number + 1 :]]
                    yield _assign([_tuple(others)], _tuple(fewer))
        case ast.Assign(targets=[ast.Tuple(targets)]) if not _are_local(targets):
            yield "pass"
        case ast.Assign(targets=[_, _, *_]):
            for target in statement.targets:
                if not isinstance(target, ast.Name):
                    others = [one for one in statement.targets if one is not target]
                    yield _assign(others, statement.value)
    match statement:
        case ast.AugAssign(target, op, value) if type(op) in OTHER:
            new = ast.AugAssign(target, OTHER[type(op)](), value)
            yield ast.unparse(ast.fix_missing_locations(new))


def _are_local(targets: list[ast.expr]) -> bool:
    return all(isinstance(target, ast.Name) for target in targets)


def _tuple(parts: list[ast.expr]) -> ast.expr:
    return parts[0] if len(parts) == 1 else ast.Tuple(parts, ast.Load())


def _assign(targets: list[ast.expr], value: ast.expr) -> str:
    return ast.unparse(ast.fix_missing_locations(ast.Assign(targets, value)))


def _changes(node: ast.expr) -> Iterator[ast.expr]:
    """Expressions in place of one."""
    match node:
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(str(value)):
            yield ast.Constant(value + "~")
        case ast.Constant(bytes(value)):
            yield ast.Constant(value + b"~")
        case ast.JoinedStr():
            yield ast.Constant("")
        case ast.Name(name) if name in NAMES:
            yield ast.Name(NAMES[name], ast.Load())
        case ast.UnaryOp(ast.Not(), operand):
            yield operand
        case ast.BinOp(left, op, right) if type(op) in OTHER:
            yield ast.BinOp(left, OTHER[type(op)](), right)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(OTHER[type(op)](), values)
            for left_out in values:
                others = [value for value in values if value is not left_out]
                yield others[0] if len(others) == 1 else ast.BoolOp(op, others)
        case ast.Compare(left, ops, comparators):
            for number, op in enumerate(ops):
                other = [*ops[:number], OTHER[type(op)](), *ops[number + 1 :]]
                yield ast.Compare(left, other, comparators)
        case ast.Call():
            for keyword in node.keywords:
                if keyword.arg is not None:
                    call = copy(node)
                    call.keywords = [one for one in node.keywords if one is not keyword]
                    yield call


def _negated(node: ast.expr, parent: ast.AST) -> Iterator[ast.expr]:
    match parent:
        case ast.If(test) | ast.While(test) | ast.IfExp(test) if test is node:
            pass
        case ast.comprehension(ifs=ifs) if node in ifs:
            pass
        case _:
            return
    match node:
        case ast.Compare(ops=[op]) if isinstance(op, NEGATED_BY_ITSELF):
            pass
        case ast.UnaryOp(ast.Not()):
            pass
        case _:
            yield ast.UnaryOp(ast.Not(), node)
