"""What the filters keep: embeddings, rows, decisions, files in their places."""

import json
import multiprocessing
import os

import numpy as np
import pytest

from shared.distributed import World
from tests.vase_filter_nano import vase_name
from vasevqa.filter import decision, placing, rows, views
from vasevqa.filter.embedding_cache import EmbeddingCache, digest_of
from vasevqa.filter.ledger import Ledger
from vasevqa.filter.rows import Item, Parts, line_of

PATTERN_NAMES = {
    vase_name(1, 12): (vase_name(1, 0).partition("_")[0], 12),
    "a/b/" + vase_name(2, 3).lower(): (vase_name(2, 0).partition("_")[0].lower(), 3),
    vase_name(1, 2).replace(".jpg", ".png"): None,
    "photo.jpg": None,
}


# --- the cache of embeddings ----------------------------------------------------------------------


def fill(directory, numbers, dim=4):
    with EmbeddingCache(directory, "model", dim) as cache:
        for number in numbers:
            digest = digest_of(bytes([number]))
            cache.add([digest], np.full((1, dim), number, np.float32))


def test_a_cache_finds_what_it_and_earlier_ones_kept(tmp_path):
    fill(tmp_path, range(20))
    with EmbeddingCache(tmp_path, "model", 4) as cache:
        cache.add([digest_of(b"new")], np.full((1, 4), 99, np.float32))
        assert len(cache) == 21
        for number in range(20):
            vector = cache.get(digest_of(bytes([number])))
            assert vector is not None and vector.tolist() == [number] * 4
        assert digest_of(b"new") in cache and digest_of(b"other") not in cache
        found = cache.get(digest_of(b"new"))
        assert found is not None and found.tolist() == [99] * 4
    with EmbeddingCache(tmp_path, "another model", 4) as cache:
        assert digest_of(b"new") not in cache


def test_a_row_cut_off_by_a_kill_is_cut_away_and_the_next_ones_are_whole(tmp_path):
    fill(tmp_path, range(3))
    path = next(tmp_path.rglob("*.rows"))
    os.truncate(path, path.stat().st_size - 5)
    with EmbeddingCache(tmp_path, "model", 4) as cache:
        assert [digest_of(bytes([n])) in cache for n in range(3)] == [True, True, False]
    fill(tmp_path, [7])
    with EmbeddingCache(tmp_path, "model", 4) as cache:
        vector = cache.get(digest_of(b"\7"))
        assert vector is not None and vector.tolist() == [7] * 4


def test_two_writers_have_a_file_each_and_both_are_read_later(tmp_path):
    with EmbeddingCache(tmp_path, "model", 4) as first:
        other = multiprocessing.get_context("fork").Process(target=fill, args=(tmp_path, [2]))
        other.start()
        other.join()
        assert other.exitcode == 0
        first.add([digest_of(b"\1")], np.ones((1, 4), np.float32))
    assert len(list(tmp_path.rglob("*.rows"))) == 2
    with EmbeddingCache(tmp_path, "model", 4) as cache:
        assert digest_of(b"\1") in cache and digest_of(b"\2") in cache


def test_a_long_writer_sorts_its_rows_in(tmp_path, monkeypatch):
    monkeypatch.setattr("vasevqa.filter.embedding_cache._FRESH", 3)
    fill(tmp_path, range(10))
    with EmbeddingCache(tmp_path, "model", 4) as cache:
        for number in range(10, 20):
            cache.add([digest_of(bytes([number]))], np.full((1, 4), number, np.float32))
            assert len(cache._fresh) < 3
        for number in range(20):
            vector = cache.get(digest_of(bytes([number])))
            assert vector is not None and vector[0] == number


# --- rows -----------------------------------------------------------------------------------------


def row(name, score=0.0, **more):
    found = {"filename": name, "size": 1, "mtime_ns": 2, "score": score, "digest": name[:1]}
    return found | {"high": score, "low": 0.0} | more


def test_every_file_has_one_owner_whatever_the_number_of_processes():
    names = [f"{n}.jpg" for n in range(300)]
    for size in (1, 2, 5):
        owners = [rows.owner(name, size) for name in names]
        assert set(owners) == set(range(size))
    assert [rows.owner(n, 4) for n in names] == [rows.owner(n, 4) for n in names]


def test_the_sample_is_the_same_in_any_order_and_another_for_another_seed():
    names = [f"{n}.jpg" for n in range(100)]
    drawn = rows.sample(names, 10, 0)
    assert drawn == rows.sample(reversed(names), 10, 0) and len(set(drawn)) == 10
    assert drawn != rows.sample(names, 10, 1)
    assert rows.sample(names[:4], 10, 0) == names[:4]


def test_a_changed_file_is_pending_again(tmp_path):
    root, parts = tmp_path / "in", Parts(tmp_path / "parts", World())
    root.mkdir()
    for name in "ab":
        (root / name).write_text(name)
    with parts.open() as lines:
        for item in parts.pending(root, ["a", "b"]):
            lines.write(line_of({"filename": item.name, "size": item.size,
                                 "mtime_ns": item.mtime_ns}))  # fmt: skip
    assert parts.pending(root, ["a", "b"]) == []
    (root / "a").write_text("longer")
    assert [item.name for item in parts.pending(root, ["a", "b"])] == ["a"]


