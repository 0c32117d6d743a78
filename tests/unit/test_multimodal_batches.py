"""Batches of multimodal/: what they hold, in which order, for any number of processes."""

from __future__ import annotations

import itertools

import pytest
import torch

from multimodal.datasets import OnePerGroup, Source, collate_views
from multimodal.pairs.batches import BatchOptions, epoch_of, held_out
from multimodal.pairs.samples import Counts
from multimodal.training.schedule import Span, order_of, steps_of_sources
from shared.checkpoint import Position
from shared.distributed import World
from shared.loader import make_loader

ALONE = World()
SPANS = [Span(0, 0, 2), Span(1, 2, 5), Span(2, 5, 7)]


class Items:
    """Numbered items in groups of `members`; an item is (its number, a random number)."""

    counts = Counts("items", "train", 0, 0)
    label_names = ("one",)

    def __init__(self, total: int, members: int = 1, base: int = 0) -> None:
        self.total, self.members, self.base = total, members, base

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number = torch.tensor([float(self.base + index), float(torch.rand(()))])
        return {"images": number, "labels": torch.zeros(3), "replaced": torch.tensor(False)}

    def group_of(self, index: int) -> int:
        return index // self.members


def source(name: str, total: int, base: int, members: int = 1) -> Source:
    items = held = OnePerGroup(Items(total, members, base))
    return Source(name, ("image", "text"), items, held, "classes")


SOURCES = [source("large", 40, 0), source("small", 12, 1000, members=2)]


def options(rows: int = 3, workers: int = 0) -> BatchOptions:
    return BatchOptions(rows, 7, workers, 0.5, 0.3)


def drawn(world: World = ALONE, rows: int = 3, start: tuple[int, int] = (2, 0), workers: int = 0):
    """(source, rows of `images`) of the rest of an epoch."""
    position = Position(0, *start)
    span = next(span for span in SPANS if span.first <= start[0] < span.end)
    found = epoch_of(SOURCES, options(rows, workers), world, span, position)
    return [(task.name, batch["images"].tolist()) for task, batch in found]


def test_an_epoch_takes_the_sources_in_the_seeded_order():
    found = [name for name, _ in drawn()]
    counts = steps_of_sources([13, 4], 0.5)
    order = order_of(counts, 7, 1, 2)
    assert found == [SOURCES[place].name for place in order]
    assert sum(counts) == 17 and counts[1] > 4  # the small source comes more often than once


@pytest.mark.parametrize(("batch", "workers"), [(1, 0), (9, 0), (14, 2)])
def test_the_rest_of_an_epoch_is_the_same_after_a_stop(batch, workers):
    assert drawn(start=(3, batch), workers=workers) == drawn(start=(3, 0))[batch:]


def test_passes_go_on_through_epochs_and_draw_other_random_numbers():
    small = [
        rows for epoch in (2, 3, 4) for name, rows in drawn(start=(epoch, 0)) if name == "small"
    ]
    passes = [list(itertools.chain(*small[i : i + 4])) for i in range(0, len(small) - 3, 4)]
    for one in passes:
        items = [int(number - 1000) for number, _ in one]
        assert sorted(items) == list(range(12))  # a pass takes every item once
    assert len({tuple(map(tuple, one)) for one in passes}) == len(passes)
    assert drawn(start=(2, 0)) != drawn(start=(5, 0))  # nor do two stages draw the same


def test_two_processes_take_the_halves_of_what_one_takes():
    whole = drawn(rows=6)
    halves = [drawn(World(rank=rank, size=2), rows=3) for rank in range(2)]
    assert [name for name, _ in whole] == [name for name, _ in halves[0]]
    for (_, rows), (_, first), (_, second) in zip(whole, *halves, strict=True):
        assert rows == first + second


def test_modality_masks_come_in_the_last_stage_and_follow_the_step():
    first = list(epoch_of(SOURCES, options(), ALONE, SPANS[1], Position(0, 2, 0)))
    last = list(epoch_of(SOURCES, options(), ALONE, SPANS[2], Position(0, 5, 0)))
    assert all("modality_mask" not in batch for _, batch in first)
    masks = [batch["modality_mask"].tolist() for _, batch in last]
    assert masks != [masks[0]] * len(masks)
    resumed = list(epoch_of(SOURCES, options(), ALONE, SPANS[2], Position(0, 5, 4)))
    assert [batch["modality_mask"].tolist() for _, batch in resumed] == masks[4:]


def test_validation_batches_are_the_same_for_any_number_of_processes():
    def taken(world: World) -> list[list[float]]:
        found = held_out(SOURCES[0], 6, world, workers=0)
        return [[number for number, _ in batch["images"].tolist()] for batch in found]

    whole = taken(ALONE)
    assert whole == [[float(i) for i in range(start, start + 6)] for start in range(0, 36, 6)]
    parts = [taken(World(rank=rank, size=2)) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == whole
    (short,) = held_out(SOURCES[1], 64, ALONE, workers=0)  # less than a batch is one
    assert len(short["images"]) == 6


def test_validation_takes_the_first_item_of_each_group():
    items = OnePerGroup(Items(12, 4))
    assert [int(items[place]["images"][0]) for place in range(3)] == [0, 4, 8]


@pytest.mark.parametrize(("rows", "batches"), [(8, 6), (5, 9), (12, 4)])
def test_a_pass_takes_every_utterance_and_no_batch_has_a_speaker_twice(rows, batches):
    items = OnePerGroup(Items(48, 4))
    assert items.steps(rows) == batches
    passes = []
    for number in (0, 1):
        loader = make_loader(items.of_pass(rows, 7, number), rows, ALONE, seed=7, workers=0,
                             epoch=number)  # fmt: skip
        found = [[int(n) for n, _ in batch["images"].tolist()] for batch in loader]
        assert len(found) == batches
        assert all(len({n // 4 for n in batch}) == rows for batch in found)
        every = [n for batch in found for n in batch]
        assert len(set(every)) == rows * batches > 48 - rows
        passes.append(every)
    assert passes[0] != passes[1]


def test_a_speaker_with_most_of_the_utterances_is_in_every_batch_once():
    class Uneven(Items):
        def group_of(self, index: int) -> int:
            return 0 if index < 20 else index

    items = OnePerGroup(Uneven(24))
    assert items.steps(2) == 4  # four others, one for each batch
    assert items.steps(6) == 0  # too few for a batch


class Sounds(Items):
    """Items with sounds of several lengths."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"audio": torch.full((3 + index, 80), float(index))}


def test_pairs_of_sounds_are_of_one_group_and_never_the_same_sound():
    pairs = OnePerGroup(Sounds(9, 4), pairs=True)  # the ninth is alone: no pair
    assert len(pairs) == 2
    torch.manual_seed(0)
    for _ in range(50):
        item = pairs.item(1, 2)
        first, second = (int(item[name][0, 0]) for name in ("audio", "audio_2"))
        assert first != second and {first, second} <= {4, 5, 6, 7}
    batch = collate_views([pairs[0], pairs[1]])
    for name, mask in (("audio", "audio_mask"), ("audio_2", "audio_mask_2")):
        assert batch[name].shape[:2] == batch[mask].shape
        lengths = [int(rows[0, 0]) + 3 for rows in batch[name]]
        assert batch[mask].sum(dim=1).tolist() == lengths
