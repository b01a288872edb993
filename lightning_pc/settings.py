"""Every knob of the engine, its range and its default."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_pc.errors import ConfigError
from lightning_pc.inference.precisions import Constant, Precisions, precisions
from lightning_pc.inference.schedules import SCHEDULES, schedule
from lightning_pc.nodes.energies import softmax_energy


@dataclass(frozen=True)
class Settings:
    """Every argument of predictive coding; both doors take them by name.

    Args:
        algorithm: ``"ipc"`` (values and weights move at every inference step), ``"pc"`` (values
            first, then weights once), ``"zil"`` (backprop's update by local errors), ``"epc"`` (pc
            in error coordinates, for deep modules: Goemaere et al. 2025) or ``"iepc"`` (ipc in
            error coordinates, for pretrained modules with value nodes everywhere).
        T: Inference steps per batch, at least 1. Default: max(8, depth + 1); zil and spiking
            precisions: depth + 1; epc, iepc: 8.
        gamma: Inference rate, positive. A number is exact: plain descent at that rate. ``"auto"``
            takes it from the curvature of F in the values, which is looked at every 300
            evaluations; zil: 1. With ``"auto"``, along conjugate gradients, values of ipc follow
            predictions that are moved too far, and all where connections skip all stages.
        gamma_decay: Factor of gamma after an inference step at which the energy has not fallen,
            within a batch, in (0, 1] (Salvatori et al. 2024, D.3). Default: 1 where gamma is given,
            0.9 where it is automatic.
        momentum: Share of their velocity that values keep from step to step, in [0, 1): 0 is the
            paper's descent, more is heavy ball, at rest at the start of a batch; PCX (Pinchetti
            et al. 2024) takes 0.35 to 0.7 for iPC; zil: 0. ``"conjugate"`` (pc, ipc, epc) finds
            rate and momentum of each step, by conjugate gradients; gamma is then the length of the
            step that is tried, but along a chain a value's first step may be longer. None is
            ``"conjugate"`` for pc and ipc where gamma is automatic, precisions do not vary, beta is
            positive and values are made anew for each batch, else 0.
        value_nodes: Where value nodes stand: ``"auto"`` (inputs of nonlinearities), ``"modules"``,
            ``"linear"``, ``"blocks"``, a module name or regular expression, or a list of these; in
            Python also a module type or a callable (name, module) -> bool.
        reset: ``"batch"`` makes values anew for each batch, ``"never"`` keeps them for full-batch
            training.
        loss_terms: Number of terms that the loss is a mean of, or in Python a callable (under the
            Trainer of the batch). Default: read off the loss functions that are called.
        softmax_energy: Energy at softmax logits: ``"categorical"`` (F_KL, Pinchetti et al. 2022) or
            ``"gaussian"``; zil, epc and iepc are Gaussian throughout.
        precisions: Weight of each node's energy in F: ``"constant"`` (1), a number, ``"spiking"``
            (Qi et al. 2025), an object of lightning_pc.precisions, or in Python a callable
            (depth, t) -> weight.
        beta: Factor of the loss in the F that values descend; parameters learn from F / beta
            (Scellier & Bengio 2017). 1 is plain predictive coding, a negative one pushes values
            away from the target, and of a pair such as (0.3, -0.3) parameters learn from the mean
            of both phases (pc, epc; 2 T evaluations).
        inference: In place of gamma and momentum, any optimizer of torch's for the values: a
            callable that makes it from their list, such as
            ``lambda values: torch.optim.Adam(values, 0.05)``; in YAML a class_path.

    Raises:
        ConfigError: A value is out of its range.
    """

    algorithm: Literal["ipc", "pc", "zil", "epc", "iepc"] = "ipc"
    T: int | None = None
    gamma: float | Literal["auto"] = "auto"
    gamma_decay: float | None = None
    momentum: float | Literal["conjugate"] | None = None
    # The list before the function: jsonargparse saves a value as the first that it may be.
    value_nodes: (
        str
        | list[str | type[nn.Module] | Callable[[str, nn.Module], bool]]
        | type[nn.Module]
        | Callable[[str, nn.Module], bool]
    ) = "auto"
    reset: Literal["batch", "never"] = "batch"
    loss_terms: float | Callable[..., float] | None = None
    softmax_energy: Literal["categorical", "gaussian"] = "categorical"
    precisions: float | str | Precisions | Callable[[int, int], float] = "constant"
    beta: float | tuple[float, ...] = 1.0
    inference: Callable[[list[Tensor]], Optimizer] | None = None

    def __post_init__(self) -> None:
        fixed = schedule(self.algorithm).fixed_gamma
        T, gamma = self.T, self.gamma
        if T is not None and not (_is_whole(T) and T >= 1):
            raise ConfigError(
                f"T={T!r}: expected a whole number of inference steps, >= 1, or None."
            )
        schedule(self.algorithm).steps(1, T)
        automatic = isinstance(gamma, str) and gamma == "auto"
        if not automatic and not (_is_number(gamma) and gamma > 0):  # type: ignore[operator]
            raise ConfigError(f"gamma={gamma!r}: expected a positive inference rate or 'auto'.")
        if fixed is not None and gamma not in ("auto", fixed):
            raise ConfigError(
                f"gamma={gamma}: {self.algorithm} is exact at gamma = {fixed:g} alone, "
                "leave gamma at 'auto'."
            )
        decay = self.gamma_decay
        if decay is not None and not (_is_number(decay) and 0 < decay <= 1):
            raise ConfigError(
                f"gamma_decay={self.gamma_decay!r}: expected a factor in (0, 1]; 1 keeps gamma."
            )
        if self.reset not in ("batch", "never"):
            raise ConfigError(f"reset={self.reset!r}: expected 'batch' or 'never'.")
        if self.reset == "never" and self.algorithm == "zil":
            raise ConfigError("reset='never': zil starts from the forward pass, use reset='batch'.")
        terms = self.loss_terms
        if terms is not None and not callable(terms) and not (_is_number(terms) and terms > 0):
            raise ConfigError(
                f"loss_terms={terms!r}: expected the number of terms that the loss is a mean of, "
                "or a callable of the batch."
            )
        softmax_energy(self.softmax_energy, -1)
        self._check_momentum()
        self._check_variants()

    def _check_momentum(self) -> None:
        momentum = self.momentum
        if momentum is None:
            return
        conjugate = isinstance(momentum, str) and momentum == "conjugate"
        if not conjugate and not (_is_number(momentum) and 0 <= momentum < 1):  # type: ignore[operator]
            raise ConfigError(
                f"momentum={momentum!r}: expected the share of their velocity that values keep "
                "from step to step, in [0, 1), 'conjugate' or None."
            )
        if momentum and self.algorithm == "zil":
            raise ConfigError(f"momentum={momentum!r}: zil is exact at 0 alone.")
        if conjugate and SCHEDULES[self.algorithm].whole:
            raise ConfigError(
                f"momentum={momentum!r} leads towards the minimum of F, but {self.algorithm} stays "
                "near its start on purpose: give a number, or use 'ipc'."
            )
        if conjugate and precisions(self.precisions).varies:
            raise ConfigError(
                f"momentum={momentum!r} tells from two gradients how F bends between them, but "
                "varying precisions change F itself: give a number."
            )

    def _check_whole(self) -> None:
        if self.reset == "never":
            raise ConfigError(
                f"reset='never': {self.algorithm} would go on learning from gradients of calls "
                "long past, since its errors forget as slowly as they move. Use 'ipc' or 'pc'."
            )

    def _check_variants(self) -> None:
        betas = self.betas
        if not betas or len(betas) > 2 or not all(_is_number(b) and b for b in betas):
            raise ConfigError(
                f"beta={self.beta!r}: expected the loss's factor in F, a number that is not 0 "
                "(negative pushes values away from the target), or a pair such as (0.3, -0.3)."
            )
        weights = precisions(self.precisions)
        if self.algorithm == "zil" and (self.betas != (1,) or weights != Constant()):
            raise ConfigError(
                "zil is exact for plain predictive coding alone: leave precisions and beta at "
                "their defaults."
            )
        if weights.wave and self.reset == "never":
            raise ConfigError(
                f"precisions={weights.name!r} send one wave through a batch, but reset='never' "
                "keeps values for the next, in which it would only add up: use reset='batch'."
            )
        if SCHEDULES[self.algorithm].through and weights.wave:
            raise ConfigError(
                f"precisions={weights.name!r} follows an error on its way up, stage by stage, but "
                f"{self.algorithm}'s errors start everywhere at once: use 'pc' or 'ipc'."
            )
        if SCHEDULES[self.algorithm].whole:
            self._check_whole()
        self._check_inference()
        if len(betas) == 1:
            return
        if SCHEDULES[self.algorithm].incremental:
            raise ConfigError(
                f"beta={self.beta!r}: {self.algorithm} moves the weights at every step, and the "
                "second phase would not start where the first did. Use 'pc' or 'epc', or one beta."
            )
        if self.reset == "never":
            raise ConfigError(
                f"beta={self.beta!r}: both phases start from the forward pass, use reset='batch'."
            )
        if self.T == 1:
            raise ConfigError(f"beta={self.beta!r}: T=1 leaves the values no step, use T >= 2.")

    def _check_inference(self) -> None:
        if self.inference is None:
            return
        if not callable(self.inference):
            raise ConfigError(
                f"inference={self.inference!r}: expected a callable that makes an optimizer of the "
                "values, e.g. lambda values: torch.optim.Adam(values, 0.05)."
            )
        given = [
            name
            for name, value, default in (
                ("gamma", self.gamma, "auto"),
                ("gamma_decay", self.gamma_decay, None),
                ("momentum", self.momentum, None),
            )
            if value != default
        ]
        if given or self.algorithm == "zil":
            raise ConfigError(
                f"inference= moves the values in its own way: {', '.join(given) or 'zil'} would "
                "have no effect, leave it out."
            )

    @property
    def betas(self) -> tuple[float, ...]:
        """The beta of each phase of a batch."""
        return tuple(self.beta) if isinstance(self.beta, (tuple, list)) else (self.beta,)

    @property
    def fixed_gamma(self) -> float | None:
        """Gamma at the start of each batch, None where it is chosen automatically."""
        fixed = schedule(self.algorithm).fixed_gamma
        return fixed if self.gamma == "auto" else self.gamma

    @property
    def chosen_momentum(self) -> float | Literal["conjugate"]:
        """Of the values: the one given, else conjugate gradients where the algorithm has them.

        With a given gamma values descend as in the paper. Where they are kept from call to call
        they do, too: what they do must not depend on how many steps a call has. And where the loss
        is pushed up: F may have no minimum.
        """
        if self.inference is not None:
            return 0.0
        if self.momentum is not None:
            return self.momentum
        steady = self.reset == "batch" and not precisions(self.precisions).varies
        downhill = schedule(self.algorithm).conjugate and min(self.betas) > 0
        return "conjugate" if self.gamma == "auto" and steady and downhill else 0.0

    @property
    def chosen_decay(self) -> float:
        """Of gamma: 1 where gamma is given or F moves by itself, else that of the paper (D.3)."""
        if self.gamma_decay is not None:
            return self.gamma_decay
        given = self.fixed_gamma is not None or precisions(self.precisions).varies
        return 1.0 if given else 0.9


#: Arguments of earlier versions and what to write instead.
_GONE = {"nudging": "beta=0.3 (positive), beta=-0.3 (negative), beta=(0.3, -0.3) (centered)"}


def refuse_unknown(door: str, given: Iterable[str]) -> None:
    """Refuses arguments that no setting has.

    Raises:
        ConfigError: Naming the argument, and the one that may be meant.
    """
    known = [f.name for f in fields(Settings)]
    for name in given:
        if name in _GONE:
            raise ConfigError(f"{door}: {name}= is gone, write {_GONE[name]}.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            meant = f"Did you mean {close[0]}=? " if close else ""
            raise ConfigError(
                f"{door} has no argument {name}=. {meant}It takes {', '.join(known)}."
            )


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
