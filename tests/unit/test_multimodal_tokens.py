"""Captions as token ids, and where they end."""

import pytest
import torch

from multimodal.pairs import samples

TEXTS = ["a photo of a cat", "wow!;!", "!;", "Ein Vögelchen singt", "海滩", "x " * 200]


@pytest.mark.slow
def test_ids_are_those_of_open_clips_tokenizer():
    import open_clip

    ids, _ = samples.tokenise(TEXTS)
    assert torch.equal(ids, open_clip.get_tokenizer("ViT-B-16")(TEXTS))


def test_mask_ends_with_the_end_token_whatever_the_ids():
    """An exclamation mark has the id of the padding; a long caption is cut and still ends."""
    ids, mask = samples.tokenise(TEXTS)
    assert ids.shape == mask.shape == (6, 77) and mask.dtype == torch.bool
    for row, seen in zip(ids.tolist(), mask.tolist(), strict=True):
        length = row.index(samples.END) + 1
        assert seen == [True] * length + [False] * (77 - length)
    assert ids[2, :5].tolist() == [49406, 0, 282, 49407, 0]
    assert mask[-1].all()
