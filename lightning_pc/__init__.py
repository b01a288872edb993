"""Predictive coding for any unmodified ``nn.Module``.

Importing the package registers ``Trainer(strategy="ipc")``, ``"pc"``, ``"zil"``, ``"epc"`` and
``"iepc"``.
"""

from lightning_pc.callbacks import EnergyMonitor as EnergyMonitor
from lightning_pc.callbacks import RandomState as RandomState
from lightning_pc.diagnosis import explain as explain
from lightning_pc.inspection import Description as Description
from lightning_pc.inspection import describe as describe
from lightning_pc.report import StepReport as StepReport
from lightning_pc.strategy import PCStrategy as PCStrategy

__version__ = "0.1.0"
