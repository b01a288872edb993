"""Modules to write into a generative model."""

from lightning_pc.nodes.latent import Latent

__all__ = ["Latent"]
