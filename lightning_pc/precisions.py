"""Precisions for users to name: weights of the node energies, by depth and step."""

from lightning_pc.inference.precisions import Constant as Constant
from lightning_pc.inference.precisions import Decaying as Decaying
from lightning_pc.inference.precisions import Depth as Depth
from lightning_pc.inference.precisions import Precisions as Precisions
from lightning_pc.inference.precisions import Spiking as Spiking
