"""Rankings and metrics against integers and fractions of Python; two ranks against one.

The file is also the program of two kinds of process: `test_retrieval.py RANK REPORT PORT`, and
`test_retrieval.py` for the memory.
"""

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared import distributed, nearest
from shared.distributed import World
from shared.errors import UserError
from shared.nearest import search
from shared.retrieval import Positives, evaluate, per_query
from shared.rows_of_ranks import gather_rows
from tests.harness import ROOT, free_port, run_ranks

ALONE = World()
RANKS = pytest.mark.xdist_group("ranks")


def rows(count: int, width: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def near_ties(count: int, width: int = 16) -> Tensor:
    """Rows whose cosines differ in the last digits of float32, every fourth one twice."""
    result = rows(1, width) + 2e-7 * rows(count, width, seed=1)
    result[3::4] = result[2::4][: len(result[3::4])]
    return result


def ranking(queries: Tensor, gallery: Tensor, k: int) -> list[list[int]]:
    """The k nearest by exact scores, then by row, with Python's integers."""
    units = [
        (nearest.unit_rows(side).double() * 2**26).long().tolist() for side in (queries, gallery)
    ]
    found = []
    for query in units[0]:
        scores = [sum(a * b for a, b in zip(query, row, strict=True)) for row in units[1]]
        found.append(sorted(range(len(scores)), key=lambda row, s=scores: (-s[row], row))[:k])
    return found


# search


def test_the_nearest_rows_are_those_of_float64() -> None:
    queries, gallery = rows(20, 64), rows(300, 64, seed=1)
    wide = [torch.nn.functional.normalize(side.double()) for side in (queries, gallery)]
    expected = (wide[0] @ wide[1].T).sort(1, descending=True)
    scores, indices = search(queries, gallery, 10)
    assert indices.tolist() == expected.indices[:, :10].tolist()
    assert (scores - expected.values[:, :10]).abs().max() < 1e-7
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("k", [1, 90])
def test_near_ties_are_ranked_exactly(k: int) -> None:
    queries, gallery = rows(6), near_ties(100)
    assert search(queries, gallery, k)[1].tolist() == ranking(queries, gallery, k)


@pytest.mark.parametrize(("copies", "k"), [(4, 3), (100, 7), (100, 40)])
def test_equal_scores_stand_by_ascending_row(copies: int, k: int) -> None:
    distinct = rows(3)
    gallery = distinct.repeat(copies, 1)
    scores, indices = search(distinct[1:2], gallery, k)
    same = list(range(1, 3 * copies, 3))[:k]
    assert indices[0].tolist() == same
    assert scores[0].unique().numel() == 1


def test_equal_scores_below_better_ones_stand_by_ascending_row_too() -> None:
    gallery = torch.tensor([[1.0, 1.0]]).repeat(200, 1)
    gallery[[150, 160]] = torch.tensor([[1.0, 0.0], [1.0, 0.5]])
    query = gallery[150:151]
    assert search(query, gallery, 5)[1].tolist() == [[150, 160, 0, 1, 2]]
    assert search(query, gallery, 2, exclude=torch.tensor([150]))[1].tolist() == [[160, 0]]
    found = search(gallery[:3], gallery[:60], 4, exclude=torch.arange(3))[1]
    assert found.tolist() == [[1, 2, 3, 4], [0, 2, 3, 4], [0, 1, 3, 4]]


@pytest.mark.parametrize("gallery", [near_ties(500), rows(7).repeat(70, 1)])
def test_chunks_and_threads_do_not_change_a_digit(gallery: Tensor) -> None:
    queries = torch.cat([rows(30, seed=2), gallery[:30]])
    expected = search(queries, gallery, 10)
    before = torch.get_num_threads()
    try:
        for chunk, threads in ((1, 1), (1, 2), (7, 1), (7, 2), (59, 2), (1000, 1)):
            torch.set_num_threads(threads)
            found = search(queries, gallery, 10, chunk=chunk)
            assert all(map(torch.equal, found, expected)), (chunk, threads)
    finally:
        torch.set_num_threads(before)


def test_a_query_can_be_kept_from_finding_itself() -> None:
    gallery = rows(30)
    second = [row[1] for row in ranking(gallery, gallery, 2)]
    some = torch.full((30,), -1)
    some[4] = 4
    found = search(gallery, gallery, 1, exclude=some)[1].flatten().tolist()
    assert found == [second[4] if row == 4 else row for row in range(30)]


def test_lower_precision_asked_for_elsewhere_stays_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[Any, ...]] = []
    original, before = nearest._nearest, torch.get_float32_matmul_precision()

    def watched(queries: Tensor, gallery: Tensor, *rest: Any) -> Any:
        cuda = torch.backends.cuda.matmul.fp32_precision
        seen.append((cuda, (queries @ gallery.T).dtype))
        return original(queries, gallery, *rest)

    monkeypatch.setattr(nearest, "_nearest", watched)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            search(rows(5), near_ties(50), 5)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [("ieee", torch.float32)]


