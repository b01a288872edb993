"""What a predictive coding step cannot train, and how the user is told."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from lightning_pc.errors import ClosureError, ConfigError, PlacementError
from lightning_pc.nodes.energies import Free
from lightning_pc.nodes.learned import LearnedGaussian
from lightning_pc.stages.batch import Batch


def checked_loss(loss: object, must: str) -> Tensor:
    """The loss that a forward gave, if one can be learned from; ``must`` as of `Learner.begin`.

    Raises:
        ClosureError: Saying what it is instead.
    """
    if loss is None:
        raise ClosureError(
            f"The closure given to {must} ran the model and returned nothing: "
            "end it with 'return loss'. To skip a batch, return before the forward."
        )
    if not isinstance(loss, Tensor):
        told = f"Expected a loss tensor, got {type(loss).__name__}"
        raise ClosureError(f"{told}: return the loss alone, such as outputs.loss.")
    if loss.numel() != 1:
        shape = tuple(loss.shape)
        raise ClosureError(f"Expected a scalar loss, got one of shape {shape}: take its mean.")
    if not loss.requires_grad:
        raise ClosureError(
            "The loss depends on no trainable parameter: it was computed under no_grad, detached, "
            "or every parameter is frozen."
        )
    return loss


def early_message(parameters: set[Tensor], model: nn.Module) -> str:
    """Says that the loss depends on these by what was computed before the forward."""
    names = [name for name, p in model.named_parameters() if p in parameters]
    some = ", ".join(map(repr, names[:5])) or "parameters of another model"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (
        f"The loss depends on {some}{more} by what was computed before the forward began, where "
        "no value node stands: compute all of it from the batch on within the closure (under the "
        "Trainer within training_step), and detach what is carried over from an earlier batch."
    )


def check_batch(
    batch: Batch,
    model: nn.Module,
    energies: Iterable[str],
    met: set[str],
    held: set[nn.Parameter] | None,
    unfit: bool,
    pushes: bool,
) -> None:
    """What is asked for can be done with this batch.

    Args:
        batch: The batch.
        model: Whose.
        energies: Names of places that are given energies.
        met: Names of nodes of all batches so far; it is added to.
        held: Parameters that the optimizer moves, None for all.
        unfit: The algorithm needs values that start at a prediction.
        pushes: Some phase pushes values away from the target.

    Raises:
        PCError: Naming the place and what to do.
    """
    check_nodes(batch, model)
    check_energies(batch, energies, met)
    check_latents(batch, unfit, pushes)
    if held is not None:
        check_held(batch, held)


def check_nodes(batch: Batch, model: nn.Module) -> None:
    """Every entry that the user wrote out has a node, and there is one at all.

    Raises:
        PlacementError: Naming the entry or the places met, and what to do.
    """
    placement = batch.watch.placement
    for entry, modules in placement.entries:
        outputs = [(site.key[0], site) for site in batch.sites if isinstance(site.key, tuple)]
        sites = [site for module in modules for of, site in outputs if of is module]
        if any(not site.why for site in sites):
            continue
        if sites:
            why = "no node can stand there: " + "; ".join(
                dict.fromkeys(f"'{site.name}' is {site.why}" for site in sites[:3])
            )
        else:
            why = (
                f"the forward never called {'it' if len(modules) == 1 else 'them'} "
                "as module(...), so its node never fired"
            )
        raise PlacementError(
            f"value_nodes entry {entry!r}: {why}. Name a module that takes part in the loss "
            "(lightning_pc.describe shows the places)."
        )
    if not batch.nodes:
        met = "; ".join(f"'{s.name}' is {s.why}" for s in batch.sites[:5]) or "none was met"
        raise PlacementError(
            f"No value node stands in {type(model).__name__}, so this would be plain "
            f"backprop. Places: {met}. value_nodes='modules' takes the outputs of all modules with "
            "parameters, a list of names some. Where one layer alone learns there is nothing to "
            "infer: train it with backprop, or unfreeze another."
        )


def check_energies(batch: Batch, energies: Iterable[str], met: set[str]) -> None:
    """Every name to which ``energies`` gives an energy is that of a node ``met``, which it fits.

    Raises:
        PlacementError: There is none.
        ConfigError: A `LearnedGaussian` is for other units, or for two nodes.
    """
    names = [site.name for site in batch.sites if not site.why]
    met.update(names, [name.partition("#")[0] for name in names])
    for name in energies:
        if name not in met:
            told = f"energies: no value node is named {name!r}. {_meant(name, sorted(met))}"
            raise PlacementError(told)
    at = dict[int, str]()
    for node in batch.nodes:
        energy = node.energy
        if isinstance(energy, LearnedGaussian):
            if (first := at.setdefault(id(energy), node.name)) != node.name:
                told = f"energies: '{first}' and '{node.name}' learn one variance"
                raise ConfigError(f"{told}. Name each, with a LearnedGaussian of its own.")
            energy.fit(node.name, node.x)


def check_latents(batch: Batch, unfit: bool, pushes: bool) -> None:
    """Latent variables can be inferred.

    Args:
        batch: The batch.
        unfit: The algorithm needs values that start at a prediction.
        pushes: Some phase pushes values away from the target.

    Raises:
        PlacementError: The loss reads one of them not at all.
        ConfigError: The algorithm is ``unfit``, or it ``pushes``.
    """
    for site in batch.sites:
        if site.stand is None:
            continue
        if site.why:
            raise PlacementError(
                f"'{site.name}' is a Latent that is {site.why}, so nothing could be inferred of "
                "it: compute the loss from what it returns."
            )
        if unfit:
            raise ConfigError(
                f"'{site.name}' is a Latent, which has no prediction to start from: infer it with "
                "algorithm='pc' or 'ipc' (PCStrategy('pc'), lightning_pc.optim.PC)."
            )
        if pushes:
            raise ConfigError(
                f"'{site.name}' is a Latent: below 0 beta would infer causes of other data. Take "
                "beta > 0."
            )


def check_held(batch: Batch, held: set[nn.Parameter]) -> None:
    """The optimizer moves something that the loss depends on.

    Raises:
        ClosureError: It would train nothing.
    """
    if held.isdisjoint(batch.arrivals):
        raise ClosureError(
            "The loss depends on none of the parameters that the optimizer holds, which would "
            "train nothing: it was computed by another model (a copy?), these are frozen, or this "
            "batch does not use them (then give no loss, None, for it)."
        )


def unreached(batch: Batch, T: int, model: nn.Module) -> str:
    """Says which parameters no error reaches within ``T`` steps, "" where it reaches all."""
    last = max(batch.graph.reached.values(), default=0)
    if last < T:
        return ""
    names = {p: n for n, p in model.named_parameters()}
    missed = [names.get(p, "?") for p, arrival in batch.arrivals.items() if arrival >= T]
    more = f" and {len(missed) - 20} more" if len(missed) > 20 else ""
    return (
        f"T={T} inference steps never reach {len(missed)} parameters, which do not learn: "
        f"{', '.join(missed[:20])}{more}. T={last + 1} reaches all of them."
    )


def shortcut(batch: Batch) -> str:
    """Says where one wave of precisions strays, "" where no stage reads a node that moves early."""
    for node, stage in zip(batch.nodes, batch.graph.stages, strict=False):
        for parent in (batch.nodes[number] for number in stage.parents):
            if parent.depth <= node.depth:
                return (
                    "Spiking precisions take the value nodes for a chain, but "
                    f"'{node.name}' (depth {node.depth}) is predicted from '{parent.name}' (depth "
                    f"{parent.depth}), which moves no later: when its own error arrives, its "
                    "prediction has moved, and its stage learns of that as well. For such modules "
                    "leave precisions constant, or use 'epc' or 'iepc'."
                )
    return ""


def let_free(batch: Batch, names: Sequence[str]) -> None:
    """No prediction holds the nodes of these names.

    Raises:
        PlacementError: No node has such a name.
    """
    nodes = {node.name: node for node in batch.nodes}
    for name in names:
        if name not in nodes:
            told = f"free={[*names]}: no value node is named {name!r}."
            raise PlacementError(f"{told} {_meant(name, [*nodes])}")
        nodes[name].energy = Free()


def _meant(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    meant = f"Did you mean {close[0]!r}? " if close else ""
    return f"{meant}There are {', '.join(map(repr, [*dict.fromkeys(names)][:20]))}."
