"""``--help`` teaches: each command shows examples, and each of them is a command that there is."""

from __future__ import annotations

import re
import shlex

import pytest

from fdbroker import cli
from fdbroker.cli import COMMANDS

SHELL = re.compile(r" +(\|.*|\d>>?\S+|&)$")  # what the shell takes of a line


def examples(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    """The words of each example line, without its comment."""
    assert cli.main([*arguments, "--help"]) == 0
    lines = re.findall(r"^  fdbroker (.+)$", capsys.readouterr().out, re.M)
    return [shlex.split(SHELL.sub("", re.split(r" {2,}(?=[a-z])", line)[0])) for line in lines]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_shows_examples_of_itself(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    found = examples(capsys, name)
    assert found
    for words in found:
        assert words[0] == name
        assert cli._parser(words).parse_args(words).run


def test_the_command_alone_shows_how_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    found = examples(capsys)
    assert [words[0] for words in found] == ["serve", "exec"]
    for words in found:
        assert cli._parser(words).parse_args(words).run
