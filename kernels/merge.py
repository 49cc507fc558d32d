"""
What comes after attention, forward and backward: the merge of two results over disjoint keys, and a learned sink.

Merge:
    lse = ln(exp(lse_a) + exp(lse_b)),   a = exp(lse_a - lse),  b = exp(lse_b - lse),   out = a out_a + b out_b
    dout_a = a dout,   dlse_a = a (dlse + dout . (out_a - out)),   and so for b

out (B, T, H, D), lse (B, H, T), natural logarithm. A part that saw nothing has lse -inf and share 0; two of them give
(0, -inf). All in float32 (float64 for float64). Bytes moved, e per element: forward 3 B T H D e, backward 6 B T H D e.

A sink that is a logit z_h in the softmax denominator, with no key or value: softmax-off-by-one where z is 0.
    y = sum_j exp(s_j) v_j / (exp(z) + sum_j exp(s_j)) = g out,   g = sigmoid(lse - z),   lse without the sink
    dout = g dy,   dlse = g (1 - g) dy . out,   dz_h = -sum over rows of dlse
Bytes moved: forward 2 B T H D e, backward 3 B T H D e.
"""

import torch
from torch.autograd.function import once_differentiable

from kernels.backend import register, tl, triton, use_triton

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def merge_attention_ref(out_a, lse_a, out_b, lse_b):
    """The meaning of `merge_attention`, in plain torch, in float32 (float64 for float64 inputs)."""
    acc = torch.promote_types(out_a.dtype, torch.float32)
    lse_a, lse_b = lse_a.to(acc), lse_b.to(acc)
    pivot = torch.maximum(lse_a, lse_b).detach()
    pivot = pivot.masked_fill(pivot == -torch.inf, 0.0)
    a, b = (lse_a - pivot).exp(), (lse_b - pivot).exp()
    empty = a + b == 0
    total = (a + b).masked_fill(empty, 1.0)
    a, b = ((x / total).transpose(1, 2)[..., None] for x in (a, b))
    return a * out_a.to(acc) + b * out_b.to(acc), (pivot + total.log()).masked_fill(empty, -torch.inf)


@triton.jit(do_not_specialize=["N", "T"])
def _merge_fwd_kernel(OUT_A, LSE_A, OUT_B, LSE_B, OUT, LSE, N, T, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                      BLOCK_N: tl.constexpr):
    """Rows of (B, T, H, D) in memory order; lse is (B, H, T)."""
    rows, at_lse = _merge_rows(N, T, H, BLOCK_N)
    a = tl.load(LSE_A + at_lse, rows < N, 0.0)
    b = tl.load(LSE_B + at_lse, rows < N, 0.0)
    pivot = tl.maximum(a, b)
    pivot = tl.where(pivot == float("-inf"), 0.0, pivot)
    a = tl.exp2((a - pivot) * LOG2E)
    b = tl.exp2((b - pivot) * LOG2E)
    total = tl.where(a + b == 0.0, 1.0, a + b)
    tl.store(LSE + at_lse, tl.where(a + b == 0.0, float("-inf"), pivot + tl.log2(total) * LN2), rows < N)
    d = tl.arange(0, BLOCK_D)
    at = rows[:, None] * D + d[None, :]
    mask = (rows < N)[:, None] & (d < D)[None, :]
    out = (a / total)[:, None] * tl.load(OUT_A + at, mask, 0.0) + (b / total)[:, None] * tl.load(OUT_B + at, mask, 0.0)
    tl.store(OUT + at, out, mask)


