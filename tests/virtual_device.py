"""A GPU that is none: its tensors say they are on cuda:0, and compute on the CPU.

    with VirtualGPU() as gpu:
        generate(gpu.copy(model), prompts)

It refuses what a GPU refuses or what costs it dearly: an operation on tensors of two devices, an
attention that no fused kernel takes and, inside the capture of a CUDA graph, a wait for the device,
another device than the current one, a garbage collector that may run. Nothing here is about speed.

To PyTorch's C++ code the tensors are on `meta`, which needs no driver. Every operation reaches
`__torch_dispatch__` below, which does it on the tensors inside.
"""

import copy
import gc
from contextlib import ExitStack, contextmanager
from functools import cache
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from virtual_kernels import FOR_CUDA

COPIES = {"_to_copy", "copy_"}  # they may have tensors of two devices, and then wait
# The host waits for these: it needs the numbers to know the size or the value of the result.
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"}
WAITS |= {"_unique2", "unique_dim", "unique_consecutive"}
INDEXING = {"index", "index_put", "index_put_"}  # by a mask they wait, too


class VirtualTensor(torch.Tensor):
    """A tensor on the virtual GPU; its numbers are in `held`, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: self.place)
    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, held, place):
        layout = dict(strides=held.stride(), storage_offset=held.storage_offset())
        options = dict(dtype=held.dtype, device="meta") | layout
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.shape, **options)
        tensor.held = held
        tensor.place = place
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on the virtual GPU, but outside of its `with`")

    def data_ptr(self):
        return self.held.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"{self.place} {self.held}"

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        self.held = other.held


# ---- The arguments of an operation ---------------------------------------------------------------
def changed(function, x):
    """Return x, a tensor or lists, tuples and dicts of some, with the function of each tensor."""
    if isinstance(x, torch.Tensor):
        return function(x)
    if isinstance(x, (list, tuple)):
        return type(x)([changed(function, y) for y in x])
    if isinstance(x, dict):
        return {key: changed(function, y) for key, y in x.items()}
    return x


def tensors_in(x):
    """Return the tensors of lists, tuples and dicts in their order."""
    found = []
    changed(found.append, x)
    return found


@cache
def arguments_of(func):
    """Return the names of an operation's arguments, and of those that it writes to."""
    arguments = func._schema.arguments
    written = [x.name for x in arguments if x.alias_info and x.alias_info.is_write]
    return [x.name for x in arguments], written


def inside(tensor):
    return tensor.held if isinstance(tensor, VirtualTensor) else tensor


def memory(tensor):
    """Return the address of the memory that a tensor is a view of."""
    return inside(tensor).untyped_storage().data_ptr()


# ---- CUDA graphs ---------------------------------------------------------------------------------
class Graph:
    """What was done in a capture, to be done again on the same memory. The dicts are {address:
    tensor}: what the graph made itself, and what it reads and writes of others."""

    def __init__(self):
        self.calls, self.made, self.read, self.written = [], {}, {}, {}

    def record(self, call, args, kwargs, out, writes):
        given = {memory(x): x for x in tensors_in((args, kwargs))}
        self.read |= {key: x for key, x in given.items() if key not in self.made}
        self.written |= {memory(x): x for x in writes if memory(x) not in self.made}
        new = {memory(x): x for x in tensors_in(out) if memory(x) not in given}
        self.made |= new
        if new or writes:  # a view stays one
            self.calls.append((call, args, kwargs, tensors_in(out)))

    @torch.no_grad()
    def replay(self):
        with _disable_current_modes():
            for graph in self.pool:
                graph.spoil()
            for call, args, kwargs, out in self.calls:
                again = tensors_in(call(*args, **kwargs))
                for old, new in zip(out, again, strict=True):
                    if old is not new:
                        old.copy_(new)

    def spoil(self):
        """Overwrite what the graph made, as others that share its memory do."""
        for x in self.made.values():
            x.fill_(torch.nan if x.is_floating_point() else 0)


