"""Predictive coding for any unmodified ``nn.Module``.

Importing the package registers ``Trainer(strategy="pc_auto")``, ``"ipc"``, ``"pc"``, ``"zil"``,
``"epc"`` and ``"iepc"``, on several devices ``"ipc_ddp"`` and so on, with sharded weights
``"ipc_sharded"``. Lightning is loaded only where it is used, so `lightning_pc.optim` goes without.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_pc.callbacks import EnergyMonitor as EnergyMonitor
    from lightning_pc.callbacks import RandomState as RandomState
    from lightning_pc.description import Description as Description
    from lightning_pc.description import describe as describe
    from lightning_pc.distributed import PCDDPStrategy as PCDDPStrategy
    from lightning_pc.inferring import Inferred as Inferred
    from lightning_pc.inferring import infer as infer
    from lightning_pc.insight.explain import explain as explain
    from lightning_pc.insight.report import StepReport as StepReport
    from lightning_pc.sharded import PCShardedStrategy as PCShardedStrategy
    from lightning_pc.strategy import PCStrategy as PCStrategy

__version__ = "0.1.0"

_WHERE = {
    "EnergyMonitor": "callbacks",
    "RandomState": "callbacks",
    "Inferred": "inferring",
    "explain": "insight.explain",
    "infer": "inferring",
    "Description": "description",
    "describe": "description",
    "StepReport": "insight.report",
    "PCDDPStrategy": "distributed",
    "PCShardedStrategy": "sharded",
    "PCStrategy": "strategy",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lightning_pc' has no attribute {name!r}")
    return getattr(import_module(f"lightning_pc.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return [*_WHERE, "__version__"]


class _Registration(MetaPathFinder):
    """Registers the strategies once Lightning has been imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "lightning.pytorch":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                import_module("lightning_pc.strategy")

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "lightning.pytorch" in sys.modules:
    import_module("lightning_pc.strategy")
else:
    sys.meta_path.insert(0, _Registration())
