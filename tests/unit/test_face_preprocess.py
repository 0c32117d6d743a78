"""Batch preprocessing against the per-image Pillow pipeline."""

import numpy as np
import pytest
import torch
from PIL import Image

from face_distill.distill import images as preprocess
from face_distill.distill.images import CLIP_MEAN, CLIP_STD, Preprocess, resize


def pictures(kind, count=6, side=112):
    rng = np.random.default_rng(0)
    if kind == "noise":
        return rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    # the hardest: overshoot is clamped between the two passes
    return (255 * rng.integers(0, 2, (count, side, side, 3))).astype(np.uint8)


def by_pillow(images, side):
    resized = [Image.fromarray(i).resize((side, side), Image.Resampling.BICUBIC) for i in images]
    return np.stack([np.asarray(image) for image in resized]).astype(int)


def batch(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("kind", ["noise", "black and white"])
@pytest.mark.parametrize("side", [224, 56, 130])
@pytest.mark.parametrize("scaled", [preprocess.resize, preprocess._resize_as_float])
def test_pixels_are_within_one_grey_level_of_pillow(kind, side, scaled):
    """The second is how a GPU resizes."""
    images = pictures(kind)
    ours = scaled(batch(images), side, side).permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(ours - by_pillow(images, side)).max() <= 1


def test_the_result_is_clip_normalised_as_to_tensor_and_normalize_do():
    images = pictures("noise", 2)
    levels = torch.from_numpy(by_pillow(images, 224)).permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    ours = Preprocess(224)(batch(images))
    assert ours.dtype == torch.float32 and ours.shape == (2, 3, 224, 224) and ours.is_contiguous()
    one_level = 1 / 255 / torch.tensor(CLIP_STD).view(3, 1, 1)
    assert ((ours - (levels - mean) / std).abs() <= 1.001 * one_level).all()


def test_without_a_resize_the_values_are_exact_and_the_input_is_kept():
    images = batch(pictures("noise", 2))
    before = images.clone()
    ours = Preprocess(112, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))(images)
    torch.testing.assert_close(ours, images.float() / 127.5 - 1, atol=1e-6, rtol=0)
    assert torch.equal(images, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_pixels_are_within_one_grey_level_of_pillow():
    images = pictures("black and white")
    ours = resize(batch(images).cuda(), 224, 224).cpu().permute(0, 2, 3, 1).numpy()
    assert np.abs(ours.astype(int) - by_pillow(images, 224)).max() <= 1
