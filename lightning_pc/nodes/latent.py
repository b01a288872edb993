"""Latent variables: causes that nothing predicts, which predictive coding infers from data."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_pc.errors import ConfigError, UnsupportedError, refuse, shown


class Stand(NamedTuple):
    """What is to stand for a latent variable in one forward.

    Attributes:
        of: The module.
        start: Where its values start, [B, *].
        numbers: Of the samples, [B]; None where none are kept.
    """

    of: Latent
    start: Tensor
    numbers: Tensor | None = None


class Latent(nn.Module):
    """The causes at the top of a generative model: value nodes without a prediction from above.

    ``latent(B)`` gives values of B samples, ``latent(indices)`` those of the samples with these
    numbers, which are kept from epoch to epoch and in checkpoints. While a batch is learned, or in
    `lightning_pc.infer`, they are inferred. Elsewhere they are as they stand: those of numbered
    samples as of their last batch, others at their start.

    Args:
        *shape: Of one sample's values; with B samples they are [B, *shape].
        samples: How many samples there are, to keep the values of each; None for new ones at each
            call.
        prior: Whether their energy is ``0.5 * ||x||^2``, of a standard normal prior (Salvatori et
            al. 2024, Eq. 1), or none.
        start: Where values start: ``"zeros"``, the prior's mean, or ``"normal"``, drawn from it.
        seed: Of these draws; None for torch's own generator.

    Attributes:
        values: Of numbered samples, [samples, *shape].
        drawn: State of the generator of ``seed``, bytes; None without one.

    Raises:
        ConfigError: A wrong argument; an index out of range; indices where no ``samples`` are kept,
            or a number where they are.
        UnsupportedError: Called while gradients are on in a training module that nobody records:
            backprop cannot infer causes.
    """

    values: Tensor
    drawn: Tensor | None

    def __init__(
        self,
        *shape: int,
        samples: int | None = None,
        prior: bool = True,
        start: Literal["zeros", "normal"] = "zeros",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        refuse(
            {
                f"Latent{shown(shape)}: expected the sizes of one sample's values, such as "
                "Latent(16).": not shape or not all(_is_size(n) for n in shape),
                f"samples={shown(samples)}: expected how many samples there are, or None.": (
                    samples is not None and not _is_size(samples)
                ),
                f"start={shown(start)}: expected 'zeros' or 'normal'.": (
                    start not in ("zeros", "normal")
                ),
                f"prior={shown(prior)}: expected True or False.": not isinstance(prior, bool),
                f"seed={shown(seed)}: expected a whole number or None.": not (
                    seed is None or isinstance(seed, Integral)
                ),
            }
        )
        self.shape, self.samples, self.prior, self.start = shape, samples, prior, start
        self._seed = seed
        # A buffer, so that it is copied, kept in checkpoints and put back like others.
        state = None if seed is None else torch.Generator().manual_seed(int(seed)).get_state()
        self.register_buffer("drawn", state)
        self.register_buffer("values", self._begin(samples or 0), persistent=samples is not None)

    @property
    def at_mean(self) -> bool:
        """Whether values always start at the prior's mean."""
        return self.samples is None and self.start == "zeros"

    @override
    def extra_repr(self) -> str:
        kept = "" if self.samples is None else f", samples={self.samples}"
        seed = "" if self._seed is None else f", seed={self._seed}"
        sizes = ", ".join(map(str, self.shape))
        return f"{sizes}{kept}, prior={self.prior}, start={self.start!r}{seed}"

    @override
    def forward(self, which: int | Tensor) -> Tensor:
        """The values of B samples.

        Args:
            which: B, or of numbered samples their numbers, whole numbers [B] in [0, samples).

        Returns:
            Their values, [B, *shape].
        """
        with torch._C.DisableTorchFunction(), torch.no_grad():
            stand = self._stand(which)
        meets: list[Callable[[Stand], Tensor]] = getattr(_here, "meets", [])
        if meets:
            return meets[-1](stand)
        if self.training and torch.is_grad_enabled():
            raise UnsupportedError(
                "A Latent is inferred by predictive coding, and backprop would leave it where it "
                "starts. Train with PCStrategy('pc') or lightning_pc.optim.PC, infer with "
                "lightning_pc.infer, and look at the model under model.eval()."
            )
        return stand.start

    def _stand(self, which: int | Tensor) -> Stand:
        if self.samples is None:
            if not _is_size(which):
                raise ConfigError(
                    f"This Latent keeps no samples, so it is called with a batch size, such as "
                    f"latent(len(x)), not with {_told(which)}. For values by number give samples=N."
                )
            start = self._begin(int(which)).to(self.values)
            return Stand(self, start)
        if not isinstance(which, Tensor) or which.dim() != 1 or _is_continuous(which):
            raise ConfigError(
                f"This Latent keeps the values of {self.samples} samples, so it is called with "
                f"their numbers, a tensor of whole numbers [B], not with {_told(which)}."
            )
        numbers = which.long().to(self.values.device)
        if not len(numbers) or len({*numbers.tolist()}) < len(numbers):
            told = "no number at all" if not len(numbers) else "a number twice, which has one value"
            raise ConfigError(f"This Latent keeps the values of samples, and was given {told}.")
        if not 0 <= int(numbers.min()) <= int(numbers.max()) < self.samples:
            raise ConfigError(
                f"This Latent keeps {self.samples} samples, numbered from 0 to "
                f"{self.samples - 1}, and was asked for {int(numbers.min())} to "
                f"{int(numbers.max())}."
            )

        return Stand(self, self.values[numbers], numbers)

    @torch.no_grad()
    def keep(self, numbers: Tensor, values: Tensor) -> None:
        """Keeps the values [B, *shape] of samples with these numbers [B]."""
        self.values[numbers] = values.to(self.values)

    def _begin(self, size: int) -> Tensor:
        if self.start == "zeros":
            return torch.zeros(size, *self.shape)
        if self.drawn is None:
            return torch.randn(size, *self.shape)
        generator = torch.Generator()
        generator.set_state(self.drawn.cpu())
        values = torch.randn(size, *self.shape, generator=generator)
        self.drawn.copy_(generator.get_state())
        return values


def _is_size(number: object) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool) and int(number) >= 1


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool


def _told(which: object) -> str:
    if isinstance(which, Tensor):
        return f"a tensor of shape {tuple(which.shape)} and {which.dtype}"
    return shown(which)


_here = threading.local()  # who meets the latent variables of this thread's forward


@contextmanager
def latents_met(meet: Callable[[Stand], Tensor]) -> Iterator[None]:
    """What a `Latent` gives inside is what ``meet`` returns."""
    meets: list[Any] = vars(_here).setdefault("meets", [])
    meets.append(meet)
    try:
        yield
    finally:
        meets.pop()
