"""The demo's checkpoint: a tiny LLaVA-NeXT with tokenizer and processor, as the library saves them.

Its tower has traits of trained ones that small random numbers lack: filters that see colours and
edges, places that are told apart, and stays as it is drawn. The language model is trained from
random weights (lessons.py), then the projector with it (sight.py).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lavic.demo_data.products import Item, talk_texts
from lavic.src.recommend.prompts import RECOMMEND_CANDIDATES, RECOMMEND_HEAD, RECOMMEND_MARK
from lavic.src.vision.captions import ANSWER_MARK, CAPTION_HEAD

SIDE, PATCH = 48, 8  # pixels of a view and of its patches
TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
    "projection_dim": 64,
}
LANGUAGE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "sliding_window": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7},
}
GRIDS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE]]
GRIDS.append([SIDE, 3 * SIDE])  # (height, width), the real checkpoint's at this size
SPARE_ROWS = 57  # the real checkpoint has more rows than its tokenizer has words, too
_SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]


def write(directory: Path, items: list[Item], seed: int) -> None:
    """Write the checkpoint of a model that has taken its lessons, and tokenizer and processor."""
    import torch

    from lavic.demo_data import lessons, sight

    processor = make_processor(make_tokenizer(items))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(processor.tokenizer)
        arrange_tower(model.model.vision_tower)
        draw_projector(model.model.multi_modal_projector)
        make = lessons.Exercises(processor.tokenizer, items, seed)
        lessons.teach(model, make)
        sight.teach(model, processor, items, make, seed)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def make_tokenizer(items: list[Item]) -> Any:
    """Byte-pair encoding of the prompts' and the products' language; ids are words like others."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    words = pre_tokenizers.Split(Regex(r" ?[\p{L}\p{N}]+|\s|[^\s\p{L}\p{N}]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,  # more than there is to find: every word becomes one token
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(items), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )


def make_processor(tokenizer: Any) -> Any:
    """The library's processor of LLaVA-NeXT, for pictures of this size."""
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    images = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=GRIDS,
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def make_model(tokenizer: Any) -> Any:
    """A LLaVA-NeXT of random weights for the tokenizer's words."""
    from transformers import (
        CLIPVisionConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        MistralConfig,
    )

    settings = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=MistralConfig(
            vocab_size=len(tokenizer) + SPARE_ROWS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **LANGUAGE,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=GRIDS,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    return LlavaNextForConditionalGeneration(settings)


def arrange_tower(tower: Any) -> None:
    """Give a random tower the first layer, the places and the strength of a trained one."""
    import torch

    with torch.no_grad():
        for layer in tower.encoder.layers:
            for weight in (p for p in layer.parameters() if p.dim() == 2):
                weight.normal_(0, weight.shape[1] ** -0.5)
        filters = tower.embeddings.patch_embedding.weight
        filters.copy_(smooth_filters(filters.shape[0]))
        places = tower.embeddings.position_embedding.weight
        places.normal_(0, 0.1)
        places[1:] = smooth_places(SIDE // PATCH, places.shape[1])


def draw_projector(projector: Any) -> None:
    """Give a random projector vectors about as long as the embeddings of words."""
    import torch

    with torch.no_grad():
        for layer, gain in ((projector.linear_1, 1.0), (projector.linear_2, 0.5)):
            layer.weight.normal_(0, gain * layer.in_features**-0.5)


def smooth_filters(count: int) -> Any:
    """(count, 3, PATCH, PATCH): brightness and two colour differences, each in slow waves."""
    import torch

    axis = (torch.arange(PATCH) + 0.5) * math.pi / PATCH
    waves = [
        torch.cos(y * axis)[:, None] * torch.cos(x * axis)
        for y, x in sorted(((y, x) for y in range(5) for x in range(5)), key=lambda yx: sum(yx))
    ]
    channels = torch.tensor([[1.0, 1, 1], [1, -1, 0], [0.5, 0.5, -1]])
    found = [colour[:, None, None] * wave for wave in waves for colour in channels]
    return torch.stack([each / each.norm() for each in found[:count]])


def smooth_places(side: int, dim: int) -> Any:
    """Plane waves of random direction over the patches: (side * side, dim)."""
    import torch

    ramp = (torch.arange(side) + 0.5) / side * 2 - 1
    grid = torch.cartesian_prod(ramp, ramp)
    return 0.5 * torch.sin(grid @ (2 * torch.randn(2, dim)) + 2 * math.pi * torch.rand(dim))


def _corpus(items: list[Item]) -> list[str]:
    """What the tokenizer learns from; each word stands there often enough to become a token."""
    prompts = [CAPTION_HEAD, ANSWER_MARK, RECOMMEND_HEAD, RECOMMEND_CANDIDATES, RECOMMEND_MARK]
    texts = [f"{item.id}: {item.title}\n {item.look.description}" for item in items]
    texts += [item.look.description for item in items]
    return 4 * (prompts + texts + talk_texts())
