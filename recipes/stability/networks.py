"""Twelve architectures, tiny and as their libraries make them, each with one random batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

Loss = Callable[[], Tensor]
VOCABULARY, SAMPLES, LENGTH, CLASSES = 50, 8, 8, 3

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
_T5: dict[str, Any] = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}


class Encoder(nn.Module):
    """torch's TransformerEncoder behind an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, [B, C], of token ids, [B, S]."""
        logits: Tensor = self.head(self.encoder(self.embedding(ids)).mean(1))
        return logits


class LSTM(nn.Module):
    """The last state through a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, [B, C], of token ids, [B, S]."""
        states, _ = self.lstm(self.embedding(ids))
        logits: Tensor = self.head(torch.relu(self.fc(states[:, -1])))
        return logits


class UNet(nn.Module):
    """Skips from the way down to the way up; a class for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.middle = nn.Conv2d(6, 6, 3, padding=1)
        self.up2, self.up1 = nn.Conv2d(12, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.head, self.act = nn.Conv2d(4, CLASSES, 1), nn.SiLU()

    def forward(self, images: Tensor) -> Tensor:
        """Logits, [B, C, H, W], of images, [B, 3, H, W]."""
        one = self.act(self.down1(images))
        two = self.act(self.down2(F.max_pool2d(one, 2)))
        x = self.act(self.middle(two))
        x = F.interpolate(self.act(self.up2(torch.cat([x, two], 1))), scale_factor=2)
        logits: Tensor = self.head(self.act(self.up1(torch.cat([x, one], 1))))
        return logits


def _transformers(name: str, head: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net: nn.Module = getattr(hf, f"{name}{head}")(getattr(hf, f"{name}Config")(**options))
        return net

    return make


def _classifier(name: str, **options: Any) -> Callable[[], nn.Module]:
    return _transformers(name, "ForSequenceClassification", num_labels=CLASSES, **_TEXT, **options)


def _image_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return _transformers(name, "ForImageClassification", num_labels=CLASSES, **options)


#: Name -> how it is made, what its batch holds, and where value nodes stand.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, Any]] = {
    "BERT": (_classifier("Bert", **_SMALL), "classify", "auto"),
    "DistilBERT": (
        _classifier("DistilBert", dim=16, n_layers=2, n_heads=2, hidden_dim=24),
        *("classify", "auto"),
    ),
    "GPT-2": (
        _transformers(
            "GPT2", "LMHeadModel", n_embd=16, n_layer=2, n_head=2, n_positions=LENGTH, **_TEXT
        ),
        *("language", "auto"),
    ),
    "Llama": (
        _transformers("Llama", "ForCausalLM", num_key_value_heads=1, **_SMALL, **_TEXT),
        *("language", "auto"),
    ),
    "T5": (
        _transformers("T5", "ForConditionalGeneration", **_T5, **_TEXT),
        *("language", "auto"),
    ),
    "ViT": (_image_model("ViT", image_size=32, patch_size=8, **_SMALL), "images", "auto"),
    "ResNet": (
        _image_model(
            "ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"
        ),
        *("images", "auto"),
    ),
    "ConvNeXt": (
        _image_model("ConvNext", num_stages=2, hidden_sizes=[8, 16], depths=[1, 2], patch_size=4),
        *("images", "auto"),
    ),
    "MobileNetV2": (
        _image_model("MobileNetV2", image_size=32, depth_multiplier=0.1, min_depth=4),
        *("images", "auto"),
    ),
    "TransformerEncoder": (Encoder, "tokens", "auto"),
    "LSTM": (LSTM, "tokens", ["lstm", "auto"]),
    "UNet": (UNet, "pixels", "auto"),
}


def problem(name: str, seed: int) -> tuple[nn.Module, Loss]:
    """A network in training mode and its loss on a random batch, both drawn with ``seed``."""
    torch.manual_seed(seed)
    make, kind, _ = NETWORKS[name]
    net = make().train()
    ids = torch.randint(3, VOCABULARY, (SAMPLES, LENGTH))
    labels = torch.randint(CLASSES, (SAMPLES,))
    images = torch.randn(SAMPLES, 3, 32, 32)
    if kind in ("tokens", "pixels"):
        x = ids if kind == "tokens" else images[..., :8, :8]
        y = labels if kind == "tokens" else torch.randint(CLASSES, (SAMPLES, 8, 8))
        return net, lambda: F.cross_entropy(net(x), y)
    batch = {
        "classify": {"input_ids": ids, "labels": labels},
        "language": {"input_ids": ids, "labels": ids},
        "images": {"pixel_values": images, "labels": labels},
    }[kind]
    return net, lambda: net(**batch).loss
