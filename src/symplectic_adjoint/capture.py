"""Which tensors a function depends on, and how to put others in their place.

Two mechanisms work together. A walk over the function's own references (module tree, closure,
defaults, globals it names, partial arguments, bound object) finds *slots*: places that hold a
tensor requiring grad and can be assigned. During a solve every slot holds a detached alias, so that
nothing ``func`` computes requires grad, unless it reached a tensor that the walk missed. That
is checked at every evaluation, at no cost; a missed tensor is then found by watching the torch
functions that receive it, and replaced by identity from there on.

When ``func`` is evaluated again in the backward pass, every name that the walk has seen means what
it meant in the forward pass, whatever was assigned to it since.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import inspect
import threading
import types
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.weak import TensorWeakRef

from symplectic_adjoint import sharding
from symplectic_adjoint._errors import ArgumentError, CaptureError, ChangedTensorError

_SUBSTITUTION = threading.RLock()
"""Held while slots are read or hold aliases, since these are shared by all threads."""


def _in_worker() -> bool:
    """Whether this is a thread that the program has started, beside others that use its modules.

    Then tensors are replaced by identity, for this thread alone. The main thread and those of
    autograd, which work while it waits, write into the slots: that is faster.
    """
    thread = threading.current_thread()
    foreign = isinstance(thread, threading._DummyThread)
    return thread is not threading.main_thread() and not foreign


_EMPTY = object()


class _Slot:
    """An assignable place that holds a tensor."""

    __slots__ = ("container", "key")

    def __init__(self, container: Any, key: Any) -> None:
        self.container = container
        self.key = key

    def read(self) -> Any:
        try:
            if isinstance(self.container, types.CellType):
                return self.container.cell_contents
            return self.container[self.key]
        except (ValueError, KeyError):
            return _EMPTY

    def write(self, value: Any) -> None:
        if isinstance(self.container, types.CellType):
            if value is _EMPTY:
                del self.container.cell_contents
            else:
                self.container.cell_contents = value
        elif value is _EMPTY:
            del self.container[self.key]
        else:
            self.container[self.key] = value


def transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work."""
    return bool(torch._C._are_functorch_transforms_active())


def wrapped(x: Tensor) -> bool:
    """Whether a transform of ``torch.func`` stands behind a tensor."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


def has_tangent(x: Tensor) -> bool:
    """Whether a tensor carries a tangent of forward mode."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def varies(x: Tensor) -> bool:
    """Whether a derivative with respect to a tensor, or its value in a batch, may be wanted."""
    return x.requires_grad or wrapped(x) or has_tangent(x)


