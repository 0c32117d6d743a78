"""ArcFace, attention transfer and relational distillation, as functions of whole batches.

Every loss is computed in float32 (float64 stays) with autocast off: bfloat16 rounds cosines near 1
to 1 and loses a third of the distance between close embeddings.

B batch, D embedding width, C classes, L tokens; t teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from shared.distributed import World, gather_with_grad
from shared.errors import UserError
from shared.margins import add_margin

DEFAULT_AT_MODE = {"probability": "kl_energy", "features": "zagoruyko"}  # by kind of teacher map
MINMAX_TEMPERATURE = 4.0
ANGLE_CHUNK_ELEMENTS = 1 << 24  # differences or angles held at a time by rkd_angle: 64 MB each


def at_mode_for(mode: str, kind: str) -> str:
    """The mode of `attention_transfer`; "auto" is the one for the `kind` of the teacher's maps."""
    return DEFAULT_AT_MODE[kind] if mode == "auto" else mode


class Distillation:
    """The three terms of the loss and their weighted sum.

    weights: of the terms ArcFace, AT (attention transfer) and RKD (relational distillation).
    """

    def __init__(
        self, weights: dict[str, float], at_mode: str, rkd_norm: str, angle_weight: float
    ) -> None:
        self.weights, self.at_mode = weights, at_mode
        self.rkd_norm, self._angle_weight = rkd_norm, angle_weight

    def terms(
        self,
        outputs: tuple[Tensor, ...],
        wanted: tuple[Tensor, Tensor, str],
        world: World | None = None,
    ) -> dict[str, Tensor]:
        """The terms, unweighted scalars.

        outputs: the student's embeddings (B, D), patch tokens (B, L, D) and mean ArcFace loss.
        wanted: the teacher's embeddings (B, D_t), maps and kind of maps.
        The first two terms are means over this process's images. The relations are those of the
        images of all processes of `world`, the same on each, with exact gradients under DDP's
        averaging; without `world`, of this process's alone.
        """
        embeddings, tokens, arc = outputs
        teacher_embeddings, maps, kind = wanted
        everyone = gather_with_grad(embeddings, world or World())
        teachers = gather_with_grad(teacher_embeddings, world or World())
        relations = rkd_distance(everyone, teachers, self.rkd_norm)
        if self._angle_weight:
            relations = relations + self._angle_weight * rkd_angle(everyone, teachers)
        attention = attention_transfer(tokens, maps, self.at_mode, kind)
        return {"ArcFace": arc, "AT": attention, "RKD": relations}

    def total(self, terms: dict[str, Tensor], *, arc_only: bool = False) -> Tensor:
        """The weighted sum, a scalar; of ArcFace alone during the warm-up."""
        arc = self.weights["ArcFace"] * terms["ArcFace"]
        if arc_only:
            return arc
        return arc + self.weights["AT"] * terms["AT"] + self.weights["RKD"] * terms["RKD"]


