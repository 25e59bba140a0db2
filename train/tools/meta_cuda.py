"""The meta device acts as a GPU: all host code runs, and what a GPU would refuse or wait for is recorded.

Meta tensors have no values, but shapes, strides and dtypes. Here they say that they are on CUDA, tensors for
CUDA are made of them, torch.cuda answers for a GPU, and Triton's launches only compile. A mode of torch's
functions does the acting; a mode of its dispatcher sees every op, those of backward passes included. It needs
no CUDA build of torch. Values, races and speed are not shown.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from traceback import walk_tb
from types import FrameType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # else imported in the middle of a step, while the meta device acts
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from fusedgpt.kernels.tools.compiling import Compiled, only_compile

aten = torch.ops.aten
_ON_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_CUDA, _META = torch.device("cuda", 0), torch.device("meta")
_LIBRARIES = {"torch", "triton", "contextlib", "unittest"}  # their frames call nothing of their own accord
_FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
_LAUNCH_NOTHING = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten._unsafe_view.default,
    aten.record_stream.default,
}
_SIZED_BY_VALUES = {  # the host waits to know the size of their results
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.equal.default,
}


@dataclass(frozen=True)
class Fault:
    """Something that would fail, or let the host wait, on a GPU."""

    what: str
    where: str  # file:line in function, of the project's code that was running


@dataclass(frozen=True)
class TorchOp:
    """One op of torch that launches a kernel, as "aten.NAME", with its input and output tensors."""

    name: str
    inputs: list[Tensor]
    outputs: list[Tensor]


@dataclass
class Record:
    """What the GPU was asked to do.

    launches counts Triton's kernels by name and torch's ops as "aten.NAME", one launch each, though some ops
    (sort, topk) make several. Faults: an op whose fake kernel promises other outputs than its body makes, a
    kernel that does not compile, a CPU tensor among the GPU's, a forbidden call or a new kernel in a capture
    and, while `watching`, each wait of the host.
    """

    launches: Counter[str] = field(default_factory=Counter)
    work: list[Compiled | TorchOp] = field(default_factory=list)  # the launches in order
    step: list[Compiled | TorchOp] = field(default_factory=list)  # those of the last training step
    kernels: dict[str, tuple[Any, str]] = field(default_factory=dict)  # hash -> (CompiledKernel, where first)
    faults: list[Fault] = field(default_factory=list)
    watching: bool = False
    capturing: bool = False

    def fault(self, what: str) -> None:
        """In the code that is running."""
        self.faults.append(Fault(what, _caller(sys._getframe())))

    def failed(self, error: Exception) -> None:
        """An exception, in the code that raised it."""
        innermost = [frame for frame, _ in walk_tb(error.__traceback__)][-1]
        self.faults.append(Fault(f"{type(error).__name__}: {error}", _caller(innermost)))

    def wait(self, what: str) -> None:
        """The host waits, for a reason."""
        if self.capturing:
            self.fault(f"{what}, forbidden in the capture of a CUDA graph")
        elif self.watching:
            self.fault(f"{what}: the host waits for the GPU")

    def copy(self, way: str, *, waits: bool) -> None:
        """A copy between host and GPU."""
        if waits:
            self.wait(f"copy {way} the host, not asynchronous and pinned")
        self.launches[f"copy {way} the host"] += 1


@contextmanager
def meta_cuda(arch: int) -> Iterator[Record]:
    """Within the block the meta device acts as GPU 0, of compute capability `arch`, e.g. 90."""
    record = Record()
    acting = _Acting(record)
    engine = torch.autograd.graph._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with acting.resumed():  # for backward functions in Python and recomputed forwards
            return engine(*args, **kwargs)

    with ExitStack() as stack:
        compiled = stack.enter_context(only_compile(arch))
        run = JITFunction.run

        def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
            run(kernel, *args, **kwargs)
            _take_launch(record, compiled.pop())

        metadata: Any = torch.utils.checkpoint._allowed_determinism_checks_to_fns  # of recomputed tensors
        stack.enter_context(patch.dict(metadata, default=lambda x: {"shape": x.shape, "dtype": x.dtype}))
        for owner, name, value in (
            (JITFunction, "run", launch),
            (torch.autograd, "_engine_run_backward", backward),
            (torch, "Generator", _Generator),
            (Tensor, "pin_memory", _pin),
            *((torch.cuda, name, value) for name, value in _torch_cuda(arch, record).items()),
        ):
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(_Seeing(record, acting))
        stack.enter_context(acting)
        yield record


class _Generator(torch.Generator):
    """Of the CPU, whatever device is asked for."""

    def __new__(cls, device: object = None) -> _Generator:
        return super().__new__(cls)


def _pin(x: Tensor) -> Tensor:
    pinned = x.clone()
    pinned.pinned = True  # type: ignore[attr-defined]
    return pinned


def _take_launch(record: Record, launch: Any) -> None:
    record.launches[launch.kernel] += 1
    record.work.append(launch)
    for name, x in launch.arguments.items():
        if isinstance(x, Tensor) and not x.is_cuda:
            record.fault(f"{launch.kernel} gets {name} on the CPU")
    if isinstance(launch.result, Exception):
        record.fault(f"{launch.kernel} does not compile: {type(launch.result).__name__}: {launch.result}")
    else:
        if record.capturing and launch.result.hash not in record.kernels:
            record.fault(f"{launch.kernel} is compiled in the capture of a CUDA graph")
        where = _caller(sys._getframe())
        record.kernels.setdefault(launch.result.hash, (launch.result, where))


def _caller(frame: FrameType) -> str:
    """The code outside of libraries that led to `frame`, as file:line in function."""
    between = {__name__, only_compile.__module__}
    while (module := frame.f_globals["__name__"]).split(".")[0] in _LIBRARIES or module in between:
        if frame.f_back is None:
            break
        frame = frame.f_back
    file = module.removeprefix("fusedgpt.").replace(".", "/")
    return f"{file}.py:{frame.f_lineno} in {frame.f_code.co_qualname.split('.<locals>')[0]}"


def _torch_cuda(arch: int, record: Record) -> dict[str, object]:
    """What stands for the functions and classes of torch.cuda."""
    capability, memory = divmod(arch, 10), 80 << 30
    device = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=capability[0],
        minor=capability[1],
        total_memory=memory,
        multi_processor_count=132,
    )

    @contextmanager
    def capture(*_: object, **__: object) -> Iterator[None]:
        record.capturing = True
        try:
            yield
        finally:
            record.capturing = False

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "is_current_stream_capturing": lambda: record.capturing,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_capability": lambda *_: capability,
        "get_device_name": lambda *_: device.name,
        "get_device_properties": lambda *_: device,
        "mem_get_info": lambda *_: (memory, memory),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "synchronize": lambda *_: record.wait("torch.cuda.synchronize"),
        "Stream": partial(_Stream, record),
        "Event": partial(_Stream, record),
        "current_stream": lambda *_: _Stream(record),
        "stream": lambda _: nullcontext(),
        "CUDAGraph": partial(_Graph, record),
        "graph": capture,
    }


class _Stream:
    """torch.cuda.Stream and torch.cuda.Event."""

    def __init__(self, record: Record, *_: object, **__: object) -> None:
        self._record = record

    def synchronize(self) -> None:
        self._record.wait("synchronize()")

    def record(self, *_: object) -> _Stream:
        return self  # as the event

    wait_stream = wait_event = record_event = record

    def elapsed_time(self, _: object) -> float:
        return 1.0


class _Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def register_generator_state(self, _: object) -> None: ...

    def replay(self) -> None:
        self._record.launches["CUDA graph"] += 1


class _Acting(TorchFunctionMode):
    """Lets the meta device pass for CUDA in Python's calls of torch."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record
        self.properties: dict[Any, Callable[[Tensor], Any]] = {
            Tensor.device.__get__: lambda x: _CUDA if x.is_meta else x.device,
            Tensor.is_cuda.__get__: lambda x: x.is_meta,  # type: ignore[attr-defined]
            Tensor.is_meta.__get__: lambda x: False,  # type: ignore[attr-defined]
            Tensor.data_ptr: _address,
        }

    def resumed(self) -> AbstractContextManager[Any]:
        """Entered again, where torch has suspended it: while it runs a function."""
        modes = _get_current_function_mode_stack()
        return nullcontext() if self in modes else self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.properties:
            return self.properties[func](*args)
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args = tuple(map(_on_meta, args))
        kwargs = {name: _on_meta(x) for name, x in (kwargs or {}).items()}
        on_gpu = kwargs.get("device") == _META or any(isinstance(x, Tensor) and x.is_meta for x in args)
        if on_gpu and "generator" in kwargs:
            kwargs["generator"] = None  # nothing is drawn
        if on_gpu and func in _FROM_NUMBERS and not isinstance(args[-1], Tensor):
            self.record.wait(f"{func.__name__} on the GPU from numbers of the host")
        if on_gpu and func in (Tensor.__getitem__, Tensor.__setitem__) and _holds_list(args[1]):
            self.record.wait("indexing with a list")
        return func(*args, **kwargs)


