"""Reading an untrusted SQLite file: never written to, never trusted, in bulk."""

from __future__ import annotations

import os
import sqlite3
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from llmprobe.analysis.events import AnalysisError, Ints

#: No table of a capture is larger; 20 million activities take about 2 GB here.
MAX_ROWS = 20_000_000
#: Reading a sane file takes no longer.
MAX_QUERY_SECONDS = 300.0
_MAX_TEXT_BYTES = 1 << 24
#: Rows that are made into one text; more at once are no faster.
_ROWS_A_TEXT = 10_000

_READ_ONLY = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION})


class Database:
    """One open file and what its tables hold. Made by `open_database`."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self.path = path
        self.columns: dict[str, frozenset[str]] = {}
        # Only plain tables: a view or virtual table of a crafted file would run what it likes.
        rows = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE 'CREATE TABLE%'"
        ).fetchall()
        for (name,) in rows:
            found = connection.execute("SELECT name FROM pragma_table_info(?)", (name,)).fetchall()
            self.columns[name] = frozenset(column for (column,) in found)
        connection.set_authorizer(_authorize)

    def __contains__(self, table: object) -> bool:
        return table in self.columns

    def read(self, table: str, wanted: Sequence[str], absent: int = -1) -> list[Ints]:
        """Integer columns of ``table``, one array each.

        A column may name alternatives, ``"demangledName|shortName"``: the first that the table has is read.
        Where it has none of them, or a row holds NULL, stands ``absent``. No table gives empty arrays.
        """
        if table not in self:
            return [np.empty(0, dtype=np.int64) for _ in wanted]
        chosen = [self._column(table, names) for names in wanted]
        there = [name for name in chosen if name is not None]
        count = self.count(table)
        if count > MAX_ROWS:
            raise AnalysisError(
                f"{self.path}: table {table} has {count} rows, more than the {MAX_ROWS} that are read: "
                "capture for less long"
            )
        try:
            found = iter(self._numbers(table, [f'"{name}"' for name in there], count))
        except (TypeError, ValueError):  # NULL, or a text where a number belongs
            filled = [f'ifnull(CAST("{name}" AS INTEGER), {absent})' for name in there]
            found = iter(self._numbers(table, filled, count))
        return [np.full(count, absent, dtype=np.int64) if name is None else next(found) for name in chosen]

    def _numbers(self, table: str, fields: list[str], count: int) -> list[Ints]:
        if not fields:
            return []
        try:
            return self._as_text(table, fields, count)
        # Not whole numbers throughout (numpy before 2.3 only warns of those), or no rowid: row by row.
        except (ValueError, DeprecationWarning, sqlite3.Error):
            pass
        rows = self._connection.execute(f'SELECT {", ".join(fields)} FROM "{table}"')
        flat = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=count * len(fields))
        return list(np.ascontiguousarray(flat.reshape(-1, len(fields)).T))

    def _as_text(self, table: str, fields: list[str], count: int) -> list[Ints]:
        """The same through texts of many numbers: half the time, as no row becomes Python objects."""
        joined = ", ".join(f"group_concat(c{number})" for number in range(len(fields)))
        # Adding 0 makes a number of a text, which could hold a comma.
        inner = ", ".join(f"{field} + 0 AS c{number}" for number, field in enumerate(fields))
        query = (
            f"SELECT max(r), {joined} FROM (SELECT rowid AS r, {inner} "
            f'FROM "{table}" WHERE rowid > ? ORDER BY rowid LIMIT {_ROWS_A_TEXT})'
        )
        columns = [np.empty(count, dtype=np.int64) for _ in fields]
        done, last = 0, -(1 << 63)
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            while done < count:
                last, *texts = self._connection.execute(query, (last,)).fetchone()
                if last is None:
                    break
                parts = [np.fromstring(text, dtype=np.int64, sep=",") for text in texts if text]
                size = len(parts[0]) if parts else 0
                if len(parts) < len(fields) or any(len(part) != size for part in parts) or not size:
                    raise ValueError("not whole numbers throughout")
                for column, part in zip(columns, parts, strict=True):
                    column[done : done + size] = part  # ValueError if there are more than were counted
                done += size
        if done != count:
            raise ValueError("not every row was seen")
        return columns

    def rows(self, query: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """The rows of a query."""
        return iter(self._connection.execute(query, values))

    def count(self, table: str) -> int:
        """The number of rows of a table that is there."""
        (count,) = self._connection.execute(f'SELECT count(*) FROM "{table}"').fetchone()
        return int(count)

    def require(self, table: str, *columns: str) -> None:
        """The columns without which a table that is there cannot be read."""
        missing = [name for name in columns if name not in self.columns[table]]
        if missing:
            raise AnalysisError(f"{self.path}: table {table} has no column {missing[0]}: an unknown schema")

    def _column(self, table: str, names: str) -> str | None:
        return next((name for name in names.split("|") if name in self.columns[table]), None)


@contextmanager
def open_database(path: Path) -> Iterator[Database]:
    """The database in ``path``; whatever is wrong with the file is an `AnalysisError`."""
    try:
        # immutable: no locks, no journal, nothing beside the file is looked at or made.
        uri = f"file:{quote(os.fsencode(path.resolve()))}?mode=ro&immutable=1"
        connection = sqlite3.connect(uri, uri=True, cached_statements=16)
    except sqlite3.Error as error:
        raise AnalysisError(f"{path}: cannot be opened as SQLite: {error}") from None
    try:
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        if hasattr(connection, "setlimit"):  # from Python 3.11
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_TEXT_BYTES)
            connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        deadline = time.monotonic() + MAX_QUERY_SECONDS
        connection.set_progress_handler(lambda: time.monotonic() > deadline, 1_000_000)
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA query_only = ON")
        connection.execute("PRAGMA mmap_size = 0")
        yield Database(connection, path)
    except (sqlite3.Error, sqlite3.Warning, OverflowError, ValueError, TypeError) as error:
        if str(error) == "interrupted":  # by the handler above; there are no codes before Python 3.11
            raise AnalysisError(
                f"{path}: reading it took longer than {MAX_QUERY_SECONDS:.0f} s and was ended: try once the "
                "machine is less busy, or capture for less long"
            ) from None
        raise AnalysisError(f"{path}: damaged or not an nsys export: {_one_line(error)}") from None
    finally:
        connection.close()


def _authorize(action: int, *_: object) -> int:
    return sqlite3.SQLITE_OK if action in _READ_ONLY else sqlite3.SQLITE_DENY


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
