"""What inference did, in sentences: which value node, since when, and what to change.

Axis legend: t evaluations, n nodes in call order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_pc.errors import DivergenceError, require
from lightning_pc.inference.curvature import ROOM
from lightning_pc.inference.movers import Mover
from lightning_pc.inference.relax import Inference
from lightning_pc.inference.schedules import SCHEDULES
from lightning_pc.insight.report import StepReport
from lightning_pc.insight.trend import MANY
from lightning_pc.nodes.node import Node
from lightning_pc.stages.batch import Batch

#: What is wrong with the training loss: verdicts.
NOISE, RATE, GUESS = "weights explain noise", "lower the learning rate", "no better than a guess"


def divergence(inference: Inference) -> DivergenceError:
    """Names the first loss or energy that was not finite, and why."""
    trace, mover, start = inference.trace, inference.mover, inference.age or 0
    names = [node.name for node in inference.evaluator.batch.nodes]
    automatic, algorithm = inference.auto is not None, inference.schedule.name
    losses, energies = torch.stack(trace.losses).cpu(), torch.stack(trace.energies).cpu()
    free, pulls = torch.stack(trace.free).cpu(), torch.tensor(trace.pulls)
    t = int(free.isfinite().cumprod(0).sum())
    parts = torch.cat([energies[t], losses[t : t + 1]])
    own = energies.sum(1) + inference.terms * pulls.to(losses.dtype) * losses
    if own[t].isfinite():
        told = f"At inference step t = {start + t} F is not finite on another process"
        return DivergenceError(f"{told}. No weight has moved on it. Its error says why.")
    place = int(parts.nan_to_num(math.inf, math.inf, math.inf).argmax())
    why = "Lower gamma, or the learning rate."
    if not t + start:
        why = (
            "Inference has not begun, so the batch or the weights are at fault. Steps before may "
            "have ruined the weights: begin anew with a lower learning rate."
        )
    elif t > 1 and free[t - 1] > free[t - 2]:
        grew = _growth(names, losses[:t], energies[:t], own[:t])
        why = f"F rose before: {grew}. {_cure(algorithm, automatic, mover, mover.start_gamma)}"
    return DivergenceError(
        f"At inference step t = {start + t} {_place(names, place)} is not finite (loss "
        f"{float(losses[t]):g}). No weight has moved on it. {why}"
    )


def out_of_memory(error: BaseException, batch: Batch) -> RuntimeError | None:
    """The same error with the sizes of the values in hand, None where it is about another matter.

    What searches for a batch size goes by the device's own words, so they come first.
    """
    device = isinstance(error, torch.OutOfMemoryError)
    if not isinstance(error, RuntimeError) or not (device or "t allocate memory" in str(error)):
        return None
    bytes_of = {node: node.x.numel() * node.x.element_size() for node in batch.nodes}
    largest = max(bytes_of, key=bytes_of.__getitem__)
    total, most = (f"{b / 2**20:.3g} MiB" for b in (sum(bytes_of.values()), bytes_of[largest]))
    kind = torch.OutOfMemoryError if device else RuntimeError
    return kind(
        f"{error}\nThis was in inference. The values of the batch's {len(bytes_of)} nodes take "
        f"{total}, each about three times: itself, its prediction, its gradient. The largest is "
        f"'{largest.name}' {[*largest.x.shape]}, {most}. Take smaller batches, or fewer nodes, such"
        " as value_nodes='blocks'."
    )


def rises(
    report: StepReport, mover: Mover, seen: tuple[float, Node] | None, automatic: bool, since: int
) -> str:
    """Says that F rises within each batch from ``since`` to ``report``'s, where, and what to do.

    ``seen`` is the largest curvature of F in the values at the start of the last, and its node.
    """
    first, last = report.free_energy[[0, -1]].tolist()
    told, stable = "", math.inf
    if seen is not None and 0 < seen[0] < math.inf and (automatic or not mover.remedy):
        product = _product(mover.start_gamma, seen[0], mover.momentum)
        told = f"The curvature is largest at value node '{seen[1].name}': {product} "
        stable = 1.4 * (1.0 + mover.momentum) / seen[0]  # a look mostly sees 0.7 of it or more
    return (
        f"Since batch {since} F rises within each batch (in this one from {first:.3g} to "
        f"{last:.3g}): {_growth(report.nodes, report.loss, report.energy, report.free_energy)}. "
        f"{told}{_cure(report.algorithm, automatic, mover, stable)}"
    )


def _cure(algorithm: str, automatic: bool, mover: Mover | None, stable: float) -> str:
    """What to change where F rises; a given gamma of ``stable`` or more is to blame."""
    incremental = SCHEDULES[algorithm].incremental
    cure = ""
    if mover is not None and mover.remedy:
        cure = "" if incremental and automatic else mover.remedy
    elif mover is not None and not automatic and (mover.start_gamma >= stable or not incremental):
        cure = f"Use gamma='auto', or gamma < {min(mover.start_gamma, stable):.2g}."
    if not incremental or (cure and mover and stable < mover.start_gamma):
        return cure or "The weights have changed since gamma was chosen: lower the learning rate."
    given = algorithm == "ipc" and not (automatic or cure)
    cure += " Lower the learning rate, scale down what the modules before it read, use a smaller T"
    cure += ", leave gamma, momentum and inference at their defaults" if given else ""
    chain = ", or take precisions='spiking' where the nodes form a chain"
    return f"{cure}{chain if algorithm == 'ipc' else ''}.".lstrip()


def _product(gamma: float, curvature: float, momentum: float) -> str:
    told = f"gamma {gamma:.3g} times the curvature {curvature:.3g} is {gamma * curvature:.2g}"
    return f"{told}; the limit is {2 * (1 + momentum):g}."


def _growth(names: Sequence[str], losses: Tensor, energies: Tensor, free: Tensor) -> str:
    """What rose most where F, ``free``, did: the loss or an energy; [t], [t, n] and [t]."""
    t = int(free.diff().argmax())
    parts = torch.column_stack([energies, free - energies.sum(1)])  # the loss's last
    place = int((parts[t + 1] - parts[t]).argmax())
    shown = torch.column_stack([energies, losses.detach().cpu()])
    before, after = shown[t : t + 2, place].tolist()
    between = f"between evaluations {t + 1} and {t + 2}"
    return f"{_place(names, place)} went from {before:.3g} to {after:.3g} {between}"


def _place(names: Sequence[str], place: int) -> str:
    return f"the energy at value node '{names[place]}'" if place < len(names) else "the loss"


def unseen(failures: int, gamma: float) -> str:
    """Says that the automatic gamma's last looks at the curvature failed, "" below three."""
    told = (
        f"gamma='auto' could not tell the curvature of F, the last {failures} times it looked: the "
        f"loss or an energy is not finite close to the values. gamma stays at {gamma:.3g}; give a "
        "number if that does not learn."
    )
    return told if failures >= 3 else ""


