"""Columns of numbers from a database that may hold anything: many rows at once are read as one by one."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.analysis import database
from llmprobe.analysis.database import Database, open_database
from llmprobe.analysis.events import AnalysisError

_VALUES = st.one_of(
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.none(),
    st.floats(allow_nan=False),
    st.sampled_from([1e20, -1e300, 9.3e18]),
    st.text(alphabet="0123456789 ,.-ex", max_size=25),
    st.binary(max_size=3),
)
_PLAIN = st.integers(0, 1 << 62)


def read(rows: Sequence[tuple[Any, Any]], shape: str) -> list[list[int]] | str:
    """Both columns, or what is said."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.sqlite"
        with contextlib.closing(sqlite3.connect(path)) as data:
            data.execute("PRAGMA synchronous = OFF")
            data.execute(f"CREATE TABLE t {shape}")
            data.executemany("INSERT INTO t (a, b) VALUES (?, ?)", rows)
            data.commit()
        try:
            with open_database(path) as found:
                return [column.tolist() for column in found.read("t", ("a", "b"))]
        except AnalysisError as error:
            return str(error).partition(": ")[2]


def row_by_row(*given: object) -> None:
    raise ValueError


@pytest.mark.parametrize(
    "shape", ["(a INTEGER, b INTEGER)", "(a, b)", "(a INTEGER, b INTEGER, rowid INTEGER)"]
)
@given(
    rows=st.one_of(
        st.lists(st.tuples(_PLAIN, _PLAIN), max_size=8), st.lists(st.tuples(_VALUES, _VALUES), max_size=8)
    )
)
def test_many_rows_at_once_are_as_one_by_one(shape: str, rows: list[tuple[Any, Any]]) -> None:
    with mock.patch.object(database, "_ROWS_A_TEXT", 3):
        at_once = read(rows, shape)
    with mock.patch.object(Database, "_as_text", row_by_row):
        assert at_once == read(rows, shape)


@pytest.mark.parametrize("at", [0, 2, 3, 6])
@pytest.mark.parametrize("huge", [1e20, -1e300, "9" * 30])
def test_a_number_beyond_64_bits_is_not_cut_at_its_point(huge: object, at: int) -> None:
    rows: list[tuple[Any, Any]] = [(number, number) for number in range(7)]
    rows[at] = (1, huge)
    with mock.patch.object(database, "_ROWS_A_TEXT", 3):
        assert "too large" in read(rows, "(a INTEGER, b INTEGER)")


def test_a_file_that_takes_too_long_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as data:
        data.execute("PRAGMA synchronous = OFF")
        data.execute("CREATE TABLE t (a INTEGER, b INTEGER)")
        data.executemany("INSERT INTO t VALUES (?, 1)", ((number,) for number in range(2_000)))
        data.commit()
    with (
        mock.patch.object(database, "MAX_QUERY_SECONDS", 0.0),
        pytest.raises(AnalysisError, match="took longer than 0 s"),
        open_database(path) as found,
    ):
        list(found.rows("SELECT count(*) FROM t AS one, t AS other WHERE one.a + other.b = 0"))
