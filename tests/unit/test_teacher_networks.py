"""What each kind of teacher gives for a face, and which files are refused with which words."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from face_distill.distill import teacher_networks
from face_distill.distill.images import Preprocess
from face_distill.distill.teacher_networks import open_teacher, spatial_probability
from shared.errors import UserError

FACES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 112, 112), np.uint8))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return teacher_networks.build_iresnet("iresnet18").eval()


@pytest.fixture(scope="module")
def weight_file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.save(network.state_dict(), path)
    return path


def expected_of(network):
    levels = FACES.double().div(255).sub(0.5).div(0.5).float()
    with torch.no_grad():
        return network.embed_and_map(levels)


@pytest.mark.parametrize("form", ["plain", "ddp", "wrapped", "safetensors", "half"])
def test_an_iresnet_is_found_by_its_names_in_every_form_of_file(
    network, weight_file, tmp_path, form
):
    state, path = network.state_dict(), tmp_path / "w.pth"
    if form == "plain":
        path = weight_file
    elif form == "ddp":
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    elif form == "wrapped":
        torch.save({"epoch": 3, "state_dict": state}, path)
    elif form == "safetensors":
        path = tmp_path / "w.safetensors"
        save_file(state, path)
    else:
        torch.save({name: tensor.half() for name, tensor in state.items()}, path)
    teacher = open_teacher(path)
    assert (teacher.arch, teacher.preprocessing.image_size) == ("iresnet18", 112)
    for found, expected in zip(teacher(FACES), expected_of(network), strict=True):
        tolerance = 0.02 if form == "half" else 1e-5
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_a_teacher_is_frozen_and_leaves_no_graph(weight_file):
    teacher = open_teacher(weight_file)
    assert not teacher.network.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(result.requires_grad for result in teacher(FACES))


def head_of(network):
    return network.fc if hasattr(network, "fc") else network.classifier


@pytest.mark.parametrize(
    "arch", ["resnet18", "densenet121", "mobilenet_v2", "shufflenet_v2_x0_5", "efficientnet_b0"]
)
def test_a_torchvision_embedding_is_what_its_own_classifier_reads(arch, tmp_path):
    torch.manual_seed(0)
    network = models.get_model(arch, weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    teacher = open_teacher(tmp_path / "w.pth", arch)
    embeddings, maps = teacher(FACES)
    images = Preprocess(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(FACES)
    with torch.no_grad():
        logits = head_of(network)(embeddings)
        torch.testing.assert_close(logits, network(images), rtol=1e-4, atol=1e-5)
    assert maps.shape == (2, embeddings.shape[1], 7, 7)
    torch.testing.assert_close(maps.mean((2, 3)), embeddings)


def test_a_backbone_may_have_been_trained_for_any_number_of_identities(tmp_path):
    network = models.shufflenet_v2_x0_5(num_classes=175)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    assert open_teacher(tmp_path / "w.pth", "shufflenet_v2_x0_5")(FACES)[0].shape == (2, 1024)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["googlenet", "swin_t"])
def test_the_odd_networks_of_torchvision_give_a_square_map_too(arch, tmp_path):
    options = {"init_weights": False} if arch == "googlenet" else {}
    network = models.get_model(arch, weights=None, **options)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    embeddings, maps = open_teacher(tmp_path / "w.pth", arch, image_size=64)(FACES)
    assert maps.shape == (2, embeddings.shape[1], 2, 2)


class Scripted(nn.Module):
    """A teacher of one convolution; `form` says what it returns."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 16, 16)


class Both(Scripted):
    def forward(self, images):
        maps = self.conv(images)
        return maps.mean((2, 3)), maps


class MapFirst(Scripted):
    def forward(self, images):
        maps = self.conv(images)
        return maps, maps.mean((2, 3))


class NoMap(Scripted):
    def forward(self, images):
        return self.conv(images).mean((2, 3))


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


