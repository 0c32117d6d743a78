"""Encoders: from files of torchvision, mmpretrain, open_clip and this recipe, or refused."""

import json

import pytest
import torch
from torchvision import models

from arcface.inshop_retrieval.encoders import RankBuffers, build_encoder, load_weights
from arcface.inshop_retrieval.partial_fc import PartialFC
from shared.distributed import World
from shared.errors import UserError


def build(settings):
    return build_encoder(settings, "pretrained")


GAP = {"type": "GlobalAveragePooling"}


def resnet(checkpoint=None, depth=18, **settings):
    init_cfg = {"type": "Pretrained", "checkpoint": str(checkpoint)} if checkpoint else None
    return [{"type": "ResNet", "depth": depth, "init_cfg": init_cfg, **settings}, GAP]


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return models.resnet18()


@pytest.fixture(scope="module")
def file(classifier, tmp_path_factory):
    """A state dict of torchvision's."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(classifier.state_dict(), path)
    return path


def assert_has_weights_of(encoder, classifier):
    own, given = encoder.backbone.state_dict(), classifier.state_dict()
    assert own.keys() == given.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(own[name], given[name]) for name in own if "num_batches" not in name)


def test_the_embedding_is_the_pooled_feature(classifier, file):
    encoder = build(resnet(file)).eval()
    assert encoder.dim == 512
    images = torch.randn(2, 3, 40, 40)
    pooled = {}
    classifier.avgpool.register_forward_hook(lambda _m, _i, out: pooled.update(out=out.flatten(1)))
    with torch.no_grad():
        classifier.eval()(images)
        assert torch.equal(encoder(images), pooled["out"])


def test_torchvisions_names_stand_for_files_in_its_cache(classifier, file, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        UserError, match=r"IMAGENET1K_V1 are missing .*resnet18-f37072fd\.pth.*init random"
    ):
        build(resnet("IMAGENET1K_V1"))
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "checkpoints" / "resnet18-f37072fd.pth").write_bytes(file.read_bytes())
    assert_has_weights_of(build(resnet("IMAGENET1K_V1")), classifier)


@pytest.mark.parametrize("prefix", ["backbone", None, "module.backbone"])
def test_a_checkpoint_in_mmpretrains_format_loads(classifier, tmp_path, prefix):
    """Wrapped with its meta, names below a prefix, without counts of batches, a head beside."""
    below = prefix or "backbone"
    state = {
        f"{below}.{name}": tensor
        for name, tensor in classifier.state_dict().items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    state["head.fc.weight"] = torch.zeros(3, 3)
    torch.save({"state_dict": state, "meta": {"epoch": 3}}, tmp_path / "mm.pth")
    settings = resnet(tmp_path / "mm.pth")
    if prefix:
        settings[0]["init_cfg"]["prefix"] = "backbone"
    assert_has_weights_of(build(settings), classifier)


def test_weights_that_are_missing_or_of_another_network_are_refused(file, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pth are missing .*--init random"):
        build(resnet(tmp_path / "nowhere.pth"))
    assert build_encoder(resnet(tmp_path / "nowhere.pth"), "random").dim == 512
    with pytest.raises(UserError, match="does not fit"):
        build(resnet(file, depth=34))
    (tmp_path / "cut.pth").write_bytes(file.read_bytes()[:9999])
    with pytest.raises(UserError, match="truncated"):
        build(resnet(tmp_path / "cut.pth"))


@pytest.mark.parametrize("kind", ["best", "run"])
def test_the_recipes_own_files_load_with_their_head(tmp_path, kind):
    encoder, head = build(resnet()), PartialFC(5, 512, World(), seed=3)
    state = {f"encoder.{name}": t for name, t in encoder.state_dict().items()}
    content = {"state_dict": state | {"head.weight": head.weight.detach()}, "meta": {"epoch": 1}}
    if kind == "run":
        parts = {"encoder": encoder.state_dict(), "head": head.state_dict(), "optimizer": {}}
        content = {"position": {"step": 1}, "parts": parts}
    torch.save(content, tmp_path / "file.pth")
    other, others_head = build(resnet()), PartialFC(5, 512, World(), seed=4)
    load_weights(other, others_head, tmp_path / "file.pth")
    assert torch.equal(other.backbone.conv1.weight, encoder.backbone.conv1.weight)
    assert torch.equal(others_head.weight, head.weight)
    of_another_size = PartialFC(7, 512, World(), seed=3)  # stays as it is
    before = of_another_size.weight.detach().clone()
    load_weights(other, of_another_size, tmp_path / "file.pth")
    assert torch.equal(of_another_size.weight, before)
    if kind == "best":  # also as the weights to begin another run with
        again = build(resnet(tmp_path / "file.pth"))
        assert torch.equal(again.backbone.conv1.weight, encoder.backbone.conv1.weight)


@pytest.mark.parametrize("frozen", [True, False])
def test_norm_eval_keeps_running_statistics(frozen):
    encoder = build(resnet(norm_eval=frozen)).train()
    before = encoder.backbone.bn1.running_mean.clone()
    encoder(torch.randn(4, 3, 32, 32) + 3)
    assert torch.equal(encoder.backbone.bn1.running_mean, before) is frozen


REFUSED = {
    "another network": ([{"type": "SwinTransformer"}, GAP], "type is 'SwinTransformer'"),
    "no pooling": ([{"type": "ResNet", "depth": 18}], r"expected \['GlobalAveragePooling'\]"),
    "a depth": (resnet(depth=20), "depth is 20; allowed: 18, 34, 50"),
    "caffe's strides": (resnet(style="caffe"), "style is 'caffe'"),
    "a misspelt key": (resnet(norm_evla=True), "norm_evla is not known"),
    "nothing": ([], "model.image_encoder.0.type is None"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_known_is_refused_by_name(settings, message):
    with pytest.raises(UserError, match=message):
        build(settings)


def test_rank_buffers_of_another_number_of_ranks_are_averaged():
    encoder = build(resnet())
    buffers = RankBuffers(encoder, World())
    rows = buffers.state_dict()["rows"]
    buffers.load_state_dict({"rows": torch.cat([rows + 1, rows + 3])})
    buffers.collect()
    assert torch.allclose(buffers.state_dict()["rows"], rows + 2)
    assert torch.equal(encoder.backbone.bn1.running_var, torch.full((64,), 3.0))
    without = RankBuffers(torch.nn.Linear(2, 2), World())  # as a tower of open_clip
    without.average()
    without.collect()
    without.load_state_dict(without.state_dict())


# --- open_clip ------------------------------------------------------------------------------------


def tower(checkpoint, name="ViT-nano"):
    init_cfg = {"type": "Pretrained", "checkpoint": str(checkpoint)}
    return [{"type": "OpenClip", "model_name": name, "init_cfg": init_cfg}]


@pytest.mark.slow
def test_a_checkpoint_of_open_clip_gives_its_image_tower(tmp_path):
    import open_clip

    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "ViT-nano.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "ViT-nano.json")
    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-nano")
    torch.save({"epoch": 1, "state_dict": clip.state_dict()}, tmp_path / "clip.pt")
    encoder = build(tower(tmp_path / "clip.pt"))
    assert (encoder.dim, encoder.image_size) == (24, (32, 32))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(encoder.eval()(images), clip.eval().encode_image(images), atol=1e-6)
    encoder(images).sum().backward()  # DDP needs a gradient for every parameter
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.slow
def test_open_clips_names_stand_for_files_in_the_hubs_cache(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"did you mean ViT-"):
        build(tower("x", name="ViT-B-61"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"laion2b_s34b_b88k are missing .*CLIP-ViT-B-16-laion2B"):
        build(tower("laion2b_s34b_b88k", "ViT-B-16"))
    with pytest.raises(UserError, match="openai need QuickGELU on"):
        build(tower("openai", "ViT-B-16"))
