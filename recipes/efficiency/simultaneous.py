"""Training loss and test error against simultaneous matrix multiplications: Fig. 2 (right) and 8.

    python -m recipes.efficiency.simultaneous --data_dir FOLDER

As in the paper: 250 images, all in one batch, 64 units in each of L - 1 hidden layers, learning
rate 0.0001, gamma 0.5. iPC's values are kept from update to update. Simultaneous matrix
multiplications (SMMs) of an update are those that `describe` counts in a row. Our choice: tanh
units, the squared error of one-hot labels, Adam.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from lightning_pc import describe
from lightning_pc.optim import IPC, PC, ZIL
from recipes.common.queue import Figures, Job, Row, Study, main
from recipes.stability.data import Images, fashion_mnist, mnist

DATA = {"mnist": mnist, "fashion_mnist": fashion_mnist}
LAYERS = (3, 4, 6)
#: Row -> the algorithm, what it is given.
ROWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "BP": (None, {}),
    "Z-IL": (ZIL, {}),
    **{f"PC, T = {T}": (PC, {"T": T, "gamma": 0.5}) for T in (8, 12, 16)},
    "iPC": (IPC, {"T": 1, "gamma": 0.5, "reset": "never"}),
}
SIZES: tuple[dict[str, Any], ...] = ({"seeds": (0, 1, 2), "images": 250, "smms": 8000},)
POINTS = 80  # of a curve
RATE = 1e-4


def jobs() -> list[Job]:
    """Panel by panel, the rows beside each other."""
    return [
        {"size": size, "data": data, "layers": layers, "row": row, "seed": seed}
        | {name: settings[name] for name in ("images", "smms")}
        for size, settings in enumerate(SIZES)
        for data, layers, row in product(DATA, LAYERS, ROWS)
        for seed in settings["seeds"]
    ]


def network(layers: int) -> nn.Module:
    """Linear layers with tanh between them."""
    widths = [784, *[64] * (layers - 1), 10]
    made = [module for a, b in pairwise(widths) for module in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(nn.Flatten(), *made[:-1])


def run(job: Job, data_dir: str | None = None) -> Figures:
    """Trains one network; ``loss`` and ``error`` (of the test images, %) at ``POINTS`` moments."""
    folder = None if data_dir is None else str(Path(data_dir, job["data"]))
    images: Images = DATA[job["data"]](folder, job["images"], 2000)
    (x, labels), (x_test, y_test) = images
    y = F.one_hot(labels, 10).float()
    torch.manual_seed(job["seed"])
    net = network(job["layers"])
    algorithm, given = ROWS[job["row"]]

    def loss() -> Tensor:
        return 0.5 * F.mse_loss(net(x), y, reduction="sum") / len(x)

    smms = per_update(net, loss, job["row"])
    optimizer: Any = torch.optim.Adam(net.parameters(), RATE)
    if algorithm:
        given = {**given, "loss_terms": len(x)}
        optimizer = algorithm(optimizer, net, **given)
    losses: list[float] = []
    errors: list[float] = []
    updates = 0
    for point in range(POINTS + 1):
        while updates * smms < point * job["smms"] / POINTS:
            updates += 1
            if algorithm:
                optimizer.step(loss)
            else:
                optimizer.zero_grad()
                loss().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        with torch.no_grad():
            losses.append(round(float(loss()), 6))
            wrong = net(x_test).argmax(1) != y_test
            errors.append(round(100 * float(wrong.float().mean()), 2))
    return {"smms_per_update": smms, "updates": updates, "loss": losses, "error": errors}


def per_update(net: nn.Module, loss: Any, row: str) -> int:
    """SMMs of one update of all weights."""
    algorithm, given = ROWS[row]
    name = algorithm.algorithm if algorithm else "ipc"
    found = describe(net, loss, print_table=False, algorithm=name, loss_terms=1, **given)
    return (found.update if algorithm else found.backprop).in_a_row


def curve(rows: Sequence[Row], data: str, layers: int, row: str, what: str) -> list[float]:
    """Mean over seeds at each point, [] where there is no run."""
    wanted = (data, layers, row)
    runs = [r[what] for r in rows if (r["data"], r["layers"], r["row"]) == wanted]
    return [fmean(values) for values in zip(*runs, strict=True)]


def needed(losses: Sequence[float], smms: float, target: float) -> float | None:
    """The SMMs after which the loss is at ``target`` or below; None if it never is."""
    reached = next((i for i, loss in enumerate(losses) if loss <= target), None)
    return None if reached is None else reached * smms / (len(losses) - 1)


def tables(rows: list[Row]) -> list[Table]:
    """SMMs until the loss is backprop's at half of all SMMs; the last loss and error."""
    table = Table("data", "L", "loss", *ROWS, title="SMMs to the loss (last loss, last error %)")
    budget = rows[0]["smms"]
    for data, layers in product(DATA, LAYERS):
        base = curve(rows, data, layers, "BP", "loss")
        if not base:
            continue
        target, cells = base[len(base) // 2], []
        for row in ROWS:
            losses, errors = (curve(rows, data, layers, row, w) for w in ("loss", "error"))
            if not losses:
                cells.append("")
                continue
            found = needed(losses, budget, target)
            told = "-" if found is None else f"{found:,.0f}"
            cells.append(f"{told} ({losses[-1]:.3g}, {errors[-1]:.1f})")
        table.add_row(data, str(layers), f"{target:.3g}", *cells)
    return [table]


def picture(rows: list[Row]) -> Figure:
    """Loss above, test error below, a panel for each data set and depth."""
    panels = list(product(DATA, LAYERS))
    figure, axes = plt.subplots(2, len(panels), figsize=(3 * len(panels), 5.4), squeeze=False)
    for column, (data, layers) in enumerate(panels):
        for line, what in enumerate(("loss", "error")):
            for row in ROWS:
                values = curve(rows, data, layers, row, what)
                smms = [i * rows[0]["smms"] / POINTS for i in range(len(values))]
                axes[line, column].plot(smms, values, label=row)
        axes[0, column].set(yscale="log", title=f"{data}, L = {layers}")
        axes[1, column].set(xlabel="SMMs")
    axes[0, 0].set(ylabel="training loss")
    axes[1, 0].set(ylabel="test error, %")
    axes[0, -1].legend(fontsize=7)
    figure.tight_layout()
    return figure


STUDY = Study(
    "recipes.efficiency.simultaneous",
    "the first 250 images of MNIST and FashionMNIST, and 2,000 test images",
    jobs,
    run,
    tables,
    picture,
)

if __name__ == "__main__":
    main(STUDY)
