"""Texts of devices, machines and callers, made fit to be shown."""

from __future__ import annotations

import unicodedata

TEXT_LIMIT = 256


def clean(text: str | bytes, limit: int = TEXT_LIMIT) -> str:
    """TEXT made fit for a bus, a prompt, a log and a terminal.

    Device strings are the device's own claims: broken UTF-8 becomes U+FFFD, control, format and
    surrogate characters go, white space is folded, and what is longer than LIMIT characters is cut.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    text = text[: limit * 16].strip()
    if not (text.isascii() and text.isprintable()):
        text = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c) not in _UNFIT)
    return " ".join(text.split())[:limit].rstrip()


# Control, format (bidirectional overrides), surrogate, private use and unassigned characters.
_UNFIT = frozenset({"Cc", "Cf", "Cs", "Co", "Cn"})
