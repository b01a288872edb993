"""How much memory the tensors take that a call makes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes alive at once on the CPU of the tensors that ``run`` makes.

    What was there before does not count, nor that it is freed meanwhile: of that the profiler knows
    no size, or an old one, of what stood at the same address when it last watched.
    """
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    profiler: Any = profile.profiler
    events, changes = profiler.kineto_results.experimental_event_tree(), []
    while events:
        event = events.pop()
        events += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            change = event.extra_fields
            changes.append((event.start_time_ns, change.ptr, change.alloc_size))
    held: dict[int, int] = {}
    alive = peak = 0
    for _, address, size in sorted(changes):
        alive -= held.pop(address, 0)
        if size > 0:
            held[address] = size
            alive += size
        peak = max(peak, alive)
    return peak
