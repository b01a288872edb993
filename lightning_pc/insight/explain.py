"""What inference did, in sentences: which value node, since when, and what to change.

Axis legend: t inference steps, n nodes in call order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from lightning_pc.errors import DivergenceError
from lightning_pc.inference.movers import Mover
from lightning_pc.inference.schedules import SCHEDULES
from lightning_pc.insight.report import StepReport
from lightning_pc.nodes.node import Node

#: What is seen this often on end is no accident: batches in which inference raises the energy, or
#: looks at the curvature that fail.
PATIENCE = 3
#: Batches on end in which iPC's inference raises F, until its weights' steps are suspected.
LONG_PATIENCE = 10
#: Share of the limit below which a given gamma is not to blame: a look mostly sees no less of the
#: curvature.
SURE = 0.7
#: Share of the first batch's F below which it may rise: data that are known by heart, whose small F
#: any step raises.
KNOWN = 0.01
#: Times the largest F at the start of any batch that F may rise within one.
LEAP = 100.0


def limit(momentum: float) -> float:
    """Stable moves of the values have gamma * curvature below this; 2 without momentum."""
    return 2.0 * (1.0 + momentum)


def divergence(
    names: Sequence[str],
    losses: Sequence[Tensor],
    energies: Sequence[Tensor],
    free: Sequence[float],
    start: int,
    gamma: float,
    momentum: float | None,
    automatic: bool,
    incremental: bool,
    remedy: str = "",
) -> DivergenceError:
    """Names the first loss or energy that was not finite, and why it came to that.

    Args:
        names: Of the nodes.
        losses: The loss at each evaluation, [] each.
        energies: Each node's energy at each evaluation, [n] each.
        free: F at each evaluation before the last.
        start: t of the first of these evaluations.
        gamma: Inference rate at the start of the batch.
        momentum: Of the values; None where their steps had rates of their own.
        automatic: It was chosen by ``gamma="auto"``.
        incremental: The weights moved between these evaluations.
        remedy: What keeps values from going too far, where their steps had rates of their own.
    """
    for t, (loss, energy) in enumerate(zip(losses, energies, strict=True)):  # noqa: B007
        finite = energy.isfinite().tolist()
        bad = [name for name, fine in zip(names, finite, strict=True) if not fine]
        if bad or not loss.isfinite():
            break
    where = f"the energy of value node '{bad[0]}'" if bad else "the loss"
    why = "Lower gamma, or the learning rate."
    if not t + start:
        why = "Inference has not begun: look at the batch, the model, the learning rate."
    rising = _rising([value for value in free[:t] if math.isfinite(value)], momentum or 0.0)
    if rising is not None:
        since, product = rising
        energy = energies[t - 1]
        most = int(energy.argmax())
        share = float((energy[most] / energy.double().sum()).nan_to_num())
        where_most = f"{share:.0%} of the energy was at '{names[most]}'"
        why = f"F has risen since t = {start + since}; {where_most}."
        if incremental:
            why += " The weights move at every step: lower the learning rate, or gamma."
        elif momentum is None:
            why += f" {remedy}"
        else:
            remedy = f"Use gamma='auto', or gamma < {limit(momentum) * gamma / product:.2g}."
            if automatic:
                remedy = "The weights have changed since gamma was chosen: lower the learning rate."
            why = (
                f"F has risen since t = {start + since}, so fast that gamma = {gamma:.3g} times "
                f"its curvature is at least {product:.2g}, above the limit of {limit(momentum):g}; "
                f"{where_most}. {remedy}"
            )
    return DivergenceError(
        f"At inference step t = {start + t} {where} is not finite (loss {float(loss):g}). No "
        f"weight has moved on it. {why}"
    )


def _rising(free: Sequence[float], momentum: float) -> tuple[int, float] | None:
    """Step since which F rises, and gamma * curvature by the growth of its last step."""
    if len(free) < 2 or not free[-1] > free[-2] > 0:
        return None
    since = len(free) - 1
    while since > 1 and free[since - 1] > free[since - 2]:
        since -= 1
    # An unstable error changes its sign and grows at each step, F by the square of that growth.
    # Heavy ball: (1 + growth) (1 + momentum / growth) = gamma * curvature.
    growth = math.sqrt(free[-1] / free[-2])
    return since, (1 + growth) * (1 + momentum / growth)


def unstable(
    node: Node, gamma: float, momentum: float, curvature: float, bearable: float, since: int
) -> str:
    """Says that inference raises the energy, "" where gamma is not to blame.

    Args:
        node: Where the curvature is largest.
        gamma: Inference rate.
        momentum: Of the values.
        curvature: Largest curvature of F in the values.
        bearable: Largest gamma * curvature that the algorithm lives with, without momentum.
        since: The first of the batches on end in which it did.
    """
    if not gamma * curvature > bearable * (1 + momentum):
        return ""
    return (
        f"Since batch {since} inference raises the energy instead of lowering it: gamma = "
        f"{gamma:.3g} times the curvature of {curvature:.3g}, which is largest at value node "
        f"'{node.name}', is {gamma * curvature:.3g}, above the limit of {limit(momentum):g}. "
        f"Use gamma='auto', or gamma < {limit(momentum) / curvature:.2g}."
    )


def overshot(
    report: StepReport,
    gamma: float,
    momentum: float,
    curvature: float,
    given: bool,
    first: float,
    since: int,
) -> str:
    """Says that F rises within a batch by the weights' own steps, or by these or gamma.

    Args:
        report: Of the last of the batches on end in which F rose.
        gamma: Inference rate at its start.
        momentum: Of the values.
        curvature: Largest curvature of F in the values at its start.
        given: Gamma is the user's, and the length of the values' steps.
        first: F at the start of the first batch of all.
        since: The first of the batches on end.

    Returns:
        "" where F is small, and where the curvature is not known.
    """
    start, end = float(report.free_energy[0]), float(report.free_energy[-1])
    product, most = gamma * curvature, limit(momentum)
    if math.isnan(product) or not end > KNOWN * first:
        return ""
    suspect = product >= (SURE * most if given else most)
    cause = ", and gamma is not to blame: the weights, which move at every step, go"
    if suspect:
        cause = (
            f". gamma = {gamma:.3g} times the curvature of {curvature:.3g} is {product:.3g}, where "
            f"the limit is about {most:g}: values or weights, which move at every step, go"
        )
    lower = f"Give gamma < {SURE * most / curvature:.2g}, lower" if suspect and given else "Lower"
    return (
        f"Since batch {since} F rises within each batch (in this one from {start:.3g} to "
        f"{end:.3g}){cause} too far. Here {_leap(report)}. {lower} {_cures(report)}"
    )


def leapt(report: StepReport, batch: int) -> str:
    """Says that F has risen beyond all measure within one batch, at an automatic gamma."""
    free = report.free_energy
    return (
        f"In batch {batch} F rose from {float(free[0]):.3g} to {float(free[-1]):.3g}: the weights, "
        "which move at every step, went too far, or this batch is far from those before. Here "
        f"{_leap(report)}. Lower {_cures(report)}"
    )


def _cures(report: StepReport) -> str:
    """What keeps the weights' steps from undoing each other within a batch."""
    cures = "the learning rate, scale down what the modules before it read, "
    if report.algorithm == "ipc":
        if report.curvature is None:
            cures += "leave gamma and momentum at their defaults, with which values of up to three "
            cures += "axes go along with their predictions, "
        return cures + "use a smaller T, or precisions='spiking' where the nodes form a chain."
    return cures + "or use a smaller T."


