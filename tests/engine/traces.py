"""Traces of small modules that learn, which every later engine must repeat.

`python -m tests.engine.traces` says how far today's engine is from `traces.json`, with `--write`
it makes that file anew. Modules and batches stand here, since a change to them is a change to all
traces. Batches and first weights come from numpy and are the same to the bit on any processor.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lightning_pc.optim import EPC, IEPC, IPC, PC, ZIL

FILE = Path(__file__).with_suffix(".json")
BATCHES, SAMPLES, TOKENS, VOCABULARY = 3, 5, 6, 9


class MLP(nn.Sequential):
    def __init__(self):
        layers = [nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4)]
        super().__init__(*layers)


class CNN(nn.Sequential):
    """BatchNorm, dropout, pooling, activations in place."""

    def __init__(self):
        super().__init__(
            *(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True)),
            *(nn.MaxPool2d(2), nn.Dropout(0.25), nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)),
            *(nn.LeakyReLU(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)),
        )


class Residual(nn.Module):
    """The loss reads every node."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 7), nn.Linear(7, 4)
        self.branches = nn.ModuleList(nn.Linear(7, 7) for _ in range(3))

    def forward(self, x):
        h = self.stem(x)
        for branch in self.branches:
            h = h + branch(torch.relu(h)) / 2
        return self.head(h)


class Block(nn.Module):
    """Causal attention, whose logits have F_KL, and a feed-forward part."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.first, self.second = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.first(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.second(x))))


class Transformer(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(Block(width, 2), Block(width, 2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.embedding(ids)))).flatten(0, 1)


def uniform(generator: np.random.Generator, *shape: int) -> torch.Tensor:
    """Numbers of mean 0 and variance 1; whole multiples of 2^-52 but for the factor."""
    return torch.from_numpy((2 * generator.random(shape) - 1) * math.sqrt(3))


def weigh(model: nn.Module, generator: np.random.Generator) -> None:
    """First weights by numpy, of the usual size; biases are not zero, norms not one."""
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = uniform(generator, *parameter.shape)
            size = 1 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.1
            parameter.copy_(drawn * size)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
                module.weight += 1
            elif isinstance(module, nn.Embedding):
                module.weight *= math.sqrt(module.embedding_dim)


def vectors(generator):
    return uniform(generator, SAMPLES, 6), torch.from_numpy(generator.integers(0, 4, SAMPLES))


def numbers(generator):
    return uniform(generator, SAMPLES, 6), uniform(generator, SAMPLES, 4)


def images(generator):
    x = uniform(generator, SAMPLES, 1, 8, 8)
    return x, torch.from_numpy(generator.integers(0, 4, SAMPLES))


def sequences(generator):
    ids = torch.from_numpy(generator.integers(0, VOCABULARY, (SAMPLES, TOKENS)))
    return ids, ids.roll(-1, 1).flatten()


MODULES = {  # name -> module, batches, loss
    "mlp": (MLP, vectors, F.cross_entropy),
    "cnn": (CNN, images, F.cross_entropy),
    "residual": (Residual, numbers, F.mse_loss),
    "transformer": (Transformer, sequences, F.cross_entropy),
}


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.05)


def adam(parameters):
    return torch.optim.Adam(parameters, 0.01)


@dataclass
class Setup:
    """One module under one algorithm."""

    module: str
    algorithm: type
    arguments: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[..., torch.optim.Optimizer] = sgd

    @property
    def draws(self) -> bool:
        """Whether its forward draws from torch's generator."""
        return self.module == "cnn"

    @property
    def told(self) -> int | None:
        """How many evaluations are compared: of Z-IL, whose stages count once, the first."""
        return 1 if self.algorithm is ZIL else None

    @property
    def automatic(self) -> bool:
        """Whether gamma comes from a look at the curvature."""
        return not self.arguments and self.algorithm is not ZIL


