"""Callbacks: watching the energies, and resuming to the bit."""

from __future__ import annotations

import random
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_pc.errors import refuse, require, shown
from lightning_pc.insight.report import StepReport
from lightning_pc.page import write_page
from lightning_pc.plots import plot_history
from lightning_pc.precisions import is_number
from lightning_pc.refusals import at_the_door
from lightning_pc.strategy import Learning

#: Pictures that it can save.
FORMATS = (".png", ".pdf", ".svg", ".html")


class EnergyMonitor(pl.Callback):
    """Logs what inference did in each batch, to whatever logger the Trainer has.

    ``pc/energy`` is the energy of all nodes at the last inference step, per loss term; it also
    stands in the progress bar. ``pc/gamma`` is the inference rate in use, ``pc/curvature`` the
    curvature by which ``gamma="auto"`` goes (gamma times it must stay below 2), ``pc/steps`` is T.

    Args:
        per_node: Log ``pc/energy/<node>`` as well.
        plot: A picture of each node's energy over training is saved there (.png, .pdf or .svg) when
            the fit ends, or fails; needs matplotlib (the ``plots`` extra). None for no picture. An
            .html is a page of all that is known of the run: energies, loss, gamma and curvature
            over training, the last batch, what learned, the warnings met, and `explain`'s words.
        most: Batches that ``history`` remembers.

    Attributes:
        history: ``(batch, {node: energy per loss term})`` of batches evenly spread over this fit,
            ``most`` at most; the energies are scalar tensors.

    Raises:
        MisconfigurationException: An argument or the strategy is wrong, or matplotlib missing.
    """

    def __init__(self, per_node: bool = False, plot: str | None = None, most: int = 1000) -> None:
        self.per_node, self.plot, self.most = per_node, plot, most
        told = f"EnergyMonitor(most={shown(most)}): expected a number of batches, >= 1."
        with at_the_door():
            refuse({told: not (is_number(most) and most >= 1)})
        self.history: list[tuple[int, dict[str, Tensor]]] = []
        self._course: dict[int, tuple[Tensor, float, float | None]] = {}
        self._report: StepReport | None = None

    @at_the_door()
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks the strategy."""
        if stage != "fit":
            return
        self.history.clear()
        self._course.clear()
        self._batches, self._every, self._report = 0, 1, None
        given, plot = self.plot is not None, f"EnergyMonitor(plot={shown(self.plot)})"
        require(Learning, trainer.strategy, "EnergyMonitor: expected a Trainer with a PCStrategy")
        refused = {
            f"{plot}: expected a file name that ends in one of {', '.join(FORMATS)}.": (
                given and not str(self.plot).endswith(FORMATS)
            ),
            f"{plot} needs matplotlib: pip install 'lightning_pc[plots]'.": (
                given and find_spec("matplotlib") is None
            ),
        }
        refuse(refused)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Logs the last step's report."""
        assert isinstance(trainer.strategy, Learning)
        report = trainer.strategy.report
        if report is None:
            return
        self._report = report
        last = report.energies[-1] / report.loss_terms
        each = dict(zip(report.nodes, last, strict=True))
        log = partial(pl_module.log, on_step=True, on_epoch=False, batch_size=1)
        log("pc/energy", last.sum(), prog_bar=True)
        log("pc/gamma", report.gamma)
        if report.curvature is not None:
            log("pc/curvature", report.curvature)
        log("pc/steps", float(report.steps))
        for name, energy in each.items() if self.per_node else ():
            log(f"pc/energy/{name}", energy)
        if self._batches % self._every == 0:
            self.history.append((self._batches, each))
            self._course[self._batches] = report.loss[0], report.gamma, report.curvature
        if len(self.history) > self.most:
            del self.history[1::2]
            self._course = {batch: self._course[batch] for batch, _ in self.history}
            self._every *= 2
        self._batches += 1

    def on_fit_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Saves the picture; where the fit failed, of how it came to that."""
        if self.plot is None or not self.history or not trainer.is_global_zero:
            return
        Path(self.plot).parent.mkdir(parents=True, exist_ok=True)
        if self.plot.endswith(".html"):
            self._write_page(trainer)
            return
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        plot_history(self.history, figure.subplots())
        figure.savefig(self.plot, dpi=150)

    def _write_page(self, trainer: pl.Trainer) -> None:
        assert isinstance(trainer.strategy, Learning)
        assert self.plot is not None
        if self._report is None:
            return
        course = {b: (float(loss), gamma, c) for b, (loss, gamma, c) in self._course.items()}
        told = trainer.strategy.told
        write_page(Path(self.plot), self._report, self.history, course, told)

    def on_exception(self, trainer: pl.Trainer, *args: Any) -> None:
        """Saves the picture."""
        self.on_fit_end(trainer)


class RandomState(pl.Callback):
    """Saves the random generators with every checkpoint, so that a resumed run is exact.

    Plain Lightning resumes with whatever state they happen to have. With this callback dropout
    masks and shuffles are those of the run that was never interrupted, from a checkpoint of the end
    of an epoch. In mid-epoch the order of what is left of it is the data loader's to keep, by a
    ``state_dict`` of its own. Of several processes each goes on with its own generators.
    """

    def __init__(self) -> None:
        self._pending: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """States of torch's, numpy's and Python's generators, in plain types, of each process."""
        if not _several():
            return self._own()
        each: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(each, self._own())
        return {"each": each}

    def _own(self) -> dict[str, Any]:
        name, keys, *rest = np.random.get_state(legacy=True)
        state = {
            "torch": torch.get_rng_state(),
            "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
            "python": random.getstate(),
        }
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the states until the fit starts."""
        self._pending = state_dict

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sets the generators, before the loaders draw; the sanity check does not touch them."""
        state, self._pending = self._pending, None
        if state is None:
            return
        each = state.get("each", [state])
        rank, count = (dist.get_rank(), dist.get_world_size()) if _several() else (0, 1)
        if len(each) != count:
            told = f"RandomState: the checkpoint is of {len(each)} processes, this run has {count}"
            rank_zero_warn(f"{told}. Generators stay as they are.")
            return
        state = each[rank]
        torch.set_rng_state(state["torch"].cpu())
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        random.setstate(state["python"])
        if "cuda" in state:
            torch.cuda.set_rng_state_all(state["cuda"])


def _several() -> bool:
    """Whether other processes train as well."""
    return dist.is_available() and dist.is_initialized()
