"""
RMSNorm (Zhang & Sennrich, arXiv 1910.07467), forward and backward.

    y = x * r * w,   r = 1 / sqrt(mean(x^2) + eps)                    x, y (N, C), w (C,), r (N,)
    dx = r * (w dy - x r^2 mean(w dy x)),   dw = sum_n dy x r

The arithmetic is float32 (float64 for float64 inputs) whatever the storage; r is kept for the backward pass. Bytes
moved, e per element: forward 2 N C e, backward 3 N C e. dw is summed per program in registers, then over programs:
deterministic.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.backend import register, tl, triton, use_triton


def rms_norm_ref(x, weight, eps):
    """The meaning of `rms_norm`, in plain torch."""
    acc = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(acc), weight.shape, weight.to(acc), eps).to(x.dtype)


@triton.jit(do_not_specialize=["N"])
def _rms_norm_fwd_kernel(X, W, Y, R, N, stride_x, C: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
                         BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_C)
    mask = (rows < N)[:, None] & (cols < C)[None, :]
    x = tl.load(X + rows[:, None] * stride_x + cols[None, :], mask, 0.0).to(ACC)
    w = tl.load(W + cols, cols < C, 0.0).to(ACC)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 1) / C + EPS)
    y = x * r[:, None] * w[None, :]
    tl.store(Y + rows[:, None] * C + cols[None, :], y.to(Y.dtype.element_ty), mask)
    tl.store(R + rows, r, rows < N)


@triton.jit(do_not_specialize=["N"])
def _rms_norm_bwd_kernel(DY, X, W, R, DX, DW, N, stride_dy, stride_x, C: tl.constexpr, ACC: tl.constexpr,
                         BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    cols = tl.arange(0, BLOCK_C)
    w = tl.load(W + cols, cols < C, 0.0).to(ACC)
    dw = tl.zeros((BLOCK_C,), ACC)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (rows < N)[:, None] & (cols < C)[None, :]
        x = tl.load(X + rows[:, None] * stride_x + cols[None, :], mask, 0.0).to(ACC)
        dy = tl.load(DY + rows[:, None] * stride_dy + cols[None, :], mask, 0.0).to(ACC)
        r = tl.load(R + rows, rows < N, 0.0)
        x_hat = x * r[:, None]
        wdy = dy * w[None, :]
        dx = r[:, None] * (wdy - x_hat * (tl.sum(wdy * x_hat, 1) / C)[:, None])
        dw += tl.sum(dy * x_hat, 0)
        tl.store(DX + rows[:, None] * C + cols[None, :], dx.to(DX.dtype.element_ty), mask)
    tl.store(DW + tl.program_id(0).to(tl.int64) * C + cols, dw, cols < C)


def _tile(C):
    """Rows per program and warps: about 4096 elements a tile, one row at least, 16 elements a thread."""
    block_c = triton.next_power_of_2(C)
    block_n = max(1, 4096 // block_c)
    return dict(BLOCK_N=block_n, BLOCK_C=block_c, num_warps=min(16, max(1, block_n * block_c // 512)))


def _rows(x):
    """x (..., C) as (N, C), its last dim contiguous; a copy only where the leading dims do not fold into one stride."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _rms_norm_fwd(x, weight, eps):
    rows, acc = _rows(x), torch.promote_types(x.dtype, torch.float32)
    N, C = rows.shape
    y, r = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(N, dtype=acc, device=x.device)
    tile = _tile(C)
    if N:
        _rms_norm_fwd_kernel[(triton.cdiv(N, tile["BLOCK_N"]),)](
            rows, weight.contiguous(), y, r, N, rows.stride(0), C=C, EPS=eps, ACC=getattr(tl, str(acc)[6:]), **tile)
    return y, r


def _rms_norm_bwd(dy, x, weight, r):
    dy_rows, rows = _rows(dy), _rows(x)
    N, C = rows.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = _tile(C)
    programs = max(1, min(triton.cdiv(N, tile["BLOCK_N"]), 1024))
    dw = torch.empty(programs, C, dtype=r.dtype, device=x.device)
    _rms_norm_bwd_kernel[(programs,)](dy_rows, rows, weight.contiguous(), r, dx, dw, N, dy_rows.stride(0),
                                      rows.stride(0), C=C, ACC=getattr(tl, str(r.dtype)[6:]), **tile)
    return dx, dw.sum(0).to(weight.dtype)


register("rms_norm_fwd", "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", _rms_norm_fwd,
         lambda x, weight, eps: (
             x.new_empty(x.shape),
             x.new_empty(x.numel() // x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))))
register("rms_norm_bwd", "(Tensor dy, Tensor x, Tensor weight, Tensor r) -> (Tensor, Tensor)", _rms_norm_bwd,
         lambda dy, x, weight, r: (x.new_empty(x.shape), weight.new_empty(weight.shape)))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, r = torch.ops.nanolong.rms_norm_fwd(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *torch.ops.nanolong.rms_norm_bwd(dy, *ctx.saved_tensors), None


def rms_norm(x, weight, eps):
    """
    x (..., C) any float dtype, weight (C,), eps > 0 -> (..., C) in x's dtype: x / rms(x) * weight. Differentiable once,
    in x and weight. ValueError when the sizes differ. Zhang & Sennrich, arXiv 1910.07467.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, x ends in {x.shape[-1]}: "
                         "they must be equal")
    if not use_triton(x):
        return rms_norm_ref(x, weight, eps)
    return _RMSNorm.apply(x, weight, float(eps))
