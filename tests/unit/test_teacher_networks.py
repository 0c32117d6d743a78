"""What each kind of teacher gives for a face, and which files are refused with which words."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision import models

from face_distill.distill import teacher_networks
from face_distill.distill.images import Preprocess
from face_distill.distill.teacher_networks import open_teacher, spatial_probability
from shared.errors import UserError

FACES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 112, 112), np.uint8))


@pytest.fixture(scope="module")
def weight_file(tmp_path_factory):
    """An IResNet-18 in half precision, as a training of several processes saves it."""
    torch.manual_seed(0)
    state = teacher_networks.build_iresnet("iresnet18").state_dict()
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    halves = {f"module.{name}": tensor.half() for name, tensor in state.items()}
    torch.save({"epoch": 3, "state_dict": halves}, path)
    return path


def test_an_iresnet_is_found_by_its_names_and_computes_in_float32(weight_file):
    teacher = open_teacher(weight_file)
    assert (teacher.arch, teacher.preprocessing.image_size) == ("iresnet18", 112)
    network = teacher_networks.build_iresnet("iresnet18").eval()
    state = torch.load(weight_file, weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("module."): t for name, t in state.items()})
    levels = FACES.double().div(255).sub(0.5).div(0.5).float()
    with torch.no_grad():
        expected = network.embed_and_map(levels)
    for ours, theirs in zip(teacher(FACES), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert ours.dtype == torch.float32 and not ours.requires_grad


def head_of(network):
    return network.fc if hasattr(network, "fc") else network.classifier


@pytest.mark.parametrize(
    ("arch", "size", "side"),
    [("resnet18", None, 7), ("densenet121", 64, 2), ("shufflenet_v2_x0_5", 64, 2)],
)
def test_a_torchvision_embedding_is_what_its_own_classifier_reads(arch, size, side, tmp_path):
    torch.manual_seed(0)
    network = models.get_model(arch, weights=None, num_classes=175).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    embeddings, maps = open_teacher(tmp_path / "w.pth", arch, size)(FACES)
    images = Preprocess(size or 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(FACES)
    with torch.no_grad():
        logits = head_of(network)(embeddings)
        torch.testing.assert_close(logits, network(images), rtol=1e-4, atol=1e-5)
    assert maps.shape == (2, embeddings.shape[1], side, side)
    torch.testing.assert_close(maps.mean((2, 3)), embeddings)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["googlenet", "swin_t"])
def test_the_odd_networks_of_torchvision_give_a_square_map_too(arch, tmp_path):
    options = {"init_weights": False} if arch == "googlenet" else {}
    network = models.get_model(arch, weights=None, **options)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    embeddings, maps = open_teacher(tmp_path / "w.pth", arch, image_size=64)(FACES)
    assert maps.shape == (2, embeddings.shape[1], 2, 2)


class Both(nn.Module):
    """A teacher of one convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 16, 16)

    def forward(self, images):
        maps = self.conv(images)
        return maps.mean((2, 3)), maps


class MapFirst(Both):
    def forward(self, images):
        maps = self.conv(images)
        return maps, maps.mean((2, 3))


class NoMap(Both):
    def forward(self, images):
        return self.conv(images).mean((2, 3))


class OneRow(Both):
    def forward(self, images):
        maps = self.conv(images)
        return maps[:1].mean((2, 3)), maps


def scripted(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module.eval()), path)
    return path


@pytest.mark.parametrize("kind", [Both, MapFirst])
def test_a_torchscript_file_gives_what_the_module_gives(kind, tmp_path):
    module = kind()
    teacher = open_teacher(scripted(module, tmp_path / "t.pt"), "torchscript")
    maps = module.conv(FACES.double().div(255).sub(0.5).div(0.5).float())
    found = teacher(FACES)
    torch.testing.assert_close(found[1], maps.detach())
    torch.testing.assert_close(found[0], maps.detach().mean((2, 3)))


