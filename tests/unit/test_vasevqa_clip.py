"""The CLIP of the filters: where it is looked for, that it is whole, what it agrees with."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from torch.nn.functional import cosine_similarity, normalize

from shared.errors import UserError
from tests.vase_filter_nano import CLIP_CFG, pixels, write_clip
from vasevqa.filter import clip_convert, clip_model, clip_source, prompts
from vasevqa.filter.scoring import PromptTable

CPU = torch.device("cpu")
TEXTS = ["a complete intact vase", "broken pottery: shards, and more!", "数据"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder):
    return clip_model.load(clip_source.find(folder), CPU)


@pytest.fixture(scope="module")
def theirs():
    """A small CLIP of transformers, random weights."""
    torch.manual_seed(3)
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    config = transformers.CLIPConfig(
        text_config=size | {"intermediate_size": 96, "vocab_size": 49408},
        vision_config=size | {"intermediate_size": 64, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    model = transformers.CLIPModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero by default, where a mistake would not show
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def their_folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "clip-vit-base-patch32"
    theirs.save_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    processor.save_pretrained(folder)
    return folder


def pooled(output):
    """transformers 5 gives an output object, earlier versions the tensor."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def test_a_folder_of_transformers_gives_the_embeddings_of_transformers(theirs, their_folder):
    own = clip_model.load(clip_source.find(their_folder), CPU)
    images = torch.randn(3, 3, 32, 32)
    tokens = own.tokenize(TEXTS)
    with torch.no_grad():
        image = normalize(pooled(theirs.get_image_features(pixel_values=images)), dim=-1)
        text = pooled(theirs.get_text_features(input_ids=tokens))
    assert torch.allclose(own.encode_images(images), image, atol=1e-5)
    assert torch.allclose(own.encode_texts(TEXTS), text, atol=1e-5)


def test_pictures_are_prepared_as_transformers_prepares_them(their_folder):
    own = clip_model.load(clip_source.find(their_folder), CPU)
    image = Image.fromarray(pixels(4, 57)[:, :43])
    processor = transformers.CLIPImageProcessorPil.from_pretrained(their_folder)
    expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.allclose(own.prepare_tensor(tensor), expected, atol=1e-5)


@pytest.mark.full
def test_the_default_network_is_that_of_clip_vit_base_patch32():
    torch.manual_seed(0)
    reference = transformers.CLIPModel(transformers.CLIPConfig()).eval()
    own = open_clip.create_model(clip_source.ARCH)
    own.load_state_dict(clip_convert._state(dict(reference.state_dict())), strict=True)
    images, tokens = torch.randn(2, 3, 224, 224), open_clip.SimpleTokenizer()(TEXTS)
    with torch.no_grad():
        image = own.eval().encode_image(images)
        text = own.encode_text(tokens)
        expected = pooled(reference.get_image_features(pixel_values=images))
        assert torch.allclose(image, expected, atol=1e-5)
        expected = pooled(reference.get_text_features(input_ids=tokens))
        assert torch.allclose(text, expected, atol=1e-5)


def test_the_score_is_the_difference_of_the_cosines_to_the_groups_means(clip, folder):
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    texts = prompts.Prompts(("a vase", "a whole vase"), ("shards", "dust", "a broken vase"))
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        own = model.encode_image(image)
        high = model.encode_text(tokenize(list(texts.high)))
        low = model.encode_text(tokenize(list(texts.low)))
    found = PromptTable.of(clip, texts).compare(clip.encode_images(image)[0].numpy())
    to_high = float(cosine_similarity(own, high.mean(0, keepdim=True)))
    to_low = float(cosine_similarity(own, low.mean(0, keepdim=True)))
    assert found["high"] == pytest.approx(to_high, abs=1e-6)
    assert found["low"] == pytest.approx(to_low, abs=1e-6)
    assert found["score"] == pytest.approx(to_high - to_low, abs=1e-6)
    each = cosine_similarity(own, torch.cat([high, low])).tolist()
    assert found["prompts"] == pytest.approx(each, abs=2e-6)


def test_the_identity_changes_with_weights_and_preparation_and_with_nothing_else(folder, tmp_path):
    def identity(path):
        return clip_model.load(clip_source.find(path), CPU).identity

    first = identity(folder)
    assert identity(write_clip(tmp_path / "again")) == first
    assert identity(write_clip(tmp_path / "other", seed=1)) != first
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.1, 0.2, 0.3]
    moved = write_clip(tmp_path / "moved")
    (moved / "open_clip_config.json").write_text(json.dumps(config))
    assert identity(moved) != first


