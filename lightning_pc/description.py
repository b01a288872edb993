"""``describe``: which value nodes a module gets, before any training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pc.errors import ClosureError, misfit, require
from lightning_pc.insight.products import Products, products
from lightning_pc.learner import Learner
from lightning_pc.settings import Settings, refuse_unknown
from lightning_pc.stages.through import ThroughErrors
from lightning_pc.tree import NodeRow, ranges, tree_of

#: Nodes of a table; more are shown as a tree.
MOST = 30


@dataclass(frozen=True, repr=False)
class Description:
    """What `describe` found.

    Attributes:
        rows: The nodes, in call order.
        passed_over: Places of the same kind that hold no node, and why.
        depth: Depth of the module.
        T: Inference steps it would get.
        loss_parameters: Number of trainable weights of the loss's own stage.
        step: Matrix multiplications of one inference step: all, and those in a row (SMMs).
        update: Likewise of one update of all weights (Salvatori et al. 2024, Table 4).
        backprop: Likewise, with backprop.
    """

    rows: list[NodeRow]
    passed_over: list[NodeRow]
    depth: int
    T: int
    loss_parameters: int
    step: Products
    update: Products
    backprop: Products

    def __repr__(self) -> str:
        return f"Description(nodes={len(self.rows)}, depth={self.depth}, T={self.T})"

    def __rich__(self) -> Table | Group:
        nodes = "value node" if len(self.rows) == 1 else "value nodes"
        title = f"{len(self.rows)} {nodes}, depth {self.depth}, T = {self.T}"
        caption = (
            f"stage of the loss: {self.loss_parameters:,} weights\n"
            f"matrix products of an update: {_told(self.update)}; backprop: {_told(self.backprop)}"
        )
        if len(self.rows) > MOST:
            return Group(tree_of([*self.rows, *self.passed_over], title), Text(caption, "dim"))
        table = Table(title=title, caption=caption)
        table.add_column("#", justify="right")
        table.add_column("value node", overflow="fold", min_width=16)
        table.add_column("shape", no_wrap=True)
        table.add_column("energy")
        table.add_column("parents")
        table.add_column("depth", justify="right")
        table.add_column("weights", justify="right")
        number = {row.name: i for i, row in enumerate(self.rows, 1)}
        for row in self.rows:
            parents = ranges(number[name] for name in row.parents)
            parents = parents or ("input" if row.parameters else "none")  # none of a Latent
            cells = (row.energy, parents, str(row.depth), f"{row.parameters:,}")
            table.add_row(str(number[row.name]), row.name, "x".join(map(str, row.shape)), *cells)
        for row in self.passed_over:
            table.add_row("", row.name, "x".join(map(str, row.shape)), row.why, style="dim")
        return table


def describe(
    model: nn.Module,
    batch_or_closure: Any,
    how: Any = None,
    *,
    print_table: bool = True,
    **settings: Any,
) -> Description:
    """Prints the value nodes that a module gets on a batch; nothing is trained or changed.

    More than 30 are printed as a tree of modules, in which neighbours that are alike stand once.

    Args:
        model: The module; a LightningModule's ``training_step`` is run, another module is called.
        batch_or_closure: A batch (for a LightningModule what ``training_step`` takes; for another
            module its input: a tensor, a tuple of arguments or a mapping of keyword arguments),
            or a callable that returns the loss.
        how: The `PCStrategy`, or the optimizer of `lightning_pc.optim`, whose settings count.
        print_table: Print the table; False to get the `Description` alone.
        settings: Others than of ``how``, by name: ``algorithm``, ``value_nodes`` and so on.

    Returns:
        The nodes, and the places that hold none.

    Raises:
        PCError: The nodes cannot stand there.
    """
    told = "describe(model, batch, how): expected"
    require(nn.Module, model, f"{told} the nn.Module to train")
    given = Settings() if how is None else getattr(how, "settings", how)
    of = "a PCStrategy or an optimizer of lightning_pc.optim (or algorithm='ipc', by name)"
    require(Settings, given, f"{told} {of}")
    refuse_unknown("describe", settings)
    learner = Learner(model, replace(given, **settings))
    with torch.enable_grad(), learner.undone():
        learner.begin(_forward(model, batch_or_closure), _any_loss)
        if (waiting := learner.waiting) is None:
            raise ClosureError("The forward returned no loss: there is no graph to describe.")
        batch, T = waiting.batch, waiting.T
        step, backprop = (products(batch, kind, None) for kind in (learner.kind, ThroughErrors))
        batch.watch.undo()
    sizes = [sum(p.numel() for p in batch.parameters(stage)) for stage in batch.graph.stages]
    rows = []
    for node, stage, size in zip(batch.nodes, batch.graph.stages, sizes, strict=False):
        parents = tuple(batch.nodes[number].name for number in stage.parents)
        shape, energy = tuple(node.x.shape), node.energy.name
        rows.append(NodeRow(node.name, shape, energy, parents, node.depth, size))
    passed = [NodeRow(site.name, site.shape, why=site.why) for site in batch.sites if site.why]
    depth, schedule = batch.graph.depth, learner.schedule
    update = step.times(1 if schedule.incremental else depth if schedule.wave else T)
    description = Description(rows, passed, depth, T, sizes[-1], step, update, backprop)
    if print_table:
        Console().print(description)
    return description


def _told(products: Products) -> str:
    return f"{products.total:,}, {products.in_a_row:,} in a row"


def _forward(model: nn.Module, given: Any) -> Callable[[], Any]:
    if callable(given) and not isinstance(given, nn.Module):
        return lambda: given()
    step = getattr(model, "training_step", None)
    if callable(step):
        taken = len(inspect.signature(step).parameters)  # batch_idx is optional
        return lambda: step(*(given, 0)[:taken])
    if isinstance(given, Mapping):
        return lambda: model(**given)
    arguments = given if isinstance(given, (tuple, list)) else (given,)
    told = misfit(model.forward, *arguments)
    if told and not model._forward_pre_hooks:  # which may change what it is given
        raise ClosureError(
            f"describe calls {type(model).__name__} with the batch, which it cannot take ({told}): "
            "give its inputs alone, or a closure, lambda: loss_fn(model(x), y)."
        )
    return lambda: model(*arguments)


def _any_loss(output: Any) -> Tensor:
    """The loss in an output; of a module that returns none, a stand-in that reads all outputs."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    leaves = [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor) and v.requires_grad]
    if not leaves:
        told = "The module gives no tensor with a gradient: pass a closure that returns the"
        raise ClosureError(f"{told} loss, e.g. describe(model, lambda: loss_fn(model(x), y)).")
    return torch.stack([leaf.float().sum() for leaf in leaves]).sum()
