"""How long retrieval at the full In-shop size takes, and what it needs above the data.

    python tests/benchmarks/retrieval.py [--queries 14218] [--gallery 12612] [--width 2048]

Ours: shared.retrieval.evaluate, Recall@{1,10,20,30,40} and both mAP@10. Broadcast: the cosine of a
batch of 8 queries with the whole gallery by broadcasting, all scores sorted; three batches, and the
rest by calculation. faiss: IndexFlatIP, only where it is installed. Every side has a process of its
own and one thread; memory is the highest of the process less that with the data loaded.
The rows are noise around one centre an item. The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

import torch
from torch import Tensor

from shared.distributed import World
from shared.nearest import unit_rows
from shared.retrieval import Positives, evaluate
from tests.benchmarks.measure import conclude

BATCH, BATCHES, DEPTH = 8, 3, 40
QUERIES_AN_ITEM = 3.57  # In-shop: 14,218 queries of 3,985 items


def main() -> None:
    """Print a table of seconds and MB, then one JSON line; or measure one side."""
    parser = argparse.ArgumentParser(description="Retrieval at the full size.")
    parser.add_argument("--queries", type=int, default=14218)
    parser.add_argument("--gallery", type=int, default=12612)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--side", choices=SIDES, help="measure this one here, print JSON")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measured(options)))
        return
    sides = [side for side in SIDES if side != "faiss" or importlib.util.find_spec("faiss")]
    found = {side: in_own_process(side) for side in sides}
    ours = found["ours"]
    print(f"{'':<12}{'wall s':>10}{'CPU s':>10}{'MB above data':>16}{'time ratio':>12}")
    for side, row in found.items():
        row["ratio"] = round(row["cpu"] / ours["cpu"], 2)
        print(f"{side:<12}{row['wall']:>10}{row['cpu']:>10}{row['mb']:>16}{row['ratio']:>12}")
    sizes = {name: getattr(options, name) for name in ("queries", "gallery", "width")}
    conclude("retrieval", "s, MB", sizes=sizes, **found)


def in_own_process(side: str) -> dict[str, float]:
    """What `measured` says of one side, run alone with this run's arguments."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measured(options: argparse.Namespace) -> dict[str, float]:
    """Seconds and the memory above the data of one side, and its figures."""
    torch.set_num_threads(1)
    num_items = max(1, round(options.queries / QUERIES_AN_ITEM))
    asked, offered = torch.arange(options.queries) % num_items, torch.arange(options.gallery)
    positives = Positives.same_id(asked, offered % num_items)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(num_items, options.width, generator=generator)
    queries = noisy(centres, asked, generator)
    gallery = noisy(centres, offered % num_items, generator)
    before = memory("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    factor, figures = SIDES[options.side](queries, gallery, positives)
    return {
        "wall": round((time.perf_counter() - start) * factor, 1),
        "cpu": round((time.process_time() - cpu) * factor, 1),
        "mb": round(memory("VmHWM") - before),
        **figures,
    }


def noisy(centres: Tensor, items: Tensor, generator: torch.Generator) -> Tensor:
    """A row for each of `items`: its centre and four times as much noise."""
    result = torch.randn(len(items), centres.shape[1], generator=generator).mul_(4)
    for part, own in zip(result.split(256), items.split(256), strict=True):  # no large temporary:
        part.add_(centres[own])  # it would hide what is measured later
    return result


def memory(name: str) -> float:
    """MB of this process by the kernel: VmRSS now, VmHWM the highest."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024 / 1e6


def ours(queries: Tensor, gallery: Tensor, positives: Positives) -> tuple[float, dict[str, float]]:
    """The whole evaluation; 1 and its metrics."""
    found = evaluate(queries, gallery, positives, World())
    names = ("Recall@1", "mAP@10", "mAP@10_min")
    return 1.0, {name: round(found.metrics[name], 6) for name in names}


def broadcast(
    queries: Tensor, gallery: Tensor, positives: Positives
) -> tuple[float, dict[str, float]]:
    """The search of a few batches; how many times that the whole is."""
    for batch in queries[: BATCH * BATCHES].split(BATCH):
        scores = torch.cosine_similarity(batch.unsqueeze(1), gallery.unsqueeze(0), dim=-1)
        scores.sort(dim=1, descending=True)
    return len(queries) / (BATCH * BATCHES), {}


def faiss(queries: Tensor, gallery: Tensor, positives: Positives) -> tuple[float, dict[str, float]]:
    """The search; 1."""
    import faiss as library  # pyright: ignore[reportMissingImports]

    library.omp_set_num_threads(1)
    index = library.IndexFlatIP(gallery.shape[1])
    index.add(unit_rows(gallery).numpy())
    index.search(unit_rows(queries).numpy(), DEPTH)
    return 1.0, {}


Side = Callable[[Tensor, Tensor, Positives], tuple[float, dict[str, float]]]
SIDES: dict[str, Side] = {"ours": ours, "broadcast": broadcast, "faiss": faiss}

if __name__ == "__main__":
    main()