def choice(report: StepReport) -> str:
    """What ``auto`` took, in a line; "" of another algorithm."""
    nodes = "value node" if len(report.nodes) == 1 else "value nodes"
    told = (
        f"auto takes ePC with T = {report.steps}, gamma = {report.gamma:.2g} and "
        f"beta = {abs(report.pulls[0]):.2g} of changing sign, at {len(report.nodes)} {nodes}."
    )
    return told if report.algorithm == "auto" else ""


def unlearns(report: StepReport) -> str:
    """Says that the training loss rises or stays too high, and what to do; "" where it does not."""
    fault = _fault(report)
    if not fault:
        return ""
    noise = (
        "Where targets hold noise, weights grow to explain it: use auto, which is PCStrategy() or "
        "PredictiveCoding(optimizer, model)."
    )
    cures = {
        NOISE: f"{noise} If the loss rises there as well, lower the learning rate.",
        RATE: "Lower the learning rate, unless the task has become harder.",
        GUESS: f"{noise + ' Else t' if _explains(report) else 'T'}ry another learning rate.",
    }
    return f"{report.trend} {cures[fault]}"


def _fault(report: StepReport) -> str:
    """What is wrong with the training loss, "" for nothing."""
    if report.trend.risen:
        return NOISE if _explains(report) else RATE
    return GUESS if report.trend.stuck else ""


def _health(report: StepReport) -> str:
    """The verdict where nothing is wrong within the batch."""
    if report.trend.flat:
        return "the loss has not fallen"
    return "healthy" if report.trend.batches >= MANY else "healthy so far"


def _explains(report: StepReport) -> bool:
    """Whether weights can gain by explaining noise: the loss weighs much, and inference infers."""
    explains = report.algorithm != "zil" and not report.sampled
    return explains and abs(report.pulls[0]) > ROOM


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(map(repr, names[:5]))} ({len(names)} in all)"


