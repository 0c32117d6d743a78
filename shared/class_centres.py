"""Softmax class centres for margin losses, sharded over ranks, with a sampling rate (Partial FC).

    centres = ClassCentres(num_classes, width, world, sample_rate=0.1, seed=seed).to(world.device)
    optimizer = torch.optim.SGD(centres.parameters(), lr=0.02, momentum=0.9)   # the centres alone
    rows = CentreRows(centres, optimizer)            # a part of the checkpoint
    ...
    rows.sample(labels, position.step)               # nothing to do at rate 1
    loss = centres(wrapped(images), labels)          # every rank, equal batches
    ...
    run.save({"centres": rows, ...})                 # which calls rows.collect() on every rank

Rank r of w owns a contiguous slice of the classes. The embeddings of all ranks are gathered, each
rank compares them with its own centres, and the softmax's maximum and sums go round, never the
logits. At rate 1 loss and gradients are those of one process on the whole batch.

The centres differ from rank to rank, so they must stay out of DDP, which would make them equal:
keep the module outside what `distributed.wrap` gets, as above, or inside with their names in the
wrapped module's `_ddp_params_and_buffers_to_ignore`. They also stay out of `clip_grad_norm_`: its
norm would differ by rank, and with it the backbone; `Amp.step(…, sharded=(optimizer, world))` clips
both by the norm over all ranks. Few classes need no sharding: with `World()` in place of the real
world and rate 1 the module is an ordinary head, for DDP to wrap with the rest.

Memory of a rank, beside the backbone, at the peak of a step: 4 bytes times
    D · rows                    centres                      rows = sub-centres · C / w
    D · rows · moments          optimizer: SGD's momentum 1, AdamW 2
    D · drawn · (1 + moments)   below rate 1: the drawn rows and their moments, drawn = rate · rows
    the largest of              N images of all ranks, one centre a class:
        3 · D · drawn             unit rows, their gradient, the centres' gradient
        2 · D · drawn + N · drawn
        D · drawn + 2 · N · drawn logits and their exponentials, forward and backward
    4 · D · N                   gathered embeddings and their gradients
in figures, D = 512, 8 ranks of 64 images, SGD with momentum, `bytes_per_rank`:
     1 million classes   rate 1   1.28 GB     rate 0.1   0.64 GB
    10 million classes   rate 1  12.80 GB     rate 0.1   6.40 GB
Beside these, rank 0 holds all centres and moments in CPU memory while a checkpoint is written, and
every rank while it is read: 4.1 GB for 1 million classes, 41 GB for 10 million.

Source: An et al. 2021 (arXiv:2010.05222) and 2022, Partial FC (arXiv:2203.15565). Theirs lets the
optimizer change rows that were not drawn; here they stay as they are, to the bit.

N images of all ranks, B of one, D width, C classes, K sub-centres.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shared import seed as seeds
from shared.distributed import World, gather_with_grad
from shared.errors import UserError
from shared.margins import check_margins, margin_logits_
from shared.sharded_softmax import softmax_loss, unit_rows

IGNORED = -1  # the label of a row that does not count (padding of a last, smaller batch)
_CLASSES_A_DRAW = 1024  # initial centres come from one generator each so many classes


def shard(num_classes: int, rank: int, size: int) -> range:
    """The classes that `rank` of `size` owns: contiguous, as many as the others' or one more."""
    share, rest = divmod(num_classes, size)
    start = rank * share + min(rank, rest)
    return range(start, start + share + (rank < rest))


