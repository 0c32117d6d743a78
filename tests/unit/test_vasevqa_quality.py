"""The quality classifier's parts: splits, preparation, net, measures, devices."""

import pathlib

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from shared.distributed import World
from shared.errors import UserError
from tests.vase_filter_nano import write_picture, write_quality_set
from vasevqa.filter import quality
from vasevqa.filter.quality import ImageQualityNet, ImageQualityPredictor, Measured

FOUND = [(f"0/{n}", 0) for n in range(100)] + [(f"1/{n}", 1) for n in range(20)]


# --- data -----------------------------------------------------------------------------------------


def test_the_splits_have_eighty_ten_ten_of_each_label_and_nothing_in_common():
    parts = quality.split(FOUND, 42)
    for part, expected in ((parts.train, (80, 16)), (parts.val, (10, 2)), (parts.test, (10, 2))):
        assert tuple(sum(label == own for _, label in part) for own in (0, 1)) == expected
    assert sorted(parts.train + parts.val + parts.test) == sorted(FOUND)
    assert quality.split(list(reversed(FOUND)), 42) == parts
    assert quality.split(FOUND, 43) != parts
    weights = parts.class_weights.tolist()  # both labels count the same
    assert weights == pytest.approx([96 / (2 * 80), 96 / (2 * 16)])
    few = quality.split([(f"{label}/{n}", label) for label in (0, 1) for n in range(3)], 0)
    for part in (few.train, few.val, few.test):
        assert sorted(label for _, label in part) == [0, 1]


def test_only_the_training_split_is_varied(tmp_path):
    root = write_quality_set(tmp_path)
    items = quality.find_labelled(root)
    varied = quality.QualityPictures(root, items, quality.for_training(32))
    fixed = quality.QualityPictures(root, items, quality.for_evaluation(32))
    torch.manual_seed(0)
    assert torch.equal(fixed[0][0], fixed[0][0])  # built after it: one for both would show here
    assert not torch.equal(varied[0][0], varied[0][0])


def test_the_fixed_preparation_is_resizing_and_imagenets_normalisation():
    found = quality.for_evaluation(32)(torch.full((3, 60, 40), 128, dtype=torch.uint8))
    assert found.shape == (3, 32, 32)
    mean, std = torch.tensor([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)])
    assert torch.allclose(found.mean((1, 2)), (128 / 255 - mean) / std, atol=1e-5)


# --- the net --------------------------------------------------------------------------------------


def test_the_net_is_resnet_50_with_the_documented_head_and_names():
    net = ImageQualityNet()
    state = net.state_dict()
    assert all(name.startswith("resnet.") for name in state)
    shapes = {name: tuple(state[f"resnet.fc.{name}.weight"].shape) for name in "036"}
    assert shapes == {"0": (512, 2048), "3": (256, 512), "6": (2, 256)}
    kinds = [type(layer).__name__ for layer in net.resnet.fc]  # type: ignore[arg-type]
    assert kinds == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    assert [layer.p for layer in net.resnet.fc if hasattr(layer, "p")] == [0.5, 0.3]  # type: ignore
    body = torchvision.models.resnet50(weights=None).state_dict()
    assert {n for n in state if ".fc." not in n} == {f"resnet.{n}" for n in body if "fc" not in n}


def test_a_file_of_the_original_is_loaded(tmp_path):
    net = ImageQualityNet()
    optimizer = torch.optim.Adam(net.parameters())
    torch.save({"epoch": 3, "model_state_dict": net.state_dict(),
                "optimizer_state_dict": optimizer.state_dict(), "val_acc": 0.9},
               tmp_path / "m.pth")  # fmt: skip
    loaded, about = quality.load_trained(tmp_path / "m.pth", torch.device("cpu"))
    assert about == {"epoch": 3, "val_acc": 0.9} and not loaded.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_imagenet_weights_fill_the_body_and_leave_the_head(tmp_path):
    torch.manual_seed(0)
    body = torchvision.models.resnet18(weights=None)
    path = tmp_path / "resnet18-f37072fd.pth"
    torch.save(body.state_dict(), path)
    net = ImageQualityNet(arch="resnet18")
    head = net.resnet.fc[0].weight.clone()  # type: ignore[index]
    quality.start_from(net, path)
    assert torch.equal(net.resnet.conv1.weight, body.conv1.weight)
    assert torch.equal(net.resnet.fc[0].weight, head)  # type: ignore[index]
    with pytest.raises(UserError, match="does not fit"):
        quality.start_from(ImageQualityNet(arch="resnet50"), path)