class Balance:
    """How strongly each weighted term pulls at the same parameters in the first hundred steps.

    factors: term → its weight in the total. A pull is the norm of the gradient of the weighted
    term by `parameters`, on this process. `steps` are those at which it is measured, from 0.
    """

    DOMINANT = 20.0  # times ArcFace's pull

    def __init__(
        self, factors: dict[str, float], parameters: Sequence[Tensor], total_steps: int
    ) -> None:
        self.factors, self._parameters = factors, parameters
        self.steps = [step for step in (0, *range(9, 100, 10)) if step < total_steps]
        self._measured: list[dict[str, float]] = []

    def measure(self, terms: dict[str, Tensor], step: int) -> dict[str, float]:
        """The pulls at this step, term → norm; {} at a step that is not measured.

        Every process calls it at the same steps: terms of all processes gather in their backward
        pass. The graph of `terms` stays, and no gradient is left on the parameters.
        """
        if step not in self.steps:
            return {}
        pulls = {name: self._pull(self.factors[name] * term) for name, term in terms.items()}
        self._measured.append(pulls)
        return pulls

    def _pull(self, weighted: Tensor) -> float:
        found = torch.autograd.grad(
            weighted, self._parameters, retain_graph=True, allow_unused=True
        )
        squares = [gradient.float().square().sum() for gradient in found if gradient is not None]
        return math.sqrt(float(sum(squares)))

    def dominant(self) -> tuple[str, float] | None:
        """The term that outweighed ArcFace more than DOMINANT times at every measured step.

        And the median of how many times; None when there is none, or nothing was measured.
        """
        for name in self.factors:
            ratios = sorted(pulls[name] / max(pulls["ArcFace"], 1e-12) for pulls in self._measured)
            if name != "ArcFace" and ratios and ratios[0] > self.DOMINANT:
                return name, ratios[len(ratios) // 2]
        return None


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _exact(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or in float64 when it came so."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class ArcFaceHead(nn.Module):
    """Additive angular margin softmax: cross entropy of s·cos θ, with θ + m for the true class.

    `weight` (C, D) holds the class centres, Xavier uniform at the start. Only their directions
    enter the loss; their length sets how fast the optimizer turns them.
    Source: Deng et al. 2019, ArcFace, eq. 3 (arXiv:1801.07698).
    """

    def __init__(
        self, embedding_dim: int, num_classes: int, s: float = 64.0, m: float = 0.5
    ) -> None:
        """Take the scale `s` > 0 and the margin `m` in radians, 0 ≤ m < π/2."""
        super().__init__()
        self.s = s
        self.m = m
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of `embeddings` (B, D), any length, for `labels` (B,) in 0 … C - 1."""
        with _no_autocast(embeddings):
            embeddings = functional.normalize(_exact(embeddings))
            cosines = functional.linear(
                embeddings, functional.normalize(self.weight.to(embeddings.dtype))
            )
            target = cosines.gather(1, labels[:, None])
            logits = cosines.scatter(1, labels[:, None], add_margin(target, self.m))
            return functional.cross_entropy(logits * self.s, labels)


def attention_transfer(
    tokens: Tensor,
    maps: Tensor,
    mode: str = "kl_energy",
    kind: str = "probability",
) -> Tensor:
    """Distance between where the student's tokens and the teacher's map are strong; batch mean.

    tokens: (B, L, D), L a square. mode: kl_energy, zagoruyko or kl_minmax.
    maps, by `kind`: "probability" (B, K) with K a square or (B, H, W), non-negative, each summing
    to 1; "features" (B, C, H, W), or (B, K, C) tokens.
    The student's energy, the sum of squares over D, is laid out as a square; the finer of the two
    maps is averaged down to the grid of the coarser. Averaging uses every token; bilinear
    sampling of 16 x 16 at 7 x 7 points would read 196 of 256. No gradient reaches `maps`.
    Raises UserError for "zagoruyko" with probabilities: they fix the teacher's energy only up to a
    constant.
    """
    if mode == "zagoruyko" and kind == "probability":
        raise UserError(
            "attention transfer mode 'zagoruyko' needs the teacher's feature maps (N, C, H, W), "
            "but the stored maps are probabilities: use kl_energy, or extract feature maps"
        )
    with _no_autocast(tokens):
        student = _as_square(_exact(tokens).square().sum(-1))
        teacher = _teacher_map(_exact(maps.detach()).to(student.dtype), kind)
        side = min(student.shape[-1], teacher.shape[-1])
        student, teacher = (_averaged(energy, side).flatten(1) for energy in (student, teacher))
        if mode == "kl_energy":
            return kl_energy(student, _probabilities(teacher, kind))
        return {"zagoruyko": zagoruyko, "kl_minmax": kl_minmax}[mode](student, teacher)


def kl_energy(energy: Tensor, probability: Tensor) -> Tensor:
    """Σ p_t·(log p_t - log softmax(energy)), averaged over the batch; both inputs (B, K).

    The energy is not scaled, so its absolute size is the temperature.
    """
    return functional.kl_div(energy.log_softmax(1), probability, reduction="batchmean")


def zagoruyko(energy: Tensor, energy_t: Tensor) -> Tensor:
    """Mean over batch and positions of (Q/‖Q‖ - Q_t/‖Q_t‖)²; both inputs (B, K).

    Source: Zagoruyko & Komodakis 2017, eq. 2 (arXiv:1612.03928), squared and averaged as in the
    authors' implementation, whose weight for it is 1000.
    """
    return functional.mse_loss(functional.normalize(energy), functional.normalize(energy_t))


def kl_minmax(energy: Tensor, energy_t: Tensor) -> Tensor:
    """KL of softmax(minmax(√Q)/T) from softmax(minmax(Q_t)/T), T = 4, batch mean; inputs (B, K).

    minmax moves each map to 0 … 1, so neither map's size nor its offset matters. √Q is the length
    of the student's tokens.
    """
    lengths = energy.clamp_min(torch.finfo(energy.dtype).tiny).sqrt()
    log_student = (_minmax(lengths) / MINMAX_TEMPERATURE).log_softmax(1)
    teacher = (_minmax(energy_t) / MINMAX_TEMPERATURE).softmax(1)
    return functional.kl_div(log_student, teacher, reduction="batchmean")


def _minmax(rows: Tensor) -> Tensor:
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    return (rows - low) / (high - low + 1e-6)


def _as_square(rows: Tensor) -> Tensor:
    """(B, K), K a square, as (B, √K, √K)."""
    side = math.isqrt(rows.shape[1])
    return rows.unflatten(1, (side, side))


def _teacher_map(maps: Tensor, kind: str) -> Tensor:
    """The teacher's (B, H, W): its probabilities, or the energy of its features."""
    if kind == "features":
        return _as_square(maps.square().sum(-1)) if maps.ndim == 3 else maps.square().sum(1)
    return _as_square(maps) if maps.ndim == 2 else maps


def _averaged(maps: Tensor, side: int) -> Tensor:
    """(B, H, W) averaged over areas to (B, side, side)."""
    return functional.adaptive_avg_pool2d(maps[:, None], side)[:, 0]


def _probabilities(teacher: Tensor, kind: str) -> Tensor:
    """The teacher's map (B, K) as rows that sum to 1: after averaging, or of its energy."""
    if kind == "features":
        return teacher.softmax(1)
    return teacher / teacher.sum(1, keepdim=True)


def rkd_distance(student: Tensor, teacher: Tensor, norm: str = "offdiag") -> Tensor:
    """Smooth L1 between the two batches' relative pairwise distances, mean over all B² pairs.

    student (B, D), teacher (B, D_t), the whole batch of all processes; no gradient to `teacher`.
    Distances are divided by their mean: "offdiag" over the pairs of different samples, as the
    authors do; "all" counts the B zeros of the diagonal too, which makes the loss
    (B / (B - 1))² times larger and so dependent on the batch size.
    Raises UserError for B < 2. Source: Park et al. 2019, RKD, eq. 5 to 7 (arXiv:1904.05068).
    """
    _check_batch(student)
    with _no_autocast(student):
        student, teacher = _exact(student), _exact(teacher.detach())
        return functional.smooth_l1_loss(
            _relative_distances(student, norm), _relative_distances(teacher, norm).to(student.dtype)
        )


def rkd_angle(student: Tensor, teacher: Tensor, max_elements: int = ANGLE_CHUNK_ELEMENTS) -> Tensor:
    """Smooth L1 between the cosines of the angles at every corner of every triplet, mean of B³.

    student (B, D), teacher (B, D_t), the whole batch of all processes; no gradient to `teacher`.
    Worked off some corners at a time and recomputed in the backward pass, so that no more than
    about `max_elements` differences are held at once instead of B²·D.
    Raises UserError for B < 2. Source: Park et al. 2019, RKD, eq. 8 to 10 (arXiv:1904.05068).
    """
    _check_batch(student)
    with _no_autocast(student):
        student, teacher = _exact(student), _exact(teacher.detach()).to(_exact(student).dtype)
        size = len(student)
        corner = size * max(size, student.shape[1], teacher.shape[1])
        step = max(1, max_elements // corner)
        total = student.new_zeros(())
        for start in range(0, size, step):
            corners = slice(start, start + step)
            total = total + checkpoint(
                _angle_sum, student, teacher, corners, use_reentrant=False, preserve_rng_state=False
            )
        return total / size**3


def _check_batch(student: Tensor) -> None:
    if len(student) < 2:
        raise UserError("relational distillation needs at least 2 images in a batch, got 1")


def _relative_distances(embeddings: Tensor, norm: str) -> Tensor:
    """Euclidean distances (B, B) over their mean."""
    # The matrix-product form of the distance cancels for close embeddings; this one does not.
    distances = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
    size = len(embeddings)
    pairs = size * size if norm == "all" else size * (size - 1)
    mean = distances.sum() / pairs
    return distances / mean.clamp_min(torch.finfo(distances.dtype).eps)


def _angle_sum(student: Tensor, teacher: Tensor, corners: slice) -> Tensor:
    """Summed smooth L1 of the angles whose corner lies in `corners`."""
    with torch.no_grad():
        wanted = _angles(teacher, corners)
    return functional.smooth_l1_loss(_angles(student, corners), wanted, reduction="sum")


def _angles(embeddings: Tensor, corners: slice) -> Tensor:
    """Cosines of the angle j-i-k for each corner i in `corners` and all j, k: (corners, B, B)."""
    edges = functional.normalize(embeddings[None, :] - embeddings[corners, None], dim=-1)
    return edges @ edges.mT
