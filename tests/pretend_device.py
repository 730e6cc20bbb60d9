"""An accelerator that is not there: tensors that say they are on `cuda:0`, whose numbers the CPU holds.

As on a device, operations that mix both kinds of tensors raise. What makes the host wait for the device is counted.
Numbers are those of the CPU, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode  # nothing public sees every operation
from torch.utils._pytree import tree_flatten, tree_map  # as torch takes arguments apart

aten = torch.ops.aten
DEVICE = torch.device("cuda:0")
COPIES = (aten.copy_, aten._to_copy)
INDEXED = (aten.index, aten.index_put, aten.index_put_)
READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.equal, aten.bincount)
TAKES_NUMBERS = (*INDEXED, aten.fill_, aten.masked_fill, aten.masked_fill_, aten.where, aten.lerp, aten.clamp)
READERS = [getattr(Tensor, f"__{name}__") for name in ("bool", "int", "float", "index", "format", "repr")]
READERS += [Tensor.item, Tensor.tolist]
DIRECT = {Tensor.__invert__: aten.bitwise_not, Tensor.nonzero: aten.nonzero, Tensor.copy_: aten.copy_}
DIRECT |= {Tensor.contiguous: aten.contiguous}


class OnDevice(Tensor):
    """A tensor on the pretended device.

    Attributes:
        held: its numbers, on the CPU.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.shape, device=DEVICE, **layout)  # type: ignore[attr-defined]
        made.held = held
        return made  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of pretending()")


def on_device(value: Any) -> Any:
    """Return nested tensors on the device, sharing memory with those given."""
    return tree_map(lambda leaf: OnDevice(leaf) if type(leaf) is Tensor else leaf, value)


def on_cpu(value: Any) -> Any:
    """Return nested tensors on the CPU, sharing memory with those given."""
    return tree_map(lambda leaf: leaf.held if isinstance(leaf, OnDevice) else leaf, value)


def moved(model: nn.Module) -> nn.Module:
    """Return the model with its parameters and buffers on the device."""
    with pretending():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(OnDevice(parameter.data), requires_grad=False)
            module._buffers = on_device(module._buffers)
    return model


@contextmanager
def pretending() -> Iterator[Device]:
    """Give the device; inside, tensors may be made on it."""
    with patch.object(torch.cuda, "_lazy_init"), Device() as device, _Functions(device):  # it looks for a driver
        yield device


class Device(TorchDispatchMode):
    """Runs operations on the device.

    Attributes:
        waits: how often each operation made the host wait for what the device had to do.
        uploads: how often each operation brought numbers to it, which waits as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = dict(kwargs or {}), func.overloadpacket
        tensors = _tensors((args, kwargs))
        here = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        target = kwargs.get("device")
        goes = bool(here) if target is None else torch.device(target).type == DEVICE.type
        if packet in COPIES:
            goes = isinstance(args[0], OnDevice) if packet is aten.copy_ or target is None else goes
            self._note_copy(args, goes)
        elif here:
            self._refuse_mixed(func, args, tensors)
            self._note(packet, args, kwargs)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        result = func(*on_cpu(args), **on_cpu(kwargs))
        return _wrapped(result, here) if goes else result

    def bracket(self, func: Any, args: Sequence[Any]) -> Any:
        """Return what an index in brackets gives, whose own code looks for a driver."""
        whole, index, value = (*args, None)[:3]
        parts = _tensors(index)
        if not isinstance(whole, OnDevice):
            if any(isinstance(part, OnDevice) for part in parts):
                raise RuntimeError("a tensor on the CPU is indexed by one on the device")
            return func(*args)
        for part in parts:
            decides = part.dim() == 0 or (part.dtype == torch.bool and not (len(args) == 3 and _is_number(value)))
            if not isinstance(part, OnDevice):
                self.uploads["[]"] += 1
            elif decides:
                self.waits["[]"] += 1
        if type(value) is Tensor:
            self.uploads["[]="] += 1
        result = func(*on_cpu(tuple(args)))
        return None if result is None else OnDevice(result)

    def _refuse_mixed(self, func: Any, args: Any, tensors: Sequence[Tensor]) -> None:
        """Raise where a device would: it takes single numbers from the CPU in some operations, and indices."""
        strays = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
        numbers = torch.Tag.pointwise in func.tags or func.overloadpacket in TAKES_NUMBERS
        if func.overloadpacket in INDEXED and isinstance(args[0], OnDevice):
            strays = [stray for stray in strays if all(stray is not index for index in args[1])]
        if any(stray.dim() > 0 or not numbers for stray in strays):
            raise RuntimeError(f"{func}: tensors on the device and on the CPU, {[tuple(t.shape) for t in strays]}")

    def _note_copy(self, args: Any, goes: bool) -> None:
        source = args[min(len(args), 2) - 1]
        if isinstance(source, OnDevice) != goes:
            (self.uploads if goes else self.waits)["copy"] += 1

    def _note(self, packet: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        waits = packet in READS or (packet is aten.repeat_interleave and kwargs.get("output_size") is None)
        if packet in INDEXED:
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            waits = bool(masks) and (packet is aten.index or not _is_number(args[2]))
            if any(type(index) is Tensor for index in args[1]):
                self.uploads[packet.__name__] += 1
        if waits:
            self.waits[packet.__name__] += 1


class _Functions(TorchFunctionMode):
    """What looks into memory, for a driver, or at which kernels there are, before it is an operation of tensors."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            return whole(func)(*args, **kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            return self.device.bracket(func, args)
        if func is Tensor.untyped_storage:
            return func(on_cpu(args[0]))
        if func in READERS:
            return func(args[0].cpu(), *args[1:])
        if func in DIRECT:
            return DIRECT[func](*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and (target := kwargs.pop("device", None)) is not None:
            return func(*_read(args), **kwargs).to(target)
        return func(*args, **kwargs)


def whole(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the CPU as one of the device, all tensors on the same."""

    def run(*args: Any, **kwargs: Any) -> Any:
        kinds = {isinstance(tensor, OnDevice) for tensor in _tensors((args, kwargs))}
        if len(kinds) == 2:
            raise RuntimeError(f"{func}: tensors on the device and on the CPU")
        result = func(*on_cpu(args), **on_cpu(kwargs))
        return on_device(result) if kinds == {True} else result

    return run


def _read(nested: Any) -> Any:
    return tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, OnDevice) else leaf, nested)


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(nested)[0] if isinstance(leaf, Tensor)]


def _is_number(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.numel() == 1


def _wrapped(result: Any, here: Sequence[OnDevice]) -> Any:
    """Return a result on the device; what was changed in place is the tensor that was given."""
    known = {id(tensor.held): tensor for tensor in here}
    return tree_map(lambda leaf: known.get(id(leaf), leaf) if id(leaf) in known else on_device(leaf), result)
