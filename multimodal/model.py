"""The model: an image, a text and an audio tower with one common space, and a fusion transformer.

    from model import create_model                       # inside multimodal/
    model = create_model("base")
    outputs = model(images=images, input_ids=ids, attention_mask=mask, audio=log_mel)

Any non-empty choice of modalities will do. The towers' parts are named and shaped as open_clip's,
so that its weights fit (pretrained.py). Standard library and torch alone.

Legend of the shapes: B batch, N tokens, W width of a tower, T audio frames (10 ms), D embed_dim.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

MODALITIES = ("image", "text", "audio")
# Each with a temperature of its own; the last are two sounds of one voice.
PAIRS = ("image_text", "audio_text", "image_audio", "audio_audio")
VOCABULARY, CONTEXT = 49408, 77  # of open_clip's SimpleTokenizer
MEL_BINS = 80
FRAMES_A_TOKEN = 4
LARGEST_LOG_SCALE = math.log(100.0)
_FIRST_LOG_SCALE = math.log(1 / 0.07)


@dataclass(frozen=True)
class Shape:
    """One transformer."""

    width: int
    heads: int
    layers: int


@dataclass(frozen=True)
class Size:
    """The four transformers of a model. word: width of the word table, `text.width` or less."""

    image: Shape
    text: Shape
    audio: Shape
    fusion: Shape
    word: int
    image_size: int = 224
    patch: int = 16


SIZES = {
    "nano": Size(  # for the demo and for tests
        Shape(64, 4, 3), Shape(64, 4, 2), Shape(64, 4, 2), Shape(64, 4, 1), 32, 64, 8
    ),
    "tiny": Size(Shape(192, 3, 12), Shape(192, 3, 4), Shape(192, 3, 6), Shape(256, 4, 1), 64),
    "small": Size(Shape(320, 5, 10), Shape(256, 4, 6), Shape(256, 4, 8), Shape(384, 6, 2), 128),
    "base": Size(Shape(384, 6, 12), Shape(384, 6, 12), Shape(384, 6, 6), Shape(512, 8, 2), 384),
    "large": Size(Shape(768, 12, 12), Shape(512, 8, 12), Shape(512, 8, 12), Shape(512, 8, 4), 512),
}


def create_model(
    size: str = "base",
    *,
    num_classes: int = 80,
    embed_dim: int = 512,
    use_checkpoint: bool = True,
    dropout: float = 0.0,
    activation: str = "gelu",
) -> MultimodalModel:
    """A model with random weights: tiny, small, base or large (15, 35, 80, 200 M parameters).

    num_classes: of `logits`; the default is COCO's categories. embed_dim: of all features.
    use_checkpoint: keep only each block's input while training and compute the rest again.
    activation: gelu, or quick_gelu for OpenAI's weights.
    Raises ValueError for a name that is not allowed.
    """
    for name, value, allowed in (
        ("size", size, SIZES),
        ("activation", activation, _ACTIVATIONS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, allowed: {', '.join(allowed)}")
    options = BlockOptions(dropout, activation, use_checkpoint)
    return MultimodalModel(SIZES[size], num_classes, embed_dim, options)


# --- blocks ---------------------------------------------------------------------------------------


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """The activation, same shape."""
        return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


@dataclass(frozen=True)
class BlockOptions:
    """What all blocks of a model have in common."""

    dropout: float = 0.0
    activation: str = "gelu"
    use_checkpoint: bool = True


class Attention(nn.Module):
    """Multi-head self-attention; parameters named as nn.MultiheadAttention's.

    torch's fused kernels work in chunks: no score matrix of all queries is kept.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def initialise(self, inner: float, outer: float) -> None:
        """Draw the weights with these deviations: of the projection in, and of the one out."""
        nn.init.normal_(self.in_proj_weight, std=inner)
        nn.init.normal_(self.out_proj.weight, std=outer)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        """(B, N, W) → (B, N, W).

        allowed: bool, broadcast to (B, heads, N, N), True where a query sees a key; every query
        must see one.
        """
        batch, length, width = x.shape
        projected = functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        split = projected.view(batch, length, 3, self.heads, width // self.heads)
        queries, keys, values = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, shape: Shape, options: BlockOptions) -> None:
        super().__init__()
        width = shape.width
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, shape.heads)
        self.ln_2 = nn.LayerNorm(width)
        parts = {
            "c_fc": nn.Linear(width, 4 * width),
            "gelu": _ACTIVATIONS[options.activation](),
            "c_proj": nn.Linear(4 * width, width),
        }
        self.mlp = nn.Sequential(OrderedDict(parts))
        self.dropout = nn.Dropout(options.dropout)
        inner = width**-0.5
        outer = inner * (2 * shape.layers) ** -0.5  # the sum of all branches keeps its size
        for linear, std in ((parts["c_fc"], inner), (parts["c_proj"], outer)):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)
        self.attn.initialise(inner, outer)

    def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        """(B, N, W) → (B, N, W)."""
        x = x + self.dropout(self.attn(self.ln_1(x), allowed))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, shape: Shape, options: BlockOptions) -> None:
        super().__init__()
        self.use_checkpoint = options.use_checkpoint
        self.resblocks = nn.ModuleList(Block(shape, options) for _ in range(shape.layers))

    def forward(self, x: Tensor, allowed: Tensor | None = None) -> Tensor:
        """(B, N, W) → (B, N, W)."""
        for block in self.resblocks:
            if self.use_checkpoint and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, allowed, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x, allowed)
        return x