def _leap(report: StepReport) -> str:
    """What rose most where F did, from one evaluation to the next."""
    t = int(report.free_energy.diff().argmax())
    before, after = report.energy[t], report.energy[t + 1]
    node = int((after - before).argmax())
    what, ends = f"the energy at value node '{report.nodes[node]}'", (before[node], after[node])
    loss = report.loss[t : t + 2].detach().cpu()
    if float(loss[1] - loss[0]) * report.loss_terms * report.pulls[t] > float(ends[1] - ends[0]):
        what, ends = "the loss", (loss[0], loss[1])
    between = f"between evaluations {t + 1} and {t + 2}"
    return f"{what} went from {ends[0]:.3g} to {ends[1]:.3g} {between}"


def _rise(report: StepReport) -> str:
    """Why F has risen within a batch."""
    if SCHEDULES[report.algorithm].incremental:
        if report.pulls[0] < 0:
            return "It rose, as it does where the weights lower a loss that values push up."
        cause = "the steps of the weights, or gamma, are too large for this batch"
        return f"It rose: {cause}; {_leap(report)}."
    cause = "gamma is too large"
    if isinstance(report.momentum, str):
        cause = "F is steeper further off than steps had seen, momentum=0 makes shorter ones"
    worst = report.nodes[int(report.energy[-1].argmax())]
    return f"It rose: {cause}; most of the energy is at '{worst}'."