def silenced(report: StepReport, nodes: Sequence[Node], gamma: float) -> str:
    """Says at which of the ``nodes`` errors faded out in the first batch, "" where none did."""
    end = report.steps
    peaks = {name: e for name, e in report.peak_energy.items() if name not in report.free}
    nodes = [node for node in nodes if node.name in peaks]
    if not any(peaks.values()):
        if report.free or end < 2 or not float(report.loss[0]):
            return ""
        why = f"no value moved. gamma = {gamma:.3g} is too small, or no gradient reaches them."
        if not all(node.weight for node in nodes):  # an error stops at a node of weight 0
            why = "precisions= gave some or all of them the weight 0. Give weights > 0."
        told = f"all {len(report.nodes)} value nodes have energy zero after {end} inference steps"
        return f"In the first batch {told}: {why}"
    # Down the gradient an error shrinks by about gamma per stage, but not in error coordinates.
    far = [n.name for n in nodes if n.arrival < end and n.e is None and gamma**n.arrival < 1e-4]
    silent = [name for name in far if peaks[name] == 0]
    told = f"In the first batch no error reached {_some(silent)} within {end} inference steps: it"
    cure = "shrinks from stage to stage. Take a larger gamma or T, or epc."
    return f"{told} {cure}" if silent else ""


def explain(report: Any) -> str:
    """What inference did, by a report or what has one: F, stability, depth, learning, a verdict."""
    report = getattr(report, "report", report)
    if report is None:
        return "There has been no batch yet, or the last one diverged, or it had no loss."
    told = (
        "explain(report): expected a StepReport, a PCStrategy or an optimizer of lightning_pc.optim"
    )
    require(StepReport, report, told)
    first, last = report.free_energy[[0, -1]].tolist()
    same = len(set(report.pulls)) == 1  # else F itself has changed: weights that vary, two betas
    share = f" ({(first - last) / first:.1%} of it)" if same and 0 <= last < first else ""
    lines = [f"F went from {first:.4g} to {last:.4g} in {report.steps} evaluations{share}."]
    if report.pulls[0] * report.pulls[-1] < 0:
        lines = [f"Of two phases with their own F each, in {report.steps} evaluations."]
    if same and report.pulls[0] != 1:
        took = "auto took ePC. " if report.algorithm == "auto" else ""
        pushed = ": this batch pushes it up, others pull it down" if report.pulls[0] < 0 else ""
        lines.append(f"{took}The loss weighs {report.pulls[0]:.3g} in F{pushed}.")
    momentum = 0.0 if isinstance(report.momentum, str) else report.momentum
    # Values that push the loss up begin with F below zero, which weights that learn raise to it.
    start = first if report.pulls[0] > 0 else max(first, 0.0)
    rose = same and not report.sampled and last - start > report.rounding * abs(first)
    if rose:
        grew = _growth(report.nodes, report.loss, report.energy, report.free_energy)
        cure = "Use momentum=0." if isinstance(report.momentum, str) else "Lower gamma."
        if report.algorithm == "auto":
            cure = "The next look at the curvature sets gamma right."
        if SCHEDULES[report.algorithm].incremental:
            cure = _cure(report.algorithm, report.curvature is not None, None, math.inf)
        lines.append(f"It rose: {grew}. {cure}")
    if report.sampled:
        lines.append("Values were sampled, which raises F by about half of the number of entries.")
    if report.curvature is not None:
        lines.append(_product(report.gamma, report.curvature, momentum))
    shares = report.energy_by_depth
    if same and len(shares) > 1:  # at the last step weights that vary leave one node's energy
        low, top = min(shares), max(shares)
        lines.append(
            f"{100 * shares[low]:.2g} % of the energy is next to the loss (depth {low}), "
            f"{100 * shares[top]:.2g} % at the top, next to the input (depth {top})."
        )
    peaks = report.peak_energy.items()
    silent = [name for name, peak in peaks if peak == 0 and name not in report.free]
    idle = [name for name, times in report.learned.items() if not times]
    for what, names in (
        ("Values followed their predictions", list(report.followed)),
        ("Held by no prediction", report.free),
        ("No error reached", silent),
        ("Parameters that did not learn", idle),
    ):
        lines += [f"{what}: {_some(names)}."] if names else []
    lines += [told for told in (report.compiled, str(report.trend)) if told]
    verdict = _fault(report) or ("F rises within the batch" if rose else _health(report))
    if silent and idle:  # a unit that is off is silent, too
        verdict = "nodes unreached"
    elif silent and report.loss[0] > report.rounding:
        verdict = "no error reaches some nodes"
    return "\n".join([*lines, f"Verdict: {verdict}."])
