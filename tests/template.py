"""./dev template: what translators start from, made from the tables of codes. gettext's format (PO)."""

from __future__ import annotations

import json

from hostpassd.model import codes

HEADER = r"""# The sentences of hostpassd's reasons and facts. {fields} are details; a [part] goes where it has none.
msgid ""
msgstr ""
"Project-Id-Version: hostpassd\n"
"Content-Type: text/plain; charset=UTF-8\n"
"Content-Transfer-Encoding: 8bit\n"
"""


def text() -> str:
    """The template: of each code its meaning, its table and name, and its sentence."""
    entries = (_entry(name, row) for name, table in codes.TABLES.items() for row in table.values())
    return "\n".join([HEADER, *entries])


def _entry(table: str, row: codes.Code) -> str:
    sentence = json.dumps(row.sentence, ensure_ascii=False)  # PO quotes as C does, and so does JSON what is in here
    return f'#. {row.meaning}\nmsgctxt "{table} {row.code}"\nmsgid {sentence}\nmsgstr ""\n'


if __name__ == "__main__":
    print(text(), end="")
