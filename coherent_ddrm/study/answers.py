"""Raters and answers in one SQLite file that several servers and threads may write at once.

Write-ahead log, one transaction per answer, each begun with the write lock, on disk before it is confirmed. An answer
is kept with the two pictures that were shown, so the table can be read without making the sheet again. WAL needs a
local disk: no network folder.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from coherent_ddrm.errors import UserError

FILE = "answers.sqlite"
DAY = 24 * 3600 * 1000  # the longest response time that is believed, in milliseconds
WAIT = 30 * 60  # seconds that a sheet waits for its first answer, before the next rater may have it
MOST_OPEN = 200  # sheets that wait so at once
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS raters (
    id INTEGER PRIMARY KEY,
    token TEXT NOT NULL UNIQUE,   -- sha256 of what the rater holds, so a copy of this file lets nobody answer for them
    source TEXT NOT NULL CHECK (source IN ('server', 'file')),
    sheet INTEGER NOT NULL CHECK (sheet >= 0),
    came REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS answers (
    rater INTEGER NOT NULL REFERENCES raters (id),
    position INTEGER NOT NULL CHECK (position >= 0),
    "left" TEXT NOT NULL,
    "right" TEXT NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('left', 'right')),
    milliseconds INTEGER NOT NULL CHECK (milliseconds BETWEEN 0 AND {DAY}),
    came REAL NOT NULL,
    PRIMARY KEY (rater, position)
) STRICT, WITHOUT ROWID;
"""
EMPTY = "NOT EXISTS (SELECT 1 FROM answers WHERE answers.rater = raters.id)"


class OutOfTurn(Exception):
    """The answer is not to the rater's next question: sent twice, or from a second window."""


class TooManyRaters(Exception):
    """No new raters are taken in; the text says why."""


class Replaced(Exception):
    """The rater gave no answer for long, and their sheet has gone to another."""


@dataclass(frozen=True)
class Rater:
    """One who answers; `sheet` numbers their list of questions, `token` is the digest of theirs."""

    id: int
    sheet: int
    token: str = field(repr=False)


class Choice(BaseModel):
    """An answer as a browser sends it, checked."""

    model_config = ConfigDict(extra="forbid", strict=True)

    position: int = Field(ge=0, lt=2**31)
    choice: str = Field(pattern=r"^(left|right)$")
    milliseconds: int = Field(ge=0, le=DAY)


@dataclass(frozen=True)
class Answer:
    """What was shown at a position of the sheet, what was chosen, and how long it took."""

    position: int
    left: str
    right: str
    choice: str
    milliseconds: int

    @property
    def chosen(self) -> str:
        """The id of the chosen picture."""
        return self.left if self.choice == "left" else self.right


