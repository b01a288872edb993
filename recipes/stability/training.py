"""One job's training: backprop or predictive coding, until it is done or has diverged."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pc import optim
from lightning_pc.errors import DivergenceError
from lightning_pc.optim import PredictiveCoding
from lightning_pc.precisions import Spiking
from recipes.common.queue import Figures, Job
from recipes.stability.data import Images

#: The algorithms of the package that a study can have rows for, by name.
ALGORITHMS: dict[str, Any] = {
    name: getattr(optim, name.upper())
    for name in ("pc", "ipc", "epc", "iepc")
    if hasattr(optim, name.upper())
}
CLASSES = 10
#: The paper's descent at the automatic gamma, where PC and iPC take conjugate gradients.
PLAIN: Job = {"gamma": "auto", "momentum": 0}
#: Each stage learns when its error arrives.
SPIKING: Job = {"gamma": "auto", "precisions": "spiking"}


def variant(job: Job) -> str:
    """What is no default in a row beside its gamma, in a word; "" where all is."""
    own = job.get("momentum", job.get("precisions", ""))
    return "plain" if own == 0 else str(own)


def rate(job: Job) -> Any:
    """A row's gamma and `variant`: what its line is called."""
    return f"{job['gamma']}, {variant(job)}" if variant(job) else job["gamma"]


class Learner:
    """AdamW, alone for ``"bp"`` or inside of predictive coding.

    Args:
        net: What learns.
        job: Its ``algorithm``, ``gamma``, ``lr`` and ``weight_decay`` are used; and ``momentum``
            and ``precisions``, where it has them.
        options: Further arguments of the predictive coding optimizer.
    """

    def __init__(self, net: nn.Module, job: Job, **options: Any) -> None:
        adamw = torch.optim.AdamW(
            net.parameters(), job["lr"], weight_decay=job["weight_decay"], fused=True
        )
        self.optimizer: torch.optim.Optimizer = adamw
        if job["algorithm"] != "bp":
            algorithm = ALGORITHMS[job["algorithm"]]
            names = ("gamma", "momentum", "precisions")
            given = {name: job[name] for name in names if name in job}
            if given.get("precisions") == "spiking":  # the rest with which the rows were taken
                given["precisions"] = Spiking(0.001)
            # The paper's (D.3), with which the rows of fixed gammas were taken.
            decay = {} if job["gamma"] == "auto" else {"gamma_decay": 0.9}
            self.optimizer = algorithm(adamw, net, **given, **decay, **options)

    def step(self, loss: Callable[[], Tensor]) -> float:
        """Learns one batch.

        Raises:
            DivergenceError: The loss or an energy is not finite.
        """
        if isinstance(self.optimizer, PredictiveCoding):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # rates that are known to be unsuited
                first = self.optimizer.step(loss)
            assert first is not None
        else:
            self.optimizer.zero_grad()
            first = loss()
            torch.autograd.backward(first)
            self.optimizer.step()
        value = float(first.detach())
        if not isfinite(value):
            raise DivergenceError(f"The loss is {value}.")
        return value

    @property
    def gamma(self) -> float | None:
        """Inference rate at the end of the last batch; None for backprop."""
        report = getattr(self.optimizer, "report", None)
        return None if report is None else float(f"{report.gamma:.4g}")

    @property
    def left(self) -> float:
        """Share of F at the start of the last batch that was there at its end; 1 for backprop."""
        report = getattr(self.optimizer, "report", None)
        return 1.0 if report is None else float(report.free_energy[-1] / report.free_energy[0])

    @property
    def steps(self) -> int:
        """Evaluations of the last batch; 1 for backprop."""
        report = getattr(self.optimizer, "report", None)
        return 1 if report is None else int(report.steps)


def classify(net: nn.Module, images: Images, job: Job) -> Figures:
    """Trains a classifier and tests it after each epoch.

    Args:
        net: Images [B, *] to logits [B, C].
        images: What it learns and is tested on.
        job: Beside what `Learner` needs, its ``seed``, ``epochs`` and ``batch`` size are used; and
            ``loss`` ("squared" for the squared error) and ``T``, where it has them.

    Returns:
        ``accuracy`` at the end and ``best_accuracy`` of all epochs, in percent, ``loss``, the mean
        of the last epoch, or None where it ``diverged``, ``seconds``, ``cpu_seconds``
        (the measure on a busy machine), ``gamma_at_end`` and ``steps``, the mean evaluations a
        batch.
    """
    inputs, labels = images.train
    options = {"T": job["T"]} if "T" in job else {}
    learner, order = Learner(net, job, **options), torch.Generator().manual_seed(job["seed"])
    loss_of = _squared_error if job.get("loss") == "squared" else F.cross_entropy
    steps: list[int] = []
    accuracies: list[float] = []
    losses: list[float] = []
    start, diverged = (time.perf_counter(), time.process_time()), False
    try:
        for _ in range(job["epochs"]):
            losses.clear()
            for batch in torch.split(torch.randperm(len(inputs), generator=order), job["batch"]):
                x, y = inputs[batch], labels[batch]
                losses.append(learner.step(lambda x=x, y=y: loss_of(net(x), y)))  # type: ignore[misc]
                steps.append(learner.steps)
            accuracies.append(accuracy(net, *images.test))
    except DivergenceError:
        diverged = True
        accuracies.append(accuracy(net, *images.test))
    return {
        "accuracy": accuracies[-1],
        "best_accuracy": max(accuracies),
        "loss": None if diverged else round(sum(losses) / len(losses), 5),
        "seconds": round(time.perf_counter() - start[0], 2),
        "cpu_seconds": round(time.process_time() - start[1], 2),
        "gamma_at_end": learner.gamma,
        "steps": round(sum(steps) / max(1, len(steps)), 2),
        "diverged": diverged,
    }


def _squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(outputs, F.one_hot(labels, CLASSES).float())


def accuracy(net: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """In percent; chance where a logit is not finite."""
    with torch.no_grad():
        logits = net(inputs)
    if not logits.isfinite().all():
        return 100 / CLASSES
    return round(100 * float((logits.argmax(1) == labels).float().mean()), 2)
