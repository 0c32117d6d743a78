"""A tiny Qwen2.5-VL in the real layout, with the real ids of its special tokens.

    model, processor = build(Path("weights/tiny-qwen2.5-vl"), texts, seed=0)
    teach(model, processor, [("What form does it have?", "a deep bowl", 0)], pictures, seed=0)
    model.save_pretrained("weights/tiny-qwen2.5-vl")

Ten million parameters, of which nearly all are an embedding of Qwen's size. swift expands a picture
only at id 151655, so that the specials sit where Qwen has them and the vocabulary between is empty.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
IMAGE = "<|image_pad|>"
FIRST_SPECIAL = 151643  # of Qwen2's vocabulary; <|image_pad|> is 151655
HIDDEN, HEAD = 64, 16
_BATCH = 32  # lessons a step
Lesson = tuple[str, str, int | None]  # question, answer, number of the picture if there is one
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SIZE = {"shortest_edge": 4 * 28 * 28, "longest_edge": 16 * 28 * 28}  # pixels of a picture


def build(
    directory: Path, texts: Iterable[str], seed: int
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """An untrained model that can write the words of `texts`, and its processor.

    Everything but the weights is saved in `directory`; `model.save_pretrained` adds them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(directory, texts)
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=_SIZE),
        tokenizer,
        Qwen2VLVideoProcessor(size=_SIZE),
        chat_template=_CHAT,
    )
    model = _model(tokenizer, seed)
    processor.save_pretrained(directory)
    if not (directory / "preprocessor_config.json").exists():  # older readers look for it
        Qwen2VLImageProcessor(size=_SIZE).save_pretrained(directory)
    return model, processor


def teach(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    lessons: Sequence[Lesson],
    pictures: Sequence[NDArray[np.uint8]],
    seed: int,
    steps: int = 450,
) -> float:
    """Train the whole model to answer the lessons, in place; the last loss, nats a token.

    The embedding's rows without a token stay zero and count in the softmax.
    """
    encoded = _encoded(processor, lessons, pictures)
    embedding: Any = model.get_input_embeddings().weight
    used = used_ids(processor.tokenizer)
    rows = nn.Parameter(embedding.detach()[used].clone())
    weights = [weight for weight in model.parameters() if weight is not embedding] + [rows]
    optimizer = torch.optim.AdamW(weights, lr=2.5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2.5e-3, total_steps=steps, pct_start=0.1
    )
    generator, loss = torch.Generator().manual_seed(seed), torch.tensor(math.nan)
    model.train()
    for _ in range(steps):
        batch = encoded.take(torch.randint(len(lessons), (_BATCH,), generator=generator))
        loss = _loss(model, batch, rows, used)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        embedding[used] = rows
    model.eval()
    return loss.item()


@dataclass(frozen=True)
class _Encoded:
    """Lessons as the model reads them.

    ids, learnt: (rows, tokens), the second true where the next token is an answer's; picture:
    (rows,), the row of patches (pictures, patches, values of one) and of grid (pictures, 3), or -1.
    """

    ids: Tensor
    learnt: Tensor
    picture: Tensor
    patches: Tensor
    grid: Tensor

    def take(self, rows: Tensor) -> _Encoded:
        """Some of the rows, each picture with its own row."""
        picture = self.picture[rows]
        shown = picture[picture >= 0]
        return _Encoded(
            self.ids[rows], self.learnt[rows], picture, self.patches[shown], self.grid[shown]
        )