def test_the_four_look_ups_in_their_order(folder, their_folder, tmp_path):
    assert clip_source.find(folder).kind == "open_clip"
    below = tmp_path / "cache" / clip_source.ARCH
    write_clip(below)
    assert clip_source.find(tmp_path / "cache") == clip_source.Source("open_clip", below)
    for place in (
        their_folder,
        their_folder.parent,
        hub_layout(tmp_path / "hub", their_folder),
    ):
        assert clip_source.find(place).kind == "transformers", place
    single = tmp_path / "single"
    single.mkdir()
    torch.save(open_clip.model.CLIP(**CLIP_CFG).state_dict(), single / "weights.pt")
    assert clip_source.find(single).kind == "file"
    assert clip_source.find(tmp_path / "nowhere").kind == "hub"
    (single / "second.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds 2 weight files .*second.bin, weights.pt"):
        clip_source.find(single)


def hub_layout(cache: Path, folder: Path) -> Path:
    """The folder as the hub's cache keeps it."""
    snapshot = cache / "models--openai--clip-vit-base-patch32" / "snapshots" / "3d74acf"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(folder)
    return cache


def test_the_default_places_are_model_and_then_clip_model(monkeypatch, folder, tmp_path):
    places = (tmp_path / "model", tmp_path / "CLIP" / "model")
    monkeypatch.setattr(clip_source, "DEFAULT_PLACES", places)
    assert clip_source.find(None) == clip_source.Source("hub", places[0])
    places[1].parent.mkdir()
    places[1].symlink_to(folder)
    assert clip_source.find(None).path == places[1]
    places[0].symlink_to(folder)
    assert clip_source.find(None).path == places[0]


@pytest.mark.slow
def test_a_file_of_weights_fills_the_named_network(tmp_path):
    torch.manual_seed(1)
    model = open_clip.create_model("RN50")  # any of open_clip's networks
    torch.save({"state_dict": model.state_dict()}, tmp_path / "mine.pt")
    own = clip_model.load(clip_source.find(tmp_path, "RN50"), CPU)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = normalize(model.eval().encode_image(image), dim=-1)
    assert torch.allclose(own.encode_images(image), expected, atol=1e-6)


def test_a_folder_without_weights_is_an_error_and_no_random_network(folder, tmp_path):
    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    with pytest.raises(UserError, match="no CLIP could be loaded from the open_clip folder"):
        clip_model.load(clip_source.find(tmp_path), CPU)


def test_a_cut_off_weight_file_is_named(tmp_path):
    torch.save(open_clip.model.CLIP(**CLIP_CFG).state_dict(), tmp_path / "w.pt")
    content = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"w\.pt is truncated or damaged"):
        clip_model.load(clip_source.find(tmp_path), CPU)


def test_without_the_hub_all_look_ups_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        clip_model.load(clip_source.find(tmp_path / "model"), CPU)
    said = str(caught.value)
    for part in (
        str(tmp_path / "model" / "open_clip_config.json"),
        str(tmp_path / "model" / "ViT-B-32-quickgelu" / "open_clip_config.json"),
        "a CLIP folder of transformers",
        "one weight file",
        "the hub with",
        "--model_cache_dir PATH",
    ):
        assert part in said
    assert "\n" not in said


def test_an_activation_that_open_clip_lacks_is_refused(their_folder, tmp_path):
    config = json.loads((their_folder / "config.json").read_text())
    config["text_config"]["hidden_act"] = "silu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="hidden_act quick_gelu, silu cannot be read"):
        clip_convert.read_folder(tmp_path)


def test_the_prompts_are_the_sixteen_of_the_default_file():
    found = prompts.read(prompts.DEFAULT)
    assert len(found.high) == len(found.low) == 8
    assert found.high[0] == "a complete intact vase viewed from the front"
    assert found.low[-1] == "partial vase pieces and fragments"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[high]\na\n[lwo]\nb", r":3: unknown group \[lwo\].*did you mean low"),
        ("a vase\n[high]", r":1: write \[high\] or \[low\] above"),
        ("[high]\na\n[low]\n# b\n", r"no prompt below \[low\]"),
    ],
)
def test_a_malformed_prompt_file_is_refused_with_its_line(tmp_path, text, said):
    path = tmp_path / "p.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        prompts.read(path)


def test_prompt_files_may_have_a_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeff[high]\r\n一个花瓶\r\n\r\n[low]\r\nb\r\n".encode())
    assert prompts.read(path) == prompts.Prompts(("一个花瓶",), ("b",))