def test_the_side_of_a_torchscript_input_can_be_chosen(tmp_path):
    path = scripted(Both(), tmp_path / "t.pt")
    assert open_teacher(path, "torchscript", image_size=160)(FACES)[1].shape == (2, 5, 10, 10)


def test_a_torchscript_module_without_a_map_is_refused_with_what_it_returns(tmp_path):
    teacher = open_teacher(scripted(NoMap(), tmp_path / "t.pt"), "torchscript")
    with pytest.raises(UserError, match=r"returns \(2, 5\): .* the tuple of both"):
        teacher(FACES)


def test_a_torchscript_module_that_fails_names_file_and_way_out(tmp_path):
    teacher = open_teacher(scripted(Both(), tmp_path / "t.pt"), "torchscript", image_size=8)
    with pytest.raises(UserError, match=r"t\.pt cannot embed images \(2, 3, 8, 8\).*--image-size"):
        teacher(FACES)


def test_torchscript_runs_only_when_it_is_asked_for_by_name(tmp_path, monkeypatch):
    path = scripted(Both(), tmp_path / "t.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the file was run"))
    for arch in ("auto", "iresnet18", "resnet18"):
        with pytest.raises(UserError, match=r"is TorchScript, .* --arch torchscript if you"):
            open_teacher(path, arch)


class Evil:
    def __reduce__(self):
        return pytest.fail, ("the pickle was run",)


def pickled(path):
    with path.open("wb") as stream:
        pickle.dump({"conv1.weight": Evil()}, stream)


WRONG_FILES = {
    "missing": (lambda path: None, "auto", "is missing"),
    "a Git LFS pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "auto",
        "Git-LFS pointer",
    ),
    "a pickle": (pickled, "auto", "not loaded|not a weight file"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html>"), "auto", "a web page"),
    "cut off": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), "auto", "truncated"),
    "a directory": (lambda path: path.mkdir(), "auto", "is a directory"),
    "no IResNet": (
        lambda path: torch.save({"conv1.weight": torch.zeros(1)}, path),
        "auto",
        "holds no IResNet: type --arch NAME",
    ),
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
    "weights for torchscript": (
        lambda path: torch.save({"conv1.weight": torch.zeros(1)}, path),
        "torchscript",
        "holds plain weights, no TorchScript",
    ),
    "a pointer for torchscript": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "torchscript",
        "Git-LFS pointer",
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


def test_a_torchscript_file_that_is_cut_off_is_named(tmp_path):
    path = scripted(Both(), tmp_path / "t.pt")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"t\.pt"):
        open_teacher(path, "torchscript")


def test_an_architecture_that_the_file_is_not_is_refused(weight_file):
    with pytest.raises(UserError, match="holds iresnet18, --arch iresnet50 was typed"):
        open_teacher(weight_file, "iresnet50")


def test_an_iresnet_takes_112_pixels_alone(weight_file):
    with pytest.raises(UserError, match="--image-size 224: an IResNet takes 112"):
        open_teacher(weight_file, image_size=224)


@pytest.mark.parametrize("arch", ["vit_b_16", "mnasnet0_5"])
def test_networks_without_a_map_are_refused_with_examples(arch, tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"--arch {arch}: no last feature map .* resnet50"):
        open_teacher(tmp_path / "w.pth", arch)


def test_an_unknown_architecture_gets_the_nearest_name(tmp_path):
    with pytest.raises(UserError, match="--arch resnet51 is not known; did you mean resnet5"):
        open_teacher(tmp_path / "w.pth", "resnet51")


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


def test_a_network_that_gives_something_else_is_named(tmp_path):
    class Flat(nn.Module):
        def embed_and_map(self, images):
            return images.mean((2, 3)), images.mean(3)

    wanted = teacher_networks.Preprocessing(16)
    teacher = teacher_networks.Teacher(Flat(), "flat", tmp_path / "f", wanted)
    with pytest.raises(UserError, match=r"f gives \(2, 3\) and \(2, 3, 16\): expected embeddings"):
        teacher(FACES)