def test_a_gallery_smaller_than_k_is_filled_up_with_no_row() -> None:
    gallery = torch.eye(3)
    scores, indices = search(gallery[:2], gallery, 5, exclude=torch.tensor([-1, 1]))
    assert indices.tolist() == [[0, 1, 2, -1, -1], [0, 2, -1, -1, -1]]
    assert scores[:, 2:].tolist() == [[0.0, -torch.inf, -torch.inf], [-torch.inf] * 3]
    assert search(gallery[:0], gallery, 2)[0].shape == (0, 2)


def test_length_and_kind_of_the_rows_do_not_matter() -> None:
    queries, gallery = rows(5).half(), rows(40, seed=1).half()
    expected = search(queries, gallery, 5)
    for scaled in ((queries.float() * 2**40, gallery.double() / 2**60), (queries, gallery.float())):
        assert all(map(torch.equal, search(*scaled, 5), expected))


def test_a_row_of_zeros_scores_zero() -> None:
    gallery = torch.tensor([[0.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    scores, indices = search(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), gallery, 3)
    assert indices.tolist() == [[1, 0, 2], [0, 1, 2]]
    assert scores[:, 1].tolist() == [0.0, 0.0]


def test_unit_rows_lie_on_the_grid_and_beside_the_true_ones() -> None:
    units = nearest.unit_rows(rows(50, 333))
    steps = units.double() * 2**26
    true = torch.nn.functional.normalize(rows(50, 333).double())
    assert torch.equal(steps, steps.round())
    assert (units - true).abs().max() <= 2**-27


def test_a_float32_product_errs_less_than_is_allowed_for() -> None:
    units = nearest.unit_rows(rows(100, 2048).abs())  # all of one sign: no errors cancel
    error = ((units @ units.T).double() - units.double() @ units.double().T).abs().max()
    assert 0 < error < nearest._product_error(2048)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_refused_by_number(value: float) -> None:
    bad = rows(20)
    bad[[3, 17], 5] = value
    with pytest.raises(UserError, match="query row 3, 17: the embedding holds NaN or inf"):
        search(bad, rows(5), 1)
    with pytest.raises(UserError, match="gallery row 3, 17: "):
        search(rows(5), bad, 1)


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 16\) and \(2, 8\)"):
        search(rows(2), rows(2, 8), 1)
    with pytest.raises(UserError, match="the gallery is empty"):
        search(rows(2), torch.empty(0, 16), 1)
    with pytest.raises(ValueError, match="k is 0"):
        search(rows(2), rows(2), 0)
    with pytest.raises(ValueError, match="exclude has shape"):
        search(rows(2), rows(2), 1, exclude=torch.arange(3))
    with pytest.raises(ValueError, match="exclude names row 2 of 2"):
        search(rows(2), rows(2), 1, exclude=torch.tensor([-1, 2]))


# metrics


def test_metrics_by_hand() -> None:
    """Hits at places 2, 4 and 5 of six, and everywhere, of more relevant rows than k."""
    hits = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    found = per_query(hits, torch.tensor([4, 25]), recall_at=(1, 2, 6), map_at=(2, 5))
    by_hand = {
        "Recall@1": [0, 1],
        "Recall@2": [1, 1],
        "Recall@6": [1, 1],
        "mAP@2": [1 / 2 / 4, 2 / 25],
        "mAP@2_min": [1 / 2 / 2, 1],
        "mAP@5": [(1 / 2 + 2 / 4 + 3 / 5) / 4, 5 / 25],
        "mAP@5_min": [(1 / 2 + 2 / 4 + 3 / 5) / 4, 1],
    }
    assert found.keys() == by_hand.keys()
    for name, values in by_hand.items():
        assert found[name].tolist() == pytest.approx(values), name
    with pytest.raises(ValueError, match="depth 7 is outside 1 to 6"):
        per_query(hits, torch.tensor([4, 25]), recall_at=(7,), map_at=(2,))


def test_a_query_without_relevant_rows_has_no_value() -> None:
    found = per_query(torch.tensor([[False], [True]]), torch.tensor([0, 1]), (1,), (1,))
    for value in found.values():
        assert value[0].isnan()
        assert value[1] == 1


@pytest.mark.slow
def test_the_whole_ranking_gives_the_average_precision_of_scikit_learn() -> None:
    reference = pytest.importorskip("sklearn.metrics").average_precision_score
    queries, gallery, ids = rows(12), rows(60, seed=1), torch.arange(60) % 5
    positives = Positives.same_id(torch.arange(12) % 5, ids)
    found = evaluate(queries, gallery, positives, ALONE, map_at=(60,))
    cosine = torch.nn.functional.cosine_similarity(queries[:, None], gallery[None], dim=2)
    for query, value in enumerate(found.values["mAP@60"].tolist()):
        expected = reference((ids == query % 5).numpy(), cosine[query].numpy())
        assert value == pytest.approx(expected, abs=1e-12)


def brute_force(
    found: list[list[int]], relevant: list[set[int]], k: int
) -> tuple[Fraction, Fraction, Fraction]:
    """Recall@k, mAP@k over all relevant, mAP@k over min(k, |P|); one query after the other."""
    recall = area = area_min = Fraction(0)
    judged = [(row, good) for row, good in zip(found, relevant, strict=True) if good]
    for row, good in judged:
        num_hits, precision = 0, Fraction(0)
        for rank, item in enumerate(row[:k], 1):
            if item in good:
                num_hits += 1
                precision += Fraction(num_hits, rank)
        recall += num_hits > 0
        area += precision / len(good)
        area_min += precision / min(k, len(good))
    return tuple(value / len(judged) for value in (recall, area, area_min))  # type: ignore


def shop() -> tuple[Tensor, Tensor, list[str], list[str]]:
    """Queries, gallery and ids: many, one and no relevant rows, and rows that come twice."""
    generator = torch.Generator().manual_seed(3)
    owner = torch.randint(12, (150,), generator=generator)
    owner[owner == 3] = 4
    owner[:40], owner[40] = 0, 11
    gallery = rows(12, seed=4)[owner] + 0.9 * rows(150, seed=5)
    gallery[100:120] = gallery[80:100]
    asked = torch.arange(31) % 12
    queries = rows(12, seed=4)[asked] + 0.9 * rows(31, seed=6)
    queries[20] = queries[8] = gallery[100]
    return queries, gallery, [f"id_{n}" for n in asked.tolist()], [f"id_{n}" for n in owner]


def test_a_shop_has_the_metrics_of_brute_force() -> None:
    queries, gallery, query_ids, gallery_ids = shop()
    relevant = [{r for r, own in enumerate(gallery_ids) if own == one} for one in query_ids]
    assert max(map(len, relevant)) > 10
    found = evaluate(
        *(queries, gallery, Positives.same_id(query_ids, gallery_ids), ALONE), map_at=(1, 10, 40)
    )
    expected = ranking(queries, gallery, 40)
    for k in (1, 10, 40):
        values = brute_force(expected, relevant, k)
        names = (f"Recall@{k}", f"mAP@{k}", f"mAP@{k}_min")
        for name, value in zip(names, values, strict=True):
            assert found.metrics[name] == pytest.approx(float(value), abs=1e-12), name
    assert found.without_positive == [3, 15, 27]
    assert found.num_queries == 28
    assert found.indices.tolist() == expected
    good = [
        [row in good for row in row_of] for good, row_of in zip(relevant, expected, strict=True)
    ]
    assert found.hits.tolist() == good


def test_leaving_itself_out_takes_it_from_the_relevant_rows_too() -> None:
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    positives = Positives.same_id(["a", "a", "b"], ["a", "a", "b"])
    options = {"exclude": torch.arange(3), "recall_at": (1,), "map_at": (2,)}
    found = evaluate(gallery, gallery, positives, ALONE, **options)  # type: ignore[arg-type]
    assert found.metrics == {"Recall@1": 1.0, "mAP@2": 1.0, "mAP@2_min": 1.0}
    assert found.without_positive == [2]  # its only relevant row is itself


def test_ids_lists_and_csr_say_the_same() -> None:
    ids = Positives.same_id(torch.tensor([7, 9, 8]), torch.tensor([9, 7, 9, 9]))
    lists = Positives.listed([[1], [3, 0, 2, 0], []], 4)
    csr = Positives.csr(torch.tensor([0, 1, 5, 5]), torch.tensor([1, 3, 0, 2, 0]), 4)
    everything = torch.tensor([[0, 1, 2, 3, -1]]).repeat(3, 1)
    for positives in (ids, lists, csr):
        assert positives.counts().tolist() == [1, 3, 0]
        assert positives.hits(everything).int().tolist() == [
            [0, 1, 0, 0, 0],
            [1, 0, 1, 1, 0],
            [0, 0, 0, 0, 0],
        ]
        assert positives.of(torch.tensor([1])).counts().tolist() == [3]
    assert Positives.listed([[], []], 3).counts().tolist() == [0, 0]


def test_lists_that_name_no_gallery_row_are_refused() -> None:
    with pytest.raises(UserError, match=r"query 1 lists gallery row 4 as relevant; .* 0 to 3"):
        Positives.listed([[0], [2, 4]], 4)
    with pytest.raises(ValueError, match="starts must ascend"):
        Positives.csr(torch.tensor([0, 2]), torch.tensor([1]), 4)


def test_queries_that_all_lack_relevant_rows_are_refused() -> None:
    with pytest.raises(UserError, match="none of the 2 queries has a relevant row"):
        evaluate(rows(2), rows(3), Positives.same_id(["x", "y"], ["a", "b", "c"]), ALONE)


# rows of several ranks


def test_rows_are_put_in_their_places_once_and_missing_ones_are_refused() -> None:
    found = gather_rows(torch.tensor([[3.0], [1.0], [9.0]]), torch.tensor([1, 0, 1]), 2, ALONE)
    assert found.tolist() == [[1.0], [3.0]]
    with pytest.raises(UserError, match=r"2 of 4 are on no rank \(row 0, 3\)"):
        gather_rows(rows(2), torch.tensor([1, 2]), 4, ALONE)
    with pytest.raises(ValueError, match="row number 4 is outside 0 to 3"):
        gather_rows(rows(1), torch.tensor([4]), 4, ALONE)
    with pytest.raises(ValueError, match="come with 3 indices"):
        gather_rows(rows(2), torch.arange(3), 3, ALONE)


def answer(world: World) -> dict[str, Any]:
    """All figures of the shop and of noise; on several ranks they must not differ in a digit."""
    queries, gallery, query_ids, gallery_ids = shop()
    found = evaluate(queries, gallery, Positives.same_id(query_ids, gallery_ids), world)
    of_noise = Positives.same_id(torch.arange(1000) % 23, torch.arange(300) % 23)
    tables = (found.indices, found.scores, found.values["mAP@10"].nan_to_num(nan=-1.0))
    joined = [gather_rows(table, found.numbers, 31, world).tolist() for table in tables]
    return {
        "metrics": found.metrics,
        "noise": evaluate(rows(1000), rows(300, seed=1), of_noise, world).metrics,
        "counts": [found.num_queries, found.without_positive],
        "tables": joined,
    }


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw, by rank."""
    path = tmp_path_factory.mktemp("ranks") / "report.json"
    run_ranks(__file__, 2, path, free_port())
    return json.loads(path.read_text())


@RANKS
@pytest.mark.slow
def test_two_ranks_give_the_digits_of_one_and_refuse_together(report: list[dict[str, Any]]) -> None:
    expected = json.loads(json.dumps(answer(ALONE)))
    assert report[0]["answer"] == report[1]["answer"] == expected
    for seen in report:  # queries that a sampler gave twice count once
        assert seen["padded"] == [expected["metrics"], expected["counts"][0]]
        assert seen["rows"] == [[10.0 * row, 0.0] for row in range(5)]  # rank 0 comes first
        assert seen["labels"] == list(range(5))
        assert seen["one rank has none"] == [[0.0], [1.0]]
        assert "query row 7: the embedding holds NaN or inf" in seen["not finite"]
        assert "1 of 5 are on no rank (row 4)" in seen["missing"]
        assert "differ in shape or dtype" in seen["shapes"]
    assert sorted(report[0]["own"] + report[1]["own"]) == list(range(31))


@pytest.mark.slow
def test_memory_stays_bounded() -> None:
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    printed = subprocess.check_output([sys.executable, __file__], env=environ, text=True)
    by_chunk, at_once = map(float, printed.split())
    matrix = 9000 * 6000 * 4 / 2**20  # MiB of all scores
    assert at_once > matrix  # what is measured is measured
    assert by_chunk < 0.6 * matrix


# the programs of other processes


def ranks(rank: str, path: Path, port: str) -> None:
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    world = distributed.setup("cpu", timeout=60.0)
    seen = {"answer": answer(world), **joined(world), **padded(world), **refusals(world)}
    everyone = distributed.gather_objects(seen, world)
    if world.is_main:
        path.write_text(json.dumps(everyone))
    distributed.cleanup(world)


def joined(world: World) -> dict[str, Any]:
    places = torch.tensor([[4, 0, 2], [1, 3, 0]][world.rank][: 3 - world.rank])  # uneven
    places = torch.cat([places, places[:1] if world.rank == 0 else torch.tensor([2])])  # padding
    own = torch.stack([10.0 * places, torch.zeros(len(places))], 1)
    if world.rank == 1:
        own[-1] = torch.tensor([-1.0, -1.0])  # row 2 is taken from rank 0
    none = torch.arange(2.0 * (1 - world.rank)).view(-1, 1)
    return {
        "rows": gather_rows(own.requires_grad_(), places, 5, world).tolist(),
        "labels": gather_rows(places, places, 5, world).tolist(),
        "one rank has none": gather_rows(none, torch.arange(len(none)), 2, world).tolist(),
    }


def padded(world: World) -> dict[str, Any]:
    """A sampler that fills up the last batches: 31 queries as 16 a rank."""
    queries, gallery, query_ids, gallery_ids = shop()
    numbers = torch.arange(32)[world.rank :: 2] % 31
    positives = Positives.same_id(query_ids, gallery_ids)
    found = evaluate(queries[numbers], gallery, positives, world, numbers=numbers)
    return {"padded": [found.metrics, found.num_queries], "own": found.numbers.tolist()}


def refusals(world: World) -> dict[str, Any]:
    queries, gallery, query_ids, gallery_ids = shop()
    queries[7, 0] = torch.nan  # a query of rank 1
    positives = Positives.same_id(query_ids, gallery_ids)
    places = torch.tensor([[0, 1], [2, 3]][world.rank])
    return {
        "not finite": refusal(evaluate, queries, gallery, positives, world),
        "missing": refusal(gather_rows, places.float(), places, 5, world),
        "shapes": refusal(gather_rows, torch.zeros(2, 3 + world.rank), places, 4, world),
    }


def refusal(function: Any, *arguments: Any) -> str:
    try:
        function(*arguments)
    except (UserError, ValueError) as error:
        return str(error)
    return "nothing was refused"


def peak() -> None:
    """Print the MiB by which searches raise the memory of the process: in chunks, then at once."""
    queries, gallery = rows(9000, 32), rows(6000, 32, seed=1)
    search(queries[:50], gallery[:50], 5)
    before = highest_memory()
    for chunk in (None, 9000):
        search(queries, gallery, 5, chunk=chunk)
        print(highest_memory() - before)


def highest_memory() -> float:
    """MiB; not ru_maxrss, which begins with what the parent process held."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    if len(sys.argv) > 1:
        ranks(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    else:
        peak()
