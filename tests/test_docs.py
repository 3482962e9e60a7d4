"""The pages in docs/ say what the code does."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from fdbroker.cli import loans, ls
from fdbroker.cli.status import MEANINGS
from fdbroker.ipc.client import EntryInfo, LoanInfo

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_errors_is_up_to_date() -> None:
    made = runpy.run_path(str(DOCS / "make_errors.py"))["page"]()
    assert (DOCS / "errors.md").read_text() == made, "run python docs/make_errors.py"


def test_each_error_says_what_happened_and_what_to_do() -> None:
    rows = [line for line in (DOCS / "errors.md").read_text().splitlines() if line[2:3].isdigit()]
    assert len(rows) > 30
    for row in rows:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        assert len(cells) == 6
        assert all(cells), row
        assert "{" not in row


def test_the_page_of_commands_has_every_exit_status() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (DOCS / "commands.md").read_text(), re.M)
    assert {int(status): meaning for status, meaning in rows} == MEANINGS


@pytest.mark.parametrize(
    ("command", "fields"),
    [("ls", EntryInfo._fields), ("loans", (*LoanInfo._fields, "process"))],
)
def test_the_page_of_commands_has_every_field(command: str, fields: tuple[str, ...]) -> None:
    page = (DOCS / "commands.md").read_text()
    table = page.partition(f"| field of `{command} --json` | is |\n")[2].partition("\n\n")[0]
    names = [row.split("|")[1] for row in table.splitlines()]
    named = re.findall(r"`(\w+)`", " ".join(names))
    assert sorted(named) == sorted(fields)
    example = page.partition(f"$ fdbroker {command}")[2].partition("\n]\n```")[0]
    assert re.findall(r'^    "(\w+)": ', example, re.M) == list(fields)


@pytest.mark.parametrize("header", [ls.HEADER, loans.HEADER])
def test_the_page_of_commands_has_the_tables_of_today(header: tuple[str, ...]) -> None:
    lines = (DOCS / "commands.md").read_text().splitlines()
    assert header in [tuple(line.split()) for line in lines]