def _encoded(
    processor: Any, lessons: Sequence[Lesson], pictures: Sequence[NDArray[np.uint8]]
) -> _Encoded:
    seen = processor.image_processor(list(pictures), return_tensors="pt")
    patches = seen["pixel_values"].view(len(pictures), -1, seen["pixel_values"].shape[-1])
    tokens = patches.shape[1] // 4  # two by two make one

    @functools.cache
    def prompt(question: str, has_picture: bool) -> list[int]:
        parts = [{"type": "image"}] * has_picture + [{"type": "text", "text": f"\n{question}"}]
        messages = [{"role": "user", "content": parts}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return processor.tokenizer(text.replace(IMAGE, IMAGE * tokens))["input_ids"]

    prompts = [prompt(question, number is not None) for question, _, number in lessons]
    ends = processor.tokenizer([f"{answer}<|im_end|>" for _, answer, _ in lessons])["input_ids"]
    longest = max(len(start) + len(end) for start, end in zip(prompts, ends, strict=True))
    ids = torch.full((len(lessons), longest), FIRST_SPECIAL)  # <|endoftext|>
    learnt = torch.zeros_like(ids, dtype=torch.bool)
    for row, (start, end) in enumerate(zip(prompts, ends, strict=True)):
        ids[row, : len(start) + len(end)] = torch.tensor(start + end)
        learnt[row, len(start) - 1 : len(start) + len(end) - 1] = True
    picture = torch.tensor([-1 if number is None else number for _, _, number in lessons])
    return _Encoded(ids, learnt, picture, patches, seen["image_grid_thw"])


def _loss(
    model: Qwen2_5_VLForConditionalGeneration, batch: _Encoded, rows: Tensor, used: Tensor
) -> Tensor:
    """Cross-entropy of the answers, over the used rows and, as one, those that are zero."""
    place = torch.searchsorted(used, batch.ids)  # among the used rows
    inner: Any = model.model
    is_image = batch.ids == FIRST_SPECIAL + SPECIALS.index(IMAGE)
    seen = inner.get_image_features(batch.patches.flatten(0, 1), batch.grid).pooler_output
    inputs = rows[place].masked_scatter(is_image[..., None], torch.cat(list(seen)))
    positions, _ = inner.get_rope_index(
        batch.ids, mm_token_type_ids=is_image.long(), image_grid_thw=batch.grid
    )
    states = inner.language_model(
        inputs_embeds=inputs, position_ids=positions, use_cache=False
    ).last_hidden_state
    logits = states[batch.learnt] @ rows.T
    zeros = logits.new_full((len(logits), 1), math.log(model.lm_head.out_features - len(used)))
    wanted = place.roll(-1, dims=1)[batch.learnt]
    return nn.functional.cross_entropy(torch.cat([logits, zeros], dim=-1), wanted)


def used_ids(tokenizer: Any) -> torch.Tensor:
    """The ids that have a token, sorted."""
    return torch.tensor(sorted(set(tokenizer.get_vocab().values())))


def _tokenizer(directory: Path, texts: Iterable[str]) -> Any:
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.NFC()
    trained.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    # a BPE vocabulary is a mapping, so that ids may be sparse
    facts = json.loads(trained.to_str())
    facts["model"]["vocab"] |= {text: FIRST_SPECIAL + at for at, text in enumerate(SPECIALS)}
    whole = Tokenizer.from_str(json.dumps(facts))
    whole.add_special_tokens(list(SPECIALS))
    whole.save(str(directory / "tokenizer.json"))
    return Qwen2Tokenizer.from_pretrained(
        directory,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIALS[1:]),
        model_max_length=2048,
        chat_template=_CHAT,
    )


def _model(tokenizer: Any, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(seed)
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in SPECIALS}
    model = Qwen2_5_VLForConditionalGeneration(_config(ids))
    end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    model.generation_config = GenerationConfig(
        bos_token_id=pad, pad_token_id=pad, eos_token_id=[end, pad], do_sample=True, temperature=1.0
    )
    with torch.no_grad():
        embedding: Any = model.get_input_embeddings().weight
        used = used_ids(tokenizer)
        rows = torch.randn(len(used), HIDDEN) * 0.15
        embedding.zero_()  # 151 thousand rows have no token: they must not win the softmax
        embedding[used] = rows
    return model


def _config(ids: dict[str, int]) -> Qwen2_5_VLConfig:
    third = HEAD // 2 * 3 // 8  # mrope sections add up to half a head
    text = {
        "vocab_size": 64 * ((max(ids.values()) + 64) // 64),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 3,
        "num_attention_heads": HIDDEN // HEAD,
        "num_key_value_heads": HIDDEN // HEAD // 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [HEAD // 2 - 2 * third, third, third],
        },
    }
    vision = {
        **{"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4},
        **{"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
        **{"window_size": 112, "out_hidden_size": HIDDEN, "fullatt_block_indexes": [1]},
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
