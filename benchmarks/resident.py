"""Peak resident bytes of one run: ``python -m benchmarks.resident PROBLEM PEER``.

A process of its own for every figure, because freed memory is seldom given back and would hide the
next peak.
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

from benchmarks.peers import PEERS
from benchmarks.problems import PROBLEMS, quick


def peak_resident() -> int:
    """Peak resident bytes of this process so far (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("the kernel does not tell VmHWM")
    return int(found.group(1)) * 1024


def lower_peak() -> int:
    """Give freed memory back and let the peak begin anew; the resident bytes (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_resident()


def main(problem_name: str, peer_name: str) -> int:
    """Bytes by which one run raises the peak; a small run before loads the libraries."""
    problem, peer = PROBLEMS[problem_name], PEERS[peer_name]
    for size in (quick(problem), problem):
        before = peak_resident()
        peer.bind(size.instance()).run()
    return peak_resident() - before


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
