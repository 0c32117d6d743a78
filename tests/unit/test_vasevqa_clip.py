"""The CLIP of the filters: where it is looked for, that it is whole, what it agrees with."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import normalize

from shared.errors import UserError
from tests.vase_filter_nano import CLIP_CFG, pixels, write_clip
from vasevqa.filter import clip

CPU = torch.device("cpu")
TEXTS = ["a complete intact vase", "broken pottery: shards, and more!", "数据"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


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
    own = clip.load(clip.find(their_folder), CPU)
    images = torch.randn(3, 3, 32, 32)
    tokens = own.tokenize(TEXTS)
    with torch.no_grad():
        image = normalize(pooled(theirs.get_image_features(pixel_values=images)), dim=-1)
        text = pooled(theirs.get_text_features(input_ids=tokens))
    assert torch.allclose(own.encode_images(images), image, atol=1e-5)
    assert torch.allclose(own.encode_texts(TEXTS), text, atol=1e-5)


def test_pictures_are_prepared_as_transformers_prepares_them(their_folder):
    own = clip.load(clip.find(their_folder), CPU)
    image = Image.fromarray(pixels(4, 57)[:, :43])
    processor = transformers.CLIPImageProcessorPil.from_pretrained(their_folder)
    expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.allclose(own.prepare(tensor), expected, atol=1e-5)


@pytest.mark.full
def test_the_default_network_is_that_of_clip_vit_base_patch32():
    torch.manual_seed(0)
    reference = transformers.CLIPModel(transformers.CLIPConfig()).eval()
    own = open_clip.create_model(clip.ARCH)
    own.load_state_dict(renamed(reference.state_dict()), strict=True)
    images, tokens = torch.randn(2, 3, 224, 224), open_clip.SimpleTokenizer()(TEXTS)
    with torch.no_grad():
        image = own.eval().encode_image(images)
        text = own.encode_text(tokens)
        expected = pooled(reference.get_image_features(pixel_values=images))
        assert torch.allclose(image, expected, atol=1e-5)
        expected = pooled(reference.get_text_features(input_ids=tokens))
        assert torch.allclose(text, expected, atol=1e-5)


def renamed(given):
    """Tensors of transformers' CLIP under open_clip's names."""
    words = {
        "vision_model.": "visual.", "text_model.": "", "encoder.layers": "transformer.resblocks",
        "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj", "pre_layrnorm": "ln_pre",
        "post_layernorm": "ln_post", "final_layer_norm": "ln_final",
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding": "conv1", "embeddings.token_embedding": "token_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection",
    }  # fmt: skip
    found, stacks = {}, {}
    for old, tensor in given.items():
        name = old
        for theirs, ours in words.items():
            name = name.replace(theirs, ours)
        block, separator, part = name.partition("self_attn.")
        if separator:  # q_proj.weight and its like
            stacks.setdefault(f"{block}attn.in_proj_{part[7:]}", {})[part[0]] = tensor
        else:
            found[name] = tensor.T if "projection" in old else tensor
    return found | {n: torch.cat([parts[p] for p in "qkv"]) for n, parts in stacks.items()}


def test_the_identity_changes_with_weights_and_preparation_and_with_nothing_else(folder, tmp_path):
    def identity(path):
        return clip.load(clip.find(path), CPU).identity

    first = identity(folder)
    assert identity(write_clip(tmp_path / "again")) == first
    assert identity(write_clip(tmp_path / "other", seed=1)) != first
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.1, 0.2, 0.3]
    moved = write_clip(tmp_path / "moved")
    (moved / "open_clip_config.json").write_text(json.dumps(config))
    assert identity(moved) != first


def test_the_four_look_ups_in_their_order_and_the_default_places(
    folder, their_folder, tmp_path, monkeypatch
):
    assert clip.find(folder).kind == "open_clip"
    below = tmp_path / "cache" / clip.ARCH
    write_clip(below)
    assert clip.find(tmp_path / "cache") == clip.Source("open_clip", below)
    hub = tmp_path / "hub"  # the folder as the hub's cache keeps it
    snapshot = hub / "models--openai--clip-vit-base-patch32" / "snapshots" / "3d74acf"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(their_folder)
    for place in (their_folder, their_folder.parent, hub):
        assert clip.find(place).kind == "transformers", place
    single = tmp_path / "single"
    single.mkdir()
    torch.save(open_clip.model.CLIP(**CLIP_CFG).state_dict(), single / "weights.pt")
    assert clip.find(single).kind == "file"
    assert clip.find(tmp_path / "nowhere").kind == "hub"
    (single / "second.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds 2 weight files .*second.bin, weights.pt"):
        clip.find(single)
    places = (tmp_path / "model", tmp_path / "CLIP" / "model")
    monkeypatch.setattr(clip, "DEFAULT_PLACES", places)
    assert clip.find(None) == clip.Source("hub", places[0])
    places[1].parent.mkdir()
    for place in reversed(places):
        place.symlink_to(folder)
        assert clip.find(None).path == place


def test_a_file_of_weights_fills_the_named_network(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(CLIP_CFG))
    open_clip.add_model_config(tmp_path / "tiny.json")
    model = open_clip.create_model("tiny")  # any of open_clip's networks
    torch.save({"state_dict": model.state_dict()}, tmp_path / "mine.pt")
    own = clip.load(clip.find(tmp_path, "tiny"), CPU)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = normalize(model.eval().encode_image(images), dim=-1)
    assert torch.allclose(own.encode_images(images), expected, atol=1e-6)


def test_a_cut_off_weight_file_is_named(tmp_path):
    torch.save(open_clip.model.CLIP(**CLIP_CFG).state_dict(), tmp_path / "w.pt")
    content = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"w\.pt is truncated or damaged"):
        clip.load(clip.find(tmp_path), CPU)


def test_a_folder_without_weights_is_an_error_and_no_random_network(folder, tmp_path):
    shutil.copy(folder / "open_clip_config.json", tmp_path)
    with pytest.raises(UserError, match="no CLIP could be loaded from the open_clip folder"):
        clip.load(clip.find(tmp_path), CPU)


def test_without_the_hub_all_look_ups_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        clip.load(clip.find(tmp_path / "model"), CPU)
    said = str(caught.value)
    for name in ("open_clip_config.json", "ViT-B-32-quickgelu/open_clip_config.json"):
        assert str(tmp_path / "model" / name) in said
    for other in ("CLIP folder of transformers", "one weight file", "the hub", "--model_cache_dir"):
        assert other in said
    assert "\n" not in said


def test_a_folder_of_transformers_that_lacks_weights_is_refused(theirs, their_folder, tmp_path):
    shutil.copytree(their_folder, tmp_path, dirs_exist_ok=True)
    state = {n: t.contiguous() for n, t in theirs.state_dict().items() if "text_proj" not in n}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights .* missing: text_projection.weight"):
        clip.load(clip.find(tmp_path), CPU)


def test_prompts_are_read_with_a_byte_order_mark_and_windows_line_ends_too(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeff[high]\r\n一个花瓶\r\n\r\n[low]\r\nb\r\n".encode())
    assert clip.read_prompts(tmp_path / "p.txt") == clip.Prompts(("一个花瓶",), ("b",))
    found = clip.read_prompts(clip.PROMPTS)
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
        clip.read_prompts(path)