def test_a_torchscript_module_that_does_not_fit_is_refused_with_the_way_out(tmp_path):
    path = scripted(Both(), tmp_path / "t.pt")
    assert open_teacher(path, "torchscript", image_size=160)(FACES)[1].shape == (2, 5, 10, 10)
    teacher = open_teacher(path, "torchscript", image_size=8)
    with pytest.raises(UserError, match=r"t\.pt cannot embed images \(2, 3, 8, 8\).*--image-size"):
        teacher(FACES)
    for module, shapes in ((NoMap(), r"\(2, 5\)"), (OneRow(), r"\(1, 5\), \(2, 5, 7, 7\)")):
        teacher = open_teacher(scripted(module, tmp_path / "n.pt"), "torchscript")
        with pytest.raises(UserError, match=rf"returns {shapes}: .* the tuple of both"):
            teacher(FACES)


def test_torchscript_runs_only_when_it_is_asked_for_by_name(tmp_path, monkeypatch):
    path = scripted(Both(), tmp_path / "t.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the file was run"))
    for arch in ("auto", "resnet18"):
        with pytest.raises(UserError, match=r"is TorchScript, .* --arch torchscript if you"):
            open_teacher(path, arch)


class Evil:
    def __reduce__(self):
        return pytest.fail, ("the pickle was run",)


def pickled(path):
    with path.open("wb") as stream:
        pickle.dump({"conv1.weight": Evil()}, stream)