def test_a_line_cut_off_by_a_kill_is_cut_away(tmp_path):
    parts = Parts(tmp_path, World())
    with parts.open() as lines:
        lines.write(line_of(row("a")) + line_of(row("b"))[:9])
    with parts.open() as lines:
        lines.write(line_of(row("c")))
    assert [found["filename"] for found in parts] == ["a", "c"]


def test_rows_of_another_number_of_processes_count(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    names = [f"{n}" for n in range(8)]
    for name in names:
        (root / name).write_text(name)
    for rank in range(2):
        parts = Parts(tmp_path / "p", World(rank, rank, 2))
        with parts.open() as lines:
            for item in parts.pending(root, names):
                lines.write(line_of({"filename": item.name, "size": item.size,
                                     "mtime_ns": item.mtime_ns}))  # fmt: skip
    assert Parts(tmp_path / "p", World()).pending(root, names) == []


# --- the ledger -----------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path):
    given = [row("b", 0.2), row("a", 0.1), row("c", 0.3), row("gone", 0.9),
             row("x", problem="no picture") | {"score": None}]  # fmt: skip
    present = np.sort(np.array([Item.of(r).key for r in given if r["filename"] != "gone"],
                               np.uint64))  # fmt: skip
    with Ledger.build(tmp_path / "l.db", given, present) as made:
        made.decide("accepted", "rejected", 0.2)
        yield made


def test_a_ledger_holds_the_files_that_are_there_and_decides_at_the_threshold(ledger):
    places = {r["filename"]: r["place"] for r in ledger.rows()}
    expected = {"a": "rejected", "b": "accepted", "c": "accepted", "x": "quarantine"}
    assert places == expected and list(places) == sorted(places)
    assert ledger.counts() == {"accepted": 2, "rejected": 1, "quarantine": 1}
    assert [r["filename"] for r in ledger.rows(("accepted",), "best")] == ["c", "b"]
    assert [r["filename"] for r in ledger.nearest(0.21, 2)] == ["b", "c"]
    assert ledger.range() == (0.1, 0.3)


def test_of_equal_contents_the_first_accepted_name_stays(tmp_path):
    given = [row("q1", 0.5), row("q2", 0.5), row("q0", 0.1), row("z", 0.5)]
    given[3]["digest"] = "other"
    present = np.sort(np.array([Item.of(r).key for r in given], np.uint64))
    with Ledger.build(tmp_path / "l.db", given, present) as ledger:
        ledger.decide("accepted", "rejected", 0.3)
        ledger.group_duplicates("accepted")
        assert ledger.reject_duplicates("accepted", "rejected") == 1
        assert [r["filename"] for r in ledger.rows(("accepted",))] == ["q1", "z"]
        assert ledger.keeper_of("q") == "q1"


def test_the_shares_of_all_ranks_are_all_files(ledger):
    shares = [list(ledger.share(rank, 3)) for rank in range(3)]
    assert sorted(pair for share in shares for pair in share) == [
        (r["filename"], r["place"]) for r in ledger.rows()
    ]


# --- files in their places ------------------------------------------------------------------------

FOLDERS = ("accepted", "rejected")


@pytest.fixture
def source(tmp_path):
    for name in ("a.txt", "sub/b.txt"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        os.utime(path, ns=(10**18, 10**18 + 7))
    return tmp_path / "in"


def tree(root):
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if not p.is_dir()}


@pytest.mark.parametrize("link", [False, True])
def test_a_new_decision_moves_files_and_leaves_sources_alone(source, tmp_path, link):
    out = tmp_path / "out"
    first = [("a.txt", "accepted"), ("sub/b.txt", "rejected")]
    folders = placing.Folders(source, out, FOLDERS, link)
    assert list(folders.place(first)) == ["a.txt", "sub/b.txt"]
    assert tree(out) == {"accepted/a.txt", "rejected/sub/b.txt"}
    assert (out / "accepted/a.txt").is_symlink() == link
    before = (out / "rejected/sub/b.txt").lstat().st_ino
    second = [("a.txt", "accepted"), ("sub/b.txt", "accepted")]
    list(folders.place(second))
    assert tree(out) == {"accepted/a.txt", "accepted/sub/b.txt"}
    assert (out / "accepted/sub/b.txt").lstat().st_ino == before  # moved, not copied again
    assert (out / "accepted/sub/b.txt").read_text() == "sub/b.txt"
    assert tree(source) == {"a.txt", "sub/b.txt"}
    assert (source / "a.txt").stat().st_mtime_ns == 10**18 + 7


def test_links_become_copies_and_copies_links(source, tmp_path):
    out, files = tmp_path / "out", [("a.txt", "accepted")]
    for link in (True, False, True):
        list(placing.Folders(source, out, FOLDERS, link).place(files))
        assert (out / "accepted/a.txt").is_symlink() == link
        assert (source / "a.txt").read_text() == "a.txt"


def test_a_changed_source_is_copied_again(source, tmp_path):
    out, files = tmp_path / "out", [("a.txt", "accepted")]
    folders = placing.Folders(source, out, FOLDERS, link=False)
    list(folders.place(files))
    (source / "a.txt").write_text("changed")
    list(folders.place(files))
    assert (out / "accepted/a.txt").read_text() == "changed"


def test_what_no_report_names_is_moved_aside_and_not_deleted(tmp_path):
    given = [row("a", 1.0)]
    present = np.sort(np.array([Item.of(r).key for r in given], np.uint64))
    out = tmp_path / "out"
    folders = placing.Folders(tmp_path, out, FOLDERS, link=False)
    for name in ("accepted/a", "accepted/own notes", "rejected/a", "rejected/old/x"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    with Ledger.build(tmp_path / "l.db", given, present) as ledger:
        ledger.decide("accepted", "rejected", 0.5)
        assert folders.move_strays(ledger, tmp_path / "aside") == 3
    assert tree(out) == {"accepted/a"}
    assert tree(tmp_path / "aside") == {"accepted/own notes", "rejected/a", "rejected/old/x"}


# --- decisions and views --------------------------------------------------------------------------


def test_statistics_and_the_threshold_by_hand():
    found = decision.statistics([0.0, 1.0, 2.0, 3.0, 4.0])
    assert found["count"] == 5 and found["mean"] == 2.0 and found["median"] == 2.0
    assert found["std"] == pytest.approx(2**0.5)
    assert found["p10"] == pytest.approx(0.4) and found["p25"] == 1.0 and found["p90"] == 3.6
    assert decision.from_sample([0.0, 1.0, 2.0, 3.0, 4.0], 0.75).value == 1.0
    assert decision.from_sample([0.0, 1.0, 2.0, 3.0, 4.0], 1.0).value == 0.0
    keeps = {line["percentile"]: line["keeps"] for line in decision.advice(found)}
    assert keeps == {10: 0.9, 25: 0.75, 50: 0.5, 75: 0.25, 90: 0.1}


def test_a_histogram_counts_every_score_once():
    scores = [0.0, 0.1, 0.5, 1.0, 1.0]
    found = decision.histogram(iter(scores), 0.0, 1.0)
    assert sum(found["counts"]) == 5 and len(found["edges"]) == decision.BINS + 1
    assert found["counts"][-1] == 2
    assert sum(decision.histogram([0.3, 0.3], 0.3, 0.3)["counts"]) == 2


@pytest.mark.parametrize(("name", "expected"), PATTERN_NAMES.items())
def test_names_are_read_by_the_archives_pattern_in_any_case(name, expected):
    import re

    from vasevqa.filter.clipfilter2 import PATTERN

    assert views.parse_name(re.compile(PATTERN, re.IGNORECASE), name) == expected


def view_row(vase, view, score, **more):
    named = {"vase": vase.upper(), "written": vase, "view": view, "filename": f"{vase}{view}"}
    return named | {"high": score} | more


def test_the_best_view_wins_ties_go_to_the_first_and_unreadable_ones_never_win():
    given = [view_row("A", 3, 0.5), view_row("A", 2, 0.5), view_row("A", 1, 0.2),
             view_row("B", 1, 0.0, problem="cut off"), view_row("B", 2, -0.4),
             view_row("C", 1, 0.0, problem="empty")]  # fmt: skip
    found = list(views.vases(given))
    assert [vase.best and vase.best.filename for vase in found] == ["A2", "B2", None]
    first, second = found[0].result(), found[1].result()
    assert (first["selected_view"], first["reason"], first["total_views"]) == (
        2, "best_clip_score", 3)  # fmt: skip
    assert [v["view_number"] for v in first["all_view_scores"]] == [1, 2, 3]
    assert second["reason"] == "only_one_view" and "all_view_scores" not in second
    assert second["unreadable_views"] == ["B1"]
    json.dumps(first)


def test_a_vase_is_called_as_its_first_file_is_and_case_alone_makes_no_other():
    given = [view_row("ab", 1, 0.5), view_row("AB", 2, 0.7), view_row("C", 1, 0.1)]
    found = [vase.result() for vase in views.vases(given)]
    assert [(one["vase_id"], one["total_views"]) for one in found] == [("ab", 2), ("C", 1)]


def test_a_table_of_a_model_is_made_once_and_again_when_it_is_damaged(tmp_path):
    made = []

    def table():
        def make():
            made.append(1)
            return np.arange(6, dtype=np.float32).reshape(2, 3)

        with EmbeddingCache(tmp_path, "model", 3) as cache:
            return cache.table("prompts", make).tolist()

    assert table() == table() == [[0, 1, 2], [3, 4, 5]]
    assert len(made) == 1
    next(tmp_path.rglob("prompts.npy")).write_bytes(b"torn")
    assert table() == [[0, 1, 2], [3, 4, 5]]
    assert len(made) == 2
