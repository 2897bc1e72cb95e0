"""A GPU that keeps account of devices alone: what CUDA refuses between tensors of a CPU and of a GPU raises.

`FakeTensorMode` needs no GPU. PyTorch's backward pass asks CUDA's driver even then, so it is replaced here: each leaf
of the graph gets a gradient on its own device. What CUDA itself would do with a backward pass is not tested.
"""

import contextlib
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
ATEN = torch.ops.aten
COMPOSITE = (ATEN.item.default, ATEN.lstm.data, ATEN.gru.data, ATEN._pad_packed_sequence.default)


class PretendGpu(FakeTensorMode):
    """Tensors of the CPU are real. Those of the GPU are fake, and what is read back from it is all ones, or False."""

    avoid_device_init = True  # whatever `torch.cuda.is_available` says

    def __init__(self):
        super().__init__(allow_non_fake_inputs=False)
        self.inside = False  # an operation of `FakeTensorMode` itself

    def dispatch(self, func, types, args=(), kwargs=None):  # noqa: PLR0911 - a line for each kind
        kwargs = kwargs or {}
        if self.inside:
            return super().dispatch(func, types, args, kwargs)
        faked = any(map(is_fake, tree_leaves((args, kwargs))))
        if not faked and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            return func(*args, **kwargs)
        if func in COMPOSITE:
            with self:  # of several operations, as it comes in inference mode
                return func.decompose(*args, **kwargs)
        if func is ATEN._local_scalar_dense.default:
            return read_back(args[0]).item()
        if func is ATEN._pack_padded_sequence.default:  # its shape depends on the lengths
            values, lengths, batch_first = args
            if is_fake(lengths):
                raise RuntimeError("'lengths' argument should be a 1D CPU int64 tensor")
            data, sizes = func(read_back(values), lengths, batch_first)
            copy = (ATEN._to_copy.default, (), (self.fake(data),), {"device": GPU})
            return self.as_fake(lambda: super(PretendGpu, self).dispatch(*copy)), sizes
        if func is ATEN._thnn_fused_gru_cell.default:  # has no shapes without a device
            with self:
                width = args[2].shape[1]
                return args[0][:, :width] + args[1][:, :width] + args[2], args[0]
        changed = args[0] if args and func._schema.is_mutable and isinstance(args[0], Tensor) else None
        kept_on_cpu = changed is not None and not is_fake(changed)
        if kept_on_cpu and func is not ATEN.copy_.default:
            raise RuntimeError(f"{func} changes a tensor of the CPU by one of the GPU")
        fakes, fake_options = tree_map(self.fake, (tuple(args), dict(kwargs)))
        result = self.as_fake(lambda: super(PretendGpu, self).dispatch(func, types, fakes, fake_options))
        if kept_on_cpu:
            return changed
        return tree_map(lambda each: read_back(each) if is_fake(each) and each.device.type == "cpu" else each, result)

    def fake(self, value):
        real = isinstance(value, Tensor) and not is_fake(value)
        return self.as_fake(lambda: self.from_tensor(value.detach())) if real else value

    def as_fake(self, compute):
        self.inside = True
        try:
            return compute()
        finally:
            self.inside = False


def is_fake(value):
    return isinstance(value, FakeTensor)


def read_back(fake):
    return torch.full(tuple(fake.shape), fake.dtype is not torch.bool, dtype=fake.dtype)


def leaves(node, seen):
    if node is not None and node not in seen:
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        for following, _ in node.next_functions:
            yield from leaves(following, seen)


@contextlib.contextmanager
def pretend_gpu():
    """Compute on `GPU` in the block; yields the graphs' leaves that a backward pass has reached."""
    reached = []

    def backward(tensors, grad_tensors=None, **_options):
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        seeds = [None] * len(tensors) if grad_tensors is None else list(grad_tensors)
        for tensor, seed in zip(tensors, seeds, strict=True):
            if seed is not None:
                assert seed.device == tensor.device
            for leaf in leaves(tensor.grad_fn, set()):
                leaf.grad = torch.zeros_like(leaf)
                reached.append(leaf)

    def grad(_output, inputs, **_options):
        return [torch.zeros_like(each) for each in inputs]

    with contextlib.ExitStack() as stack:
        stack.enter_context(PretendGpu())  # first: where there is no CUDA, it keeps PyTorch from asking for it
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        for name, value in {
            "torch.cuda.is_available": lambda: True,  # else mixed precision is off
            "torch.cuda.is_current_stream_capturing": lambda: False,
            "torch.cuda.get_rng_state": lambda _device: torch.get_rng_state(),
            "torch.cuda.set_rng_state": lambda _state, _device: None,
            "torch.cuda.manual_seed_all": lambda _seed: None,
            "torch.cuda.mem_get_info": lambda _device: (2**30, 2**30),
            "torch.cuda.is_bf16_supported": lambda *_: True,
            "torch.Tensor.pin_memory": lambda tensor, *_: tensor,
            # It reads whether a gradient overflowed, and would read that one did.
            "torch.amp.GradScaler._maybe_opt_step": lambda _scaler, optimizer, _state, **_options: optimizer.step(),
            "torch.Tensor.backward": backward,
            "torch.autograd.backward": backward,
            "torch.autograd.grad": grad,
        }.items():
            stack.enter_context(mock.patch(name, value))
        yield reached