PLAIN = {"conv1.weight": torch.zeros(1)}
WRONG_FILES = {
    "a pickle": (pickled, "auto", "not loaded|not a weight file"),
    "a directory": (lambda path: path.mkdir(), "auto", "is a directory"),
    "no IResNet": (lambda path: torch.save(PLAIN, path), "auto", "no IResNet: type --arch NAME"),
    "a ResNet": (
        lambda path: torch.save(models.resnet18().state_dict(), path),
        "auto",
        "looks like torchvision's ResNet; type its name, for example --arch resnet50",
    ),
    "another ResNet": (
        lambda path: torch.save(models.resnet18().state_dict(), path),
        "resnet34",
        "does not fit ResNet: .* missing",
    ),
    "plain weights": (lambda path: torch.save(PLAIN, path), "torchscript", "no TorchScript"),
    "cut TorchScript": (
        lambda path: path.write_bytes(scripted(Both(), path).read_bytes()[:-200]),
        "torchscript",
        "truncated|cannot be loaded|not a weight file",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_a_wrong_file_is_refused_with_what_it_is(wrong, tmp_path):
    write, arch, message = WRONG_FILES[wrong]
    path = tmp_path / "teacher.pth"
    write(path)
    with pytest.raises(UserError, match=message) as refused:
        open_teacher(path, arch)
    assert str(path) in str(refused.value)


def test_a_network_that_cannot_be_is_refused_with_what_can(weight_file):
    wrong = {
        ("iresnet50", None): "holds iresnet18, --arch iresnet50 was typed",
        ("auto", 224): "--image-size 224: an IResNet takes 112",
        ("mnasnet0_5", None): "--arch mnasnet0_5: no last feature map .* resnet50",
        ("resnet51", None): "--arch resnet51 is not known; did you mean resnet5",
    }
    for (arch, size), message in wrong.items():
        with pytest.raises(UserError, match=message):
            open_teacher(weight_file, arch, size)


def test_published_weights_come_from_torchs_cache_or_their_address(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("IMAGENET1K_V1", "ResNet18_Weights.DEFAULT"):
        with pytest.raises(UserError, match=r"resnet18-\w+\.pth is missing .* from https://down"):
            open_teacher(name, "resnet18")
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    network = models.resnet18()
    torch.save(network.state_dict(), tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    teacher = open_teacher("IMAGENET1K_V1", "resnet18")
    assert torch.equal(teacher.network.network.conv1.weight, network.conv1.weight)
    with pytest.raises(UserError, match="--weights IMAGENET1K_V7: resnet18 has IMAGENET1K_V1, DEF"):
        open_teacher("IMAGENET1K_V7", "resnet18")


def test_a_probability_map_is_the_softmax_of_the_energies():
    maps = torch.tensor([[[[1.0, 0.0], [2.0, 0.0]], [[0.0, 3.0], [1.0, 0.0]]]])  # two channels
    energy = np.array([1.0, 9.0, 5.0, 0.0])
    for temperature in (1.0, 4.0):
        weights = np.exp(energy / temperature)
        found = spatial_probability(maps, temperature)
        np.testing.assert_allclose(found, [weights / weights.sum()], rtol=1e-6)


def test_large_energies_stay_probabilities():
    found = spatial_probability(torch.full((1, 512, 7, 7), 1e4))
    torch.testing.assert_close(found, torch.full((1, 49), 1 / 49))


# --- IResNet against the published architecture ---------------------------------------------------


# 43.59 M and 65.16 M are also the figures that the literature gives.
PUBLISHED = {
    "iresnet18": 24_025_600,
    "iresnet34": 34_139_328,
    "iresnet50": 43_590_848,
    "iresnet100": 65_156_160,
}
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def on_meta(variant):
    with torch.device("meta"):
        return teacher_networks.build_iresnet(variant)


def documented_names(blocks):
    """The names in InsightFace's backbone.pth, as its issues and conversions list them."""
    yield from ("conv1.weight", "prelu.weight", "fc.weight", "fc.bias")
    norms = ["bn1", "bn2", "features"]
    for stage, number in enumerate(blocks, 1):
        for block in range(number):
            name = f"layer{stage}.{block}"
            yield from (f"{name}.{part}.weight" for part in ("conv1", "conv2", "prelu"))
            norms += [f"{name}.{part}" for part in ("bn1", "bn2", "bn3")]
        yield f"layer{stage}.0.downsample.0.weight"
        norms.append(f"layer{stage}.0.downsample.1")
    yield from (f"{norm}.{part}" for norm in norms for part in NORM)


@pytest.mark.parametrize("variant", teacher_networks.VARIANTS)
def test_names_and_number_of_parameters_are_those_of_insightfaces_files(variant):
    names = list(documented_names(teacher_networks.VARIANTS[variant]))
    assert sorted(on_meta(variant).state_dict()) == sorted(names)
    assert teacher_networks.find_variant(names) == variant
    found = sum(parameter.numel() for parameter in on_meta(variant).parameters())
    assert found == PUBLISHED[variant]


def test_a_block_is_what_the_papers_draw():
    torch.manual_seed(0)
    block = teacher_networks.IRBlock(4, 6, 2).double()
    for norm in (block.bn1, block.bn2, block.bn3, block.downsample[1]):
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
        torch.nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    block.eval()
    images = torch.randn(2, 4, 8, 8, dtype=torch.float64)

    def normed(x, norm):
        column = (slice(None), None, None)
        scale = norm.weight[column] / (norm.running_var[column] + 1e-5).sqrt()
        return (x - norm.running_mean[column]) * scale + norm.bias[column]

    hidden = functional.conv2d(normed(images, block.bn1), block.conv1.weight, padding=1)
    hidden = normed(hidden, block.bn2)
    hidden = torch.where(hidden > 0, hidden, 0.25 * hidden)  # PReLU's initial slope
    hidden = functional.conv2d(hidden, block.conv2.weight, stride=2, padding=1)
    shortcut = functional.conv2d(images[:, :, ::2, ::2], block.downsample[0].weight)
    expected = normed(hidden, block.bn3) + normed(shortcut, block.downsample[1])
    torch.testing.assert_close(block(images), expected)


def test_faces_of_112_pixels_become_512_numbers_in_float32_and_a_map_of_7_by_7():
    network = teacher_networks.build_iresnet("iresnet18").eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings, maps = network.embed_and_map(torch.randn(1, 3, 112, 112))
    assert (embeddings.shape, maps.shape) == ((1, 512), (1, 512, 7, 7))
    assert (embeddings.dtype, maps.dtype) == (torch.float32, torch.bfloat16)


def test_unknown_block_counts_are_refused_with_those_known():
    names = documented_names((3, 4, 7, 3))
    with pytest.raises(UserError, match=r"backbone.pth .* \(3, 4, 7, 3\) .* iresnet50 \(3, 4, 14"):
        teacher_networks.find_variant(names, "backbone.pth")
