"""Modules whose parameters are sharded by ``torch.distributed.fsdp.fully_shard``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from symplectic_adjoint._errors import CaptureError


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the module; sees no need to load what does it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def parameters(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The parameters in the module's tree that are sharded now, each with where it is held."""
    from torch.distributed.tensor import DTensor

    for part in module.modules():
        held: Any = part._parameters
        for key, parameter in held.items():
            if isinstance(parameter, DTensor):
                yield held, key, parameter


def hooks(module: Any) -> Iterator[tuple[Any, int]]:
    """The hooks that would gather and shard the parameters at every call."""
    for held in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in held.items():
            if (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp"):
                yield held, key


def gathered(parameter: Any) -> Tensor:
    """A whole parameter; in reverse its gradient is averaged over the ranks and sharded.

    Raises:
        CaptureError: The parameter is sharded along several dimensions of the mesh.
    """
    from torch.distributed.tensor import Partial

    if sum(not placement.is_replicate() for placement in parameter.placements) > 1:
        raise CaptureError(
            f"a parameter of func is sharded along several dimensions of its mesh "
            f"({parameter.placements}), which a solve cannot gather; apply fully_shard to the "
            "module that contains the solve instead of to func"
        )
    whole: Tensor = parameter.full_tensor(
        grad_placements=[Partial("avg")] * parameter.device_mesh.ndim
    )
    return whole


def check(module: Any) -> None:
    """Refuse options of ``fully_shard`` that a gathered parameter would not follow.

    Raises:
        CaptureError: A policy of mixed precision, or a divisor of gradients, was set.
    """
    for group in module._get_fsdp_state()._fsdp_param_groups:
        policy = group.mp_policy
        dtypes = (policy.param_dtype, policy.reduce_dtype, policy.output_dtype)
        if any(dtype is not None for dtype in dtypes) or group.gradient_divide_factor is not None:
            raise CaptureError(
                "func is sharded with a policy of mixed precision or a divisor of gradients, which "
                "a solve does not follow; use torch.autocast around the solve, or apply "
                "fully_shard to the module that contains the solve"
            )


def already_gathered(module: Any, *_: Any) -> None:
    """Stands in for the hooks of a module whose parameters are gathered before the solve.

    Raises:
        CaptureError: Always; the module was called.
    """
    raise CaptureError(
        f"func calls {type(module).__name__}, whose shards fully_shard has gathered before the "
        "solve, so that its gradients would not be reduced; call its reshard() first, or apply "
        "fully_shard to the module that contains the solve"
    )