GIVEN = {"T": 6, "gamma": 0.2, "gamma_decay": 1.0, "momentum": 0.0}
SETUPS = {
    **{
        f"{module} {algorithm.algorithm}": Setup(module, algorithm, GIVEN)
        for module, algorithm in itertools.product(MODULES, (IPC, PC, EPC, IEPC))
    },
    **{f"{module} zil": Setup(module, ZIL) for module in ("mlp", "cnn")},
    **{
        f"{module} pc momentum": Setup(module, PC, GIVEN | {"momentum": 0.5})
        for module in ("mlp", "transformer")
    },
    **{
        f"{module} {algorithm.algorithm} auto": Setup(module, algorithm)
        for module, algorithm in itertools.product(MODULES, (IPC, PC))
    },
    "mlp ipc adam": Setup("mlp", IPC, GIVEN, adam),
}


def probe() -> str:
    """Which entries dropout keeps: builds of torch draw differently from the same seed."""
    torch.manual_seed(0)
    kept = F.dropout(torch.ones(SAMPLES, 3, 3, 3, dtype=torch.float64), 0.25) != 0
    return "".join(map(str, kept.flatten().int().tolist()))


def told(name: str, tensor: torch.Tensor) -> dict[str, float]:
    """Size and direction of a tensor: its norm, and its product with a vector of its name's."""
    entries = tensor.detach().flatten().double().numpy()
    along = 2 * np.random.default_rng(zlib.crc32(name.encode())).random(entries.size) - 1
    return {"norm": float(np.sqrt(np.sum(entries**2))), "along": float(np.sum(entries * along))}


def trace(setup: Setup) -> dict[str, Any]:
    """Three batches: loss and energy at each t, gamma, and the module's state behind them."""
    make, draw, loss = MODULES[setup.module]
    generator = np.random.default_rng(0)
    model = make().double().train()
    weigh(model, generator)
    optimizer = setup.algorithm(setup.optimizer(model.parameters()), model, **setup.arguments)
    torch.manual_seed(0)
    batches = []
    for _ in range(BATCHES):
        x, y = draw(generator)
        value = optimizer.step(lambda x=x, y=y: loss(model(x), y))
        report = optimizer.report
        assert value == report.loss[0]
        batches.append(
            {
                "gamma": report.gamma,
                "loss": report.loss.tolist()[: setup.told],
                "energy": report.energy.sum(1).tolist()[: setup.told],
            }
        )
    state = {name: v for name, v in model.state_dict().items() if v.is_floating_point()}
    return {"batches": batches, "state": {name: told(name, v) for name, v in state.items()}}


def deviations(now: dict[str, Any], then: dict[str, Any]) -> dict[str, float]:
    """How far a trace is from another, in its order: what -> the largest relative difference.

    Of energies relative to the batch's largest, of a product to what it could be at most.
    """
    found = {}
    for number, (own, other) in enumerate(zip(now["batches"], then["batches"], strict=True), 1):
        for what in ("gamma", "loss", "energy"):
            a, b = (np.atleast_1d(np.array(each[what])) for each in (own, other))
            if a.shape != b.shape:
                found[f"{what} of batch {number}"] = math.inf
                continue
            size = max(np.abs(b).max(), 1e-300) if what == "energy" else np.abs(b)
            found[f"{what} of batch {number}"] = float((np.abs(a - b) / size).max())
    assert now["state"].keys() == then["state"].keys()
    for name, own in now["state"].items():
        other = then["state"][name]
        for what in ("norm", "along"):
            found[f"{what} of {name}"] = abs(own[what] - other[what]) / other["norm"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="make the stored traces anew")
    write = parser.parse_args().write
    traces = {name: trace(setup) for name, setup in SETUPS.items()}
    if write:
        FILE.write_text(json.dumps({"probe": probe(), "traces": traces}, indent=0) + "\n")
        return
    stored = json.loads(FILE.read_text())["traces"]
    for name, found in traces.items():
        far = deviations(found, stored[name])
        most = max(far, key=far.get)
        print(f"{name}: {far[most]:.1e} ({most})")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
