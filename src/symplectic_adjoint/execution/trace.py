"""From Python to machine code: operations are recorded on shapes alone, then compiled."""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._higher_order_ops.while_loop import while_loop_op
from torch._inductor import config as inductor
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from symplectic_adjoint._errors import CompilationError
from symplectic_adjoint._tree import real_dtype
from symplectic_adjoint.execution.lift import Graph
from symplectic_adjoint.execution.partition import Halves, partition
from symplectic_adjoint.execution.passes import Quicker, nbytes, rational_tanh
from symplectic_adjoint.field import Field, Pullback, Stage


@dataclass(frozen=True)
class Input:
    """An example of an input.

    Attributes:
        example: A tensor of its dtype, shape and device; the input itself has to be contiguous.
        dynamic: The dimensions whose size may change from call to call, each with a name: where
            names are equal sizes are.
    """

    example: Tensor
    dynamic: Mapping[int, str] = field(default_factory=dict)


def behind(dims: Mapping[int, str], lead: int) -> dict[int, str]:
    """The dimensions whose size may change of a tensor with further dimensions in front."""
    return {d + lead: name for d, name in dims.items()}


@dataclass
class Compiled:
    """A compiled function of tensors.

    Attributes:
        call: The function.
        evaluations: How often a round of its loop evaluates ``func``.
        products: How many products with transposed Jacobians a round takes.
    """

    call: Callable[..., Sequence[Tensor]]
    evaluations: int = 0
    products: int = 0


def compiled(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Input]) -> Compiled:
    """Compile a function of tensors.

    Args:
        function: Tensor operations on its arguments alone; may write into them.
        inputs: One for each argument.

    Raises:
        CompilationError: The compiler failed.
    """
    start = time.perf_counter()
    try:
        call = _compiled(function, inputs)
    except CompilationError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise CompilationError(f"{type(error).__name__}: {lines[0]}") from error
    _spent.seconds += time.perf_counter() - start
    return Compiled(call)


class _Spent(threading.local):
    """Time that this thread has spent compiling."""

    seconds = 0.0


_spent = _Spent()


def seconds_spent() -> float:
    """How long this thread has been compiling so far."""
    return _spent.seconds


def _compiled(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Input]) -> Any:
    mode, fakes = _fakes(inputs)
    with torch.no_grad():
        with mode:
            module = make_fx(function, tracing_mode="symbolic")(*fakes)
        settings: dict[str, Any] = {
            "cpp_wrapper": True,
            # The code between the kernels gains nothing by the optimizations they need, and takes
            # most of the compiler's time with them.
            "cpp_wrapper_build_separate": True,
            "post_grad_custom_post_pass": Quicker(),
        }
        with inductor.patch(settings), rational_tanh(), tracing(TracingContext(mode)):
            call = compile_fx(module, fakes)
    _refuse_fixed(mode)
    return call


def _refuse_fixed(mode: FakeTensorMode) -> None:
    """What was compiled for any size has to hold for any."""
    assert mode.shape_env is not None
    for symbol, size in mode.shape_env.replacements.items():
        if size.is_number:
            raise CompilationError(
                f"a size that changes ({symbol}) may only be {size} in compiled code", lasting=False
            )


def _fakes(inputs: Sequence[Input]) -> tuple[FakeTensorMode, list[Tensor]]:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes: dict[str, int] = {}
    return mode, [_fake(mode, i, x, sizes) for i, x in enumerate(inputs)]


def _fake(mode: FakeTensorMode, i: int, x: Input, sizes: dict[str, int]) -> Tensor:
    """A tensor without memory; sizes are one symbol where their names agree, and only there."""
    shape = list(x.example.shape)
    for dim, name in x.dynamic.items():
        if name not in sizes:
            # Equal sizes become one symbol, so that others have to differ; 0 and 1 are constants.
            sizes[name] = next(
                n for n in itertools.count(max(shape[dim], 2)) if n not in sizes.values()
            )
        shape[dim] = sizes[name]
    kinds = [DimDynamic.DUCK if d in x.dynamic else DimDynamic.STATIC for d in range(len(shape))]
    like = x.example
    if not shape:
        with mode:  # from_tensor would make a symbol of its value
            return torch.empty((), dtype=like.dtype, device=like.device)
    # A tensor of its own, since inputs that share memory are compiled as views of one.
    fresh = torch.empty(shape, dtype=like.dtype, device=like.device)
    return mode.from_tensor(
        fresh,
        source=ConstantSource(f"input{i}"),
        symbolic_context=StatelessSymbolicContext(kinds),
    )


