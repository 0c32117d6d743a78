"""Teachers from their weight files: an embedding and a feature map for each face.

    teacher = open_teacher(Path("backbone.pth"))           # an IResNet, found by its names
    embeddings, maps = teacher(faces)                      # uint8 (B, 3, H, W), any size

Three kinds, chosen by `arch`: InsightFace's IResNets; any torchvision classification network with
a last map of features; a TorchScript file of yours. The first two read plain tensors and run no
code of the file.

IResNets have the names of InsightFace's weight files. Sources: the IR block, the BN-Dropout-FC-BN
end and the block counts are of Deng et al. 2019, "ArcFace" (arXiv:1801.07698, section 3.1);
residual blocks that end without an activation, of Duta et al. 2020, "Improved Residual Networks"
(arXiv:2004.04989).
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from face_distill.distill.images import Preprocess
from shared import weights
from shared.errors import UserError, did_you_mean
from shared.files import check_regular
from shared.hub import fetched_weights

TORCHSCRIPT = "torchscript"
_FACE = (0.5, 0.5, 0.5)  # InsightFace's mean and deviation, RGB
# Where torchvision's networks have their last map, when they have no module `avgpool` to take it.
_LAST_STAGES = {
    "DenseNet": "features",  # its last activation comes after it, and works in place
    "MobileNetV2": "features",
    "SqueezeNet": "features",
    "ShuffleNetV2": "conv5",
}
_HEADS = ("fc", "classifier", "head")  # classifiers: a teacher needs none, whatever it was for
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # more classifiers, for training alone
_INCEPTIONS = ("googlenet", "inception_v3")

# Blocks in each of the four stages.
VARIANTS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
}
IRESNET_SIZE = 112  # pixels a side; the fully connected layer fits no other size
EMBEDDING_DIM = 512
_WIDTHS = (64, 128, 256, 512)  # channels of the stages
_LAST_SIDE = IRESNET_SIZE // 2 ** len(_WIDTHS)  # every stage halves the picture: 7
_BLOCK_NAME = re.compile(r"layer([1-4])\.(\d+)\.")


class Network(Protocol):
    """What each kind of teacher is."""

    def embed_and_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) and feature maps (B, C, H, W) of normalised images."""
        ...


@dataclass(frozen=True)
class Preprocessing:
    """How a teacher wants its RGB images: side in pixels, mean and deviation of each channel."""

    image_size: int = IRESNET_SIZE
    mean: tuple[float, ...] = _FACE
    std: tuple[float, ...] = _FACE


