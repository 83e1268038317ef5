"""Peak live memory of a function: what its tensors occupy, not what the process reserves.

On the CPU the allocator's own events are read (``profile_memory`` of torch's profiler), so the
figure is exact to the byte and the same on every run. Operators are not recorded: only allocations
are, which keeps a run of a million events near its normal speed.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def peak_memory(fn: Callable[[], object], *, device: str | torch.device = "cpu") -> int:
    """Runs ``fn`` once and returns the largest number of bytes its tensors held at one time.

    Counted is what ``fn`` allocates and has not yet freed, its return value included. Memory that
    was live before the call counts for nothing, whether ``fn`` frees it (CPU) or not.

    Args:
        fn: Called once without arguments; its result is dropped after the measurement.
        device: ``"cpu"`` reads the allocator's events. A CUDA device reads the peak of torch's
            caching allocator above its level at the start; there, freed older memory lowers the
            figure.

    Returns:
        Peak live bytes.

    Raises:
        RuntimeError: On the CPU, when a torch profiler is already running.
        ValueError: For a device that is neither CPU nor CUDA.

    Example:
        >>> import torch
        >>> def two_then_one() -> torch.Tensor:
        ...     first, second = torch.empty(1000), torch.empty(500)
        ...     del first
        ...     return torch.empty(250)
        >>> peak_memory(two_then_one)
        6000
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"peak_memory measures device 'cpu' or 'cuda', not {str(device)!r}")
    gc.collect()  # cycles left by earlier work would otherwise be freed, and counted, inside
    return _peak_cpu(fn) if device.type == "cpu" else _peak_cuda(fn, device)


def _peak_cuda(fn: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = fn()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def _peak_cpu(fn: Callable[[], object]) -> int:
    stop = _record_allocations()
    try:
        result = fn()
    finally:
        tree = stop()
    del result
    return _peak_of(_walk(tree))


def _peak_of(events: Iterable[tuple[int, int]]) -> int:
    """Peak of the running sum of ``(address, bytes)``; frees have negative bytes.

    A free of an address that was not allocated inside the window belongs to an older tensor and is
    passed over.
    """
    sizes: dict[int, int] = {}
    live = peak = 0
    for address, size in events:
        if size > 0:
            sizes[address] = size
            live += size
            peak = max(peak, live)
        else:
            live -= sizes.pop(address, 0)
    return peak


def _record_allocations() -> Callable[[], list[Any]]:
    """Starts to record the CPU allocator's events; the result stops it and gives their tree."""
    # torch.profiler.profile cannot leave the operators out, most of its events and of its cost.
    from torch._C._profiler import RecordScope, _ExperimentalConfig

    autograd: Any = torch.autograd  # its stubs lack what follows
    if autograd._profiler_enabled():
        raise RuntimeError("peak_memory cannot run inside a running torch profiler; stop it first")
    memory_only = (False, True, False, False, False)  # shapes, memory, stack, flops, modules
    config = autograd.ProfilerConfig(
        autograd.ProfilerState.KINETO, *memory_only, _ExperimentalConfig()
    )
    activities = {autograd.ProfilerActivity.CPU}
    with _quiet_kineto():
        autograd._prepare_profiler(config, activities)
        autograd._enable_profiler(config, activities, {RecordScope.USER_SCOPE})

    def stop() -> list[Any]:
        with _quiet_kineto():
            return list(autograd._disable_profiler().experimental_event_tree())

    return stop


def _walk(tree: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the CPU allocation events of a tree, which is ordered by time."""
    for node in tree:
        fields = node.extra_fields
        if isinstance(fields, torch._C._profiler._ExtraFields_Allocation):
            if fields.device.type == "cpu":
                yield fields.ptr, fields.alloc_size
        else:  # a record_function of the user's holds the allocations made inside it
            yield from _walk(node.children)


@contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Keeps the profiler's notices off stderr, unless the user has asked for a level."""
    name = "KINETO_LOG_LEVEL"
    asked = name in os.environ
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if not asked:
            del os.environ[name]
