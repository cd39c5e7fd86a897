"""The cleaning of texts that devices, machines and callers choose."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostpassd.model.text import clean


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        (b"QEMU USB HARDDRIVE\n", "QEMU USB HARDDRIVE"),
        (b"  padded\t to  the \n right   ", "padded to the right"),
        (b"NUL\0inside", "NULinside"),
        (b"\x1b[31mred\x1b[0m", "[31mred[0m"),
        (b"broken \xff\xfe", "broken \ufffd\ufffd"),
        ("turned \u202eround", "turned round"),
        ("lone \ud800 surrogate", "lone surrogate"),
        (b"", ""),
    ],
)
def test_clean(raw: str | bytes, cleaned: str) -> None:
    assert clean(raw) == cleaned


@given(st.text() | st.binary(max_size=5000))
def test_cleaned_text_can_go_anywhere(raw: str | bytes) -> None:
    text = clean(raw)
    assert len(text) <= 256
    assert text == " ".join(text.split())
    assert not any(unicodedata.category(c).startswith("C") for c in text)
    text.encode("utf-8")
    assert clean(text) == text


def test_clean_is_bounded() -> None:
    assert clean(b"x" * 1_000_000) == "x" * 256
    assert clean("\0" * 1_000_000) == ""
    assert clean("x" * 255 + " y") == "x" * 255