class Teacher(nn.Module):
    """uint8 faces (B, 3, H, W) on the module's device → embeddings (B, D), maps (B, C, H', W').

    Both float32, without gradients; embeddings not unit length. `arch` names the network,
    `weights_file` is where it came from, `preprocessing` what it wants.
    """

    def __init__(
        self, network: nn.Module, arch: str, weights_file: Path, preprocessing: Preprocessing
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.arch, self.weights_file, self.preprocessing = arch, weights_file, preprocessing
        wanted = preprocessing
        self._preprocess = Preprocess(wanted.image_size, wanted.mean, wanted.std)

    @torch.inference_mode()
    def forward(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        embeddings, maps = cast(Network, self.network).embed_and_map(self._preprocess(faces))
        return embeddings.float(), maps.float()


class TorchvisionBackbone(nn.Module):
    """A torchvision classifier cut off after its last map.

    embed_and_map: normalised images (B, 3, H, W) → the map's mean over its places (B, C), as nearly
    all of these networks pool it, and the map itself (B, C, about H / 32, about W / 32).
    Raises ValueError for a network where no such map is known.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._map: Tensor | None = None
        kind = type(network).__name__
        if isinstance(getattr(network, "avgpool", None), nn.Module):
            pool = cast(nn.Module, network.avgpool)
            pool.register_forward_pre_hook(lambda _module, inputs: self._keep(inputs[0]))
        elif kind in _LAST_STAGES:
            stage = cast(nn.Module, getattr(network, _LAST_STAGES[kind]))
            stage.register_forward_hook(lambda _module, _inputs, output: self._keep(output))
        else:
            raise ValueError(f"no last feature map is known of {kind}")

    def _keep(self, feature_map: Any) -> None:
        self._map = feature_map

    def embed_and_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        self.network(images)
        feature_map, self._map = self._map, None
        assert feature_map is not None
        return feature_map.mean((2, 3)), feature_map


class ScriptedTeacher(nn.Module):
    """A TorchScript module that returns an embedding (B, D) and a map (B, C, H, W), in any order.

    Raises UserError, naming `source`, when it returns anything else.
    """

    def __init__(self, module: nn.Module, source: Path) -> None:
        super().__init__()
        self.module = module
        self._source = source

    def embed_and_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        try:
            # The optimising executor fuses kernels after some calls: other digits than at first.
            with torch.jit.optimized_execution(False):  # pyright: ignore[reportPrivateImportUsage]
                output = self.module(images)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"{self._source} cannot embed images {tuple(images.shape)}: {reason}; "
                "--image-size sets their side"
            ) from error
        found = {t.dim(): t for t in _tensors(output)}
        if not {2, 4} <= found.keys() or len(found[2]) != len(found[4]):
            shapes = ", ".join(str(tuple(t.shape)) for t in _tensors(output)) or type(output)
            raise UserError(
                f"{self._source} returns {shapes}: distillation needs an embedding (B, D) and a "
                "feature map (B, C, H, W); export a module that returns the tuple of both"
            )
        return found[2], found[4]


def open_teacher(source: Path | str, arch: str = "auto", image_size: int | None = None) -> Teacher:
    """The teacher in a weight file, frozen, on the CPU.

    source: the path of the file (.pth, .pt, .safetensors); for torchvision also, as text, the name
    of published weights (IMAGENET1K_V1), which are fetched into torch's cache.
    arch: "auto" or a name of VARIANTS; a torchvision name; "torchscript", which runs the
    file's own code. image_size: side of the input, where the network leaves a choice.
    Raises UserError when the file is missing, damaged, hostile or of another architecture.
    """
    if arch == "auto" or arch in VARIANTS:
        return _open_iresnet(Path(source), arch, image_size)
    if arch == TORCHSCRIPT:
        return _open_torchscript(Path(source), image_size)
    return _open_torchvision(source, arch, image_size)


def spatial_probability(maps: Tensor, temperature: float = 1.0) -> Tensor:
    """Where the teacher looks: softmax over the places of energy / temperature, (B, H * W).

    maps: (B, C, H, W). The energy of a place is the sum of its squared features over the channels
    (Zagoruyko & Komodakis 2017, arXiv:1612.03928). Places in row-major order; rows sum to 1.
    """
    energy = maps.float().square().sum(1).flatten(1)
    return torch.softmax(energy / temperature, dim=1)


def _open_iresnet(path: Path, arch: str, image_size: int | None) -> Teacher:
    if image_size not in (None, IRESNET_SIZE):
        raise UserError(f"--image-size {image_size}: an IResNet takes {IRESNET_SIZE} pixels alone")
    state = _read_state(path)
    variant = find_variant(state, path)
    if variant is None:
        raise UserError(f"{path} holds no IResNet: {_name_the_arch(state)}")
    if arch not in ("auto", variant):
        raise UserError(f"{path} holds {variant}, --arch {arch} was typed: leave --arch out")
    with torch.device("meta"):
        network = build_iresnet(variant)
    weights.load_strict(network, state, source=path)
    return Teacher(network, variant, path, Preprocessing())


def _name_the_arch(state: dict[str, Tensor]) -> str:
    if "layer1.0.conv1.weight" in state and "fc.weight" in state:
        return "it looks like torchvision's ResNet; type its name, for example --arch resnet50"
    return "type --arch NAME with torchvision's name of the network, or give backbone.pth"


def _open_torchvision(source: Path | str, arch: str, image_size: int | None) -> Teacher:
    from torchvision import models

    known = models.list_models(module=models)
    if arch not in known:
        allowed = ["auto", *VARIANTS, TORCHSCRIPT, *known]
        raise UserError(
            f"--arch {arch} is not known{did_you_mean(arch, allowed)}; allowed: auto, "
            f"{', '.join(VARIANTS)}, {TORCHSCRIPT}, and torchvision's classification "
            "networks (resnet50, …)"
        )
    published = _published(source, arch)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    path = fetched_weights(published.url, cache) if isinstance(source, str) else source
    state = {
        name: tensor
        for name, tensor in _read_state(path).items()
        if not name.startswith((*(f"{head}." for head in _HEADS), *_AUXILIARY))
    }
    backbone = _headless(arch)
    weights.load_strict(backbone.network, state, source=path)
    preset: Any = published.transforms()
    size = image_size or int(preset.crop_size[0])
    wanted = Preprocessing(size, tuple(preset.mean), tuple(preset.std))
    return Teacher(backbone, arch, path, wanted)


def _headless(arch: str) -> TorchvisionBackbone:
    """The network without its classifier, with random values."""
    from torchvision import models

    options: dict[str, Any] = {}
    if arch in _INCEPTIONS:  # as published: they normalise in their own way, inside
        options = {"transform_input": True, "aux_logits": False, "init_weights": False}
    network = models.get_model(arch, weights=None, **options)  # some cannot be built without values
    for head in _HEADS:
        if isinstance(getattr(network, head, None), nn.Module):
            setattr(network, head, nn.Identity())
    try:
        return TorchvisionBackbone(network)
    except ValueError as error:
        raise UserError(
            f"--arch {arch}: {error}, and distillation needs one; allowed are convolutional "
            "networks and Swin, for example resnet50, or --arch torchscript"
        ) from None


def _published(source: Path | str, arch: str) -> Any:
    """The entry of torchvision for weights of that name; for its best ones when it is a file."""
    from torchvision import models

    entries = models.get_model_weights(arch)
    name = source.rpartition(".")[2] if isinstance(source, str) else "DEFAULT"
    if name not in entries.__members__:
        raise UserError(
            f"--weights {source}: {arch} has {', '.join(entries.__members__)}; type one of these, "
            "or a file"
        )
    return entries[name]


def _open_torchscript(path: Path, image_size: int | None) -> Teacher:
    if not _is_torchscript(path):
        weights.read(path)  # says what is wrong with a file that holds no weights either
        raise UserError(f"{path} holds plain weights, no TorchScript: leave --arch torchscript out")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.export cannot read these files
            module = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path} cannot be loaded as TorchScript: {reason}") from None
    wanted = Preprocessing(image_size or IRESNET_SIZE)
    return Teacher(ScriptedTeacher(module, path), TORCHSCRIPT, path, wanted)


def _read_state(path: Path) -> dict[str, Tensor]:
    """A file's state dict under plain names. Raises UserError, for TorchScript too."""
    if _is_torchscript(path):
        raise UserError(
            f"{path} is TorchScript, which would run its own code: type --arch {TORCHSCRIPT} if "
            "you trust its source, or give the plain state dict"
        )
    if path.is_dir():
        raise UserError(f"{path} is a directory: give the weight file in it")
    return weights.strip_wrappers(weights.read(path))


def _is_torchscript(path: Path) -> bool:
    """Whether the file is a zip archive with TorchScript's table of constants."""
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _tensors(output: object) -> list[Tensor]:
    """The tensors of a module's output: one, or those of a tuple, list or dict."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [t for t in output if isinstance(t, Tensor)] if isinstance(output, tuple | list) else []


# --- IResNet --------------------------------------------------------------------------------------


class IRBlock(nn.Module):
    """(B, in_channels, H, W) → (B, channels, H / stride, W / stride).

    BN, convolution, BN, PReLU, convolution with the stride, BN; added to the input, which passes a
    1 x 1 convolution and BN first where the shape changes. No activation after the sum.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv3x3(in_channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = _conv3x3(channels, channels, stride)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()  # has no weights, hence no names in a file
        if stride != 1 or in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        hidden = self.prelu(self.bn2(self.conv1(self.bn1(images))))
        return self.bn3(self.conv2(hidden)) + self.downsample(images)


class IResNet(nn.Module):
    """Faces (B, 3, 112, 112), RGB, each channel (level / 255 - 0.5) / 0.5 → embeddings (B, 512).

    blocks: how many IR blocks each of the four stages has, see VARIANTS. The embeddings are not
    unit length.
    """

    def __init__(self, blocks: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.conv1 = _conv3x3(3, _WIDTHS[0], 1)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.prelu = nn.PReLU(_WIDTHS[0])
        self.layer1 = _stage(_WIDTHS[0], _WIDTHS[0], blocks[0])
        self.layer2 = _stage(_WIDTHS[0], _WIDTHS[1], blocks[1])
        self.layer3 = _stage(_WIDTHS[1], _WIDTHS[2], blocks[2])
        self.layer4 = _stage(_WIDTHS[2], _WIDTHS[3], blocks[3])
        self.bn2 = nn.BatchNorm2d(_WIDTHS[3])
        self.fc = nn.Linear(_WIDTHS[3] * _LAST_SIDE**2, EMBEDDING_DIM)
        self.features = nn.BatchNorm1d(EMBEDDING_DIM)

    def embed_and_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, 512), float32, and the last stage's output (B, 512, 7, 7)."""
        stem = self.prelu(self.bn1(self.conv1(images)))
        feature_map = self.layer4(self.layer3(self.layer2(self.layer1(stem))))
        flat = self.bn2(feature_map).flatten(1)
        # Sums of 25,088 products: in half precision they would lose the embedding's last digits.
        with torch.autocast(flat.device.type, enabled=False):
            return self.features(self.fc(flat.float())), feature_map


def build_iresnet(variant: str) -> IResNet:
    """An IResNet with PyTorch's own initial weights; `variant` is one of VARIANTS."""
    return IResNet(VARIANTS[variant])


def find_variant(names: Iterable[str], source: str | Path = "the given state") -> str | None:
    """Which of VARIANTS a state dict with these names is; None when it is no IResNet at all.

    source: the file they came from, for the error.
    Raises UserError for an IResNet of other block counts.
    """
    names = set(names)
    if not {"prelu.weight", "features.weight", "layer4.0.prelu.weight"} <= names:
        return None
    found = {(int(m[1]), int(m[2])) for name in names if (m := _BLOCK_NAME.match(name))}
    counts = tuple(sum(stage == wanted for stage, _ in found) for wanted in (1, 2, 3, 4))
    for variant, blocks in VARIANTS.items():
        if blocks == counts:
            return variant
    known = ", ".join(f"{name} {blocks}" for name, blocks in VARIANTS.items())
    raise UserError(f"{source} is an IResNet with {counts} blocks a stage; known are {known}")


def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
    """Blocks of which the first halves the picture."""
    rest = (IRBlock(channels, channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(IRBlock(in_channels, channels, 2), *rest)


def _conv3x3(in_channels: int, channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
