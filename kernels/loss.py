"""
Cross entropy of a linear layer's output, the logits never whole in memory.

    l_n = W x_n,   lse_n = log sum_v exp l_nv,   nll_n = lse_n - l_n,target       x (N, C), W (V, C), targets (N,)
    dl_nv = g_n (exp(l_nv - lse_n) - [v = target]),   dx_n = dl_n W,   dW = sum_n dl_n x_n^T

Rows go in chunks. Per chunk: logits by one matrix product; one kernel that reads a row once for its lse (online), again
to write dl over it; two products for dx and dW. For "mean" and "sum" that all happens in the forward pass, with g = 1:
the backward pass only multiplies by its scalar, and no logits are computed twice. For "none", g differs per token, so
lse is kept and the backward pass computes the logits again, chunk by chunk, and folds g in before the sum over tokens.

Memory beyond inputs, outputs and gradients: one chunk, 1/14 of the float32 logits (at least 2^19 logits, 2^21 on a GPU,
so that a tiny vocabulary goes in few chunks), and for x in float16 or bfloat16 also W in x's dtype and, on a GPU, one
float32 product of W's size. dW's products and their sum are float32: with g = 1 they grow with N, past float16's range.
dx is in x's dtype: the |dl_nv| of a row add up to at most 2, so |dx| <= 2 max |W|, within range while |W| < 2^15. From
the forward pass of "mean" and "sum" to the end of the backward pass dx and dW exist, and twice while it runs. Bytes the
kernel moves, e per logit: 2 N V e forward, 3 N V e with gradients, beside the matrix products' own.
"""

import torch
from torch.autograd.function import once_differentiable

from kernels.backend import register, tl, triton, use_triton


