"""Captions as token ids, and where they end."""

import subprocess
import sys
import textwrap

import pytest
import torch

from multimodal.pairs import samples
from tests.harness import ROOT

TEXTS = ["a photo of a cat", "wow!;!", "!", "Ein Vögelchen singt", "海滩", "x " * 200]


@pytest.mark.slow
def test_ids_are_those_of_open_clips_tokenizer():
    import open_clip

    ids, _ = samples.tokenise(TEXTS)
    assert torch.equal(ids, open_clip.get_tokenizer("ViT-B-16")(TEXTS))


def test_mask_ends_with_the_end_token_whatever_the_ids():
    ids, mask = samples.tokenise(TEXTS)
    assert ids.shape == mask.shape == (6, 77) and mask.dtype == torch.bool
    for row, seen in zip(ids.tolist(), mask.tolist(), strict=True):
        length = row.index(samples.END) + 1
        assert seen == [True] * length + [False] * (77 - length)


def test_an_exclamation_mark_has_the_id_of_the_padding_and_is_seen():
    ids, mask = samples.tokenise(["!;"])
    assert ids[0, :5].tolist() == [49406, 0, 282, 49407, 0]
    assert mask[0, :5].tolist() == [True, True, True, True, False]


def test_long_captions_are_cut_and_still_end():
    ids, mask = samples.tokenise(["x " * 200])
    assert ids[0, -1] == samples.END and mask.all()


@pytest.mark.slow
def test_the_tokenizer_imports_neither_open_clip_nor_transformers():
    code = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from multimodal.pairs import samples
        samples.tokenise(["a"])
        print(*{{"open_clip", "transformers", "torchvision"}} & set(sys.modules))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
