"""Who is measured: one file a package, each with its adapters."""

from benchmarks.peers import (
    diffrax_peer,
    jax_peer,
    ours,
    torchdiffeq_peer,
    torchdiffeqpack_peer,
    torchode_peer,
    zuko_peer,
)
from benchmarks.peers.base import Bound, Peer

_MODULES = (
    torchdiffeq_peer,
    torchode_peer,
    torchdiffeqpack_peer,
    zuko_peer,
    diffrax_peer,
    jax_peer,
    ours,
)

PEERS: dict[str, Peer] = {peer.name: peer for module in _MODULES for peer in module.PEERS}

BASELINE = "torchdiffeq/backprop"
"""The peer that times and peaks are divided by."""

__all__ = ["BASELINE", "PEERS", "Bound", "Peer"]
