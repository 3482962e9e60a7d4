"""The pages in docs/ say what the code does."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.table import goals, table
from fdbroker.cli import COMMANDS, loans, ls, stats
from fdbroker.cli.status import MEANINGS
from fdbroker.ipc.client import EntryInfo, LoanInfo, Usage
from fdbroker.lender.accounting import DEFAULT, RESOURCES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


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


def promises() -> Iterator[tuple[str, bool, list[str]]]:
    """Each point of the page of security: its text, whether it is promised, the tests it names."""
    page = (DOCS / "security.md").read_text()
    _, _, rest = page.partition("\n## What is promised\n")
    promised, _, not_promised = rest.partition("\n## What is not promised\n")
    assert not_promised
    for text, is_promised in ((promised, True), (not_promised, False)):
        for point in re.split(r"\n(?=- |#|TODO)", text):
            if point.startswith("- "):
                yield point, is_promised, re.findall(r"`([^`\s]*::[^`\s]*)`", point)


def test_each_promise_of_security_names_a_test() -> None:
    """A part whose tests are not there yet is marked by a TODO, and this fails until they are."""
    page = (DOCS / "security.md").read_text()
    assert re.findall(r"^.*\bTODO\b.*$", page, re.M) == []
    points = list(promises())
    assert len(points) > 40
    assert [point for point, promised, tests in points if promised and not tests] == []


def test_each_test_that_the_page_of_security_names_is_there() -> None:
    found: dict[str, set[str]] = {}
    for point, _, tests in promises():
        assert point.count("::") == len(tests), point  # each is in backquotes, in one line
        for file, _, name in (test.partition("::") for test in tests):
            if file not in found:
                tree = ast.parse((ROOT / file).read_text())
                found[file] = {
                    node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
                }
            assert name.startswith("test_"), (file, name)
            assert name in found[file], (file, name)
    assert len(found) > 15


def test_the_pages_have_stats_and_quotas_as_they_are() -> None:
    page = (DOCS / "commands.md").read_text().partition("\n## stats\n")[2].partition("\n## ")[0]
    broker, user, what = re.findall(
        r"^\| (?:field of|of the seven).*\n\|---.*\n((?:\|.*\n)+)", page, re.M
    )
    assert re.findall(r"^\| `(\w+)`", broker, re.M) == ["broker", "users"]
    assert re.findall(r"^\| `(\w+)`", user, re.M) == list(Usage._fields)
    assert re.findall(r"^\| `(\w+)`", what, re.M) == list(RESOURCES)
    (example,) = map(json.loads, re.findall(r"^\{.*\}$", page, re.M))
    assert tuple(example) == Usage._fields
    assert tuple(example["used"]) == tuple(example["limits"]) == RESOURCES
    page = (DOCS / "configuration.md").read_text().partition("\n## Quotas\n")[2]
    given = re.findall(r"^\| `(\w+)` \| (\d+)( MiB)? \| ", page.partition("```")[0], re.M)
    defaults = {name: int(number) * (2**20 if unit else 1) for name, number, unit in given}
    assert defaults == DEFAULT._asdict()


def test_every_command_is_on_a_page_and_in_the_readme() -> None:
    readme, page = (ROOT / "README.md").read_text(), (DOCS / "commands.md").read_text()
    for command in COMMANDS:
        assert re.search(rf"^\|.*`fdbroker {command}[ `]", readme, re.M), command
        assert f"\n## {command}\n" in page or command == "serve"


@pytest.mark.parametrize("header", [ls.HEADER, loans.HEADER, stats.HEADER])
def test_the_page_of_commands_has_the_tables_of_today(header: tuple[str, ...]) -> None:
    lines = (DOCS / "commands.md").read_text().splitlines()
    assert header in [tuple(line.split()) for line in lines]


def test_the_program_in_the_readme_runs(tmp_path: Path) -> None:
    """The pool's, word for word, with one line more, which looks at what came of it."""
    (program,) = re.findall(
        r"^```python\n(import.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S
    )
    (tmp_path / "pages.py").write_text(
        program + "    print(b''.join(pages) == open('data.bin', 'rb').read())\n"
    )
    (tmp_path / "data.bin").write_bytes(b"".join(bytes([page]) * 4096 for page in range(8)))
    command = [sys.executable, "pages.py"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_the_tables_of_the_benchmarks_are_those_of_their_rounds() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    *pinned, unpinned = (
        json.loads((ROOT / f"benchmarks/last/{name}.json").read_text())
        for name in ("1", "2", "3", "unpinned")
    )
    assert goals(pinned) in page, "python -m benchmarks goals benchmarks/last/[123].json"
    assert table(pinned[0]) in page, "python -m benchmarks table benchmarks/last/1.json"
    assert table(unpinned) in page, "python -m benchmarks table benchmarks/last/unpinned.json"
