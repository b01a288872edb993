"""Every knob of the engine, its range and its default."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from inspect import signature
from typing import Any, Literal

from torch import Tensor, optim
from torch.optim import Optimizer

from lightning_pc.errors import ConfigError, misfit, refuse, shown
from lightning_pc.inference.curvature import ROOM
from lightning_pc.inference.schedules import Moves, schedule
from lightning_pc.nodes.energies import softmax_energy
from lightning_pc.nodes.learned import LearnedGaussian
from lightning_pc.nodes.placement import Entry
from lightning_pc.nodes.registry import energies_of
from lightning_pc.precisions import Constant, Precisions, is_number, plain, precisions
from lightning_pc.stages.compiled import check_options


@dataclass(frozen=True)
class Settings:
    """Every argument of predictive coding; both doors take them by name.

    Args:
        algorithm: ``"auto"`` (learns what backprop learns, at its learning rate: epc near the
            feed-forward pass, T = 2 and ``beta="auto"``), ``"ipc"`` (values and weights move at
            every inference step), ``"pc"`` (values first, then weights once), ``"zil"`` (backprop's
            update by local errors), ``"epc"`` (pc in error coordinates, for deep modules: Goemaere
            et al. 2025) or ``"iepc"`` (ipc in error coordinates, for pretrained modules with value
            nodes everywhere).
        T: Inference steps per batch, at least 1. Default: max(8, depth + 1); zil and spiking
            precisions: depth + 1; epc, iepc: 8; auto: 2.
        gamma: Inference rate, positive. A number is exact: plain descent at that rate. ``"auto"``
            takes it from the curvature of F in the values, which is looked at every 300
            evaluations; zil: 1. With ``"auto"`` values of ipc also follow what their predictions
            move by, all of it where no row of stages has more than 2 that no connection skips,
            else 2 / stages of it.
        gamma_decay: Factor of gamma after an inference step at which the energy has not fallen,
            within a batch, in (0, 1] (Salvatori et al. 2024, D.3). Default: 0.9 where gamma is
            automatic and values are made anew for each batch, else 1.
        momentum: Share of their velocity that values keep from step to step, in [0, 1): 0 is the
            paper's descent, more is heavy ball, at rest at the start of a batch; PCX (Pinchetti
            et al. 2024) takes 0.35 to 0.7 for iPC; zil: 0. ``"conjugate"`` (pc, ipc, epc) finds
            rate and momentum of each step, by conjugate gradients; gamma is then the length of the
            step that is tried. None is 0. But with an automatic gamma, constant precisions, a
            positive beta and values made anew for each batch it is ``"conjugate"`` for pc and ipc;
            along a chain a value of ipc takes a longer first step instead.
        value_nodes: Where value nodes stand: ``"auto"`` (inputs of nonlinearities, outputs of
            recurrent modules), ``"nonlinearities"``, ``"modules"``,
            ``"linear"``, ``"blocks"``, a module name or regular expression, or a list of these; in
            Python also a module type or a callable (name, module) -> bool.
        reset: ``"batch"`` makes values anew for each batch, ``"never"`` keeps them for full-batch
            training.
        loss_terms: Number of terms that the loss is a mean of, or in Python a callable (under the
            Trainer of the batch). Default: read off the loss functions that are called.
        softmax_energy: Energy at softmax logits: ``"categorical"`` (F_KL, Pinchetti et al. 2022) or
            ``"gaussian"``; zil, auto, epc and iepc are Gaussian throughout.
        energies: Name of a node -> its energy, by name (``"gaussian"``, ``"learned_gaussian"``,
            ``"laplace"``, ``"huber"``, ``"bernoulli"``, ``"categorical"``, or your own) or an
            object of lightning_pc.energies. For pc and ipc. A name stands for all calls of that
            module, ``"net.3#2"`` for the second alone.
        precisions: Weight of each node's energy in F: ``"constant"`` (1), a number, ``"spiking"``
            (Qi et al. 2025), an object of lightning_pc.precisions, or in Python a callable
            (depth, t) -> weight.
        beta: Factor of the loss in the F that values descend; parameters learn from F / beta
            (Scellier & Bengio 2017). 1 is plain predictive coding, a negative one pushes values
            away from the target, and of a pair such as (0.3, -0.3) parameters learn from the mean
            of both phases (pc, epc; 2 T evaluations). ``"auto"`` (auto, epc, iepc) is 0.05, or
            0.05 / curvature where the loss's curvature in error coordinates is above 1, and changes
            its sign from batch to batch, so that weights cannot gain by explaining noise. None is
            ``"auto"`` for auto, else 1.
        parallel: Layers side by side: neighbouring stages that are alike run as one, with their
            values and weights stacked. True does so wherever it can, False never, ``"auto"`` where
            at least 6 stages of at most 32,768 weights and 8,192 value entries each are alike. The
            numbers are the same but for rounding. For pc, and ipc with a given gamma. Meanwhile the
            weights of such stages are there twice. In plain PyTorch, where the optimizer is SGD
            without momentum and hooks, linear layers then learn without stored gradients.
        compile: Inference steps are compiled: True, or a dict of arguments of `torch.compile`. Each
            kind of step (which errors stand, who moves) is compiled when it is met for the second
            time. The numbers are the same but for rounding. Where a call draws (dropout) or has a
            hook, or there is no compiler, steps run as they are, and a warning says so. For pc, and
            ipc with a given gamma.
        until: T is the most. Once errors have reached all nodes, and F has changed by no more than
            this share of itself at each of two steps on end, the next step is the last. So no count
            says when weights learn. None for T steps.
        inference: In place of gamma and momentum, any optimizer of torch's for the values: a
            callable that makes it from their list, such as
            ``lambda values: torch.optim.Adam(values, 0.05)``; in YAML a class_path.

    Raises:
        ConfigError: A value is out of its range.
    """

    algorithm: Literal["auto", "ipc", "pc", "zil", "epc", "iepc"] = "auto"
    T: int | None = None
    gamma: float | Literal["auto"] = "auto"
    gamma_decay: float | None = None
    momentum: float | Literal["conjugate"] | None = None
    # The list before the function: jsonargparse saves a value as the first that it may be.
    value_nodes: str | list[Entry] | Entry = "auto"
    reset: Literal["batch", "never"] = "batch"
    loss_terms: float | Callable[..., float] | None = None
    softmax_energy: Literal["categorical", "gaussian"] = "categorical"
    energies: dict[str, Any] | None = None
    precisions: float | str | Precisions | Callable[[int, int], float] = "constant"
    beta: float | tuple[float, ...] | Literal["auto"] | None = None
    inference: Callable[[list[Tensor]], Optimizer] | None = None
    parallel: bool | Literal["auto"] = "auto"
    compile: bool | dict[str, Any] = False
    until: float | None = None

    def __post_init__(self) -> None:
        vars(self).update({name: plain(name, given) for name, given in vars(self).items()})
        way, weights, name = schedule(self.algorithm), precisions(self.precisions), self.algorithm
        T, gamma, decay, momentum = self.T, self.gamma, self.gamma_decay, self.momentum
        reset, terms, beta, inference = self.reset, self.loss_terms, self.beta, self.inference
        zil, never, wave = name == "zil", reset == "never", weights.wave
        conjugate, pair = momentum == "conjugate", len(self.betas) == 2
        idle = {"gamma": gamma != "auto", "gamma_decay": decay, "momentum": momentum is not None}
        given = [argument for argument, is_given in idle.items() if is_given]
        told = {"gamma": gamma != "auto", "inference": inference, "reset": never}
        told["precisions"] = weights != Constant()
        fixed = [f"{n}={shown(getattr(self, n))}" for n, is_told in told.items() if is_told]
        moves = {"gamma_decay": decay, "momentum": momentum}
        ends = weights.wave or weights.varies or zil or way.whole
        own = ", ".join(fixed + [f"{n}={shown(m)}" for n, m in moves.items() if m is not None])
        refused = {
            f"T={shown(T)}: expected a whole number of inference steps, >= 1, or None.": (
                T is not None and not (is_number(T) and isinstance(T, int) and T >= 1)
            ),
            f"{T=}: zil takes depth + 1 evaluations, leave it at None.": zil and T is not None,
            f"until={shown(self.until)}: expected a share of F, such as 0.001, or None.": (
                self.until is not None and not (is_number(self.until) and self.until > 0)
            ),
            f"until={shown(self.until)}: F does not settle where stages count once, precisions "
            "vary or, as in iepc and auto, errors stay small on purpose. Use 'ipc', 'pc' or 'epc' "
            "with constant precisions, or give T.": self.until is not None and ends,
            f"gamma={shown(gamma)}: expected a positive inference rate or 'auto'.": (
                gamma != "auto" and not (is_number(gamma) and gamma > 0)
            ),
            f"{gamma=}: zil is exact at 1, leave it at 'auto'.": zil and gamma not in ("auto", 1),
            f"gamma_decay={shown(decay)}: expected a factor in (0, 1]; 1 keeps gamma.": (
                decay is not None and not (is_number(decay) and 0 < decay <= 1)
            ),
            f"reset={shown(reset)}: expected 'batch' or 'never'.": reset not in ("batch", "never"),
            f"{reset=}: zil starts from the forward pass, use reset='batch'.": zil and never,
            f"loss_terms={shown(terms)}: expected the number of terms that the loss is a mean of, "
            "or a callable of the batch.": (
                not (terms is None or callable(terms) or (is_number(terms) and terms > 0))
            ),
            f"momentum={shown(momentum)}: expected the share of their velocity that values keep, "
            "in [0, 1), 'conjugate' or None.": (
                not (momentum is None or conjugate or (is_number(momentum) and 0 <= momentum < 1))
            ),
            f"{momentum=}: zil is exact at 0 alone.": zil and momentum,
            f"{momentum=} leads towards the minimum of F, but {name} stays near its start on "
            "purpose: give a number, or use 'ipc'.": conjugate and way.whole,
            f"{momentum=} tells from two gradients how F bends between them, but varying "
            "precisions change F itself: give a number.": conjugate and weights.varies,
            f"beta={shown(beta)}: expected the loss's factor in F, a number that is not 0 (below 0 "
            "it pushes values from the target), 'auto', or a pair such as (0.3, -0.3).": (
                len(self.betas) not in (1, 2) or not all(is_number(b) and b for b in self.betas)
            ),
            "zil is exact for plain predictive coding alone: leave precisions and beta at their "
            "defaults.": zil and (self.betas != (1,) or weights != Constant()),
            f"precisions={weights.name!r} send one wave through a batch, which would only add up "
            "in values that are kept: use reset='batch'.": wave and never,
            f"precisions={weights.name!r} follows an error from stage to stage, but {name}'s "
            "errors start everywhere at once: use 'pc' or 'ipc'.": wave and way.through,
            f"{reset=}: {name} would go on learning from gradients of calls long past, since its "
            "errors forget as slowly as they move. Use 'ipc' or 'pc'.": never and way.whole,
            f"inference={shown(inference)}: expected a callable that makes an optimizer of the "
            "values, e.g. lambda values: torch.optim.Adam(values, 0.05).": inference is not None
            and (not callable(inference) or misfit(inference, [])),
            f"inference= moves the values in its own way: {', '.join(given)} would have no effect, "
            "leave it out.": inference is not None and given,
            "inference= moves the values in its own way, but zil is exact in one way alone: use "
            "another algorithm.": inference is not None and zil,
            f"inference= does not tell how far an error has come, by which {name} learns: leave it "
            "out, or use 'pc', 'ipc' or 'epc'.": inference is not None and way.whole,
            f"{beta=}: {name} moves the weights at every step, and the second phase would not "
            "start where the first did. Use 'pc' or 'epc', or one beta.": pair and way.incremental,
            f"{beta=}: both phases start from the forward pass, use reset='batch'.": pair and never,
            f"T=1 leaves the values of {name} no step: use T >= 2.": T == 1
            and (pair or (self.chosen_beta == "auto" and not way.incremental)),
            f"{own}: auto chooses how values move by itself. Say beside it which algorithm is "
            "meant: algorithm='ipc', 'pc' or 'epc'.": name == "auto" and beta is None and own,
            f"parallel={shown(self.parallel)}: expected True, False or 'auto'.": (
                self.parallel not in (True, False, "auto")
            ),
            "beta='auto' goes by the looks of gamma='auto' in error coordinates, where energies "
            "count 1, at values made anew: use 'auto', 'epc' or 'iepc', leave gamma, inference, "
            "precisions and reset out, or give beta a number.": (
                self.chosen_beta == "auto" and (fixed or not way.through)
            ),
        }
        refuse(refused)
        refuse({f"parallel=True: {self.one_by_one}": self.parallel is True and self.one_by_one})
        compiles = self.compile is not False
        check_options(self.compile)
        refuse({f"compile={shown(self.compile)}: {self.apart}": compiles and self.apart})
        exact = f"energies=: {name} is exact for Gaussian energies alone. Use 'pc' or 'ipc'."
        energies = energies_of(self.energies).values()
        refuse({exact: energies and (way.through or way.wave or weights.wave)})
        learns = any(isinstance(energy, LearnedGaussian) for energy in energies)
        alone = "energies: beside a LearnedGaussian leave out precisions=, compile= and beta="
        refuse({f"{alone} of two phases.": learns and (pair or compiles or weights != Constant())})
        softmax_energy(self.softmax_energy, -1)

    @property
    def changes(self) -> str:
        """What is not as by default, but for the algorithm, as arguments: ``", T=8"``."""
        names = [f.name for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return "".join(f", {name}={shown(getattr(self, name))}" for name in names)

    @property
    def betas(self) -> tuple[float, ...]:
        """The beta of each phase of a batch, of an automatic one the largest."""
        beta = ROOM if self.chosen_beta == "auto" else self.chosen_beta
        return tuple(beta) if isinstance(beta, (tuple, list)) else (beta,)

    @property
    def chosen_beta(self) -> float | tuple[float, ...] | Literal["auto"]:
        """What is given, or the algorithm's own."""
        return schedule(self.algorithm).beta if self.beta is None else self.beta

    @property
    def fixed_gamma(self) -> float | None:
        """Gamma at the start of each batch, None where it is chosen automatically."""
        return schedule(self.algorithm).fixed_gamma if self.gamma == "auto" else self.gamma

    @cached_property
    def mover(self) -> Moves:
        """How values move: as ``momentum`` says, else in the algorithm's own way.

        Values descend as in the paper where gamma is given. So do values that are kept: what they
        do must not depend on how many steps a call has. Where the loss is pushed up F may have no
        minimum.
        """
        if self.momentum == "conjugate":
            return "conjugate"
        told = self.gamma != "auto" or self.momentum is not None or self.inference is not None
        steady = self.reset == "batch" and not precisions(self.precisions).varies
        own = not told and steady and min(self.betas) > 0
        return schedule(self.algorithm).mover if own else "plain"

    @cached_property
    def apart(self) -> str:
        """Why stages do not run at once, each by itself, "" where they do."""
        way = schedule(self.algorithm)
        if way.through:
            return f"{self.algorithm} sends gradients from stage to stage. Use 'ipc' or 'pc'."
        if way.wave or precisions(self.precisions).wave:
            return "one stage runs at a time. Use 'ipc' or 'pc' with constant precisions."
        follow = "values of ipc follow one another where gamma is automatic. Give gamma a number."
        return follow if self.mover == "passing on" else ""

    @cached_property
    def one_by_one(self) -> str:
        """Why stages cannot run side by side, "" where they may."""
        if self.inference is not None and not self.apart:
            return "inference= may treat each value by itself. Use gamma and momentum."
        return self.apart

    @cached_property
    def chosen_decay(self) -> float:
        """Of gamma: the paper's (D.3), or 1 where gamma is given, F moves or a batch never ends."""
        lasts = self.reset == "never" or precisions(self.precisions).varies
        own = 1.0 if lasts or self.fixed_gamma is not None else 0.9
        return own if self.gamma_decay is None else self.gamma_decay


#: What other libraries call an argument, and arguments of earlier versions.
_MEANT = {"T": "t steps n_steps num_steps iterations", "gamma": "rate step_size x_lr value_lr"}
_GONE = {"nudging": "beta=0.3 (positive), beta=-0.3 (negative), beta=(0.3, -0.3) (centered)"}


def refuse_unknown(door: str, given: Iterable[str], algorithm: bool = True) -> None:
    """Refuses arguments that no setting has, or ``algorithm``, and names the one that is meant."""
    known = [f.name for f in fields(Settings) if algorithm or f.name != "algorithm"]
    own = {a for k in vars(optim).values() if isinstance(k, type) for a in signature(k).parameters}
    for name in given:
        if name in _GONE:
            raise ConfigError(f"{door}: {name}= is gone, write {_GONE[name]}.")
        if name not in known:
            close = [m for m, others in _MEANT.items() if name.lower() in others.split()]
            close += difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            meant = f"Did you mean {close[0]}=? " if close else ""
            takes = f"It takes {', '.join(known)}."
            if name in own:
                meant, takes = "", "It belongs to the wrapped optimizer: give it to that one."
            raise ConfigError(f"{door} has no argument {name}=. {meant}{takes}")
