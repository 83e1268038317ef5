"""``func`` as a graph of operations on its inputs: what the compiled tiers run.

TorchDynamo reads ``func`` once and guards what it has read: code, shapes, dtypes and Python values.
At the next solve the guards are checked and give back the same graph, together with the tensors
that ``func`` depends on now, its parameters and whatever its closure holds. So a graph is known by
code and structure and not by the identity of ``func``: a lambda made anew for each call finds it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from symplectic_adjoint._errors import CompilationError
from symplectic_adjoint._tree import real_dtype
from symplectic_adjoint._types import FlatFunc, code_of

RECOMPILES = 32
"""After so many graphs of the same code, ``func`` is taken to change at every call."""

_SETTINGS = {
    "trace_autograd_ops": True,  # func may differentiate inside itself
    "specialize_float": True,
    "specialize_int": True,
}


@dataclass
class Graph:
    """``f(t, y, *tensors)`` as one graph, for all solves that pass the same guards.

    Attributes:
        module: The graph, with the inputs that TorchDynamo has found.
        sizes: For each input that is a number, the tensor input and the dimension it is the size
            of.
        dynamic: For each tensor input, the dimensions whose size may change, and the name of each
            size.
        programs: What was compiled of it, by what else it depends on.
    """

    module: fx.GraphModule
    sizes: Mapping[int, tuple[int, int]]
    dynamic: Mapping[int, dict[int, str]]
    programs: dict[Any, Any] = field(default_factory=dict)
    _places: tuple[int | None, int | None] = (None, None)
    _others: tuple[int, ...] = ()

    def place(self, args: Sequence[Any], t: Tensor, y: Tensor) -> list[Tensor]:
        """Note which inputs are ``t`` and ``y``; returns the others."""
        where = [next((i for i, x in enumerate(args) if x is own), None) for own in (t, y)]
        self._places = (where[0], where[1])
        taken = {*where, *self.sizes}
        self._others = tuple(i for i in range(len(args)) if i not in taken)
        return [args[i] for i in self._others]

    @property
    def dims(self) -> list[dict[int, str]]:
        """The dimensions of the tensors, except ``t`` and ``y``, whose size may change."""
        return [self.dynamic[i] for i in self._others]

    @property
    def state_dims(self) -> dict[int, str]:
        """The dimensions of the state whose size may change."""
        where = self._places[1]
        return {} if where is None else self.dynamic[where]

    def __call__(self, t: Tensor, y: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Evaluate ``f``, differentiably."""
        args: dict[int | None, Any] = dict(zip(self._others, tensors, strict=True))
        args |= dict(zip(self._places, (t, y), strict=True))
        args.pop(None, None)  # func may not depend on t, or not on y
        for i, (source, dim) in self.sizes.items():
            args[i] = args[source].shape[dim]
        (k,) = self.module(*(args[i] for i in range(len(args))))
        return k  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Lifted:
    """``func`` at one solve: its graph, and the tensors that it depends on."""

    graph: Graph
    tensors: Sequence[Tensor]


def lift(flat: FlatFunc, func: Any, y0: Tensor) -> Lifted:
    """The graph of ``func`` on the flat state, read again only where something has changed.

    Args:
        flat: ``func`` on the flat state.
        func: The user's function, by whose code graphs are kept.
        y0: The flat initial state.

    Raises:
        CompilationError: ``func`` is no graph of tensor operations alone; says what and where.
    """
    t = y0.new_zeros((), dtype=real_dtype(y0))
    # func may differentiate with respect to its argument, and expect it to require grad.
    y = y0.detach().requires_grad_()
    _caught.clear()
    try:
        with torch.enable_grad(), _settings(), warnings.catch_warnings():
            # TorchDynamo looks at the gradients of tensors that are no leaves.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
            _entry(code_of(func))(flat, t, y)
    except Exception as error:
        raise CompilationError(_reason(error)) from error
    if _caught.graph is None:
        raise CompilationError("TorchDynamo is disabled or made no graph of func")
    graph, args = _caught.graph, _caught.args
    _caught.clear()
    return Lifted(graph, graph.place(args, t, y))


@contextlib.contextmanager
def _settings() -> Generator[None]:
    """TorchDynamo's settings for ``func``; its own ``config.patch`` takes five times as long."""
    config: Any = torch._dynamo.config
    before = {name: getattr(config, name) for name in _SETTINGS}
    try:
        for name, value in _SETTINGS.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


class _Caught(threading.local):
    """The graph that was called last, and its inputs."""

    graph: Graph | None = None
    args: Sequence[Any] = ()

    def clear(self) -> None:
        self.graph, self.args = None, ()


