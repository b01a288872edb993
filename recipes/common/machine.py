"""What figures were measured on."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import lightning
import torch

import lightning_pc


def machine(torch_threads: int | None = None) -> dict[str, Any]:
    """Kind of machine and its GPU, torch threads (default: this process's) and versions."""
    return {
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "torch_threads": torch_threads or torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "lightning_pc": lightning_pc.__version__,
        },
    }


def clock() -> float:
    """Seconds: the processor's, the measure on a busy machine, but where there is a GPU."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()
