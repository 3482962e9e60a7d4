"""Write docs/errors.md from fdbroker/errors.py: ``python docs/make_errors.py``.

A sentence of an error ends with what to do, behind its last colon or semicolon.
"""

from __future__ import annotations

import re
from pathlib import Path

from fdbroker.errors import FDBrokerError, by_code

HEAD = """\
# Errors

<!-- made by docs/make_errors.py from fdbroker/errors.py: change it there -->

Every error of fdbroker is a class in `fdbroker.errors`, a subclass of `FDBrokerError`, and of the
builtin that a plain `except` expects. It carries its data as attributes, survives pickling, and
crosses the wire by its code, which is never used again for something else. Its text is one sentence
that ends with what to do next. The exit statuses of the command are in [commands.md](commands.md).

| code | class | also a | when | says | what to do |
|---|---|---|---|---|---|
"""
SAMPLES: dict[str, object] = {  # for those whose sentence is made, not a template
    "name": "NAME",
    "nearest": ["NEAREST"],
    "seconds": 5.0,
    "holders": [(812, 1000, 240.0, True)],
    "uid": 1000,
    "verb": "VERB",
    "path": "PATH",
    "line": 12,
    "reason": "REASON",
}


def page() -> str:
    """The whole text."""
    rows = (_row(code, kind) for code, kind in sorted(by_code().items()))
    return HEAD + "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in rows)


def _row(code: int, kind: type[FDBrokerError]) -> tuple[str, ...]:
    builtin = next(
        base
        for base in kind.__mro__
        if base.__module__ == "builtins" and base not in (Exception, BaseException)
    )
    says, what_to_do = _parts(_sentence(kind))
    when = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
    return str(code), f"`{kind.__name__}`", f"`{builtin.__name__}`", when, says, what_to_do


def _sentence(kind: type[FDBrokerError]) -> str:
    """Its template, with its data in capitals."""
    if not kind.says:
        return str(kind(*(SAMPLES[field] for field in kind.fields)))
    return re.sub(r"\{self\.(\w+)[^}]*\}", lambda found: found[1].upper(), kind.says)


def _parts(sentence: str) -> tuple[str, str]:
    """What happened, and what to do."""
    found = re.fullmatch(r"(.*)[:;] (.*)", sentence) or re.fullmatch(r"(.*) \((.*)\)", sentence)
    return (found[1], found[2]) if found else (sentence, "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    Path(__file__).with_name("errors.md").write_text(page())
