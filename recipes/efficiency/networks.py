"""Networks whose cost is measured beside those of the benchmark."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn


def deep() -> nn.Module:
    """Sixteen tanh layers of width 256."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise([784, *[256] * 16]):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


class Transformer(nn.Module):
    """Blocks of four heads and a linear head, which classifies the mean over tokens."""

    def __init__(self, depth: int = 12, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, 10] of tokens [B, S, width]."""
        for layer in self.layers:
            tokens = layer(tokens)
        logits: Tensor = self.head(tokens.mean(1))
        return logits


def tiny_bert(seed: int = 0) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A BERT of two layers of width 64, and its forward to the loss of 8 sequences of 16 tokens."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = BertForSequenceClassification(config).train()
    tokens, labels = torch.randint(0, config.vocab_size, (8, 16)), torch.randint(0, 2, (8,))
    return model, lambda: model(input_ids=tokens, labels=labels).loss
