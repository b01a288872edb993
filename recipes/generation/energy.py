"""The energy of generative networks against inference steps: the paper's Fig. 2 (left, centre), 7.

    python -m recipes.generation.energy --data_dir FOLDER

As in the paper: 100 images, all in one batch, L layers of 128, 256 or 512 units, the causes among
them, learning rate 0.00005, gamma 0.5. PC's weights move at every T-th inference step, iPC's at
each; values are kept from step to step. Our choice: tanh units, Adam, and a gamma that falls by a
tenth after a step at which the energy has not (the paper, D.3), since 0.5 is too large for the
widest layer. Energies are those of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from statistics import fmean
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from lightning_pc import infer
from lightning_pc.losses import squared_error
from lightning_pc.nn import Latent
from lightning_pc.optim import IPC, PC
from recipes.common.queue import Figures, Job, Row, Study, main
from recipes.generation.data import SETS, pictures

WIDTHS, LAYERS = (128, 256, 512), (4, 5)
#: Row -> the algorithm, and inference steps from one update of the weights to the next.
ROWS: dict[str, tuple[Any, int]] = {
    **{f"PC, T = {T}": (PC, T) for T in (8, 12, 16)},
    "iPC": (IPC, 1),
}
#: L and units: first the paper's Fig. 2, then the others of Fig. 7.
PANELS = [(4, 256), *(panel for panel in product(LAYERS, WIDTHS) if panel != (4, 256))]
SEEDS, STEPS = (0,), 2400
IMAGES, RATE, GAMMA = 100, 5e-5, 0.5
POINTS = 60  # of a curve


def jobs() -> list[Job]:
    """Panel by panel, the rows beside each other."""
    return [
        {"size": 0, "data": data, "layers": layers, "width": width, "row": row}
        | {"seed": seed, "steps": STEPS}
        for (layers, width), data, row, seed in product(PANELS, SETS, ROWS, SEEDS)
    ]


class Generator(nn.Module):
    """Causes, and layers that predict images from them: mu = W tanh(x) + b, of each layer.

    Args:
        layers: L, causes and images among them.
        width: Units of each layer, but for the images.
        pixels: Numbers of an image.
    """

    def __init__(self, layers: int, width: int, pixels: int) -> None:
        super().__init__()
        self.causes = Latent(width)
        widths = [*[width] * (layers - 1), pixels]
        made = [m for a, b in pairwise(widths) for m in (nn.Tanh(), nn.Linear(a, b))]
        self.net = nn.Sequential(*made)

    def forward(self, size: int) -> Tensor:
        """Images, [size, pixels]."""
        images: Tensor = self.net(self.causes(size))
        return images


def run(job: Job, data_dir: str | None = None) -> Figures:
    """Trains one network; ``energy`` at ``POINTS`` moments, and what is left of the images."""
    x = pictures(job["data"], IMAGES, data_dir)
    torch.manual_seed(job["seed"])
    net = Generator(job["layers"], job["width"], x.shape[1])
    algorithm, T = ROWS[job["row"]]
    how = {"T": T, "gamma": GAMMA, "gamma_decay": 0.9, "reset": "never"}
    optimizer = algorithm(torch.optim.Adam(net.parameters(), RATE), net, **how)
    energies: list[float] = []
    while len(energies) < job["steps"]:
        optimizer.step(lambda: squared_error(net(IMAGES), x))
        energies += (optimizer.report.free_energy / IMAGES).tolist()
    every = job["steps"] // POINTS
    found = infer(net, lambda: (squared_error(out := net(IMAGES), x), out))
    error = float((found.output - x).square().sum() / (x - x.mean(0)).square().sum())
    return {
        "energy": [round(e, 3) for e in energies[:: max(every, 1)][:POINTS]],
        "last": round(energies[job["steps"] - 1], 3),
        "error": round(error, 4),
        "gamma": round(float(optimizer.report.gamma), 4),
    }


def curve(rows: Sequence[Row], panel: tuple[Any, ...], row: str) -> list[float]:
    """Mean over seeds at each point, [] where there is no run."""
    wanted = (*panel, row)
    runs = [r for r in rows if (r["data"], r["layers"], r["width"], r["row"]) == wanted]
    points = zip(*(r["energy"] for r in runs), strict=True)
    return [*map(fmean, points), fmean(r["last"] for r in runs)] if runs else []


def needed(energies: Sequence[float], steps: int, target: float) -> str:
    """The inference steps after which F is at ``target`` or below."""
    reached = next((i for i, energy in enumerate(energies) if energy <= target), None)
    return "-" if reached is None else f"{reached * steps // (len(energies) - 1):,}"


def tables(rows: list[Row]) -> list[Table]:
    """Inference steps until F is what PC's best row ends at, and the last F."""
    head = "inference steps to the energy (last energy; error of what is reconstructed)"
    table = Table("data", "L", "width", "energy", *ROWS, title=head)
    for panel in product(SETS, LAYERS, WIDTHS):
        curves = {row: curve(rows, panel, row) for row in ROWS}
        of_pc = [values[-1] for row, values in curves.items() if values and row != "iPC"]
        if not of_pc:
            continue
        target, cells = min(of_pc), []
        for row, values in curves.items():
            wanted = (*panel, row)
            errors = [
                r["error"] for r in rows if (r["data"], r["layers"], r["width"], r["row"]) == wanted
            ]
            told = f"({values[-1]:.3g}; {fmean(errors):.2f})" if values else ""
            cells.append(f"{needed(values, rows[0]['steps'], target)} {told}" if values else "")
        table.add_row(panel[0], *map(str, panel[1:]), f"{target:.3g}", *cells)
    return [table]


def picture(rows: list[Row]) -> Figure:
    """F against inference steps, a panel for each network."""
    panels = [p for p in product(SETS, LAYERS, WIDTHS) if any(curve(rows, p, r) for r in ROWS)]
    columns = min(len(panels), 6)
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3 * columns, 2.8 * lines), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for row in ROWS:
            values = curve(rows, panel, row)
            steps = [i * rows[0]["steps"] / (len(values) - 1) for i in range(len(values))]
            axis.plot(steps, values, label=row)
        axis.set(yscale="log", title=f"{panel[0]}, L = {panel[1]}, {panel[2]} units")
        axis.title.set_fontsize(9)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    axes[0, 0].set(ylabel="energy of an image")
    axes[-1, 0].set(xlabel="inference steps")
    axes[0, -1].legend(fontsize=7)
    figure.tight_layout()
    return figure


STUDY = Study(
    "recipes.generation.energy",
    "the first 100 training images of CIFAR-10 and Tiny ImageNet",
    jobs,
    run,
    tables,
    picture,
)

if __name__ == "__main__":
    main(STUDY)