def unseen(failures: int, gamma: float) -> str:
    """Says that the automatic gamma does not see the curvature, "" where it does.

    Args:
        failures: Of its last looks on end.
        gamma: Inference rate.
    """
    if failures < PATIENCE:
        return ""
    return (
        f"gamma='auto' could not tell the curvature of F, the last {failures} times it looked: the "
        f"loss or an energy is not finite close to the values. gamma stays at {gamma:.3g}; give a "
        "number if that does not learn."
    )


def silenced(report: StepReport, nodes: Sequence[Node], mover: Mover, end: int) -> str:
    """Says where errors faded out on their way up, "" where none did.

    Enough steps on paper may not be enough: down the gradient an error shrinks by about gamma per
    stage, so by about ``gamma**arrival`` before it comes to a node.

    Args:
        report: Of the batch.
        nodes: Its nodes; none in error coordinates, where errors do not fade.
        mover: How values moved.
        end: Inference steps taken.
    """
    peaks, gamma = report.peak_energy, mover.start_gamma
    if not any(peaks.values()):
        if end < 2 or not float(report.loss[0]):
            return ""
        return (
            f"In the first batch no value moved: all {len(report.nodes)} value nodes have energy "
            f"zero after {end} inference steps at gamma = {gamma:.3g}, so that only the stage of "
            "the loss learns. Either gamma is too small, or no gradient of the loss reaches the "
            "nodes (dead units, a constant loss)."
        )
    far = [node.name for node in nodes if node.arrival < end and gamma**node.arrival < 1e-4]
    silent = [name for name in far if peaks[name] == 0]
    if not silent:
        return ""
    return (
        f"In the first batch no error reached {', '.join(map(repr, silent[:5]))} "
        f"({len(silent)} of {len(nodes)} value nodes) within {end} inference steps: it "
        "shrinks from stage to stage and fell below the precision of the values. A larger "
        "gamma or T carries it further, algorithm='epc' at once."
    )


def explain(report: StepReport | None) -> str:
    """What inference did in one batch, a sentence each for F, stability, depth and learning.

    Args:
        report: What the step left; None before the first and where the batch was skipped.
    """
    if report is None:
        return "There has been no batch yet, or the last one was skipped."
    free = report.free_energy
    moved = float(free[0] - free[-1])
    same = len(set(report.pulls)) == 1  # else F itself has changed between the steps
    share = f" ({moved / float(free[0]):.1%} of it)" if same and moved > 0 < free[0] else ""
    lines = [
        f"F went from {float(free[0]):.4g} to {float(free[-1]):.4g} in {report.steps} evaluations"
        f"{share}."
    ]
    if moved < 0 and same:
        lines.append(_rise(report))
    if report.curvature is not None:
        most = limit(0.0 if isinstance(report.momentum, str) else report.momentum)
        lines.append(
            f"gamma {report.gamma:.3g} times the curvature {report.curvature:.3g} is "
            f"{report.gamma * report.curvature:.2g}; the limit is {most:g}."
        )
    shares = report.energy_by_depth
    if same and len(shares) > 1:  # at the last step weights that vary leave one node's energy
        last = max(shares)
        lines.append(
            f"{shares[min(shares)]:.1%} of the energy is next to the loss (depth {min(shares)}), "
            f"{shares[last]:.2g} of it at the top (depth {last})."
        )
    if report.followed:
        times = ", ".join(
            f"'{name}' ({times})" for name, times in list(report.followed.items())[:5]
        )
        lines.append(
            f"Values went along with their predictions (evaluations): {times}; "
            f"{len(report.followed)} nodes in all."
        )
    silent = [name for name, peak in report.peak_energy.items() if peak == 0]
    if silent:
        lines.append(f"No error reached {', '.join(map(repr, silent[:5]))} ({len(silent)} nodes).")
    idle = [name for name, times in report.learned.items() if not times]
    if idle:
        lines.append(f"Parameters that did not learn: {', '.join(idle[:5])} ({len(idle)} in all).")
    return "\n".join(lines)