# --- towers ---------------------------------------------------------------------------------------


@dataclass
class Encoded:
    """One modality, encoded."""

    tokens: Tensor  # (B, N, W)
    present: Tensor  # (B, N) bool: tokens that carry something
    features: Tensor  # (B, D), unit norm


class ImageTower(nn.Module):
    """A vision transformer."""

    def __init__(self, size: Size, embed_dim: int, options: BlockOptions) -> None:
        super().__init__()
        width, self.image_size = size.image.width, size.image_size
        patches = (size.image_size // size.patch) ** 2
        self.conv1 = nn.Conv2d(3, width, size.patch, size.patch, bias=False)
        self.class_embedding = _normal(width, std=width**-0.5)
        self.positional_embedding = _normal(patches + 1, width, std=width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(size.image, options)
        self.ln_post = nn.LayerNorm(width)
        self.proj = _normal(width, embed_dim, std=width**-0.5)

    def forward(self, images: Tensor) -> Encoded:
        """images: (B, 3, side, side) normalised floats; ValueError for another shape."""
        expected = (3, self.image_size, self.image_size)
        if images.shape[1:] != expected:
            raise ValueError(f"images are {tuple(images.shape)}, expected (B, *{expected})")
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
        x = torch.cat([first, patches], dim=1) + self.positional_embedding
        x = self.ln_post(self.transformer(self.ln_pre(x)))
        present = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return Encoded(x, present, _unit(x[:, 0] @ self.proj))


class TextTower(nn.Module):
    """A causal transformer whose last token, the end of the text, stands for the whole.

    A word table narrower than the tower (ALBERT's factorisation) is what lets tiny be tiny.
    """

    def __init__(self, size: Size, embed_dim: int, options: BlockOptions) -> None:
        super().__init__()
        width = size.text.width
        self.token_embedding = nn.Embedding(VOCABULARY, size.word)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        narrow = size.word < width
        self.widen = nn.Linear(size.word, width, bias=False) if narrow else nn.Identity()
        self.positional_embedding = _normal(CONTEXT, width, std=0.01)
        self.transformer = Transformer(size.text, options)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = _normal(width, embed_dim, std=width**-0.5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Encoded:
        """input_ids: (B, L) int64, L up to 77. attention_mask: (B, L), non-zero at real tokens.

        Without a mask the text ends at its largest id, the end token: 0 pads and is "!" too.
        Raises ValueError for more tokens, and for ids outside the vocabulary (on a GPU only while
        evaluating: looking there waits for the device).
        """
        length = input_ids.shape[1]
        if length > CONTEXT:
            raise ValueError(f"input_ids have {length} tokens, at most {CONTEXT} are possible")
        if input_ids.is_cuda and not self.training:
            _check_ids(input_ids)
        _check_mask("attention_mask", attention_mask, input_ids.shape)
        place = torch.arange(length, device=input_ids.device)
        present = (
            place <= input_ids.argmax(dim=1, keepdim=True)
            if attention_mask is None
            else attention_mask.bool()
        )
        # each token sees itself at least, so that no row is without a key
        seen = (place <= place[:, None]) & present[:, None, :] | (place == place[:, None])
        try:
            words = self.token_embedding(input_ids)
        except IndexError:
            _check_ids(input_ids)
            raise
        x = self.widen(words) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, seen[:, None]))
        last = x[torch.arange(len(x), device=x.device), (present * place).argmax(dim=1)]
        return Encoded(x, present, _unit(last @ self.text_projection))


class AudioTower(nn.Module):
    """Two convolutions and a transformer over tokens of 40 ms; any number of frames."""

    def __init__(self, size: Size, embed_dim: int, options: BlockOptions) -> None:
        super().__init__()
        width = size.audio.width
        self.conv1 = nn.Conv1d(MEL_BINS, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.transformer = Transformer(size.audio, options)
        self.ln_post = nn.LayerNorm(width)
        self.proj = _normal(width, embed_dim, std=width**-0.5)

    def forward(self, audio: Tensor, audio_mask: Tensor | None = None) -> Encoded:
        """audio: (B, T, 80) log-mel. audio_mask: (B, T), non-zero at real frames (default: all).

        What stands in other frames has no influence. Raises ValueError for another shape.
        """
        if audio.ndim != 3 or audio.shape[2] != MEL_BINS:
            raise ValueError(f"audio is {tuple(audio.shape)}, expected (B, T, {MEL_BINS})")
        if audio_mask is None:
            audio_mask = torch.ones(audio.shape[:2], dtype=torch.bool, device=audio.device)
        _check_mask("audio_mask", audio_mask, audio.shape[:2])
        spare = -audio.shape[1] % FRAMES_A_TOKEN
        present = functional.pad(audio_mask.bool(), (0, spare))
        x = functional.pad(audio, (0, 0, 0, spare)).transpose(1, 2) * present[:, None]
        x = functional.gelu(self.conv1(x)) * present[:, None]
        present = _halved(present)
        x = functional.gelu(self.conv2(x)) * present[:, None]
        x, present = functional.avg_pool1d(x, 2).transpose(1, 2), _halved(present)
        x = x + _waves(x.shape[1], x.shape[2], x.device)
        x = self.ln_post(self.transformer(x, _visible(present)))
        weights = present[:, :, None].to(x.dtype)
        mean = (x * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return Encoded(x, present, _unit(mean @ self.proj))


class Fusion(nn.Module):
    """One token reads the tokens of all modalities that are present."""

    def __init__(self, size: Size, embed_dim: int, options: BlockOptions) -> None:
        super().__init__()
        width = size.fusion.width
        widths = {"image": size.image.width, "text": size.text.width, "audio": size.audio.width}
        self.project = nn.ModuleDict({name: nn.Linear(w, width) for name, w in widths.items()})
        self.kind = nn.ParameterDict({name: _normal(width, std=0.02) for name in widths})
        self.first = _normal(width, std=width**-0.5)
        self.transformer = Transformer(size.fusion, options)
        self.ln_post = nn.LayerNorm(width)
        self.output = nn.Linear(width, embed_dim)

    def forward(self, encoded: dict[str, Encoded], modality_mask: Tensor | None) -> Tensor:
        """(B, D). modality_mask: (B, 3), non-zero where a sample has image, text, audio."""
        batch = len(next(iter(encoded.values())).tokens)
        tokens = [self.first.expand(batch, 1, -1)]
        seen = [torch.ones(batch, 1, dtype=torch.bool, device=self.first.device)]
        for name, one in encoded.items():
            tokens.append(self.project[name](one.tokens) + self.kind[name])
            column = MODALITIES.index(name)
            has = True if modality_mask is None else modality_mask[:, column, None].bool()
            seen.append(one.present & has)
        x = self.transformer(torch.cat(tokens, dim=1), torch.cat(seen, dim=1)[:, None, None])
        return self.output(self.ln_post(x[:, 0]))


class MultimodalModel(nn.Module):
    """See the module's docstring. Build it by `create_model`."""

    def __init__(self, size: Size, num_classes: int, embed_dim: int, options: BlockOptions) -> None:
        super().__init__()
        self.size = size
        self.image = ImageTower(size, embed_dim, options)
        self.text = TextTower(size, embed_dim, options)
        self.audio = AudioTower(size, embed_dim, options)
        self.fusion = Fusion(size, embed_dim, options)
        self.classifier = nn.Linear(embed_dim, num_classes)
        self.logit_scale = nn.ParameterDict(
            {pair: nn.Parameter(torch.tensor(_FIRST_LOG_SCALE)) for pair in PAIRS}
        )
        self.logit_bias = nn.ParameterDict(  # of the sigmoid loss
            {pair: nn.Parameter(torch.zeros(())) for pair in PAIRS}
        )

    @property
    def image_size(self) -> int:
        """The side of the pictures, in pixels."""
        return self.image.image_size

    def forward(
        self,
        images: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        audio: Tensor | None = None,
        audio_mask: Tensor | None = None,
        modality_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`fused_features` (B, D), `logits` (B, classes), `<modality>_features` (B, D) unit norm.

        images: (B, 3, side, side). input_ids, attention_mask: (B, L). audio: (B, T, 80) log-mel,
        audio_mask: (B, T). modality_mask: (B, 3), which of image, text, audio each sample has for
        the fusion (default: all that are given).
        Raises ValueError without any modality, and for inputs of different numbers of samples.
        """
        given = {"images": images, "input_ids": input_ids, "audio": audio}
        sizes = {name: len(value) for name, value in given.items() if value is not None}
        if len(set(sizes.values())) > 1:
            counts = ", ".join(f"{name} {count}" for name, count in sizes.items())
            raise ValueError(f"all inputs need the same number of samples, got {counts}")
        if sizes:
            _check_mask("modality_mask", modality_mask, (next(iter(sizes.values())), 3))
        encoded: dict[str, Encoded] = {}
        if images is not None:
            encoded["image"] = self.image(images)
        if input_ids is not None:
            encoded["text"] = self.text(input_ids, attention_mask)
        if audio is not None:
            encoded["audio"] = self.audio(audio, audio_mask)
        if not encoded:
            raise ValueError("give at least one of images, input_ids and audio")
        fused = self.fusion(encoded, modality_mask)
        features = {f"{name}_features": one.features for name, one in encoded.items()}
        return {"fused_features": fused, "logits": self.classifier(fused), **features}

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, side, side) → (B, D), unit norm."""
        return self.image(images).features

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, L) → (B, D), unit norm."""
        return self.text(input_ids, attention_mask).features

    def encode_audio(self, audio: Tensor, audio_mask: Tensor | None = None) -> Tensor:
        """(B, T, 80) → (B, D), unit norm."""
        return self.audio(audio, audio_mask).features

    @torch.no_grad()
    def clamp_temperatures(self) -> None:
        """Keep every logit scale at 100 or less; after each optimizer step."""
        for scale in self.logit_scale.values():
            scale.clamp_(max=LARGEST_LOG_SCALE)


def _check_ids(input_ids: Tensor) -> None:
    """Raise ValueError for token ids that are not in the vocabulary."""
    least, most = int(input_ids.min()), int(input_ids.max())
    if least < 0 or most >= VOCABULARY:
        raise ValueError(
            f"input_ids run from {least} to {most}, the vocabulary from 0 to {VOCABULARY - 1}: "
            "use open_clip's SimpleTokenizer"
        )


def _check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError for a mask of another shape."""
    if mask is not None and tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} is {tuple(mask.shape)}, expected {tuple(shape)}")


def _normal(*shape: int, std: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * std)


def _unit(x: Tensor) -> Tensor:
    """Rows of unit length; in float32 at least, whatever the towers computed in."""
    return functional.normalize(x.float() if x.dtype.itemsize < 4 else x, dim=-1)


def _halved(present: Tensor) -> Tensor:
    """Whether one of each two neighbours is present: (B, 2n) → (B, n)."""
    return present.unflatten(1, (-1, 2)).any(dim=2)


def _visible(present: Tensor) -> Tensor:
    """(B, N) as keys that every query may see: (B, 1, 1, N); the first always."""
    first = torch.arange(present.shape[1], device=present.device) == 0
    return (present | first)[:, None, None]


def _waves(length: int, width: int, device: torch.device) -> Tensor:
    """Sinusoidal positions (length, width), as Whisper's: sines in the first half, then cosines."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=device) * (-math.log(10_000) / (half - 1)))
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
