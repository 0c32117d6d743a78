"""All rows of a pass in one place on the disk: sorted, counted and looked up without filling RAM.

A file of SQLite, made anew from the JSON lines whenever a decision is taken; rank 0 writes it, the
others read it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from shared.errors import UserError
from vasevqa.filter.rows import Item, Keys, Row, holds, owner

QUARANTINE = "quarantine"  # the place of what cannot be read
_SCHEMA = """
CREATE TABLE files (
    filename TEXT PRIMARY KEY, digest TEXT, score REAL, problem TEXT, place TEXT, row TEXT
) WITHOUT ROWID
"""


class Ledger:
    """One row a file. `place` is where the decision puts it: accepted, rejected, quarantine …"""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._base = sqlite3.connect(path)
        self._base.execute("PRAGMA cache_size = -16000")  # 16 MB, whatever the number of rows

    @classmethod
    def build(cls, path: Path, rows: Iterable[Row], present: Keys) -> Ledger:
        """The ledger of the files whose keys are `present`; rows of others are passed over."""
        path.unlink(missing_ok=True)
        ledger = cls(path)
        # made from files that stay: it need not survive a crash
        ledger._base.execute("PRAGMA journal_mode = OFF")
        ledger._base.execute("PRAGMA synchronous = OFF")
        ledger._base.execute(_SCHEMA)
        ledger._base.executemany(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, NULL, ?)",
            (_columns(row) for row in rows if holds(present, Item.of(row).key)),
        )
        ledger._base.commit()
        return ledger

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self._base.close()

    def decide(self, accepted: str, rejected: str, threshold: float) -> None:
        """Put what scores at least `threshold` to `accepted`, the rest to `rejected`.

        What could not be read goes into quarantine.
        """
        self._base.execute(
            "UPDATE files SET place = CASE WHEN problem IS NOT NULL THEN ? "
            "WHEN score >= ? THEN ? ELSE ? END",
            (QUARANTINE, threshold, accepted, rejected),
        )
        self._base.commit()

    def refuse_mostly_unreadable(self, most: float, undone: str) -> None:
        """Raise UserError when more than the share `most` is in quarantine; undone: what is not."""
        unreadable = self.counts().get(QUARANTINE, 0)
        if unreadable > most * len(self):
            row = next(self.rows((QUARANTINE,)))
            raise UserError(
                f"{unreadable} of {len(self)} files cannot be read, more than --max_unreadable "
                f"{most:g}; the first is {row['filename']} ({row['problem']}); nothing was {undone}"
            )

    def reject_duplicates(self, accepted: str, rejected: str) -> int:
        """Of accepted files with the same content keep the first by name; how many go."""
        done = self._base.execute(
            "UPDATE files SET place = ? WHERE place = ? AND filename <> (SELECT MIN(filename) FROM "
            "keepers WHERE keepers.digest = files.digest)",
            (rejected, accepted),
        )
        self._base.commit()
        return done.rowcount

    def group_duplicates(self, accepted: str) -> None:
        """Note, for `reject_duplicates`, the first accepted file of every content."""
        self._base.execute("DROP TABLE IF EXISTS keepers")
        self._base.execute(
            "CREATE TABLE keepers AS SELECT digest, MIN(filename) AS filename FROM files "
            "WHERE place = ? GROUP BY digest",
            (accepted,),
        )
        self._base.execute("CREATE INDEX by_digest ON keepers (digest)")
        self._base.commit()

    def keeper_of(self, digest: str) -> str | None:
        """The file that stays of those with this content."""
        found = self._base.execute("SELECT filename FROM keepers WHERE digest = ?", (digest,))
        return next((name for (name,) in found), None)

    def counts(self) -> dict[str, int]:
        """How many files each place has."""
        return dict(self._base.execute("SELECT place, COUNT(*) FROM files GROUP BY place"))

    def __len__(self) -> int:
        return self._base.execute("SELECT COUNT(*) FROM files").fetchone()[0]

    def rows(self, places: tuple[str, ...] = (), order: str = "filename") -> Iterator[Row]:
        """The rows, with `place`, sorted by name (or another order of `ORDERS`)."""
        marks = ", ".join("?" * len(places))
        where = f"WHERE place IN ({marks})" if places else ""
        query = f"SELECT row, place FROM files {where} ORDER BY {ORDERS[order]}"
        for row, place in self._base.execute(query, places):
            yield json.loads(row) | {"place": place}

    def nearest(self, threshold: float, count: int) -> list[Row]:
        """The rows whose scores lie nearest to `threshold`, nearest first."""
        query = (
            "SELECT row, place FROM files WHERE score IS NOT NULL "
            "ORDER BY ABS(score - ?), filename LIMIT ?"
        )
        found = self._base.execute(query, (threshold, count))
        return [json.loads(row) | {"place": place} for row, place in found]

    def range(self) -> tuple[float | None, float]:
        """The lowest and the highest score; None first when there is none."""
        found = self._base.execute("SELECT MIN(score), MAX(score) FROM files").fetchone()
        return found[0], found[1] if found[1] is not None else 0.0

    def scores(self) -> Iterator[float]:
        """The scores, by name."""
        query = "SELECT score FROM files WHERE score IS NOT NULL ORDER BY filename"
        return (score for (score,) in self._base.execute(query))

    def mark_best(self, names: Iterable[str]) -> int:
        """Put the named files to best_views; how many."""
        chosen = [(name,) for name in names]
        self._base.executemany("UPDATE files SET place = 'best_views' WHERE filename = ?", chosen)
        self._base.commit()
        return len(chosen)

    def share(self, rank: int, world_size: int, place: str = "%") -> Iterator[tuple[str, str]]:
        """(name, place) of the files of one rank, by name; of one place alone if it is given."""
        query = "SELECT filename, place FROM files WHERE place LIKE ? ORDER BY filename"
        for name, found in self._base.execute(query, (place,)):
            if owner(name, world_size) == rank:
                yield name, found

    def place_of(self, name: str) -> str | None:
        """Where a file belongs, or None for a name that is unknown."""
        found = self._base.execute("SELECT place FROM files WHERE filename = ?", (name,))
        return next((place for (place,) in found), None)


ORDERS = {
    "filename": "filename",
    "best": "score DESC, filename",
    "worst": "score, filename",
    "vase": "CASE WHEN json_valid(row) THEN json_extract(row, '$.vase') END, filename",
}


def _columns(row: Row) -> tuple[Any, ...]:
    text = json.dumps(row)
    return row["filename"], row.get("digest"), row.get("score"), row.get("problem"), text
