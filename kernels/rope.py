"""
Rotary position embedding (Su et al., arXiv 2104.09864): frequencies, and the rotation, exact at any position.

    (y_i, y_(i+R)) = f (x_i cos a_i - x_(i+R) sin a_i,  x_(i+R) cos a_i + x_i sin a_i)        x, y (B, T, H, D)
    a_i = position * theta_i,  i < R = d/2;  y_j = x_j for j >= d: partial rotary leaves the tail of the head dim alone

The angle never exists as a large float. theta_i is kept as F_i = theta_i / 2 pi * 2^64, turns in 64-bit fixed point,
and position * F_i wraps in int64 exactly where the angle wraps: what is left is the fraction of a turn in [-1/2, 1/2),
its high 32 bits enough for float32. A float32 product would be 5 % wrong at position 10^7 (theta = 1). The backward
pass is the rotation by -a, with no activation kept. Bytes moved, e per element: 2 B T H D e each way; cos and sin are
made once per token and serve all its heads.
"""

import math

import torch
from torch.autograd.function import once_differentiable

from kernels.backend import register, tl, triton, use_triton


def rope_frequencies(dim, base=10000.0):
    """
    The frequencies of `dim` rotated dims: theta_i = base^(-2 i / dim), i = 0 .. dim/2 - 1, as a float64 tensor
    (dim/2,), and the factor on the rotated dims, 1.0. ValueError for an odd or non-positive dim, or a non-positive
    base. arXiv 2104.09864.
    """
    if dim <= 0 or dim % 2:
        raise ValueError(f"rope_frequencies: dim={dim}, it must be even and positive: dims rotate in pairs")
    if base <= 0:
        raise ValueError(f"rope_frequencies: base={base}, it must be positive")
    return base ** (torch.arange(0, dim, 2, dtype=torch.float64) / -dim), 1.0


def rope_turns(inv_freq):
    """
    inv_freq (R,) float64, radians per position -> (R,) int64: round(inv_freq / 2 pi * 2^64), turns per position in
    64-bit fixed point, wrapped into int64 (whole turns drop out). An int64 buffer of a module does not follow
    `.to(torch.bfloat16)`. int64 is returned as it is.
    """
    if inv_freq.dtype == torch.int64:
        return inv_freq
    turns = inv_freq / (2 * math.pi)
    turns = turns - torch.floor(turns + 0.5)  # in [-1/2, 1/2): times 2^64 it fits int64
    return (turns * 2.0**64).round().to(torch.int64)


def rope_ref(x, positions, inv_freq, attention_factor=1.0):
    """The meaning of `rope`, in plain torch. For float64 x the angle uses all 64 bits of the phase."""
    acc, turns, R = torch.promote_types(x.dtype, torch.float32), rope_turns(inv_freq), inv_freq.shape[0]
    phase = positions.to(torch.int64)[..., None] * turns  # (T, R) or (B, T, R); wraps
    if acc == torch.float64:
        angle = phase.double() * (2 * math.pi / 2**64)
    else:
        angle = (phase >> 32).float() * (2 * math.pi / 2**32)
    cos, sin = angle.cos() * attention_factor, angle.sin() * attention_factor
    cos = torch.cat((cos, cos), -1)[..., None, :]   # (T, 1, d) or (B, T, 1, d)
    sin = torch.cat((-sin, sin), -1)[..., None, :]
    rotated = x[..., :2 * R].to(acc)
    rotated = torch.addcmul(rotated * cos, rotated.roll(R, -1), sin).to(x.dtype)  # the roll swaps the two halves
    return rotated if 2 * R == x.shape[-1] else torch.cat((rotated, x[..., 2 * R:]), -1)


@triton.jit
def cos_sin(phase, ACC: tl.constexpr):
    """
    phase int64, 2^64 to the turn -> its cosine and sine in ACC. float32: the quadrant comes off exactly, as an integer,
    then Cephes' polynomials on [-pi/4, pi/4], right to 1e-7. (tl.sin needs local memory; the fast sine is right to 7e-7
    only.)
    """
    if ACC == tl.float64:
        angle = phase.to(tl.float64) * 3.4061215800304556e-19  # 2 pi / 2^64
        cos, sin = tl.cos(angle), tl.sin(angle)
    else:
        quadrant = (phase + (1 << 61)) >> 62  # -2 .. 1, to the nearest quarter turn
        x = ((phase - (quadrant << 62)) >> 32).to(tl.float32) * 1.4629180792671596e-9  # 2 pi / 2^32
        z = x * x
        s = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
        c = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 - z * (1.388731625493765e-3 - z * 2.443315711809948e-5))
        odd, upper = (quadrant & 1) != 0, (quadrant & 2) != 0
        cos, sin = tl.where(odd, -s, c), tl.where(odd, c, s)
        cos, sin = tl.where(upper, -cos, cos), tl.where(upper, -sin, sin)
    return cos, sin