def _refuse_random(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise CompilationError(f"func draws random numbers ({node.target})")


@dataclass(frozen=True)
class Residual:
    """A tensor that a product with a transposed Jacobian reads, and its value has computed.

    Attributes:
        dtype: Its dtype.
        sizes: Its sizes, those that may change by their names.
    """

    dtype: torch.dtype
    sizes: tuple[int | str, ...]

    def record(self, rows: int, sizes: Mapping[str, int], device: torch.device) -> Tensor:
        """Room for one of each step."""
        shape = [size if isinstance(size, int) else sizes[size] for size in self.sizes]
        return torch.empty((rows, *shape), dtype=self.dtype, device=device)

    @property
    def dims(self) -> dict[int, str]:
        """The dimensions of a record whose size may change."""
        return {d: size for d, size in enumerate(self.sizes, start=1) if isinstance(size, str)}


@dataclass(frozen=True)
class Linear:
    """``func`` and the products with its transposed Jacobian, where it was evaluated before.

    Attributes:
        linearize: ``(t, y, *tensors) -> (k, *residuals)``.
        apply: ``(t, y, cotangent, *tensors, *residuals) -> (v, time, *parts)``, as in ``Traced``.
        residuals: What they are.
    """

    linearize: Callable[..., Sequence[Tensor]]
    apply: Callable[..., Sequence[Tensor | None]]
    residuals: Sequence[Residual]


@dataclass
class Traced:
    """``func`` and its products with transposed Jacobians, as graphs of elementary operations.

    Attributes:
        graph: ``func`` as it was read.
        value: ``(t, y, *tensors) -> k``.
        pull: ``(t, y, cotangent, *tensors) -> (k, v, time, *parts)``: the parts are those of the
            tensors that may need a gradient; None where the value does not depend on an input.
        wanted: Which tensors have a gradient.
    """

    graph: Graph
    value: Callable[..., Tensor]
    pull: fx.GraphModule
    wanted: Sequence[bool]

    @functools.cached_property
    def linear(self) -> Linear | None:
        """``value`` and ``pull`` with nothing computed twice; None where they cannot be so cut."""
        halves, names = self._halves, self._names()
        residuals = [] if halves is None else [_residual(x, names) for x in halves.residuals]
        known = [x for x in residuals if x is not None]
        if halves is None or len(known) < len(residuals):
            return None
        return Linear(halves.linearize, halves.apply, known)

    @functools.cached_property
    def held(self) -> int:
        """How many bytes of an evaluation its product reads, at the sizes it was traced with."""
        return 0 if self._halves is None else sum(map(nbytes, self._halves.residuals))

    @functools.cached_property
    def _halves(self) -> Halves | None:
        return partition(self.pull, cotangent=2)

    def _names(self) -> dict[str, str]:
        """The names of the symbols that stand for sizes while operations are recorded."""
        _, y, _, *others = self.pull.graph.find_nodes(op="placeholder")
        all_dims = [self.graph.state_dims, *self.graph.dims]
        return {
            str(node.meta["val"].shape[d]): name
            for node, dims in zip((y, *others), all_dims, strict=True)
            for d, name in dims.items()
        }

    def sizes(self, y0: Tensor, tensors: Sequence[Tensor]) -> dict[str, int]:
        """The sizes that may change, by their names."""
        all_dims = [self.graph.state_dims, *self.graph.dims]
        pairs = zip((y0, *tensors), all_dims, strict=True)
        return {name: x.shape[d] for x, dims in pairs for d, name in dims.items()}

    @staticmethod
    def of(graph: Graph, y0: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> Traced:
        """Trace ``func`` on a state and tensors like these.

        Raises:
            CompilationError: ``func`` draws random numbers, writes into what it reads, or returns
                no derivative of the state.
        """
        like = Input(y0, graph.state_dims)
        time = Input(y0.new_zeros((), dtype=real_dtype(y0)))
        others = [Input(x, dims) for x, dims in zip(tensors, graph.dims, strict=True)]
        value = _traced(functools.partial(_value, graph), [time, like, *others])
        _refuse_random(value)
        pull = _traced(functools.partial(_pull, graph, wanted), [time, like, like, *others])
        (output,) = pull.graph.find_nodes(op="output")
        parts = iter(output.args[0][3:])
        used = [want and next(parts) is not None for want in wanted]
        return Traced(graph, value, pull, used)

    def inputs(self, tensors: Sequence[Tensor]) -> list[Input]:
        """What ``func`` depends on as inputs of a graph."""
        return [Input(x, dims) for x, dims in zip(tensors, self.graph.dims, strict=True)]


def _residual(x: Tensor, names: Mapping[str, str]) -> Residual | None:
    """What a residual is; None where one of its sizes is made of others."""
    sizes = [int(n) if str(n).isdecimal() else names.get(str(n)) for n in x.shape]
    known = tuple(n for n in sizes if n is not None)
    return Residual(x.dtype, known) if len(known) == len(sizes) else None


def _traced(function: Callable[..., Any], inputs: Sequence[Input]) -> fx.GraphModule:
    mode, fakes = _fakes(inputs)
    with torch.enable_grad(), mode:
        module = make_fx(function, tracing_mode="symbolic")(*fakes)
    _refuse_fixed(mode)
    return module


def _value(graph: Graph, t: Tensor, y: Tensor, *tensors: Tensor) -> Tensor:
    versions = [x._version for x in tensors]
    # func may differentiate with respect to its argument.
    k = _slope(graph, t, y.detach().requires_grad_(), tensors)
    if versions != [x._version for x in tensors]:
        raise CompilationError("func changes a tensor that it reads, such as a buffer, in place")
    return k.detach()


def _slope(graph: Graph, t: Tensor, y: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    k = graph(t, y, tensors)
    if k.is_floating_point() and torch.is_autocast_enabled(y.device.type):
        k = k.to(y.dtype)
    if k.shape != y.shape or k.dtype != y.dtype:
        raise CompilationError("func returns no derivative of the state")
    return k


def _pull(
    graph: Graph, wanted: Sequence[bool], t: Tensor, y: Tensor, cotangent: Tensor, *given: Tensor
) -> Sequence[Tensor | None]:
    t, y = t.detach().requires_grad_(), y.detach().requires_grad_()
    pairs = zip(given, wanted, strict=True)
    tensors = [x.detach().requires_grad_() if want else x for x, want in pairs]
    k = _slope(graph, t, y, tensors)
    leaves = [y, t, *(x for x, want in zip(tensors, wanted, strict=True) if want)]
    if not k.requires_grad:
        return [k.detach(), *(None for _ in leaves)]
    return [k.detach(), *torch.autograd.grad(k, leaves, cotangent, allow_unused=True)]


class TracedField(Field):
    """The field while operations are recorded.

    Attributes:
        parts: The sums of the products' parts that belong to the tensors that need a gradient.
    """

    def __init__(
        self, traced: Traced, like: Tensor, tensors: Sequence[Tensor], linear: Linear | None = None
    ) -> None:
        """Wrap a traced function.

        Args:
            traced: ``func``.
            like: A tensor of the state's shape, dtype and device.
            tensors: What ``func`` depends on.
            linear: Where given, stages keep their residuals as ``graph``.
        """
        super().__init__(lambda t, y: traced.value(t, y, *tensors), like)
        self.traced = traced
        self.tensors = tensors
        self.linear = linear
        self.parts: list[Tensor | None] = [None] * sum(traced.wanted)

    def _evaluate(self, stage: Stage) -> Tensor:
        self.evaluations += 1
        if self.linear is None:
            return self.traced.value(self.time(stage.t), stage.x, *self.tensors)
        k, *residuals = self.linear.linearize(self.time(stage.t), stage.x, *self.tensors)
        stage.graph = residuals
        return k

    def pull(self, stage: Stage, cotangent: Tensor, wants_time: bool = False) -> Pullback:
        """The vector-Jacobian product at a stage; see ``DetachedField.pull``.

        Where the stage has kept its residuals, its value is not known and NaN.
        """
        self.products += 1
        inputs = (self.time(stage.t), stage.x, cotangent, *self.tensors)
        if self.linear is not None and stage.graph is not None:
            k: Tensor | None = torch.full_like(cotangent, torch.nan)
            v, time, *parts = self.linear.apply(*inputs, *stage.graph)
        else:
            self.evaluations += 1
            k, v, time, *parts = self.traced.pull(*inputs)
        assert k is not None
        for i, part in enumerate(x for x in parts if x is not None):
            own = self.parts[i]
            self.parts[i] = part if own is None else own + part
        return Pullback(torch.zeros_like(cotangent) if v is None else v, time, k)


def compiled_loop(
    goes_on: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
    body: Callable[
        [Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Field]
    ],
    carried: Sequence[Input],
    constants: Sequence[Input],
    written: Sequence[Input],
) -> Compiled:
    """Compile ``while goes_on(carried, constants): carried = body(carried, constants, written)``.

    Args:
        goes_on: The condition, a 0-dim bool tensor.
        body: May write into ``written``. Returns what is carried to the next round, which must
            share no memory with its arguments, and the field, which has counted.
        carried: What the first round gets.
        constants: What every round gets.
        written: What every round may write into.

    Returns:
        A function of all of these that returns what is carried after the last round.
    """
    first, last = len(carried), len(carried) + len(constants)
    counts: list[Field] = []
    mutated = ",".join(str(last + i) for i in range(len(written)))

    def split(xs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        return xs[:first], xs[first:last], xs[last:]

    def condition(*xs: Tensor) -> Tensor:
        return goes_on(*split(xs)[:2])

    def round_(*xs: Tensor) -> tuple[Tensor, ...]:
        out, field = body(*split(xs))
        counts.append(field)
        return tuple(out)

    def run(*xs: Tensor) -> Sequence[Tensor]:
        start = tuple(x.clone() for x in xs[:first])  # outputs of a loop are no inputs
        loop: Any = while_loop_op
        out: Sequence[Tensor] = loop(
            condition, round_, start, tuple(xs[first:]), mutated_arg_indices=mutated
        )
        return out

    result = compiled(run, [*carried, *constants, *written])
    return replace(result, evaluations=counts[0].evaluations, products=counts[0].products)


def put(record: Tensor, n: Tensor, value: Tensor) -> None:
    """``record[n] = value`` for a 0-dim ``n``."""
    record.index_copy_(0, n.view(1), value.unsqueeze(0))


def at(record: Tensor, n: Tensor) -> Tensor:
    """``record[n]`` for a 0-dim ``n``."""
    return record.index_select(0, n.view(1)).squeeze(0)