def bytes_per_rank(
    num_classes: int,
    embedding_dim: int,
    world_size: int,
    batch_size: int,
    *,
    sub_centres: int = 1,
    sample_rate: float = 1.0,
    moments: int = 1,
) -> dict[str, int]:
    """Bytes by kind at the peak of a step on rank 0, in float32; their sum is the peak.

    batch_size: images of one rank. moments: tensors that the optimizer keeps for each centre.
    The formula stands at the top of this file.
    """
    classes = len(shard(num_classes, 0, world_size))
    images, drawn = batch_size * world_size, num_drawn(sample_rate, classes)
    unit = 4 * embedding_dim * sub_centres
    own, active, logits = unit * classes, unit * drawn, 4 * images * drawn
    kept = 2 * logits if sub_centres > 1 else 0  # which of the K was the largest, 8 bytes each
    cosines = sub_centres * logits
    working = max(3 * active, 2 * active + cosines, active + kept + logits + cosines)
    copies = 0 if sample_rate == 1 else (1 + moments) * active
    return {
        "centres": own,
        "moments": moments * own,
        "drawn rows": copies,
        "working": working,
        "embeddings": 4 * 4 * images * embedding_dim,
    }


class ClassCentres(nn.Module):
    """Embeddings and labels → the mean margin-softmax loss of all ranks' images.

    `weight` (rows, D) holds this rank's centres, those of a class next to each other; below rate 1
    those of the classes drawn last. Only their directions enter the loss; their length sets how
    fast the optimizer turns them. With K sub-centres a class's cosine is the largest of its K.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        world: World,
        *,
        margins: Tensor | float = 0.5,
        scale: float = 64.0,
        easy_margin: bool = False,
        sub_centres: int = 1,
        sample_rate: float = 1.0,
        init_std: float = 0.01,
        seed: int = 0,
    ) -> None:
        """Draw the centres, N(0, init_std²): the same ones for every number of ranks.

        margins: radians, one for all or (C,) for each class; not in the checkpoint.
        Raises UserError for a sampling rate outside (0, 1] and for fewer classes than ranks.
        """
        super().__init__()
        if not 0 < sample_rate <= 1:
            raise UserError(f"sample rate {sample_rate}: must be above 0 and at most 1")
        if num_classes < world.size:
            raise UserError(
                f"{num_classes} classes cannot be sharded over {world.size} processes: use fewer, "
                "or do not shard the head"
            )
        margins = torch.as_tensor(margins, dtype=torch.float64).expand(num_classes)
        check_margins(scale, margins)
        self.num_classes, self.sub_centres, self.sample_rate = num_classes, sub_centres, sample_rate
        self.classes = shard(num_classes, world.rank, world.size)
        self.world, self._scale, self._easy, self._seed = world, scale, easy_margin, seed
        self.margins: Tensor
        own = slice(self.classes.start, self.classes.stop)
        self.register_buffer("margins", margins[own].clone(), persistent=False)
        rows = _initial(self.classes, sub_centres * embedding_dim, seed).mul_(init_std)
        self.store: Tensor | None  # below rate 1: the centres of all own classes, (classes, K·D)
        self.drawn: Tensor | None  # and whose are in `weight`, ascending numbers within the shard
        drawn = None if sample_rate == 1 else torch.arange(num_drawn(sample_rate, len(rows)))
        self.register_buffer("store", None if drawn is None else rows, persistent=False)
        self.register_buffer("drawn", drawn, persistent=False)
        active = rows if drawn is None else rows[drawn]
        self.weight = nn.Parameter(active.view(-1, embedding_dim))
        if world.size > 1 or drawn is not None:
            self.register_state_dict_pre_hook(_refuse)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over the images of all ranks, computed in float32 (float64 stays).

        embeddings: (B, D) of any length, B the same on every rank. labels: (B,) in 0 … C - 1, or
        IGNORED. In training below rate 1 `CentreRows.sample` comes first, with these labels; in
        evaluation all classes take part.
        With DDP's mean of the backbone's gradients, they are those of one process on all images.
        Raises UserError for another label; on a GPU looking at them waits for the embeddings.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            images = unit_rows(_exact(embeddings))
            everyone = gather_with_grad(images, self.world)
            if self.world.size > 1 and everyone.requires_grad:
                # Each rank adds what its centres say; DDP will divide the sum by their number.
                everyone.register_hook(lambda gradient: gradient * self.world.size)
            labels = self.gathered(labels)
            own = labels - self.classes.start
            own = own.where((labels >= 0) & (own >= 0) & (own < len(self.classes)), -1)
            margins = self.margins[own.clamp_min(0)].to(everyone.dtype)
            cosines, columns = self._cosines(everyone), self._columns(own)
            logits = margin_logits_(cosines, columns, margins, self._scale, easy=self._easy)
            return softmax_loss(logits, columns, labels != IGNORED, self.world)

    def gathered(self, labels: Tensor) -> Tensor:
        """The labels of all ranks, int64 (ranks x B,), by rank.

        Raises UserError for one that is no class.
        """
        labels = gather_with_grad(labels.long(), self.world)
        wrong = labels[((labels < 0) | (labels >= self.num_classes)) & (labels != IGNORED)]
        if len(wrong):
            raise UserError(
                f"label {int(wrong[0])} is outside 0 … {self.num_classes - 1}: the head has "
                f"{self.num_classes} classes ({IGNORED} marks rows that do not count)"
            )
        return labels

    def draw(self, labels: Tensor, step: int) -> None:
        """Put other rows into `weight`: the classes of `labels` (all ranks') and random ones.

        The draw follows from seed, step and rank alone, so a resumed run repeats it.
        """
        assert self.store is not None
        own = labels - self.classes.start
        present = own[(labels >= 0) & (own >= 0) & (own < len(self.classes))].unique()
        numbers = torch.Generator(own.device)
        numbers.manual_seed(seeds.derive(self._seed, step, self.world.rank))
        ranking = torch.rand(len(self.classes), generator=numbers, device=own.device)
        ranking[present] = 2.0  # above all others: always drawn
        count = max(num_drawn(self.sample_rate, len(self.classes)), len(present))
        self.drawn = ranking.topk(count).indices.sort().values
        self.weight.data = self.store[self.drawn].view(-1, self.weight.shape[1])

    def write_back(self) -> None:
        """Below rate 1: copy the rows in `weight` to where all own rows are kept."""
        if self.store is not None:
            self.store[self.drawn] = self.weight.detach().view(-1, self.store.shape[1])

    def _cosines(self, images: Tensor) -> Tensor:
        """(N, classes) of unit `images` and the drawn classes, or all in evaluation."""
        rows = self.weight
        if self.store is not None and not self.training:
            self.write_back()
            rows = self.store.view(-1, rows.shape[1])
        cosines = images @ unit_rows(rows.to(images.dtype)).T
        if self.sub_centres > 1:
            cosines = cosines.unflatten(1, (-1, self.sub_centres)).max(2).values
        return cosines

    def _columns(self, own: Tensor) -> Tensor:
        """Where each class of `own` (numbers within the shard, -1 elsewhere) stands in `weight`."""
        if self.drawn is None or not self.training:
            return own
        columns = torch.searchsorted(self.drawn, own).clamp_max(len(self.drawn) - 1)
        if bool(((self.drawn[columns] != own) & (own >= 0)).any()):
            raise RuntimeError(
                "a label's centre was not drawn: call CentreRows.sample(labels) first"
            )
        return columns.where(own >= 0, -1)


def _exact(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or in float64 when it came so."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def num_drawn(sample_rate: float, num_classes: int) -> int:
    """How many of a rank's classes take part in a step, unless more are present in the batch."""
    return max(1, round(sample_rate * num_classes))


def _initial(classes: range, width: int, seed: int) -> Tensor:
    """Normal numbers (classes, width), the same for a class however the classes are sharded."""
    rows = torch.empty(len(classes), width)
    first, last = classes.start // _CLASSES_A_DRAW, (classes.stop - 1) // _CLASSES_A_DRAW
    for block in range(first, last + 1):
        numbers = torch.Generator().manual_seed(seeds.derive(seed, block))
        drawn = torch.randn(_CLASSES_A_DRAW, width, generator=numbers)
        start = block * _CLASSES_A_DRAW
        low, high = max(start, classes.start), min(start + _CLASSES_A_DRAW, classes.stop)
        rows[low - classes.start : high - classes.start] = drawn[low - start : high - start]
    return rows


def _refuse(*_: Any) -> None:
    raise RuntimeError("this module holds one rank's rows: save CentreRows(centres, optimizer)")