class _Fixed(nn.Module):
    """Stands in for a parametrisation during a solve: its value is computed once.

    To other threads it is what it was.
    """

    def __init__(self, value: Tensor, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["value"] = value
        self.original = original

    def forward(self) -> Tensor:
        owned: bool = _SUBSTITUTION._is_owned()  # type: ignore[attr-defined]
        value: Tensor = self.__dict__["value"] if owned else self.original()
        return value


class Listed:
    """Which tensors are not to be constants; what a function depends on is not known yet.

    Attributes:
        only: When given, all other tensors are constants.
    """

    tensors: Sequence[Tensor] = ()

    def __init__(self, only: Sequence[Tensor] | None = None) -> None:
        """Keep a list.

        Args:
            only: When given, all other tensors are constants.

        Raises:
            ArgumentError: ``only`` is no sequence of tensors.
        """
        self.only = None if only is None else _listed(only)
        self._only = None if self.only is None else {id(x) for x in self.only}

    @property
    def restricted(self) -> bool:
        """Whether all but some listed tensors are constants."""
        return self._only is not None

    def lists(self, tensor: Tensor) -> bool:
        """Whether a tensor is not to be a constant."""
        return self._only is None or id(tensor) in self._only


class Capture(Listed):
    """The tensors that vary (``varies``) and that a function depends on.

    Attributes:
        tensors: Each such tensor once, however many slots hold it.
        names: A readable path to each; empty where it was found by its use alone.
    """

    def __init__(self, func: Any, args: Any = (), only: Sequence[Tensor] | None = None) -> None:
        """Find what ``func(t, y, *args)`` depends on.

        Args:
            func: Any callable.
            args: Extra arguments (any containers); their tensors are found, too.
            only: When given, all other tensors are constants.

        Raises:
            ArgumentError: ``only`` is no sequence of tensors.
        """
        super().__init__(only)
        self.tensors: list[Tensor] = []
        self.names: list[str] = []
        self._originals: list[Tensor] = []  # what func holds, and the tensors stand for
        self._slots: list[list[_Slot]] = []
        self._index: dict[int, int] = {}
        self._constants: list[tuple[_Slot, Tensor]] = []
        self._stand_ins: list[tuple[_Slot, Any]] = []
        self._by_identity: set[int] = set()
        self._hidden_constants: list[tuple[Tensor, Tensor]] = []
        self._scripted: dict[str, Tensor] = {}
        self._held: list[tuple[_Slot, Any]] = []
        self._frozen: list[tuple[_Slot, Any]] = []
        self._private = _in_worker()
        self._buffers: list[dict[str, Tensor | None]] = []
        self._versions: list[tuple[Tensor, int]] = []
        walk = _Walk(self)
        walk.visit(func, "func")
        walk.visit(args, "args")
        with _SUBSTITUTION:
            walk.run()
        for tensor in self.only or ():
            if id(tensor) not in self._index:
                self._add(tensor, "params", None)

    @property
    def found(self) -> list[Tensor]:
        """All tensors that were found, constants included."""
        found = {id(x): x for x, _ in self._versions}
        found |= {id(x): x for x in (*self.tensors, *self._scripted.values())}
        return [*found.values()]

    @property
    def elements(self) -> int:
        """How many elements they have."""
        return sum(x.numel() for x in self.found)

    def _add(self, tensor: Tensor, name: str, slot: _Slot | None) -> None:
        value = tensor
        if not wrapped(tensor) and not tensor.is_inference():
            self._versions.append((tensor, tensor._version))
        if not self.lists(tensor):
            if not wrapped(tensor):
                if slot is not None:
                    self._constants.append((slot, tensor))
                    self._hidden_constants += [(tensor, tensor)] if self._private else []
                return
            value = tensor.detach()
        elif not varies(tensor):
            return
        i = self._index.setdefault(id(tensor), len(self._originals))
        if i == len(self._originals):
            self._originals.append(tensor)
            self.tensors.append(value)
            self.names.append(name)
            self._slots.append([])
        if slot is None:
            self._by_identity.add(i)
        else:
            self._slots[i].append(slot)

    def _identified(self) -> Collection[int]:
        """The tensors that are replaced by identity."""
        return range(len(self.tensors)) if self._private else self._by_identity

    def _fix(self, slot: _Slot, stand_in: Any) -> None:
        self._stand_ins.append((slot, stand_in))

    def freeze(self) -> None:
        """Let names mean what they mean now whenever ``func`` is evaluated again.

        What ``func`` itself has rebound or written since the capture, such as a counter, stays its
        own. Where it has written a buffer of a module, all buffers there are taken to be of that
        kind: functions such as ``batch_norm`` write some that autograd does not count.
        """
        with _SUBSTITUTION:
            self._frozen = [(slot, value) for slot, value in self._held if slot.read() is value]
        written = {id(x) for x, version in self._versions if x._version != version}
        self._versions = [(x, version) for x, version in self._versions if id(x) not in written]
        self._buffers = [
            held for held in self._buffers if any(id(x) in written for x in held.values())
        ]

    @contextlib.contextmanager
    def substituted(self, aliases: Sequence[Tensor]) -> Generator[None]:
        """Put ``aliases`` (one for each of ``tensors``) where ``func`` looks for the originals."""
        with _SUBSTITUTION, _Swaps() as swaps, swaps, contextlib.ExitStack() as undo:
            for slot, value in self._frozen:
                if slot.read() is not value:
                    swaps.put(slot, value)
            for slot, stand_in in self._stand_ins:
                swaps.put(slot, stand_in)
            if not self._private:
                for slot, tensor in self._constants:
                    swaps.put(slot, tensor.detach())
                for alias, slots in zip(aliases, self._slots, strict=True):
                    for slot in slots:
                        swaps.put(slot, alias)
            identities = {id(x): value.detach() for x, value in self._hidden_constants}
            identities |= {id(self._originals[i]): aliases[i] for i in self._identified()}
            if identities:
                undo.enter_context(_Replace(identities))
            yield

    @contextlib.contextmanager
    def resumed(self, aliases: Sequence[Tensor]) -> Generator[None]:
        """``substituted``, to evaluate again what the forward pass has evaluated.

        Buffers that ``func`` writes, such as running statistics, are copies that nobody keeps.

        Raises:
            ChangedTensorError: An evaluation reads a tensor that was changed in place since. That
                is seen for the tensors that the walk has found; those that require grad are in the
                care of autograd.
        """
        with (
            self.substituted(aliases),
            _Swaps(rebound=True) as swaps,
            swaps,
            contextlib.ExitStack() as undo,
        ):
            changed = [x for x, version in self._versions if x._version != version]
            kept = {id(x) for x in changed}
            for held in self._buffers:
                for key, buffer in held.items():
                    if buffer is not None and not buffer.requires_grad and id(buffer) not in kept:
                        swaps.put(_Slot(held, key), buffer.clone())
            if changed:
                undo.enter_context(_Changed(changed))
            yield

    @property
    def convertible(self) -> bool:
        """Whether every tensor that was found sits in a place that can be assigned."""
        return not self._identified() and not self._scripted

    @contextlib.contextmanager
    def converted(
        self, aliases: Sequence[Tensor], convert: Callable[[Tensor], Tensor]
    ) -> Generator[None]:
        """Let ``func`` find ``aliases``, and all other tensors converted.

        Args:
            aliases: One for each of ``tensors``.
            convert: Makes what stands for a tensor that requires no grad.
        """
        with self.substituted(aliases), _Swaps() as swaps, swaps:
            standing = {id(x) for x in aliases}
            for slot, value in self._held:
                if isinstance(value, Tensor) and id(slot.read()) not in standing:
                    swaps.put(slot, convert(value))
            yield

    def discover(self, evaluate: Callable[[], Tensor], known: Iterable[Tensor]) -> bool:
        """Evaluate again, twice, watching for tensors that require grad and come from outside.

        What is found is replaced by identity from the next ``substituted`` on.

        Args:
            evaluate: The evaluation that gave a result requiring grad.
            known: Its arguments.

        Returns:
            Whether anything was found; if not, the leaves were made by the evaluation itself.

        Raises:
            CaptureError: The result depends on a tensor that no torch function received.
        """
        known = list(known)
        with _Watch(known) as before:
            evaluate()
        with _Watch(known) as watch:
            output = evaluate()
        replaced = self._replaced()
        # What an evaluation makes itself is another tensor each time.
        outside = {id(x) for x in before.found} - replaced
        new = [x for x in watch.found if id(x) in outside]
        reached = graph_leaves(output, {(x.grad_fn, x.output_nr) for x in new})
        hidden = [x for x in reached if id(x) not in watch.known or id(x) in replaced]
        if has_tangent(output) and not new:
            hidden.append(output)
        if hidden and self._private:
            self._private = False  # they can only be replaced where they are held
            return True
        if hidden:
            raise CaptureError(
                "func depends on tensors that vary and cannot be replaced during the solve:"
                f" {', '.join(map(self._describe, hidden))}. They are "
                "used where Python does not see them (TorchScript, a custom autograd.Function or "
                "operator). Pass them through args, hold them in the module that is func, or "
                "detach them."
            )
        for tensor in new:
            if self.lists(tensor):
                self._add(tensor, "", None)
            else:
                self._hidden_constants.append((tensor, tensor))
        return bool(new)

    def _replaced(self) -> set[int]:
        """Tensors that are replaced by identity."""
        replaced = {id(self._originals[i]) for i in self._identified()}
        return replaced | {id(x) for x, _ in self._hidden_constants}

    def holding(self, tensors: Sequence[Tensor]) -> Capture:
        """The same places, in which other tensors (one for each of ``tensors``) are to stand.

        Those that cannot have a derivative, such as integers, become constants.
        """
        twin = copy.copy(self)
        twin.tensors, twin.names, twin._originals, twin._slots = [], [], [], []
        twin._constants, twin._hidden_constants = [*self._constants], [*self._hidden_constants]
        twin._by_identity, twin._index = set(), {}
        for i, tensor in enumerate(tensors):
            hidden = i in self._identified()
            if tensor.requires_grad:
                twin._by_identity |= {len(twin.tensors)} if hidden else set()
                twin._index[id(self._originals[i])] = len(twin.tensors)
                twin.tensors.append(tensor)
                twin.names.append(self.names[i])
                twin._originals.append(self._originals[i])
                twin._slots.append(self._slots[i])
                continue
            twin._constants += [(slot, tensor) for slot in self._slots[i]]
            twin._hidden_constants += [(self._originals[i], tensor)] if hidden else []
        return twin

    def extend(self, tensors: Iterable[Tensor]) -> None:
        """Take in tensors that were found by their use."""
        for tensor in tensors:
            self._add(tensor, "", None)

    def guarded(self) -> contextlib.AbstractContextManager[Any]:
        """Raise where a tensor of a transform is used that is not replaced."""
        return _Guard(self)

    def _describe(self, tensor: Tensor) -> str:
        kind = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        named = [*zip(self.names, self.tensors, strict=True), *self._scripted.items()]
        names = [name for name, x in named if x is tensor and name]
        return f"{names[0]} ({kind})" if names else kind


def _listed(params: Any) -> list[Tensor]:
    tensors = None if isinstance(params, Tensor) else list(params)
    if tensors is None or not all(isinstance(x, Tensor) for x in tensors):
        raise ArgumentError(
            f"params must be a sequence of tensors, but is {type(params).__name__}; give a list, "
            "e.g. list(module.parameters())"
        )
    return tensors


class _Swaps:
    """Writes into slots, and on leaving puts back what was there.

    To be entered twice: what interrupts the one exit, at whatever line, is seen to by the other.
    """

    def __init__(self, *, rebound: bool = False) -> None:
        """Swap nothing yet.

        Args:
            rebound: Whether to undo what ``func`` itself has written into a slot since, too.
        """
        self._rebound = rebound
        self._done: list[tuple[_Slot, Any, Any]] = []

    def put(self, slot: _Slot, value: Any) -> None:
        """Write ``value``."""
        self._done.append((slot, slot.read(), value))  # first, in case of an interruption
        slot.write(value)

    def __enter__(self) -> _Swaps:
        return self

    def __exit__(self, *_: object) -> None:
        for slot, before, value in reversed(self._done):
            if self._rebound or slot.read() is value:
                slot.write(before)


class _Walk:
    """A breadth-first walk over the references of a callable."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.seen: set[int] = set()
        self.gathered: set[int] = set()
        self.queue: collections.deque[tuple[Any, str, bool]] = collections.deque()

    def visit(self, obj: Any, name: str, *, direct: bool = True) -> None:
        """Queue an object; ``direct`` objects of any class have their attributes walked."""
        self.queue.append((obj, name, direct))

    def run(self) -> None:
        while self.queue:
            obj, name, direct = self.queue.popleft()
            if isinstance(obj, Tensor):
                self.capture._add(obj, name, None)
            elif id(obj) not in self.seen and obj is not None:
                self.seen.add(id(obj))
                self._expand(obj, name, direct)

    def _expand(self, obj: Any, name: str, direct: bool) -> None:
        if isinstance(obj, nn.Module):
            self._module(obj, name)
        elif isinstance(obj, Mapping | list | tuple | set | frozenset):
            self._container(obj, name)
        elif isinstance(obj, types.FunctionType):
            self._function(obj, name)
        elif isinstance(obj, types.MethodType):
            self.visit(obj.__self__, name)
            self.visit(obj.__func__, name)
        elif isinstance(obj, functools.partial):
            self.visit(obj.func, name)
            self.visit(obj.args, name)
            self.visit(obj.keywords, name)
        elif direct and _is_users(type(obj)) and hasattr(obj, "__dict__"):
            self._container(vars(obj), name)
            call = getattr(type(obj), "__call__", None)  # noqa: B004
            if isinstance(call, types.FunctionType):
                self._function(call, name)

    def _module(self, module: nn.Module, name: str) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            # Its tensors live outside Python; the check at each evaluation names them.
            self.capture._scripted |= {f"{name}.{key}": x for key, x in module.named_parameters()}
            return
        skip: set[str] = set()
        if parametrize.is_parametrized(module):
            skip.add("parametrizations")
            self._parametrized(module, name)
        self._hooked_weights(module, name)
        if sharding.is_sharded(module):
            self._sharded(module, name)
        if module._buffers:
            self.capture._buffers.append(module._buffers)
        for attribute, value in vars(module).items():
            path = f"{name}.{attribute}"
            if attribute in ("_parameters", "_buffers", "_modules"):
                self._container(value, name, skip)
            elif attribute in _INTERNAL:
                if value:  # most are empty, and a module has a dozen of them
                    self.visit(value, path, direct=False)
            else:
                self._item(value, path, _Slot(vars(module), attribute))
        forward = type(module).forward
        if _is_users(type(module)) and isinstance(forward, types.FunctionType):
            self.visit(forward, name)

    def _made_of(self, owner: nn.Module, make: Callable[[], Tensor]) -> Tensor:
        """A weight made of ``owner``'s parameters; it stands for those that are listed."""
        only = self.capture._only
        with _Swaps() as swaps, swaps:
            for part in owner.modules() if only is not None else ():
                for key, x in part._parameters.items():
                    if x is not None and id(x) not in (only or ()):
                        swaps.put(_Slot(part._parameters, key), x.detach())
            value = make()
        if only is not None and value.requires_grad:
            only.add(id(value))
        return value

    def _parametrized(self, module: nn.Module, name: str) -> None:
        lists: Any = module.parametrizations
        for key in list(lists._modules):
            value = self._made_of(lists[key], functools.partial(getattr, module, key))
            fixed = _Fixed(value, lists[key])
            self.capture._fix(_Slot(lists._modules, key), fixed)
            self.capture._add(value, f"{name}.{key}", _Slot(fixed.__dict__, "value"))

    def _hooked_weights(self, module: nn.Module, name: str) -> None:
        """The older weight_norm and spectral_norm: hooks that assign the weight at each call."""
        hooks: Any = module._forward_pre_hooks
        for key, hook in list(hooks.items()):
            if type(hook).__module__ in _WEIGHT_HOOKS:
                self._made_of(module, functools.partial(_hooked, hook, module))
                self.capture._fix(_Slot(hooks, key), _no_hook)

    def _sharded(self, module: nn.Module, name: str) -> None:
        """Parameters are gathered once, not by hooks at each call of the module."""
        sharding.check(module)
        only = self.capture._only
        parameters = list(sharding.parameters(module))
        for held, key, x in parameters:
            if id(x) in self.gathered:
                continue
            self.gathered.add(id(x))
            listed = only is None or id(x) in only
            value = sharding.gathered(x if listed else x.detach())
            slot = _Slot(held, key)
            if value.requires_grad:
                if only is not None:
                    only.add(id(value))
                self.capture._add(value, f"{name}.{key}", slot)
            else:
                self.capture._fix(slot, value)
        stand_in = _no_hook if parameters else sharding.already_gathered
        for hooks, number in sharding.hooks(module):
            self.capture._fix(_Slot(hooks, number), stand_in)

    def _container(self, obj: Any, name: str, skip: Collection[str] = ()) -> None:
        if len(obj) > _LONG:
            return
        assignable = isinstance(obj, dict | list)
        items = obj.items() if isinstance(obj, Mapping) else enumerate(obj)
        for key, value in list(items):
            if key not in skip:
                path = f"{name}.{key}" if isinstance(key, str) else f"{name}[{key}]"
                self._item(value, path, _Slot(obj, key) if assignable else None)

    def _function(self, function: types.FunctionType, name: str) -> None:
        if not _is_users(function):
            return
        for variable, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            with contextlib.suppress(ValueError):  # an empty cell
                slot = _Slot(cell, None)
                self._item(cell.cell_contents, f"{name}:{variable}", slot, direct=True)
        for variable in _global_names(function.__code__):
            if variable in function.__globals__:
                slot = _Slot(function.__globals__, variable)
                self._item(function.__globals__[variable], variable, slot, direct=True)
        self.visit(function.__defaults__, name)
        self.visit(function.__kwdefaults__, name)
        self.visit(vars(function), name)

    def _item(self, value: Any, name: str, slot: _Slot | None, *, direct: bool = False) -> None:
        if id(value) in self.gathered:
            return
        if slot is not None:
            self.capture._held.append((slot, value))
        if isinstance(value, Tensor):
            self.capture._add(value, name, slot)
        else:
            self.visit(value, name, direct=direct)


_LONG = 4096
"""Longer containers hold data; a tensor that func takes from one is found when it is used."""

_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that belong to the machinery of modules."""

_WEIGHT_HOOKS = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")


def _hooked(hook: Any, module: nn.Module) -> Tensor:
    """The weight that a hook assigns."""
    hook(module, None)
    weight: Tensor = getattr(module, hook.name)
    return weight


def _no_hook(module: nn.Module, *_: Any) -> None:
    """Stands in for a hook whose work is already done."""


def _global_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names


def _is_users(obj: Any) -> bool:
    """Whether a class or function comes from outside torch and the interpreter.

    What ``functools.cache`` wraps is not looked into: it would keep a stand-in for later solves.
    """
    module = getattr(obj, "__module__", None) or ""
    root = module.partition(".")[0]
    return root not in ("torch", "builtins", "numpy", "functools") and not inspect.isbuiltin(obj)


class _Replace(TorchFunctionMode):
    """Replaces tensors by identity in the arguments of every torch function.

    It sees all operations of a solve, so it asks first what an identity stands for, and not what
    an argument is.
    """

    def __init__(self, aliases: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._aliases = aliases

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if kwargs:
            return func(
                *self._replaced(args),
                **dict(zip(kwargs, self._replaced(kwargs.values()), strict=True)),
            )
        return func(*self._replaced(args))

    def _replaced(self, values: Iterable[Any]) -> list[Any]:
        aliases = self._aliases
        return [
            type(x)(self._replaced(x)) if type(x) in _LISTS else aliases.get(id(x), x)
            for x in values
        ]


_LISTS = (list, tuple)


class _Guard(TorchFunctionMode):
    """Refuses tensors of a transform of ``torch.func`` from which the solve has been lifted out."""

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self._passes = capture._replaced()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not transformed():
            for x in _tensors((args, kwargs or {})):
                if wrapped(x) and id(x) not in self._passes:
                    raise HiddenTensor(x)
        return func(*args, **(kwargs or {}))


class HiddenTensor(Exception):  # noqa: N818 - a signal, not an error
    """A tensor of a transform was found by its use."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Changed(TorchFunctionMode):
    """Refuses to compute with tensors that were changed in place."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._storages = {x.untyped_storage().data_ptr() for x in tensors if x.numel()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name.endswith("_like") or name.startswith("new_") or not _tensors(result):
            return result  # depends on its shape, dtype and device alone
        for x in _tensors((args, kwargs)):
            if x.untyped_storage().data_ptr() in self._storages:
                raise changed(x)
        return result


def changed(x: Tensor) -> ChangedTensorError:
    """The error that says which tensor was changed in place."""
    return ChangedTensorError(
        f"a tensor that func reads ({x.dtype} of shape {tuple(x.shape)}) was changed in place "
        "between the forward and the backward pass, which evaluates func again; change it after "
        "the backward pass, or change a copy of it"
    )


class _Watch(TorchFunctionMode):
    """Collects tensors requiring grad that torch functions receive and none of them made."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        # Holding the tensors keeps their ids from being used again.
        self.known = {id(x): x for x in known}
        self.found: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for x in _tensors((args, kwargs)):
            if (x.requires_grad or has_tangent(x)) and id(x) not in self.known:
                self.found.append(x)
                self.known[id(x)] = x
        result = func(*args, **kwargs)
        for x in _tensors(result):
            self.known[id(x)] = x
        return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [x for item in value for x in _tensors(item)]
    return []


_Leaf: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]


