"""The file of rows: what is read of it, whatever was cut or changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostpassd.passthrough.rowfile import RowFile, rows_in

ROWS = ["one", "two \u00fc", ""]


def made(folder: Path) -> RowFile:
    file = RowFile(folder / "state" / "rows")
    for count in range(1, len(ROWS) + 1):
        file.add(ROWS[count - 1], ROWS[:count])
    return file


def test_what_was_added_is_read_by_the_next(tmp_path: Path) -> None:
    assert made(tmp_path).read() == ROWS == RowFile(tmp_path / "state" / "rows").read()


def test_without_a_file_there_are_no_rows(tmp_path: Path) -> None:
    assert RowFile(tmp_path / "rows").read() == []


def test_a_file_cut_anywhere_has_the_first_rows_and_nothing_else(tmp_path: Path) -> None:
    data = made(tmp_path).path.read_bytes()
    whole = data.split(b"\n")
    for end in range(len(data)):
        complete = data[:end].count(b"\n")
        # A last line without its end may be whole: then it counts.
        found = rows_in(data[:end])
        assert found in (ROWS[:complete], ROWS[: complete + 1]) or (complete == 0 and found in ([], [None])), end
    assert len(whole) == len(ROWS) + 1


def test_a_byte_changed_in_a_row_is_seen(tmp_path: Path) -> None:
    data = bytearray(made(tmp_path).path.read_bytes())
    data[10] ^= 1
    assert rows_in(bytes(data)) == [None, *ROWS[1:]]


def test_a_file_that_others_changed_is_written_anew(tmp_path: Path) -> None:
    file = made(tmp_path)
    file.path.write_text("garbage")
    file.add("more", [*ROWS, "more"])
    assert file.read() == [*ROWS, "more"]


def test_what_is_damaged_is_kept_under_another_name(tmp_path: Path) -> None:
    file = made(tmp_path)
    file.path.write_text("garbage\n")
    for number in (1, 2):
        file.set_aside = True
        file.replace(["new"])
        assert Path(f"{file.path}.corrupt-{number}").exists()
    assert Path(f"{file.path}.corrupt-1").read_text() == "garbage\n" and file.read() == ["new"]


def test_a_folder_that_cannot_be_written_is_an_error_and_leaves_no_half(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        RowFile(tmp_path / "file" / "rows").replace(["x"])
