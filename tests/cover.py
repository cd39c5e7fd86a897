"""./dev cover's table: which share of each room's lines and branches the tests ran."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

COVERED, ALL = ("covered_lines", "covered_branches"), ("num_statements", "num_branches")


def table(measured: Mapping[str, Any]) -> str:
    """MEASURED, coverage's figures, by room: a folder of hostpassd, or hostpassd itself for what is in none."""
    ran: Counter[str] = Counter()
    there: Counter[str] = Counter()
    for file, row in measured["files"].items():
        for room in (str(PurePosixPath(file).parent), "all"):
            ran[room] += sum(row["summary"][key] for key in COVERED)
            there[room] += sum(row["summary"][key] for key in ALL)
    rooms = [*sorted(room for room in there if room != "all"), "all"]
    return "\n".join(f"{room:24}{100 * ran[room] / max(1, there[room]):6.1f} %" for room in rooms)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