def test_the_weights_to_start_from_are_typed_lie_here_or_are_torchs(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    first_of_imagenet = cache / "resnet18-f37072fd.pth"  # what pretrained=True loads
    first_of_imagenet.write_bytes(b"x")
    (cache / "resnet18-z.pth").write_bytes(b"another training's")
    choose = quality.starting_weights
    assert choose("none", "resnet18", [tmp_path]) is None
    assert choose("a.pth", "resnet18", [tmp_path]) == pathlib.Path("a.pth")
    assert choose("auto", "resnet18", [tmp_path / "none", tmp_path]) == first_of_imagenet
    mine = tmp_path / "resnet18-mine.pth"
    mine.write_bytes(b"y")
    assert choose("auto", "resnet18", [tmp_path / "none", tmp_path]) == mine
    with pytest.raises(UserError, match="type --pretrained none"):
        choose("auto", "resnet10", [tmp_path])


def test_the_predictor_gives_the_nets_softmax(tmp_path):
    torch.manual_seed(0)
    net = ImageQualityNet(arch="resnet10").eval()
    torch.save({"model_state_dict": net.state_dict(), "arch": "resnet10", "image_size": 32},
               tmp_path / "m.pth")  # fmt: skip
    path = write_picture(tmp_path / "a.png", 1)
    predict = ImageQualityPredictor(tmp_path / "m.pth")
    image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    with torch.no_grad():
        high = float(torch.softmax(net(quality.for_evaluation(32)(image)[None]), 1)[0, 1])
    label, confidence = predict(path)
    assert label == int(high >= 0.5) and confidence == pytest.approx(max(high, 1 - high), abs=1e-6)


# --- measures and what is written -----------------------------------------------------------------


def test_measures_by_hand():
    counts = {(0, 0): 6, (0, 1): 2, (1, 0): 1, (1, 1): 11}  # (label, prediction): pictures
    found = Measured.of([pair for pair, count in counts.items() for _ in range(count)])
    assert found.confusion == [[6, 2], [1, 11]] and found.count == 20
    assert found.accuracy == 17 / 20 and found.majority == 12 / 20
    low, high = found.report
    assert low["precision"] == 6 / 7 and low["recall"] == 6 / 8 and low["support"] == 8
    assert high["precision"] == 11 / 13 and high["recall"] == 11 / 12
    assert low["f1"] == pytest.approx(2 * (6 / 7) * 0.75 / (6 / 7 + 0.75))
    nothing = Measured.of([(1, 1)] * 3).report[0]
    assert nothing == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}


def test_measuring_counts_every_picture_of_uneven_batches():
    class Sign(torch.nn.Module):
        def forward(self, x):
            return torch.stack([-x[:, 0], x[:, 0]], 1)

    batches = [(torch.tensor([[1.0], [-1.0], [2.0]]), torch.tensor([1, 1, 0])),
               (torch.tensor([[-3.0]]), torch.tensor([0]))]  # fmt: skip
    found = quality.measure(Sign(), batches, World(), torch.tensor([2.0, 0.5]))
    assert found.confusion == [[1, 1], [1, 1]]
    assert np.isnan(quality.measure(Sign(), batches, World()).loss)
    # -log softmax of the true class: scores differ by 2, 2, 4 and 6
    wrong, right = np.log1p(np.exp([2.0, 4.0])), np.log1p(np.exp([-2.0, -6.0]))
    expected = 0.5 * right[0] + 0.5 * wrong[0] + 2 * wrong[1] + 2 * right[1]
    assert found.loss == pytest.approx(expected / (0.5 + 0.5 + 2 + 2))


@pytest.mark.parametrize(
    ("gpu", "typed", "visible", "processes", "expected"),
    [
        (2, (), 4, 1, "cuda:2"),
        (2, (), 1, 1, "cuda:0"),
        (2, (), 0, 1, "auto"),
        (1, ("gpu",), 4, 1, "cuda:1"),
        (2, ("device",), 4, 1, "auto"),
        (2, (), 4, 4, "auto"),
    ],
)
def test_the_default_gpu_is_a_wish(monkeypatch, gpu, typed, visible, processes, expected):
    monkeypatch.setattr(quality, "present_gpus", lambda: visible)
    assert quality.device_for(gpu, "auto", typed, processes, {}) == expected
    with pytest.raises(UserError, match="--gpu 5 is not there; allowed: "):
        quality.device_for(5, "auto", ("gpu",), 1, {})
