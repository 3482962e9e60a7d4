"""The rule for names."""

from __future__ import annotations

import string

import pytest

from fdbroker.errors import BadName
from fdbroker.lender.names import check_name


def is_good(name: str) -> bool:
    try:
        check_name(name)
    except BadName:
        return False
    return True


def test_letters_digits_and_a_few_more_are_names() -> None:
    """All that no shell, path or terminal reads as anything else, and of ASCII only."""
    allowed = string.ascii_letters + string.digits + "._/@-"
    assert [chr(code) for code in range(0x250) if is_good(chr(code))] == sorted(allowed)


def test_a_name_has_1_to_255_characters() -> None:
    assert [size for size in range(300) if is_good("n" * size)] == list(range(1, 256))


def test_one_bad_character_is_enough() -> None:
    for name in ("web\n", " web", "we\x1b[31mb", "wéb", "a\0b", "*"):
        with pytest.raises(BadName) as caught:
            check_name(name)
        assert caught.value.data == (name,)


def test_what_is_no_text_is_no_name() -> None:
    for other in (b"web", None, 8000, ["web"]):
        with pytest.raises(TypeError, match=f"a str, not {type(other).__name__}"):
            check_name(other)  # type: ignore[arg-type]