# ---- The device ----------------------------------------------------------------------------------
class VirtualGPU(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.current = 0  # of torch.cuda.set_device
        self.graphs = []  # all that were captured
        self.graph = None  # the one that is being captured

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # True would import PyTorch's compiler, which takes seconds

    def __enter__(self):
        fakes = dict(_lazy_init=lambda: None, set_device=self.set_device, CUDAGraph=Graph)
        fakes |= dict(graph=self.capture, graph_pool_handle=list)
        fakes |= dict(mem_get_info=lambda *_: (2**30, 2**30), current_device=lambda: self.current)
        fakes |= dict(get_device_capability=lambda *_: (9, 0))
        self.patches = ExitStack()
        self.patches.enter_context(mock.patch.multiple(torch.cuda, **fakes))
        self.attend = F.scaled_dot_product_attention
        fused = dict(scaled_dot_product_attention=self.fused_attention)
        self.patches.enter_context(mock.patch.multiple(F, **fused))
        torch._C._set_only_lift_cpu_tensors(True)  # or torch.tensor would pass us by
        self.patches.callback(torch._C._set_only_lift_cpu_tensors, False)
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        return super().__exit__(*error)

    def copy(self, model):
        """Return a copy of a model on cuda:0."""
        model, moved = copy.deepcopy(model), {}
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None and p not in moved:
                    there = VirtualTensor(p.detach(), torch.device("cuda:0"))
                    moved[p] = torch.nn.Parameter(there, p.requires_grad)
                module._parameters[name] = moved.get(p)
        return model

    def set_device(self, device):
        index = device if isinstance(device, int) else torch.device(device).index
        if index is None:
            raise ValueError(f"PyTorch expects a device with an index, not {device}")
        self.current = index

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        tensors = tensors_in((args, kwargs))
        here = [x for x in tensors if isinstance(x, VirtualTensor)]
        devices = {x.place for x in here if x.dim()} or {x.place for x in here}

        # 1) Where the result is. C++ code asks for `meta` where it wants its arguments' device.
        asked = torch.device(kwargs["device"]) if kwargs.get("device") else None
        if not here and (asked is None or asked.type == "cpu"):
            return func(*args, **kwargs)  # all of it is on the host
        place = next(iter(devices), torch.device("cuda", self.current))
        if asked is not None and asked.type != "meta":
            place = torch.device("cuda", asked.index or 0) if asked.type == "cuda" else asked
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")

        # 2) What a GPU refuses. A number of the host, without axes, may go with any tensor.
        on_host = any(x.dim() and not isinstance(x, VirtualTensor) for x in tensors)
        if name not in COPIES and (len(devices) > 1 or (here and on_host)):
            raise RuntimeError(f"{func}: tensors of two devices")
        waits = name in WAITS or func is torch.ops.aten.repeat_interleave.Tensor
        waits |= name in COPIES and (on_host or devices != {place})
        waits |= name in INDEXING and any(x.dtype == torch.bool for x in tensors_in(args[1]))
        if waits and self.graph is not None:
            raise RuntimeError(f"{func} waits for the device, inside a capture")

        # 3) Do it.
        names, written = arguments_of(func)
        named = dict(zip(names, args, strict=False)) | kwargs
        writes = tensors_in([named.get(name) for name in written])
        return self.do(FOR_CUDA.get(func, func), args, kwargs, place, writes)

    def do(self, call, args, kwargs, place, writes=()):
        """Call a function with the numbers of its arguments; its result is on the device."""
        outside = {id(inside(x)): x for x in tensors_in((args, kwargs))}  # in place: the same
        args, kwargs, writes = changed(inside, (args, kwargs, writes))
        if self.graph is not None:
            if place.index != self.current:
                raise RuntimeError(f"the capture is of cuda:{self.current}, not of {place}")
            for x in writes:
                self.before.setdefault(memory(x), (x, x.clone()))
        out = call(*args, **kwargs)
        if self.graph is not None:
            self.graph.record(call, args, kwargs, out, writes)

        def wrap(x):
            return outside[id(x)] if id(x) in outside else VirtualTensor(x, place)

        return changed(wrap, out) if place.type == "cuda" else out

    def fused_attention(self, q, k, v, mask=None, **how):
        """Do what F.scaled_dot_product_attention does, if a fused kernel of a GPU would."""
        if not isinstance(q, VirtualTensor):
            return self.attend(q, k, v, mask, **how)
        fused = all(x.dim() == 4 and x.stride(3) == 1 and x.dtype == q.dtype for x in (q, k, v))
        if mask is not None:  # no kernel repeats heads under a mask
            fused &= mask.dim() == 4 and mask.dtype in (torch.bool, q.dtype)
            fused &= q.shape[1] == k.shape[1] and not how.get("is_causal")
        if self.graph is not None:  # else the mask is copied in every layer
            fused &= k.shape[2] % 8 == 0
        if not fused:
            raise RuntimeError(f"no fused attention of q {q.shape} and k {k.shape}")
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            return self.attend(q, k, v, mask, **how)
        return self.do(self.attend, (q, k, v, mask), how, q.place)

    @contextmanager
    def capture(self, graph, pool=None):
        """Record what is done, and undo it."""
        if gc.isenabled():
            raise RuntimeError("the garbage collector may end a capture: it frees other graphs")
        self.graph = graph
        self.before = {}  # {address: (tensor, what was in it)}
        try:
            yield
        finally:
            self.graph = None
            with _disable_current_modes(), torch.no_grad():
                for x, numbers in self.before.values():
                    x.copy_(numbers)
                graph.spoil()  # what it made has no meaning before a replay
        graph.pool = [] if pool is None else pool
        graph.pool.append(graph)
        self.graphs.append(graph)
