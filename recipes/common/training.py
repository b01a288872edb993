"""Trains what a YAML says, through LightningCLI, and keeps what tables and plots need."""

from __future__ import annotations

import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import Tensor

from lightning_pc import PCStrategy, RandomState, StepReport
from lightning_pc.errors import DivergenceError

#: What of a `Run` a checkpoint keeps.
KEPT = ("val_accuracy", "energy", "seconds", "cpu_seconds")


@dataclass
class Run:
    """One training run.

    Attributes:
        config: The YAML.
        seed: Decides initial weights and batch order.
        epochs: Number of epochs, at most.
        val_accuracy: After each epoch, in percent.
        test_accuracy: Of the final weights, in percent; of the best ones on the validation images
            if the YAML has a ``ModelCheckpoint`` that monitors something.
        last_test_accuracy: Of the final weights, in percent, where a run can be resumed.
        diverged: Whether training ended in a divergence, after best weights had been found.
        energy: Of all value nodes at the last inference step of a batch, per sample, the mean of
            each epoch; empty for backprop.
        first_report: What the last batch of the first epoch did; None for backprop.
        seconds: Wall clock of all epochs, validation included.
        cpu_seconds: Processor time of all epochs, of all threads.
    """

    config: Path
    seed: int
    epochs: int = 0
    val_accuracy: list[float] = field(default_factory=list)
    test_accuracy: float = 0.0
    last_test_accuracy: float = 0.0
    diverged: bool = False
    energy: list[float] = field(default_factory=list)
    first_report: StepReport | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def train(
    config: Path,
    seed: int,
    overrides: Sequence[str] = (),
    on_batch: Callable[[Run, float], None] = lambda run, share: None,
    keep: Path | None = None,
    callbacks: Sequence[L.Callback] = (),
    resume: Path | None = None,
) -> Run:
    """Fits and tests what a YAML says.

    Args:
        config: The YAML, as for ``python -m lightning_pc fit -c``.
        seed: Takes the place of the YAML's ``seed_everything``.
        overrides: Further arguments of LightningCLI, like ``--trainer.max_epochs=1``.
        on_batch: Called after each batch with the run so far and the share of it that is done.
        keep: Where to leave the checkpoint of the best weights, if there is one.
        callbacks: Beside the YAML's.
        resume: Folder of checkpoints, one an epoch: a run that was stopped goes on from its last
            one, with the same numbers as if it had not been stopped. A run to fewer epochs than
            that begins anew. None keeps nothing.

    Returns:
        What came out.

    Raises:
        DivergenceError: Training diverged, and there is no checkpoint of best weights to test.
    """
    run = Run(config, seed)
    silent = ("logger", "enable_progress_bar", "enable_model_summary")
    with hushed(), TemporaryDirectory() as folder:
        cli = LightningCLI(
            args=[f"--config={config}", f"--seed_everything={seed}", *overrides],
            run=False,
            save_config_callback=None,
            trainer_defaults=dict.fromkeys(silent, False)
            | {"callbacks": [record := _Record(run, on_batch), *callbacks]},
        )
        best = _best_weights(cli.trainer, folder if resume is None else str(resume))
        last = _last_weights(cli.trainer, resume) if resume else None
        if last and torch.load(last, weights_only=True)["epoch"] >= cli.trainer.max_epochs:
            last = None
        try:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=last)
        except DivergenceError:
            if best is None or not best.best_model_path:
                raise
            run.diverged = True
        record.restore()  # of a run that had ended before
        path = best.best_model_path if best else None
        if resume:
            run.last_test_accuracy = _tested(cli, None)
        run.test_accuracy = _tested(cli, path)
        if path and keep is not None:
            keep.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, keep)
    return run


def _tested(cli: LightningCLI, path: str | None) -> float:
    """Test accuracy in percent, of the weights of now or of a checkpoint."""
    found = cli.trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path=path, verbose=False)
    return 100 * found[0]["test_accuracy"]


def _best_weights(trainer: L.Trainer, folder: str) -> ModelCheckpoint | None:
    """The checkpoint callback that monitors something; those that only save go."""
    saving = trainer.checkpoint_callbacks
    best = next((c for c in saving if isinstance(c, ModelCheckpoint) and c.monitor), None)
    trainer.callbacks = [c for c in trainer.callbacks if c not in saving or c is best]
    if best is not None:
        best.dirpath = folder
    return best


def _last_weights(trainer: L.Trainer, folder: Path) -> str | None:
    """Saves each epoch to a folder; the checkpoint that is there already."""
    last = folder / "last.ckpt"
    saves = ModelCheckpoint(
        folder, last.stem, save_on_train_epoch_end=True, enable_version_counter=False
    )
    trainer.callbacks = [RandomState(), *trainer.callbacks, saves]
    return str(last) if last.exists() else None


class _Record(L.Callback):
    """Fills in a `Run`."""

    def __init__(self, run: Run, on_batch: Callable[[Run, float], None]) -> None:
        self.run, self.on_batch = run, on_batch
        self._energies: list[Tensor] = []
        self._begun, self._before = (0.0, 0.0), dict[str, Any]()

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.restore()
        self.run.epochs = trainer.max_epochs or 0
        self._begun = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        report = _report(trainer)
        if report is not None:
            self._energies.append(report.energies[-1].sum() / report.loss_terms)
        batches = self.run.epochs * trainer.num_training_batches
        self.on_batch(self.run, trainer.global_step / batches)

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.run.val_accuracy.append(100 * float(trainer.callback_metrics["val_accuracy"]))
        if self._energies:
            self.run.energy.append(float(torch.stack(self._energies).mean()))
            self._energies.clear()
        self.run.first_report = self.run.first_report or _report(trainer)
        wall, processor = self._begun
        self._begun = time.perf_counter(), time.process_time()
        self.run.seconds += self._begun[0] - wall
        self.run.cpu_seconds += self._begun[1] - processor

    def restore(self) -> None:
        """What the run had come to when it was stopped; nothing that came since is lost."""
        for name, value in self._before.items():
            setattr(self.run, name, value)
        self._before = {}

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self.run, name) for name in KEPT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict  # for a fit: a test of best weights leaves the run alone


def _report(trainer: L.Trainer) -> StepReport | None:
    return trainer.strategy.report if isinstance(trainer.strategy, PCStrategy) else None


@contextmanager
def hushed() -> Iterator[None]:
    """Without Lightning's remarks on hardware, loggers and workers: a table needs none of them."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in (".*does not have many workers", ".*args parameter is intended"):
                warnings.filterwarnings("ignore", message=message)
            warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
