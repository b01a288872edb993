"""Energies of value nodes: how far a value is from its prediction.

By name or as objects in ``energies={"net.3": "bernoulli"}``.
"""

from lightning_pc.nodes.energies import (
    Bernoulli,
    Categorical,
    Energy,
    Gaussian,
    Huber,
    Laplace,
    Slopes,
)
from lightning_pc.nodes.learned import LearnedGaussian
from lightning_pc.nodes.registry import Entrywise, register

__all__ = [
    "Bernoulli",
    "Categorical",
    "Energy",
    "Entrywise",
    "Gaussian",
    "Huber",
    "Laplace",
    "LearnedGaussian",
    "Slopes",
    "register",
]