def graph_leaves(output: Tensor, cut: Collection[tuple[Any, int]] = ()) -> list[Tensor]:
    """The leaves of ``output``'s graph, not looking behind the edges (node, output) in ``cut``."""
    if output.grad_fn is None:
        return [output] if output.requires_grad else []
    leaves = []
    seen: set[Any] = {None, output.grad_fn}
    stack: list[Any] = [output.grad_fn]
    while stack:
        node = stack.pop()
        if type(node) is _Leaf:
            leaves.append(node.variable)
            continue
        for edge in node.next_functions:
            if edge[0] not in seen and edge not in cut:
                seen.add(edge[0])
                stack.append(edge[0])
    return leaves


def foreign_leaves(output: Tensor, known: Iterable[Tensor]) -> list[TensorWeakRef]:
    """Those leaves of ``output``'s graph that are not among ``known``.

    Weakly, so that one may see which are gone with the graph: nothing else holds a leaf that the
    evaluation made itself.
    """
    ids = {id(x) for x in known}
    return [TensorWeakRef(leaf) for leaf in graph_leaves(output) if id(leaf) not in ids]


def detached(tensors: Iterable[Tensor], *, leaf: bool = False) -> list[Tensor]:
    """Aliases of tensors outside their graph; leaves requiring grad when asked for."""
    return [x.detach().requires_grad_(leaf) for x in tensors]
