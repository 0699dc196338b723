"""Bytes that a decoder block keeps for its backward pass with CUDA's kernels, by libtorch itself and without a GPU.

Runs the operations of `DecoderBlock::forward` on fake CUDA tensors: shapes and autograd are real, memory is not.
The figures are those of `cuda_keeps_what_libtorch_keeps` in crates/sail-train/src/estimate/forward.rs.

    .venv/bin/python tests/reference/cuda_block.py
"""

import weakref

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

ROWS, WIDTH, HEADS, KEY_HEADS, HEAD, INNER = 4096, 1024, 8, 4, 128, 3072
aten = torch.ops.aten


class Meter(TorchDispatchMode):
    """Counts the bytes of all storages that live."""

    def __init__(self):
        super().__init__()
        self.live, self.known = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                self.track(tensor.untyped_storage())
        return out

    def track(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.known.discard(key)
        self.live -= size


class SwiGlu(torch.autograd.Function):
    """Keeps what it is made of, as `sail_torch::swiglu`."""

    @staticmethod
    def forward(context, gate, up):
        context.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)


def kept_bytes(trained):
    with FakeTensorMode(), Meter() as meter:
        def empty(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, device="cuda", dtype=dtype)

        def param(*shape):
            return empty(*shape).requires_grad_(trained)

        norm1, norm2, q_norm, k_norm = param(WIDTH), param(WIDTH), param(HEAD), param(HEAD)
        q_proj, o_proj = param(HEADS * HEAD, WIDTH), param(WIDTH, HEADS * HEAD)
        k_proj, v_proj = param(KEY_HEADS * HEAD, WIDTH), param(KEY_HEADS * HEAD, WIDTH)
        gate, up, down = param(INNER, WIDTH), param(INNER, WIDTH), param(WIDTH, INNER)
        x = empty(ROWS, WIDTH).requires_grad_()
        cos, sin = empty(ROWS, 1, HEAD // 2), empty(ROWS, 1, HEAD // 2)
        ends = empty(5, dtype=torch.int32)
        before = meter.live

        def rms_norm(x, weight):
            return aten._fused_rms_norm(x, weight.shape, weight, 1e-6)[0]

        def rotate(x):
            low, high = x.chunk(2, -1)
            return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

        def block(x):
            normed = rms_norm(x, norm1)
            heads = lambda weight: F.linear(normed, weight).view(ROWS, -1, HEAD)
            q, k, v = heads(q_proj), heads(k_proj), heads(v_proj)
            q, k = rotate(rms_norm(q, q_norm)), rotate(rms_norm(k, k_norm))
            out = aten._flash_attention_forward(q, k, v, ends, ends, 1024, 1024, 0.0, True, False)[0]
            x = x + F.linear(out.reshape(ROWS, -1), o_proj)
            normed = rms_norm(x, norm2)
            return x + F.linear(SwiGlu.apply(F.linear(normed, gate), F.linear(normed, up)), down)

        y = block(x)
        return meter.live - before - y.untyped_storage().nbytes()


for trained in (True, False):
    print("trained" if trained else "frozen", kept_bytes(trained))
