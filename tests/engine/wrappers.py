"""Every wrapper by its algorithm's name."""

import pytest

from lightning_pc.optim import EPC, IEPC, IPC, PC, ZIL

WRAPPERS = {"ipc": IPC, "pc": PC, "zil": ZIL, "epc": EPC, "iepc": IEPC}
every = pytest.mark.parametrize("kind", WRAPPERS.values())


def learn(optimizer, loss_of, batches):
    return [float(optimizer.step(loss_of)) for _ in range(batches)]