@triton.jit
def _merge_rows(N, T, H: tl.constexpr, BLOCK_N: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = rows // H
    return rows, (token // T * H + rows % H) * T + token % T


@triton.jit(do_not_specialize=["N", "T"])
def _merge_bwd_kernel(DOUT, DLSE, OUT_A, LSE_A, OUT_B, LSE_B, OUT, LSE, DOUT_A, DLSE_A, DOUT_B, DLSE_B, N, T,
                      H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    rows, at_lse = _merge_rows(N, T, H, BLOCK_N)
    lse = tl.load(LSE + at_lse, rows < N, 0.0)
    empty = lse == float("-inf")
    lse = tl.where(empty, 0.0, lse)
    a = tl.exp2((tl.load(LSE_A + at_lse, rows < N, 0.0) - lse) * LOG2E)  # the share of each part; 0 in an empty row
    b = tl.exp2((tl.load(LSE_B + at_lse, rows < N, 0.0) - lse) * LOG2E)
    d = tl.arange(0, BLOCK_D)
    at = rows[:, None] * D + d[None, :]
    mask = (rows < N)[:, None] & (d < D)[None, :]
    dout = tl.load(DOUT + at, mask, 0.0)
    out = tl.load(OUT + at, mask, 0.0)
    dlse = tl.where(empty, 0.0, tl.load(DLSE + at_lse, rows < N, 0.0))
    dlse_a = a * (dlse + tl.sum(dout * (tl.load(OUT_A + at, mask, 0.0) - out), 1))
    dlse_b = b * (dlse + tl.sum(dout * (tl.load(OUT_B + at, mask, 0.0) - out), 1))
    tl.store(DOUT_A + at, a[:, None] * dout, mask)
    tl.store(DOUT_B + at, b[:, None] * dout, mask)
    tl.store(DLSE_A + at_lse, dlse_a, rows < N)
    tl.store(DLSE_B + at_lse, dlse_b, rows < N)


def _launch(kernel, *tensors):
    """The kernel over all rows; the first tensor is (B, T, H, D)."""
    B, T, H, D = tensors[0].shape
    block_d = triton.next_power_of_2(D)
    block_n = max(1, 4096 // block_d)
    if tensors[0].numel():
        kernel[(triton.cdiv(B * T * H, block_n),)](*tensors, B * T * H, T, H=H, D=D, BLOCK_D=block_d, BLOCK_N=block_n,
                                                   num_warps=4)


def _merge_fwd(out_a, lse_a, out_b, lse_b):
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    _launch(_merge_fwd_kernel, out_a, lse_a, out_b, lse_b, out, lse)
    return out, lse


def _merge_bwd(dout, dlse, out_a, lse_a, out_b, lse_b, out, lse):
    grads = [torch.empty_like(x) for x in (out_a, lse_a, out_b, lse_b)]
    _launch(_merge_bwd_kernel, dout, dlse, out_a, lse_a, out_b, lse_b, out, lse, *grads)
    return tuple(grads)


register("merge_attention_fwd", "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)", _merge_fwd,
          lambda out_a, lse_a, out_b, lse_b: (torch.empty_like(out_a), torch.empty_like(lse_a)))
register("merge_attention_bwd",
          "(Tensor dout, Tensor dlse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, Tensor out, Tensor lse) "
          "-> (Tensor, Tensor, Tensor, Tensor)", _merge_bwd,
          lambda dout, dlse, out_a, lse_a, out_b, lse_b, out, lse: tuple(
              torch.empty_like(x) for x in (out_a, lse_a, out_b, lse_b)))


class _MergeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out_a, lse_a, out_b, lse_b):
        out, lse = torch.ops.nanolong.merge_attention_fwd(out_a, lse_a, out_b, lse_b)
        ctx.save_for_backward(out_a, lse_a, out_b, lse_b, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        return torch.ops.nanolong.merge_attention_bwd(dout.contiguous(), dlse.contiguous(), *ctx.saved_tensors)


def merge_attention(out_a, lse_a, out_b, lse_b):
    """
    Attention over the union of two disjoint sets of keys, from the results over each: out_a, out_b (B, T, H, D), lse_a,
    lse_b (B, H, T), natural logarithm -> (out, lse), float32 (float64 for float64 inputs), differentiable. Two rows
    that saw nothing give (0, -inf). Ring attention's merge, Liu et al., arXiv 2310.01889.
    """
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or lse_a.shape != out_a.transpose(1, 2).shape[:3]:
        raise ValueError(f"merge_attention: out_a {tuple(out_a.shape)}, out_b {tuple(out_b.shape)}, lse_a "
                         f"{tuple(lse_a.shape)}, lse_b {tuple(lse_b.shape)}: outs must be equal, (B, T, H, D), "
                         "and lses (B, H, T)")
    if not use_triton(out_a):
        return merge_attention_ref(out_a, lse_a, out_b, lse_b)
    acc = torch.promote_types(out_a.dtype, torch.float32)
    return _MergeAttention.apply(*(x.to(acc).contiguous() for x in (out_a, lse_a, out_b, lse_b)))


@triton.jit(do_not_specialize=["N", "T"])
def _merge_into_kernel(OUT, LSE, OUT_B, LSE_B, N, T, stride_ob, stride_lb, stride_lh, H: tl.constexpr, D: tl.constexpr,
                       BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """out and lse in place, at rows of longer tensors; out_b and lse_b contiguous."""
    rows, at_lse_b = _merge_rows(N, T, H, BLOCK_N)
    token, head = rows // H, rows % H
    at_lse = token // T * stride_lb + head * stride_lh + token % T
    a = tl.load(LSE + at_lse, rows < N, 0.0)
    b = tl.load(LSE_B + at_lse_b, rows < N, 0.0)
    top = tl.maximum(a, b)
    top = tl.where(top == float("-inf"), 0.0, top)
    a = tl.exp2((a - top) * LOG2E)
    b = tl.exp2((b - top) * LOG2E)
    empty = a + b == 0.0
    share = tl.where(empty, 0.0, b / tl.where(empty, 1.0, a + b))
    tl.debug_barrier()  # every thread has read the lse that one of them writes
    tl.store(LSE + at_lse, tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, a + b)) * LN2), rows < N)
    d = tl.arange(0, BLOCK_D)
    at = (token // T * stride_ob + (token % T * H + head) * D)[:, None] + d[None, :]
    mask = (rows < N)[:, None] & (d < D)[None, :]
    out = tl.load(OUT + at, mask, 0.0)
    out_b = tl.load(OUT_B + rows[:, None] * D + d[None, :], mask, 0.0)
    tl.store(OUT + at, out + share[:, None] * (out_b - out), mask)


def merge_into(out, lse, out_b, lse_b):
    """
    merge_attention in place, without autograd: out (B, T, H, D) and lse (B, H, T), float32 (float64), may be the same rows
    of longer tensors; out_b and lse_b like them, contiguous.
    """
    if not use_triton(out):
        merged, total = merge_attention_ref(out, lse, out_b, lse_b)
        out.copy_(merged), lse.copy_(total)
        return
    (B, T, H, D), block_d = out.shape, triton.next_power_of_2(out.shape[3])
    block_n = max(1, 4096 // block_d)
    if out.numel():
        _merge_into_kernel[(triton.cdiv(B * T * H, block_n),)](
            out, lse, out_b.contiguous(), lse_b.contiguous(), B * T * H, T, out.stride(0), *lse.stride()[:2], H=H, D=D,
            BLOCK_D=block_d, BLOCK_N=block_n, num_warps=4)


# ----------------------------------------------------------------------------------------------------------------------
# the learned sink

def apply_sink_logit_ref(out, lse, z):
    """The meaning of `apply_sink_logit`, in plain torch."""
    acc = torch.promote_types(out.dtype, torch.float32)
    empty = lse == -torch.inf
    share = (lse.to(acc).masked_fill(empty, 0.0) - z.to(acc)[:, None]).sigmoid().masked_fill(empty, 0.0)
    return (out.to(acc) * share.transpose(1, 2)[..., None]).to(out.dtype)


@triton.jit
def _sink_share(LSE, Z, rows, at_lse, N, H: tl.constexpr):
    """g and 1 - g: 0 and 1 for a row that saw nothing."""
    b_lse = tl.load(LSE + at_lse, rows < N, 0.0)
    empty = b_lse == float("-inf")
    excess = tl.where(empty, 0.0, b_lse) - tl.load(Z + rows % H)
    small = tl.exp2(-tl.abs(excess) * LOG2E)  # 0 to 1: no overflow
    share = tl.where(excess > 0, 1.0, small) / (1.0 + small)
    rest = tl.where(excess > 0, small, 1.0) / (1.0 + small)
    return tl.where(empty, 0.0, share), tl.where(empty, 1.0, rest)


@triton.jit(do_not_specialize=["N", "T"])
def _sink_logit_fwd_kernel(OUT, LSE, Z, Y, N, T, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                           BLOCK_N: tl.constexpr):
    rows, at_lse = _merge_rows(N, T, H, BLOCK_N)
    share, _ = _sink_share(LSE, Z, rows, at_lse, N, H)
    d = tl.arange(0, BLOCK_D)
    at = rows[:, None] * D + d[None, :]
    mask = (rows < N)[:, None] & (d < D)[None, :]
    y = tl.load(OUT + at, mask, 0.0).to(share.dtype) * share[:, None]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["N", "T"])
def _sink_logit_bwd_kernel(DY, OUT, LSE, Z, DOUT, DLSE, N, T, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                           BLOCK_N: tl.constexpr):
    rows, at_lse = _merge_rows(N, T, H, BLOCK_N)
    share, rest = _sink_share(LSE, Z, rows, at_lse, N, H)
    d = tl.arange(0, BLOCK_D)
    at = rows[:, None] * D + d[None, :]
    mask = (rows < N)[:, None] & (d < D)[None, :]
    dy = tl.load(DY + at, mask, 0.0).to(share.dtype)
    out = tl.load(OUT + at, mask, 0.0).to(share.dtype)
    tl.store(DOUT + at, (dy * share[:, None]).to(DOUT.dtype.element_ty), mask)
    tl.store(DLSE + at_lse, share * rest * tl.sum(dy * out, 1), rows < N)


def _sink_logit_fwd(out, lse, z):
    y = torch.empty_like(out)
    _launch(_sink_logit_fwd_kernel, out, lse, z, y)
    return y


def _sink_logit_bwd(dy, out, lse, z):
    dout, dlse = torch.empty_like(out), torch.empty_like(lse)
    _launch(_sink_logit_bwd_kernel, dy, out, lse, z, dout, dlse)
    return dout, dlse


register("apply_sink_logit_fwd", "(Tensor out, Tensor lse, Tensor z) -> Tensor", _sink_logit_fwd,
         lambda out, lse, z: torch.empty_like(out))
register("apply_sink_logit_bwd", "(Tensor dy, Tensor out, Tensor lse, Tensor z) -> (Tensor, Tensor)", _sink_logit_bwd,
         lambda dy, out, lse, z: (torch.empty_like(out), torch.empty_like(lse)))


class _SinkLogit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, lse, z):
        ctx.save_for_backward(out, lse, z)
        return torch.ops.nanolong.apply_sink_logit_fwd(out, lse, z)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dout, dlse = torch.ops.nanolong.apply_sink_logit_bwd(dy.contiguous(), *ctx.saved_tensors)
        return dout, dlse, -dlse.sum((0, 2))


def apply_sink_logit(out, lse, z):
    """
    Attention with a learned sink, from the attention without it: out (B, T, H, D), lse (B, H, T), natural logarithm,
    and z (H,), the sink's logit for each head, beside the scaled scores -> out * sigmoid(lse - z) in out's dtype,
    differentiable once in all three. Rows that saw nothing (out 0, lse -inf) stay 0, with gradients 0; a z of -inf is
    no sink. Apply it once, after any merge. ValueError for shapes that do not fit. Softmax-off-by-one (Miller, 2023) is
    z = 0.
    """
    if out.dim() != 4 or lse.shape != out.transpose(1, 2).shape[:3] or z.shape != out.shape[2:3]:
        raise ValueError(f"apply_sink_logit: out {tuple(out.shape)}, lse {tuple(lse.shape)}, z {tuple(z.shape)}: "
                         "they must be (B, T, H, D), (B, H, T) and (H,)")
    if not use_triton(out):
        return apply_sink_logit_ref(out, lse, z)
    acc = torch.promote_types(out.dtype, torch.float32)
    return _SinkLogit.apply(out.contiguous(), lse.to(acc).contiguous(), z.to(acc).contiguous())
