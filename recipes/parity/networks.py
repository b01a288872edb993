"""Small networks of many kinds, plain ``nn.Module``s."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.image_classification.model import ResidualBlock
from recipes.stability import depth


class Residual(nn.Module):
    """A pre-norm residual MLP of 3 blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
            for _ in range(3)
        )
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 10] of pixels [B, 64]."""
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        logits: Tensor = self.head(self.norm(h))
        return logits


class Recurrent(nn.Module):
    """A GRU cell in a loop, one step for each row of the input."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(inputs, 32), nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of sequences [B, S, inputs]."""
        h = x.new_zeros(len(x), 32)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        logits: Tensor = self.head(h)
        return logits


class _Block(nn.Module):
    """A pre-norm transformer block of 4 heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.n1, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out, self.n2 = nn.Linear(width, width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Of [B, S, width]."""
        b, s, width = x.shape
        q, k, v = self.qkv(self.n1(x)).view(b, s, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).reshape(b, s, width))
        blended: Tensor = x + self.mlp(self.n2(x))
        return blended


class GPT(nn.Module):
    """Three blocks, initialised as nanoGPT."""

    def __init__(self, letters: int, sequence: int, width: int) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(letters, width), nn.Embedding(sequence, width)
        self.blocks, self.norm = nn.ModuleList(_Block(width) for _ in range(3)), nn.LayerNorm(width)
        self.head = nn.Linear(width, letters, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, S, letters] of ids [B, S]."""
        h = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.head(self.norm(h))
        return logits


class LSTM(nn.Module):
    """Two LSTMs on end, module by module."""

    def __init__(self, letters: int, width: int) -> None:
        super().__init__()
        self.tok = nn.Embedding(letters, width)
        self.lstm1 = nn.LSTM(width, width, batch_first=True)
        self.lstm2 = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, letters)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, S, letters] of ids [B, S]."""
        states, _ = self.lstm1(self.tok(ids))
        states, _ = self.lstm2(states)
        logits: Tensor = self.head(states)
        return logits


class Translator(nn.Module):
    """A GRU reads, another writes, and looks at what was read by attention."""

    def __init__(self, letters: int, width: int) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(letters, width), nn.Embedding(letters + 1, width)
        self.reader = nn.GRU(width, width, batch_first=True)
        self.writer = nn.GRU(width, width, batch_first=True)
        self.blend, self.head = nn.Linear(2 * width, width), nn.Linear(width, letters)
        self.start = letters

    def forward(self, pair: Tensor) -> Tensor:
        """Logits [B, S, letters] of what is read and is to be written, ids [B, 2, S]."""
        read, written = pair[:, 0], pair[:, 1]
        begun = torch.full_like(written[:, :1], self.start)
        keys, last = self.reader(self.source(read))
        states, _ = self.writer(self.target(torch.cat([begun, written[:, :-1]], 1)), last)
        context = F.scaled_dot_product_attention(states, keys, keys)
        blended = torch.tanh(self.blend(torch.cat([states, context], -1)))
        logits: Tensor = self.head(blended)
        return logits


def convolutions() -> nn.Module:
    """Three strided convolutions of 28x28, each with BatchNorm."""
    layers: list[nn.Module] = []
    for above, below in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(above, below, 3, 2, 1), nn.BatchNorm2d(below), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4 * 4, 10))


def resnet8() -> nn.Module:
    """A ResNet of 8 layers for 32x32: a first convolution, three blocks of two, the head."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2), ResidualBlock(32, 64, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


def deep(tanh: bool) -> nn.Module:
    """A residual MLP of 32 blocks of 64 units, with a nonlinearity before the head or without."""
    net = depth.Residual(32, 64)
    if tanh:
        net.head = nn.Sequential(nn.Tanh(), net.head)  # type: ignore[assignment]
    return net


def tanh_mlp() -> nn.Module:
    """Three layers of tanh units for 28x28."""
    hidden = [layer for _ in range(2) for layer in (nn.Linear(128, 128), nn.Tanh())]
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.Tanh(), *hidden, nn.Linear(128, 10))