class Answers:
    """The answers of one study. Every method may be called from any thread or process; UserError without a database."""

    def __init__(self, folder: Path):
        self.path = folder / FILE
        try:
            # Stays open, unused: when the last connection closes, SQLite empties the log, which takes several writes.
            kept_open = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            weakref.finalize(self, kept_open.close)
            kept_open.execute("PRAGMA journal_mode = WAL")
            kept_open.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise UserError(f"{self.path} cannot be used ({error}); it must be writable and on a local disk") from error

    def admit(self, most: int, most_open: int = MOST_OPEN) -> str:
        """A new rater; returns the token that proves who they are.

        They take the place of the first rater who gave no answer for WAIT seconds, sheet and all, whose token is worth
        nothing from then on; else they have the next sheet. So those who leave at once use up no sheets.
        TooManyRaters when `most` have answered, or `most_open` have not yet and still may.
        """
        token, now = secrets.token_hex(16), time.time()
        with self._writing() as database:
            count, empty = database.execute(
                f"SELECT COUNT(*), COUNT(*) FILTER (WHERE {EMPTY}) FROM raters WHERE source = 'server'"
            ).fetchone()
            late = database.execute(
                f"SELECT id FROM raters WHERE source = 'server' AND came < ? AND {EMPTY} ORDER BY sheet", (now - WAIT,)
            ).fetchall()
            if count - empty >= most:
                raise TooManyRaters("the study takes no more raters")
            if empty - len(late) >= most_open:
                raise TooManyRaters("too many have just begun; please try again in some minutes")
            if late:
                database.execute("UPDATE raters SET token = ?, came = ? WHERE id = ?", (_digest(token), now, *late[0]))
            else:
                self._insert_rater(database, token, "server", sheet=count)
        return token

    def rater(self, token: str) -> Rater | None:
        """Who holds this token, or None."""
        with self._connected() as database:
            row = database.execute("SELECT id, sheet, token FROM raters WHERE token = ?", (_digest(token),)).fetchone()
        return None if row is None else Rater(*row)

    def count(self, rater: Rater) -> int:
        """How many questions the rater has answered: also the position of the next."""
        with self._connected() as database:
            return _count(database, rater.id)

    def add(self, rater: Rater, answer: Answer) -> int:
        """Keep the answer to the rater's next question; returns how many there are.

        OutOfTurn for any other question; Replaced when their sheet has gone to another since `rater` found them.
        """
        with self._writing() as database:
            if database.execute("SELECT token FROM raters WHERE id = ?", (rater.id,)).fetchone() != (rater.token,):
                raise Replaced
            if answer.position != _count(database, rater.id):
                raise OutOfTurn
            _insert_answer(database, rater.id, answer)
        return answer.position + 1

    def merge(self, token: str, sheet: int, answers: Sequence[Answer]) -> int:
        """Take in the answers of a file, all or none; returns how many are new. ValueError if they contradict."""
        with self._writing() as database:
            row = database.execute("SELECT id, sheet FROM raters WHERE token = ?", (_digest(token),)).fetchone()
            identity, known = row or (self._insert_rater(database, token, "file", sheet), sheet)
            if known != sheet:
                raise ValueError("this rater has answered another sheet")
            kept = {answer.position: answer for answer in _answers(database, identity)}
            for answer in answers:
                if kept.get(answer.position, answer) != answer:
                    raise ValueError(f"this rater has answered question {answer.position + 1} otherwise")
            new = [answer for answer in answers if answer.position not in kept]
            for answer in new:
                _insert_answer(database, identity, answer)
        return len(new)

    def all(self) -> dict[Rater, list[Answer]]:
        """Every rater with their answers, by position; one consistent state."""
        with self._connected() as database:
            database.execute("BEGIN")
            raters = [Rater(*row) for row in database.execute("SELECT id, sheet, token FROM raters ORDER BY id")]
            return {rater: _answers(database, rater.id) for rater in raters}

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        try:
            database.execute("PRAGMA foreign_keys = ON")
            database.execute("PRAGMA synchronous = FULL")
            yield database
        finally:
            database.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the write lock from its start, so what it reads stays true until it ends."""
        with self._connected() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")

    @staticmethod
    def _insert_rater(database: sqlite3.Connection, token: str, source: str, sheet: int) -> int:
        row = (_digest(token), source, sheet, time.time())
        return database.execute("INSERT INTO raters (token, source, sheet, came) VALUES (?, ?, ?, ?)", row).lastrowid


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _count(database: sqlite3.Connection, rater: int) -> int:
    return database.execute("SELECT COUNT(*) FROM answers WHERE rater = ?", (rater,)).fetchone()[0]


def _answers(database: sqlite3.Connection, rater: int) -> list[Answer]:
    query = 'SELECT position, "left", "right", choice, milliseconds FROM answers WHERE rater = ? ORDER BY position'
    return [Answer(*row) for row in database.execute(query, (rater,))]


def _insert_answer(database: sqlite3.Connection, rater: int, answer: Answer) -> None:
    row = (rater, answer.position, answer.left, answer.right, answer.choice, answer.milliseconds, time.time())
    database.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", row)