_caught = _Caught()


@functools.cache
def _entry(key: Any) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """A function of its own for each code, since TorchDynamo limits the graphs of a function."""
    fresh = types.FunctionType(
        _call.__code__.replace(co_name=f"func_{key}"), _call.__globals__, "call"
    )
    # The stubs do not know recompile_limit yet.
    compile_: Any = torch.compile
    compiled: Callable[[Any, Tensor, Tensor], Tensor] = compile_(
        fresh, backend=_backend, fullgraph=True, recompile_limit=RECOMPILES
    )
    return compiled


def _call(func: Any, t: Tensor, y: Tensor) -> Tensor:
    # What required grad inside of func must not be returned; ``_backend`` takes this off again.
    return func(t, y).detach()  # type: ignore[no-any-return]


def _backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    _refuse_effects()
    module = _copied(module)
    _drop_detach(module)
    constants = _taken_out(module)
    sizes, dynamic = _shapes(module)
    graph = Graph(module, sizes, dynamic)

    def run(*args: Any) -> tuple[Any]:
        _caught.graph, _caught.args = graph, (*args, *constants)
        return (args[0] if args else None,)

    return run


def _refuse_effects() -> None:
    """A compiled loop would do once what ``func`` does at every evaluation.

    Raises:
        CompilationError: ``func`` writes to something that outlives the call.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    effects = InstructionTranslator.current_tx().output.side_effects
    names = [name for held in effects.store_attr_mutations.values() for name in held]
    if names:
        raise CompilationError(f"func assigns to {names[0]!r} at every evaluation")
    for variable in effects.id_to_variable.values():
        kind = type(variable).__name__
        if kind != "TensorVariable" and effects.is_modified(variable):
            raise CompilationError(f"func changes a Python object ({kind}) at every evaluation")


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    """TorchDynamo looks at the inputs of its own graph again."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)


def _drop_detach(module: fx.GraphModule) -> None:
    (output,) = module.graph.find_nodes(op="output")
    (result,) = output.args[0]
    output.args = ((result.args[0],),)
    module.graph.erase_node(result)
    module.recompile()


def _taken_out(module: fx.GraphModule) -> list[Tensor]:
    """Makes inputs of the tensors that ``func`` makes of numbers; a loop can hold no constants."""
    graph, constants = module.graph, []
    *_, last = graph.find_nodes(op="placeholder") or [None]
    for node in graph.find_nodes(op="call_function", target=torch.tensor):
        if node.all_input_nodes or node.kwargs.get("requires_grad"):
            continue
        constants.append(torch.tensor(*node.args, **node.kwargs))
        with graph.inserting_after(last):
            last = graph.placeholder(f"constant_{len(constants)}")
        last.meta = node.meta
        node.replace_all_uses_with(last)
        graph.erase_node(node)
    module.recompile()
    return constants


def _shapes(
    module: fx.GraphModule,
) -> tuple[dict[int, tuple[int, int]], dict[int, dict[int, str]]]:
    """Which inputs are sizes of which, and which sizes may change."""
    values = [node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder")]
    symbols: dict[str, tuple[int, int]] = {}
    dynamic: dict[int, dict[int, str]] = {}
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            sizes_of: Iterable[tuple[int, Any]] = enumerate(value.shape)
            dynamic[i] = {d: str(size) for d, size in sizes_of if _changes(size)}
            symbols |= {name: (i, d) for d, name in dynamic[i].items()}
    sizes = {}
    for i, value in enumerate(values):
        if not isinstance(value, Tensor):
            if str(value) not in symbols:
                raise CompilationError(f"func depends on a number ({value}) that changes")
            sizes[i] = symbols[str(value)]
    return sizes, dynamic


def _changes(size: Any) -> bool:
    """Whether a size may change; func may have made a constant of what changed before."""
    return type(size) is torch.SymInt and not size.node.expr.is_number


def _reason(error: BaseException) -> str:
    """The first lines of TorchDynamo's account, and where in ``func`` it stopped."""
    inner = getattr(error, "inner_exception", error)
    if isinstance(inner, CompilationError):
        return str(inner)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    head = lines[0] if lines else type(error).__name__
    why = [line for line in lines if line.startswith("Explanation:")][:1]
    where = [
        f"{place}: {lines[i + 1]}"
        for i, place in enumerate(lines[:-1])
        if place.startswith("File ") and "execution/lift.py" not in place
    ][-1:]
    return "; ".join([head, *why, *where])
