"""A pytree of tensors as one flat vector; a single tensor passes untouched."""

from __future__ import annotations

import functools
import math
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from symplectic_adjoint._errors import ArgumentError, FieldOutputError


@dataclass(frozen=True)
class StateSpec:
    """How the user's state maps onto the flat state.

    Attributes:
        tree: Structure of the user's state; None when the state is one tensor, which is then
            the flat state itself, in its own shape.
        names: Path of each leaf, for messages.
        shapes: Shape of each leaf.
        dtypes: Dtype of each leaf; the flat state has their promoted dtype.
    """

    tree: pytree.TreeSpec | None
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]

    @staticmethod
    def of(state: Any) -> tuple[StateSpec, Tensor]:
        """The spec of a state and the state flattened (differentiably).

        Raises:
            ArgumentError: A leaf is not a floating-point or complex tensor, leaves live on
                different devices, or real and complex leaves are mixed.
        """
        if isinstance(state, Tensor):
            _check_leaf("y0", state)
            return StateSpec(None, ("y0",), (state.shape,), (state.dtype,)), state
        paths, tree = pytree.tree_flatten_with_path(state)
        names = tuple("y0" + pytree.keystr(path) for path, _ in paths)
        leaves = [leaf for _, leaf in paths]
        if not leaves:
            raise ArgumentError("y0 holds no tensor; give a tensor or a pytree of tensors")
        for name, leaf in zip(names, leaves, strict=True):
            _check_leaf(name, leaf)
        devices = {leaf.device for leaf in leaves}
        if len(devices) > 1:
            raise ArgumentError(
                f"the leaves of y0 live on several devices ({', '.join(sorted(map(str, devices)))})"
                "; move them to one"
            )
        if len({leaf.is_complex() for leaf in leaves}) > 1:
            raise ArgumentError(
                "y0 mixes real and complex leaves; make them all complex, or use torch.view_as_real"
            )
        spec = StateSpec(
            tree, names, tuple(x.shape for x in leaves), tuple(x.dtype for x in leaves)
        )
        return spec, spec._join(leaves)

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """Dtype of the flat state."""
        return functools.reduce(torch.promote_types, self.dtypes)

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each leaf."""
        return tuple(math.prod(shape) for shape in self.shapes)

    def unflatten(self, flat: Tensor) -> Any:
        """The user's state from a flat state of shape ``(*batch, n)``; leaves get the batch axes.

        Example:
            >>> spec, flat = StateSpec.of((torch.zeros(2, 3), torch.ones(1)))
            >>> flat.shape, [x.shape for x in spec.unflatten(flat.expand(5, 7))]
            (torch.Size([7]), [torch.Size([5, 2, 3]), torch.Size([5, 1])])
        """
        if self.tree is None:
            return flat
        batch = flat.shape[:-1]
        leaves = [
            part.reshape(batch + shape).to(dtype)
            for part, shape, dtype in zip(
                torch.split(flat, list(self.sizes), dim=-1), self.shapes, self.dtypes, strict=True
            )
        ]
        return pytree.tree_unflatten(leaves, self.tree)

    def flatten_like(self, value: Any) -> Tensor:
        """``func``'s output as a flat tensor, checked leaf by leaf against the state.

        Raises:
            FieldOutputError: Structure or shape differ from the state's, or a leaf is no tensor.
        """
        if self.tree is None:
            if not isinstance(value, Tensor):
                raise FieldOutputError(
                    f"func must return a tensor like y0, but returned {type(value).__name__}"
                )
            return value
        leaves = self._leaves_like(value, self.tree)
        for name, shape, leaf in zip(self.names, self.shapes, leaves, strict=True):
            if not isinstance(leaf, Tensor):
                raise FieldOutputError(
                    f"func returned {type(leaf).__name__} as the derivative of {name}; "
                    "return a tensor"
                )
            if leaf.shape != shape:
                raise FieldOutputError(
                    f"func returned shape {tuple(leaf.shape)} as the derivative of {name}, "
                    f"which has shape {tuple(shape)}; they must be equal"
                )
        return self._join(leaves)

    def _leaves_like(self, value: Any, wanted: pytree.TreeSpec) -> list[Any]:
        """The leaves of ``value`` in the order of the state's."""
        leaves, tree = pytree.tree_flatten(value)
        if tree == wanted:
            return leaves
        try:
            return wanted.flatten_up_to(value)  # finds the items of a dict by their keys
        except ValueError:
            # A list returned for a tuple state, and the reverse, is what many users write.
            if _outline(tree) == _outline(wanted):
                return leaves
        raise FieldOutputError(
            f"func must return a pytree like y0 ({len(self.shapes)} tensors: "
            f"{', '.join(self.names)}), but returned {len(leaves)} leaves: {tree}"
        )

    def locate(self, index: int) -> str:
        """Name the element ``index`` of the (raveled) flat state: leaf, sample and component."""
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            if index < size:
                where = [int(i) for i in torch.unravel_index(torch.tensor(index), shape)]
                if not where:
                    return name
                sample = f"sample {where[0]}" if len(where) > 1 else f"component {where[0]}"
                rest = f", component {tuple(where[1:])}" if len(where) > 1 else ""
                return f"{name}, {sample}{rest}"
            index -= size
        raise IndexError(index)

    def _join(self, leaves: Sequence[Tensor]) -> Tensor:
        return torch.cat([leaf.reshape(-1).to(self.dtype) for leaf in leaves])


def _outline(tree: pytree.TreeSpec) -> Any:
    """The structure of a tree, not telling sequences apart."""
    if tree.is_leaf():
        return None
    sequence = tree.type in (list, tuple, namedtuple)
    kind = "sequence" if sequence else (tree.type, tree.context)
    return kind, [_outline(child) for child in tree.children()]


def _check_leaf(name: str, leaf: Any) -> None:
    if not isinstance(leaf, Tensor):
        raise ArgumentError(
            f"{name} must be a tensor, but is {type(leaf).__name__}; wrap it in "
            "torch.as_tensor, with the dtype of func's parameters"
        )
    if not (leaf.is_floating_point() or leaf.is_complex()):
        raise ArgumentError(
            f"{name} has dtype {leaf.dtype}; an ODE state must be floating-point or complex: "
            f"use {name}.float() or .double()"
        )


def real_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the real numbers that make up ``x``."""
    return x.dtype.to_real() if x.is_complex() else x.dtype


def real_size(x: Tensor) -> int:
    """How many real numbers make up ``x``."""
    return x.numel() * (2 if x.is_complex() else 1)


def as_real(x: Tensor, lead: int) -> Tensor:
    """The real numbers of ``x`` beside its ``lead`` first dimensions."""
    real = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return real.reshape((*x.shape[:lead], -1))


def as_state(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``as_real``: (*lead, N) -> (*lead, *like.shape)."""
    lead = x.shape[:-1]
    if like.is_complex():
        return torch.view_as_complex(x.reshape(*lead, *like.shape, 2).contiguous())
    return x.reshape((*lead, *like.shape))
