"""Starting from an open_clip file: the same numbers as open_clip where shapes agree."""

from pathlib import Path

import pytest
import torch

from multimodal.model import MultimodalModel, create_model
from multimodal.pairs import sources
from multimodal.training import weights
from shared.errors import UserError


def clip_file(path: Path, *, embed_dim: int = 32, text_width: int = 64, **changes) -> object:
    """A tiny CLIP of open_clip, and its state dict at `path`."""
    from open_clip.model import CLIP

    torch.manual_seed(0)
    vision = {"image_size": 64, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": text_width, "heads": 4, "layers": 2}
    clip = CLIP(
        embed_dim, {**vision, **changes.get("vision", {})}, {**text, **changes.get("text", {})}
    )
    torch.nn.init.normal_(clip.visual.ln_post.bias, std=0.1)
    torch.save(clip.state_dict(), path)
    return clip.eval()


def wide_nano(monkeypatch) -> MultimodalModel:
    """The nano model with a word table as wide as its text tower, as base and large have."""
    from dataclasses import replace

    from multimodal import model as models

    monkeypatch.setitem(models.SIZES, "nano", replace(models.SIZES["nano"], word=64))
    torch.manual_seed(1)
    return create_model("nano", embed_dim=32).eval()


@pytest.mark.slow
def test_both_towers_give_open_clips_features(tmp_path, monkeypatch):
    clip = clip_file(tmp_path / "clip.pt")
    model = wide_nano(monkeypatch)
    report = weights.load(model, tmp_path / "clip.pt", towers=True)
    assert report["words"] == "copied"
    assert report["image"]["share"] == report["text"]["share"] == 1.0
    assert report["image"]["missing"] == report["text"]["unexpected"] == []
    images = torch.randn(2, 3, 64, 64)
    ids = torch.zeros(2, 77, dtype=torch.long)
    ids[:, :4] = torch.tensor([49406, 320, 0, 49407])
    with torch.no_grad():
        expected = clip.encode_image(images, normalize=True)
        torch.testing.assert_close(model.encode_image(images), expected, atol=1e-5, rtol=1e-4)
        expected = clip.encode_text(ids, normalize=True)
        torch.testing.assert_close(model.encode_text(ids), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_narrower_table_is_the_nearest_of_its_rank(tmp_path):
    clip = clip_file(tmp_path / "clip.pt")
    model = create_model("nano", embed_dim=32)  # a table of 32, and a tower of 64
    report = weights.load(model, tmp_path / "clip.pt")
    assert report["words"].startswith("reduced from 64 to 32 dimensions")
    table = clip.token_embedding.weight.detach()
    ours = model.text.widen(model.text.token_embedding.weight).detach()
    left, values, right = torch.linalg.svd(table.double(), full_matrices=False)
    nearest = left[:, :32] * values[:32] @ right[:32]
    torch.testing.assert_close(ours.double(), nearest, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_tower_of_another_size_is_left_and_the_words_are_taken(tmp_path):
    clip_file(tmp_path / "clip.pt", vision={"layers": 4}, text_width=128)
    model = create_model("nano")
    before = model.image.proj.detach().clone()
    report = weights.load(model, tmp_path / "clip.pt", towers=True)
    assert report["image"] == "not of this size (transformer.resblocks.3.attn.in_proj_bias)"
    assert report["text"].startswith("not of this size")
    assert report["words"].startswith("reduced from 128 to 32")
    assert torch.equal(model.image.proj, before)


@pytest.mark.slow
def test_a_file_without_most_of_a_tower_is_refused(tmp_path, monkeypatch):
    clip = clip_file(tmp_path / "clip.pt")
    state = {
        n: t for n, t in clip.state_dict().items() if "visual" not in n or "resblocks.1" not in n
    }
    torch.save(state, tmp_path / "cut.pt")
    with pytest.raises(UserError, match=r"only 70% of the image tower is in the file .*90%"):
        weights.load(wide_nano(monkeypatch), tmp_path / "cut.pt", towers=True)


def test_a_file_without_words_is_refused(tmp_path):
    torch.save({"visual.proj": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"token_embedding.weight is missing, expected \(49408"):
        weights.load(create_model("nano"), tmp_path / "other.pt")


def test_auto_takes_the_one_file_and_asks_among_several(tmp_path):
    assert sources.own_weights("auto", tmp_path) is None
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "a.pt").touch()
    assert sources.own_weights("auto", tmp_path) == tmp_path / "pretrained" / "a.pt"
    assert sources.own_weights("none", tmp_path) is None
    (tmp_path / "pretrained" / "b.safetensors").touch()
    with pytest.raises(UserError, match=r"holds 2 files \(a.pt, b.safetensors\)"):
        sources.own_weights("auto", tmp_path)
