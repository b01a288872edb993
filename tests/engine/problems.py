"""The table of problems that test files share: a module, its batches, its loss, what is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_pc.precisions import Precisions
from tests.engine.modules import (
    CNN,
    LSTM,
    MLP,
    Attends,
    Cell,
    ConvNorm,
    Dropped,
    LongSkip,
    Masked,
    Residual,
    Skipping,
    Skips,
    SmoothResidual,
    Thrice,
    Tied,
    Towers,
    Transformer,
    UNet,
    run_layers,
)

# Batches of n samples ----------------------------------------------------------------------------


def vectors(n, classes=4):
    return torch.randn(n, 6), torch.randint(0, classes, (n,))


def images(n, size=8):
    return torch.randn(n, 1, size, size), torch.randint(0, 4, (n,))


def pixels(n):
    """Each pixel has a label."""
    return torch.randn(n, 1, 4, 4), torch.randint(0, 2, (n, 4, 4))


def sequences(n):
    """Each token's label is the one before it."""
    ids = torch.randint(0, 11, (n, 5))
    return ids, ids.roll(1, 1).flatten()


def labelled(n):
    """Each sequence of tokens has a label."""
    return torch.randint(0, 11, (n, 5)), torch.randint(0, 4, (n,))


def tokens(n):
    """Embedded tokens, of which some have no label."""
    y = torch.randint(0, 3, (n, 5))
    return torch.randn(n, 5, 4), y.masked_fill(torch.rand(n, 5) < 0.3, -100)


def double(value):
    return value.double() if value.is_floating_point() else value


def doubles(n, draw=vectors):
    """A batch in float64."""
    return tuple(map(double, draw(n)))


# Losses and what learns by them ------------------------------------------------------------------


def ce(model, x, y):
    return F.cross_entropy(model(x), y)


def mse(model, x, y):
    return F.mse_loss(model(x), F.one_hot(y, 4).to(x.dtype))


def classifier(model, x, y):
    return lambda: F.cross_entropy(model(x), y)


def regressor(model, x, y):
    """F is the sum of squares, its curvature in the output is 2."""
    return lambda: F.mse_loss(model(x), y)


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr)


@dataclass(frozen=True)
class ByDepth(Precisions):
    """``ratio ** (depth - 1)`` at every step, as a user writes weights that do not vary."""

    ratio: float
    name = "by depth"
    varies = False

    def weight(self, depth, t, steps):
        return self.ratio ** (depth - 1) if depth else 1.0


# The table ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A module, its batches, its loss, and for some what they are with values in place.

    Attributes:
        make: Makes the module.
        draw: A batch of so many samples, in float32.
        loss: Of the module and a batch.
        value_nodes: Where its nodes stand.
        run: What the module computes of an input, each node's value where ``at`` puts it. All that
            have one are classifiers.
        depths: The nodes' depths, in the order in which ``run`` meets them.
    """

    make: Callable[[], nn.Module]
    draw: Callable[[int], tuple[torch.Tensor, torch.Tensor]] = vectors
    loss: Callable[..., torch.Tensor] = ce
    value_nodes: Any = "auto"
    run: Callable[..., torch.Tensor] | None = None
    depths: tuple[int, ...] | None = None

    def doubles(self, n):
        """A batch in float64."""
        return doubles(n, self.draw)

    def explicit(self, model, at, x, y):
        """The sum of the loss's terms and their number, for the oracles."""
        loss = F.cross_entropy(self.run(model, x, at), y, reduction="sum")
        return loss, int((y >= 0).sum())


def written(make, draw=vectors, depths=None, run=None):
    """A problem whose module says itself what it computes with values in place."""
    return Problem(make, draw, run=run or (lambda model, x, at: model.run(x, at)), depths=depths)


PROBLEMS = {
    "one layer": Problem(lambda: nn.Linear(6, 4)),
    "mlp": written(lambda: MLP((6, 7, 5, 5, 4)), depths=(3, 2, 1), run=run_layers),
    "deep": written(lambda: MLP((6, *[6] * 5, 4)), depths=(5, 4, 3, 2, 1), run=run_layers),
    "squared error": Problem(lambda: MLP((6, 7, 5, 4), "relu"), loss=mse),
    "dropout": Problem(Dropped),
    "cnn": Problem(CNN, images),
    "conv": written(ConvNorm, partial(images, size=7)),
    "residual": written(Residual, depths=(4, 3, 3, 2, 2, 1)),
    "smooth residual": written(SmoothResidual),
    "skips": written(Skips, depths=(2, 1)),
    "skipping": Problem(Skipping),
    "long skip": written(LongSkip),
    "towers": written(Towers),
    "unet": Problem(UNet, pixels),
    "shared": Problem(Thrice),
    "tied": Problem(Tied, sequences),
    "cell": written(Cell),
    "lstm": Problem(LSTM, labelled, value_nodes=["embedding", "fc"]),
    "attention": written(Attends, tokens, depths=(2, 1)),  # F_KL
    "masked with -inf": written(Masked, tokens),
    "masked with -1e9": written(partial(Masked, -1e9), tokens),
    "transformer": Problem(Transformer, sequences),
    "transformer, prenorm": Problem(
        partial(Transformer, norm_first=True, activation="gelu"), sequences
    ),
    "transformer, no dropout": Problem(partial(Transformer, dropout=0.0), sequences),
}