def _holds_list(index: Any) -> bool:
    return any(isinstance(i, list) for i in (index if isinstance(index, tuple) else (index,)))


def _on_meta(x: Any) -> Any:
    """The meta device for CUDA, anything else as it is."""
    is_cuda = isinstance(x, (str, torch.device)) and str(x).split(":")[0] == "cuda"
    return _META if is_cuda else x


def _address(x: Tensor) -> int:
    """As an allocator's: unique, a storage begins at a multiple of 512."""
    within = int(x.storage_offset()) * x.element_size()
    return 512 * x.untyped_storage()._cdata + within if x.is_meta else x.data_ptr()


class _Seeing(TorchDispatchMode):
    """Records what reaches the GPU, and runs the body of each of our ops beside its fake kernel."""

    def __init__(self, record: Record, acting: _Acting) -> None:
        super().__init__()
        self.record, self.acting = record, acting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            if func in (aten._to_copy.default, aten.copy_.default):
                into, source = (None, args[0]) if func is aten._to_copy.default else args[:2]
                target = kwargs.get("device") or (into if into is not None else source).device
                if source.device.type != target.type:
                    return self._copy(source, target, func, args, kwargs)
            if any(x.is_meta for x in tensors):
                self._look(func, args, kwargs, tensors)
                if func is aten._local_scalar_dense.default:
                    return torch.zeros((), dtype=args[0].dtype).item()
            # torch 2.11's meta kernel of addmm.dtype_out fails.
            out = kwargs["out"] if func is aten.addmm.dtype_out else func(*args, **kwargs)
            if func.namespace in ("aten", "profiler"):
                outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
                if _launches(func) and any(x.is_meta for x in outputs):
                    name = f"aten.{func.overloadpacket.__name__}"
                    self.record.launches[name] += 1
                    # Detached, or autograd would copy the gradients, since something else holds on to them.
                    held = {id(x): x.detach() for x in (*tensors, *outputs)}
                    ins, outs = ([held[id(x)] for x in some] for some in (tensors, outputs))
                    self.record.work.append(TorchOp(name, ins, outs))
                return out
        with self.acting.resumed(), self:
            made = func.redispatch(_ON_CUDA, *args, **kwargs)
        self._compare(func, out, made)
        return out

    def _look(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        """Faults of an op before it runs."""
        name = func.overloadpacket.__name__
        if not all(x.is_meta for x in tensors):
            self.record.fault(f"{name} gets tensors of the GPU and of the CPU")
        if func is aten._local_scalar_dense.default:
            self.record.wait("a value is read (item, bool, int or float)")
        elif func in _SIZED_BY_VALUES:
            self.record.wait(name)
        elif func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self.record.wait("repeat_interleave without output_size")
        elif func in (aten.index.Tensor, aten.index_put_.default):
            masked = any(x is not None and x.dtype == torch.bool for x in args[1])
            if masked and not (func is aten.index_put_.default and args[2].numel() == 1):  # else masked_fill
                self.record.wait("indexing with a mask")

    def _copy(self, source: Tensor, target: torch.device, func: Any, args: Any, kwargs: Any) -> Any:
        non_blocking = kwargs.get("non_blocking") or (len(args) == 3 and args[2])
        down, new = target.type == "cpu", len(args) == 1  # torch pins what is new
        pinned = (down and new) or getattr(args[0] if down else source, "pinned", False)
        self.record.copy("to" if down else "from", waits=not (non_blocking and pinned))
        if not new:  # copy_
            return args[0]
        if target.type == "cpu":
            return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return func(*args, **kwargs)

    def _compare(self, func: Any, promised: Any, made: Any) -> None:
        """Record where the outputs of an op's fake kernel and of its body differ."""
        for i, pair in enumerate(zip(tree_leaves(promised), tree_leaves(made), strict=True)):
            fake, real = ((x.dtype, tuple(x.shape), x.stride()) for x in pair)
            if fake != real:
                self.record.fault(f"output {i} of {func.name()} is {real}, its fake kernel says {fake}")


def _launches(func: Any) -> bool:
    """Whether an op starts work on the GPU: not for a view or empty memory."""
    returns = func._schema.returns
    is_view = returns and all(x.alias_info is not None and not x.alias_info.is_write for x in returns)
    return not is_view and func not in _LAUNCH_NOTHING