def _chunk_ref(x, w, targets, ignore_index, lse, grad, write):
    """
    One chunk in plain torch, everything in place: x (n, C), w (V, C), targets (n,) -> nll (n,), lse (n,), dl (n, V) in
    x's dtype if `write`. Given lse and grad (n,), dl is that of the backward pass; otherwise they are computed, and 1.
    """
    logits = (x @ w.T).to(torch.promote_types(x.dtype, torch.float32))
    valid = targets != ignore_index
    index = torch.where(valid, targets, 0)[:, None]
    at_target = logits.gather(1, index)[:, 0]
    if grad is None:
        top = logits.amax(1)  # the softmax runs in place on the CPU, whose kernel allows it
        logits = torch.softmax(logits, 1, out=logits if x.device.type == "cpu" else None)
        lse = top - logits.amax(1).log()
        grad = valid.to(logits.dtype)
    else:
        logits.sub_(lse[:, None]).exp_()
        grad = torch.where(valid, grad, 0)
    if write:
        logits.scatter_add_(1, index, logits.new_full((), -1).expand_as(index)).mul_(grad[:, None])
    return torch.where(valid, lse - at_target, 0), lse, logits.to(x.dtype)


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_kernel(LOGITS, TARGETS, LSE, NLL, GRAD, ignore_index, V: tl.constexpr, STRIDE: tl.constexpr,
                          BACKWARD: tl.constexpr, WRITE: tl.constexpr, ACC: tl.constexpr, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits, cols = LOGITS + row * STRIDE, tl.arange(0, BLOCK_V)
    target = tl.load(TARGETS + row)
    valid, inside = target != ignore_index, (target >= 0) & (target < V)
    if BACKWARD:
        lse, grad = tl.load(LSE + row), tl.load(GRAD + row)
    else:
        top = tl.full((), float("-inf"), ACC)
        total = tl.full((), 0.0, ACC)
        for first in range(0, V, BLOCK_V):
            x = tl.load(logits + first + cols, first + cols < STRIDE, float("-inf")).to(ACC)
            x = tl.where(first + cols < V, x, float("-inf"))
            new_top = tl.maximum(top, tl.max(x, 0))
            pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp(top - pivot) + tl.sum(tl.exp(x - pivot), 0)
            top = new_top
        # a target outside the vocabulary is never read: its loss and gradient are NaN
        lse = tl.where(valid & ~inside, float("nan"), top + tl.log(total))
        at_target = tl.load(logits + target, inside, 0.0).to(ACC)
        tl.store(NLL + row, tl.where(valid, lse - at_target, 0.0))
        tl.store(LSE + row, lse)
        grad = tl.full((), 1.0, ACC)
    if WRITE:
        tl.debug_barrier()  # every thread has read the target's logit before any writes
        for first in range(0, V, BLOCK_V):
            x = tl.load(logits + first + cols, first + cols < STRIDE, 0.0).to(ACC)
            x = tl.where(first + cols < V, x, float("-inf"))
            dx = grad * (tl.exp(x - lse) - tl.where(first + cols == target, 1.0, 0.0))
            dx = tl.where(valid, dx, 0.0)
            tl.store(logits + first + cols, dx.to(LOGITS.dtype.element_ty), first + cols < STRIDE)


def _chunk_triton(x, w, targets, ignore_index, lse, grad, write):
    """As _chunk_ref, with the kernel. Rows of logits are padded to a multiple of 16 elements: aligned whatever V is."""
    (n, V), acc, backward = (x.shape[0], w.shape[0]), torch.promote_types(x.dtype, torch.float32), grad is not None
    stride = triton.cdiv(V, 16) * 16
    logits = torch.empty(n, stride, dtype=x.dtype, device=x.device)[:, :V]
    torch.mm(x, w.T, out=logits)
    nll = torch.empty(n, dtype=acc, device=x.device)
    lse = lse if backward else torch.empty(n, dtype=acc, device=x.device)
    _cross_entropy_kernel[(n,)](logits, targets, lse, nll, grad if backward else nll, ignore_index, V=V, STRIDE=stride,
                                BACKWARD=backward, WRITE=write, ACC=getattr(tl, str(acc)[6:]),
                                BLOCK_V=min(4096, triton.next_power_of_2(V)), num_warps=8)
    return nll, lse, logits


def _chunked(x, weight, targets, lse, grad, ignore_index, want_dx, want_dw, triton):
    """
    All rows, in chunks -> nll (N,), lse (N,), dx (N, C) in x's dtype, dw (V, C) in float32 (float64 for float64); the
    last two empty unless wanted.
    """
    (N, C), V, acc = x.shape, weight.shape[0], torch.promote_types(x.dtype, torch.float32)
    chunk, narrow = _chunk_triton if triton else _chunk_ref, x.dtype != acc
    w = weight.to(x.dtype)
    nll, lses = (torch.empty(N, dtype=acc, device=x.device) for _ in range(2))
    dx = torch.empty((N, C) if want_dx else 0, dtype=x.dtype, device=x.device)
    dw = torch.zeros((V, C) if want_dw else 0, dtype=acc, device=x.device)
    # bytes per logit at a chunk's peak: the reference, and dw on the CPU, hold a float32 copy beside float16
    held = x.itemsize + acc.itemsize if narrow and not (triton and x.is_cuda) else x.itemsize
    rows = max(1, 4 * N // (14 * held), 2 ** (21 if x.is_cuda else 19) // V)
    rows = -(-N // max(1, -(-N // rows)))  # as many chunks, all of one size but the last
    for start in range(0, N, max(1, rows)):
        part = slice(start, min(start + rows, N))
        given = (None, None) if grad is None else (lse[part], grad[part])
        nll[part], lses[part], dlogits = chunk(x[part], w, targets[part], ignore_index, *given, want_dx or want_dw)
        if want_dx:
            torch.mm(dlogits, w, out=dx[part])
        if want_dw and narrow and x.is_cuda:
            dw.add_(torch.mm(dlogits.T, x[part], out_dtype=acc))
        elif want_dw:
            dw.addmm_(dlogits.to(acc).T, x[part].to(acc))
        del dlogits  # or it would live through the next chunk
    return nll, lses, dx, dw


def _linear_cross_entropy_fwd(x, weight, targets, ignore_index, want_dx, want_dw, triton):
    return _chunked(x, weight, targets, None, None, ignore_index, want_dx, want_dw, triton)


def _linear_cross_entropy_bwd(grad, x, weight, targets, lse, ignore_index, want_dx, want_dw, triton):
    return _chunked(x, weight, targets, lse, grad, ignore_index, want_dx, want_dw, triton)[2:]


def _fake_fwd(x, weight, targets, ignore_index, want_dx, want_dw, triton):
    acc = torch.promote_types(x.dtype, torch.float32)
    return (x.new_empty(x.shape[0], dtype=acc), x.new_empty(x.shape[0], dtype=acc),
            x.new_empty(x.shape if want_dx else 0), x.new_empty(weight.shape if want_dw else 0, dtype=acc))


def _fake_bwd(grad, x, weight, targets, lse, ignore_index, want_dx, want_dw, triton):
    return x.new_empty(x.shape if want_dx else 0), x.new_empty(weight.shape if want_dw else 0, dtype=lse.dtype)


# The reference is behind the operators too: torch.compile would unroll its loop and compile it again for every length.
register("linear_cross_entropy_fwd",
         "(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool want_dx, bool want_dw, bool triton) "
         "-> (Tensor, Tensor, Tensor, Tensor)", _linear_cross_entropy_fwd, _fake_fwd)
register("linear_cross_entropy_bwd",
         "(Tensor grad, Tensor x, Tensor weight, Tensor targets, Tensor lse, int ignore_index, bool want_dx, "
         "bool want_dw, bool triton) -> (Tensor, Tensor)", _linear_cross_entropy_bwd, _fake_bwd)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, ignore_index, reduction, triton, want_dx, want_dw):
        ctx.options = ignore_index, reduction, triton, want_dx, want_dw
        ctx.dtypes = x.dtype, weight.dtype
        fwd = torch.ops.nanolong.linear_cross_entropy_fwd
        if reduction == "none":
            nll, lse, _, _ = fwd(x, weight, targets, ignore_index, False, False, triton)
            ctx.save_for_backward(x, weight, targets, lse)
            return nll
        nll, _, dx, dw = fwd(x, weight, targets, ignore_index, want_dx, want_dw, triton)
        count = (targets != ignore_index).sum() if reduction == "mean" else nll.new_ones(())
        ctx.save_for_backward(dx, dw, count)
        return nll.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (ignore_index, reduction, triton, want_dx, want_dw), (x_dtype, weight_dtype) = ctx.options, ctx.dtypes
        if reduction == "none":
            bwd = torch.ops.nanolong.linear_cross_entropy_bwd
            dx, dw = bwd(grad.contiguous(), *ctx.saved_tensors, ignore_index, want_dx, want_dw, triton)
        else:
            dx, dw, count = ctx.saved_tensors
            factor = grad / count.clamp(min=1)
            dx, dw = dx.to(dw.dtype) * factor, dw * factor  # new tensors: the pass may be repeated
        return dx.to(x_dtype) if want_dx else None, dw.to(weight_dtype) if want_dw else None, *6 * (None,)


def _apply(x, weight, targets, ignore_index, reduction, triton):
    want_dx, want_dw = (torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    loss = _LinearCrossEntropy.apply(x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1).contiguous(),
                                     int(ignore_index), reduction, triton, want_dx, want_dw)
    return loss.view(targets.shape) if reduction == "none" else loss


def linear_cross_entropy_ref(x, weight, targets, ignore_index=-100, reduction="mean"):
    """The meaning of `linear_cross_entropy`, in plain torch, chunked: F.cross_entropy(F.linear(x, weight), targets)."""
    return _apply(x, weight, targets, ignore_index, reduction, False)


def linear_cross_entropy(x, weight, targets, *, ignore_index=-100, reduction="mean"):
    """
    x (..., C) any float dtype, weight (V, C), targets (...) int64 in [0, V) or ignore_index -> the cross entropy of x @
    weight.T, float32 (float64 for float64 x): reduction "mean" over the targets that are not ignored (NaN, with zero
    gradients, if all are, as in torch), "sum", or "none": like targets, 0 where ignored. The products run in x's dtype;
    weight's gradient is summed in float32. Differentiable once, in x and weight. The (N, V) logits are never whole in
    memory.
    ValueError for shapes that do not fit, an unknown reduction, and, on the CPU, a target outside the vocabulary; on a
    GPU and under torch.compile, where looking would cost a synchronisation, such a target makes the loss NaN (or
    torch's own error).
    """
    V = weight.shape[0]
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or x.shape[:-1] != targets.shape:
        raise ValueError(f"linear_cross_entropy: x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}, targets "
                         f"{tuple(targets.shape)}: they must be (..., C), (V, C) and (...)")
    if targets.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: targets are {targets.dtype}, they must be int64")
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"linear_cross_entropy: reduction={reduction!r}, it must be 'none', 'sum' or 'mean'")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = targets[(targets != ignore_index) & ((targets < 0) | (targets >= V))]
        if outside.numel():
            raise ValueError(f"linear_cross_entropy: target {outside[0].item()} is outside the vocabulary of {V} "
                             f"tokens (ignore_index is {ignore_index})")
    return _apply(x, weight, targets, ignore_index, reduction, use_triton(x))
