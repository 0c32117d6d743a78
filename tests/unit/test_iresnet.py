"""IResNet against the published architecture: names, shapes, counts, and a block by hand."""

import pytest
import torch
from torch.nn import functional

from face_distill.distill import teacher_networks
from shared.errors import UserError

# Counted by hand below; 43.59 M and 65.16 M are also the figures that the literature gives.
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


def counted_by_hand(blocks):
    """Weights of stem, blocks and end: a convolution has in x out x places, a norm 2 a channel."""
    total, before = 3 * 64 * 9 + 2 * 64 + 64, 64
    for number, width in zip(blocks, (64, 128, 256, 512), strict=True):
        total += before * width + 2 * width  # the shortcut of the first block
        for _ in range(number):
            total += 2 * before + 9 * before * width + 2 * width + width  # norm, conv, norm, PReLU
            total += 9 * width * width + 2 * width
            before = width
    return total + 2 * 512 + (512 * 7 * 7 * 512 + 512) + 2 * 512


@pytest.mark.parametrize("variant", teacher_networks.VARIANTS)
def test_the_number_of_parameters_is_the_published_one(variant):
    found = sum(parameter.numel() for parameter in on_meta(variant).parameters())
    assert found == counted_by_hand(teacher_networks.VARIANTS[variant]) == PUBLISHED[variant]


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
def test_the_names_are_those_of_insightfaces_files(variant):
    names = list(documented_names(teacher_networks.VARIANTS[variant]))
    assert sorted(on_meta(variant).state_dict()) == sorted(names)
    assert teacher_networks.find_variant(names) == variant


def test_every_stage_halves_the_picture_in_its_first_block_alone():
    network = on_meta("iresnet50")
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        assert [block.conv2.stride for block in stage] == [(2, 2)] + [(1, 1)] * (len(stage) - 1)
        assert {block.conv1.stride for block in stage} == {(1, 1)}


def test_faces_become_512_numbers_and_a_map_of_7_by_7():
    network = teacher_networks.build_iresnet("iresnet18").eval()
    with torch.no_grad():
        embeddings, maps = network.embed_and_map(torch.randn(2, 3, 112, 112))
    assert (embeddings.shape, maps.shape) == ((2, 512), (2, 512, 7, 7))
    assert embeddings.dtype == torch.float32


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


def test_the_last_norms_weight_stays_1_in_training():
    network = on_meta("iresnet18")
    assert not network.features.weight.requires_grad
    assert network.features.bias.requires_grad


def test_embeddings_stay_float32_under_autocast():
    network = teacher_networks.build_iresnet("iresnet18").eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings, maps = network.embed_and_map(torch.randn(1, 3, 112, 112))
    assert (embeddings.dtype, maps.dtype) == (torch.float32, torch.bfloat16)


def test_another_size_is_refused_by_name():
    with pytest.raises(UserError, match=r"3, 112, 112\), got \(1, 3, 224, 224\)"):
        on_meta("iresnet18").embed_and_map(torch.empty(1, 3, 224, 224, device="meta"))


def test_names_of_other_networks_are_no_iresnet():
    from torchvision import models

    assert teacher_networks.find_variant(models.resnet18().state_dict()) is None
    assert teacher_networks.find_variant([]) is None


def test_unknown_block_counts_are_refused_with_those_known():
    names = documented_names((3, 4, 7, 3))
    with pytest.raises(UserError, match=r"backbone.pth .* \(3, 4, 7, 3\) .* iresnet50 \(3, 4, 14"):
        teacher_networks.find_variant(names, "backbone.pth")