@triton.jit(do_not_specialize=["N", "T"])
def _rope_kernel(X, POS, TURNS, Y, N, T, stride_xb, stride_xt, stride_xh, stride_pb, stride_pt,
                 H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, FACTOR: tl.constexpr, INVERSE: tl.constexpr,
                 ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
                 BLOCK_TAIL: tl.constexpr):
    # tiles are (tokens, heads, dims); N = B T tokens
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims, tail = tl.arange(0, BLOCK_R)[None, None, :], 2 * R + tl.arange(0, BLOCK_TAIL)[None, None, :]
    turns = tl.load(TURNS + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_R) < R, 0)
    positions = tl.load(POS + rows // T * stride_pb + rows % T * stride_pt, rows < N, 0).to(tl.int64)
    cos, sin = cos_sin(positions[:, None, None] * turns[None, None, :], ACC)
    cos *= FACTOR
    sin *= -FACTOR if INVERSE else FACTOR
    from_row = X + (rows // T * stride_xb + rows % T * stride_xt)[:, None, None]
    to_row = Y + (rows * (H * D))[:, None, None]
    for first in range(0, H, BLOCK_H):
        heads = (first + tl.arange(0, BLOCK_H)).to(tl.int64)[None, :, None]
        mask = (rows < N)[:, None, None] & (heads < H)
        source, target = from_row + heads * stride_xh, to_row + heads * D
        a = tl.load(source + dims, mask & (dims < R), 0.0).to(ACC)
        b = tl.load(source + R + dims, mask & (dims < R), 0.0).to(ACC)
        tl.store(target + dims, (a * cos - b * sin).to(Y.dtype.element_ty), mask & (dims < R))
        tl.store(target + R + dims, (b * cos + a * sin).to(Y.dtype.element_ty), mask & (dims < R))
        if D > 2 * R:
            tl.store(target + tail, tl.load(source + tail, mask & (tail < D), 0.0), mask & (tail < D))


def _rope(x, positions, turns, attention_factor, inverse):
    B, T, H, D = x.shape
    R, acc = turns.shape[0], torch.promote_types(x.dtype, torch.float32)
    x = x if x.stride(3) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_r, block_h = triton.next_power_of_2(R), min(4, triton.next_power_of_2(H))
    block_n = max(1, 1024 // (block_r * block_h))  # about 1024 pairs a tile: 8 a thread
    if x.numel():
        _rope_kernel[(triton.cdiv(B * T, block_n),)](
            x, positions, turns.contiguous(), y, B * T, T, x.stride(0), x.stride(1), x.stride(2),
            positions.stride(0) if positions.dim() == 2 else 0, positions.stride(-1), H=H, D=D, R=R,
            FACTOR=attention_factor, INVERSE=inverse, ACC=getattr(tl, str(acc)[6:]), BLOCK_N=block_n, BLOCK_H=block_h,
            BLOCK_R=block_r, BLOCK_TAIL=triton.next_power_of_2(max(1, D - 2 * R)), num_warps=4)
    return y


register("rope", "(Tensor x, Tensor positions, Tensor turns, float attention_factor, bool inverse) -> Tensor", _rope,
         lambda x, positions, turns, attention_factor, inverse: x.new_empty(x.shape))


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, positions, turns, attention_factor):
        ctx.save_for_backward(positions, turns)
        ctx.attention_factor = attention_factor
        return torch.ops.nanolong.rope(x, positions, turns, attention_factor, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return torch.ops.nanolong.rope(dy, *ctx.saved_tensors, ctx.attention_factor, True), None, None, None


def rope(x, positions, inv_freq, *, attention_factor=1.0):
    """
    Rotate x by its positions.

    x: (B, T, H, D), any float dtype and strides. positions: (T,) or (B, T), int32 or int64, of any size and sign.
    inv_freq: (R,) with 2 R <= D, float64 radians per position (rope_frequencies) or the same as int64 turns
    (rope_turns), which saves the conversion. The first 2 R dims rotate, in pairs (i, i + R), and are multiplied by
    attention_factor; the others are copied. -> like x, contiguous. Differentiable once, in x. ValueError for shapes or
    dtypes that do not fit. Su et al., arXiv 2104.09864.
    """
    if x.dim() != 4 or positions.shape not in (x.shape[1:2], x.shape[:2]):
        raise ValueError(f"rope: x has shape {tuple(x.shape)} and positions {tuple(positions.shape)}: x must be "
                         "(B, T, H, D) and positions (T,) or (B, T)")
    if positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rope: positions are {positions.dtype}, they must be int32 or int64 (exact)")
    if inv_freq.dtype not in (torch.float64, torch.int64):
        raise ValueError(f"rope: inv_freq is {inv_freq.dtype}, it must be float64, or int64 from rope_turns")
    if inv_freq.dim() != 1 or not 0 < 2 * inv_freq.shape[0] <= x.shape[-1]:
        raise ValueError(f"rope: inv_freq has shape {tuple(inv_freq.shape)} for head dim {x.shape[-1]}: "
                         "it must be (R,) with 2 R <= D")
    if not use_triton(x):
        return rope_ref(x, positions, inv_freq, attention_factor)
    return _Rope.apply(x, positions, rope_turns(inv_freq), float(attention_factor))
