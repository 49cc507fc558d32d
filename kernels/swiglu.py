"""
SwiGLU's gating (Shazeer, arXiv 2002.05202), forward and backward.

    y = silu(g) * u,   silu(g) = g s,   s = sigmoid(g)                g, u, y (N, F)
    du = dy g s,       dg = dy u s (1 + g (1 - s))

The arithmetic is float32 (float64 for float64 inputs) whatever the storage; the backward pass recomputes s, so nothing
but g and u is kept. Bytes moved, e per element: forward 3 N F e, backward 5 N F e.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.backend import register, tl, triton, use_triton
from kernels.norm import _rows


def swiglu_ref(gate, up):
    """The meaning of `swiglu`, in plain torch."""
    acc = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(acc)) * up.to(acc)).to(gate.dtype)


@triton.jit(do_not_specialize=["N"])
def _swiglu_fwd_kernel(G, U, Y, N, stride_g, stride_u, F: tl.constexpr, ACC: tl.constexpr,
                       BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)  # row blocks, and in each of them column blocks
    rows = block // tl.cdiv(F, BLOCK_F) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (block % tl.cdiv(F, BLOCK_F)).to(tl.int32) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < N)[:, None] & (cols < F)[None, :]
    g = tl.load(G + rows[:, None] * stride_g + cols[None, :], mask, 0.0).to(ACC)
    u = tl.load(U + rows[:, None] * stride_u + cols[None, :], mask, 0.0).to(ACC)
    y = g * tl.sigmoid(g) * u
    tl.store(Y + rows[:, None] * F + cols[None, :], y.to(Y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["N"])
def _swiglu_bwd_kernel(DY, G, U, DG, DU, N, stride_dy, stride_g, stride_u, F: tl.constexpr, ACC: tl.constexpr,
                       BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    rows = block // tl.cdiv(F, BLOCK_F) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (block % tl.cdiv(F, BLOCK_F)).to(tl.int32) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < N)[:, None] & (cols < F)[None, :]
    dy = tl.load(DY + rows[:, None] * stride_dy + cols[None, :], mask, 0.0).to(ACC)
    g = tl.load(G + rows[:, None] * stride_g + cols[None, :], mask, 0.0).to(ACC)
    u = tl.load(U + rows[:, None] * stride_u + cols[None, :], mask, 0.0).to(ACC)
    s = tl.sigmoid(g)
    out = rows[:, None] * F + cols[None, :]
    tl.store(DG + out, (dy * u * s * (1.0 + g * (1.0 - s))).to(DG.dtype.element_ty), mask)
    tl.store(DU + out, (dy * g * s).to(DU.dtype.element_ty), mask)


def _tile(N, F):
    """The grid, and per program a tile of 2048 elements: 16 a thread, three or five streams of them in flight."""
    block_f = min(1024, triton.next_power_of_2(F))
    block_n = 2048 // block_f
    return (triton.cdiv(N, block_n) * triton.cdiv(F, block_f),), dict(BLOCK_N=block_n, BLOCK_F=block_f, num_warps=4)


def _swiglu_fwd(gate, up):
    g, u, acc = _rows(gate), _rows(up), torch.promote_types(gate.dtype, torch.float32)
    N, F = g.shape
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grid, tile = _tile(N, F)
    if N:
        _swiglu_fwd_kernel[grid](g, u, y, N, g.stride(0), u.stride(0), F=F, ACC=getattr(tl, str(acc)[6:]), **tile)
    return y


def _swiglu_bwd(dy, gate, up):
    dy, g, u, acc = _rows(dy), _rows(gate), _rows(up), torch.promote_types(gate.dtype, torch.float32)
    N, F = g.shape
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    grid, tile = _tile(N, F)
    if N:
        _swiglu_bwd_kernel[grid](dy, g, u, dgate, dup, N, dy.stride(0), g.stride(0), u.stride(0), F=F,
                                 ACC=getattr(tl, str(acc)[6:]), **tile)
    return dgate, dup


register("swiglu_fwd", "(Tensor gate, Tensor up) -> Tensor", _swiglu_fwd, lambda gate, up: gate.new_empty(gate.shape))
register("swiglu_bwd", "(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)", _swiglu_bwd,
         lambda dy, gate, up: (gate.new_empty(gate.shape), up.new_empty(up.shape)))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return torch.ops.nanolong.swiglu_fwd(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return torch.ops.nanolong.swiglu_bwd(dy, *ctx.saved_tensors)


def swiglu(gate, up):
    """
    gate, up (..., F), one float dtype, any row strides -> (..., F) in that dtype: silu(gate) * up. Differentiable once.
    ValueError when their shapes or dtypes differ. Shazeer, arXiv 2002.05202.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu: gate is {gate.dtype} {tuple(gate.shape)}, up is {up.dtype} {tuple(up.shape)}: "
                         "they must be equal")
    if not use_triton(gate):
        return swiglu_ref(gate, up)
    return _SwiGLU.apply(gate, up)
