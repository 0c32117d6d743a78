"""The data of a run: training batches on the device, queries and gallery for validation."""

from __future__ import annotations

from torch import Tensor
from torch.utils.data import DataLoader

from arcface.batches import GarmentBatch, Preprocess, collate, open_preprocess
from arcface.evaluation import Split
from arcface.inshop import InShop, open_inshop
from arcface.recipe import Loader
from arcface.run_settings import Settings
from shared.checkpoint import Position
from shared.distributed import World
from shared.errors import UserError
from shared.loader import make_loader
from shared.sampling import steps_per_epoch


class TrainingData:
    """The training pictures, and the way of a batch to the device."""

    def __init__(self, settings: Settings, world: World, seed: int) -> None:
        """Raises UserError for what is missing or does not go together."""
        recipe, self._world, self._seed = settings.recipe, world, seed
        self._loader = recipe.train
        self.dataset = _open(recipe.train, settings)
        if self.dataset.num_classes > recipe.head.num_classes:
            raise UserError(
                f"model.head.num_classes is {recipe.head.num_classes}, the training pictures show "
                f"{self.dataset.num_classes} items; type --cfg-options model.head.num_classes="
                f"{self.dataset.num_classes}"
            )
        self.steps_per_epoch = steps_per_epoch(
            len(self.dataset), recipe.train.batch_size, world.size
        )
        direction = self.dataset.pipeline.flip.direction
        self.preprocess = open_preprocess(recipe.preprocess, direction).to(world.device)

    def epoch(self, position: Position) -> DataLoader[GarmentBatch]:
        """The batches of the epoch at `position` that are not done."""
        return make_loader(
            self.dataset, self._loader.batch_size, self._world, seed=self._seed,
            workers=self._loader.workers, epoch=position.epoch, offset=position.batch,
            collate=collate,
        )  # fmt: skip

    def to_device(self, batch: GarmentBatch) -> tuple[Tensor, Tensor]:
        """Normalised images (B, 3, H, W), mirrored where drawn so, and labels (B,)."""
        images, labels, flipped = (
            tensor.to(self._world.device, non_blocking=True)
            for tensor in (batch.images, batch.labels, batch.flipped)
        )
        return self.preprocess(images, flipped), labels


def open_test(settings: Settings) -> tuple[Split, Split]:
    """Queries and gallery. Raises UserError for what is missing."""
    query, gallery = (
        Split(_open(loader, settings), loader.batch_size, loader.workers)
        for loader in (settings.recipe.query, settings.recipe.gallery)
    )
    return query, gallery


def preprocess_of(settings: Settings, world: World) -> Preprocess:
    """The normalisation, on the device."""
    return open_preprocess(settings.recipe.preprocess).to(world.device)


def _open(loader: Loader, settings: Settings) -> InShop:
    root = settings.roots[loader.name]
    return open_inshop(loader.dataset, root, f"{loader.name}.dataset")
