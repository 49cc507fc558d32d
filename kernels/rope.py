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


# What each rope_type needs, and what it may have besides, by Hugging Face's names.
SCALING_KEYS = {
    "default": ((), ()),
    "linear": (("factor",), ("original_max_position_embeddings",)),
    "ntk": (("factor",), ("original_max_position_embeddings",)),
    "dynamic": (("factor", "original_max_position_embeddings"), ()),
    "ntk_by_parts": (("factor", "original_max_position_embeddings"), ("beta_fast", "beta_slow", "truncate", "ramp")),
    "yarn": (("factor", "original_max_position_embeddings"),
             ("beta_fast", "beta_slow", "truncate", "ramp", "attention_factor", "mscale", "mscale_all_dim")),
    "longrope": (("short_factor", "long_factor", "original_max_position_embeddings"),
                 ("factor", "attention_factor", "n_hat")),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
}


def rope_frequencies(dim, base=10000.0, scaling=None, seq_len=None):
    """
    The frequencies of `dim` rotated dims as a float64 tensor (dim/2,), radians per position, and the factor on the
    rotated dims (of q and of k). Without `scaling`: theta_i = base^(-2 i / dim), i = 0 .. dim/2 - 1, and 1.0
    (arXiv 2104.09864). scaling is a checkpoint's rope_scaling or rope_parameters: "rope_type" (or the older "type"),
    its keys as in SCALING_KEYS, and "rope_theta", which then is the base. With s = factor, L =
    original_max_position_embeddings, and a value of None counting as absent:

    linear        theta / s (arXiv 2306.15595)
    ntk           the base is base * s^(dim / (dim - 2))
    dynamic       the same with s * seq_len / L - (s - 1) for s where seq_len > L; unchanged up to L or without seq_len
    ntk_by_parts  theta for dims that turn more than beta_fast (32) times in L, theta / s for those below beta_slow (1),
                  blended in between, evenly from dim to dim, the ends on whole dims unless truncate is False; or, with
                  ramp "turns" and not "dims", evenly by the turns, as YaRN's paper writes it
    yarn          ntk_by_parts, with the factor attention_factor, else m(mscale) / m(mscale_all_dim) where both are
                  given, else m(1), for m(x) = 0.1 x ln s + 1 (arXiv 2309.00071, as released)
    longrope      theta / long_factor where seq_len > L, else theta / short_factor; the factor is attention_factor,
                  else sqrt(1 + ln s / ln L); while long_factor is in use, positions below n_hat (0) keep the angles of
                  theta, which is the caller's to do (arXiv 2402.13753)
    llama3        theta for wavelengths below L / high_freq_factor, theta / s above L / low_freq_factor, else blended

    ValueError for an odd or non-positive dim, a base of 1 or less, an unknown rope_type or key, a missing key, or a
    value out of its range.
    """
    scaling = {key: value for key, value in (scaling or {}).items() if value is not None}
    older = scaling.pop("type", "default")
    kind, base = scaling.pop("rope_type", older), scaling.pop("rope_theta", base)
    _check_scaling(dim, base, kind, scaling)
    s, L = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / -dim
    theta, factor = base ** exponents, 1.0
    if kind == "linear":
        theta = theta / s
    elif kind in ("ntk", "dynamic"):
        stretch = s if kind == "ntk" else s * max(seq_len or L, L) / L - (s - 1)
        theta = (base * stretch ** (dim / (dim - 2))) ** exponents
    elif kind in ("ntk_by_parts", "yarn"):
        fast, slow = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)
        # the dim that turns n times in L positions
        low, high = (dim * math.log(L / (2 * math.pi * n)) / (2 * math.log(base)) for n in (fast, slow))
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low or 1e-3)
        if scaling.get("ramp") == "turns":
            ramp = (fast - L * theta / (2 * math.pi)) / (fast - slow)
        ramp = ramp.clamp(0, 1)
        theta = ramp * theta / s + (1 - ramp) * theta
        if kind == "yarn":
            m, m_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
            m, m_all = (m, m_all) if m and m_all else (1, 0)
            factor = scaling.get("attention_factor", (0.1 * m * math.log(s) + 1) / (0.1 * m_all * math.log(s) + 1))
    elif kind == "longrope":
        stretch = scaling["long_factor" if seq_len and seq_len > L else "short_factor"]
        theta = theta / torch.tensor(stretch, dtype=torch.float64)
        factor = scaling.get("attention_factor") or math.sqrt(1 + math.log(s) / math.log(L))
    elif kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((L * theta / (2 * math.pi) - low) / (high - low)).clamp(0, 1)  # L theta / 2 pi: the turns in L
        theta = (1 - keep) * theta / s + keep * theta
    return theta, float(factor)


def _check_scaling(dim, base, kind, scaling):
    """ValueError, one line, for what rope_frequencies cannot take; scaling without its rope_type and rope_theta."""
    if dim <= 0 or dim % 2:
        raise ValueError(f"rope_frequencies: dim={dim}, it must be even and positive: dims rotate in pairs")
    if not isinstance(kind, str) or kind not in SCALING_KEYS:
        raise ValueError(f"rope_frequencies: rope_type {kind!r} is unknown: use one of {', '.join(SCALING_KEYS)}")
    needed, optional = SCALING_KEYS[kind]
    missing, unknown = [key for key in needed if key not in scaling], sorted(scaling.keys() - {*needed, *optional})
    if kind == "longrope" and not missing and not {"factor", "attention_factor"} & scaling.keys():
        missing = ["factor (or attention_factor)"]
    if missing or unknown:
        wrong = f"lacks {', '.join(missing)}" if missing else f"does not know {', '.join(unknown)}"
        raise ValueError(f"rope_frequencies: rope_type {kind!r} {wrong}: it needs {', '.join(needed) or 'nothing'} and "
                         f"may have {', '.join(optional) or 'nothing else'}")
    for key, least in {"factor": 1, "original_max_position_embeddings": 2}.items():
        value = scaling.get(key, least)
        if not _is_number(value) or not value >= least:
            raise ValueError(f"rope_frequencies: {key} is {value!r}, it must be a number of at least {least}")
    for key in ("short_factor", "long_factor"):
        value = scaling.get(key, [1.0] * (dim // 2))
        if not isinstance(value, (list, tuple)) or not all(_is_number(x) and x > 0 for x in value):
            raise ValueError(f"rope_frequencies: {key} is {value!r}, it must be a list of positive numbers")
        if len(value) != dim // 2:
            raise ValueError(f"rope_frequencies: {key} has {len(value)} numbers, dim={dim} needs {dim // 2}")
    for key in ("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "attention_factor", "mscale",
                "mscale_all_dim"):
        if key in scaling and (not _is_number(scaling[key]) or not scaling[key] >= (0 if "mscale" in key else 1e-9)):
            raise ValueError(f"rope_frequencies: {key} is {scaling[key]!r}, it must be a positive number")
    if not isinstance(scaling.get("truncate", True), bool):
        raise ValueError(f"rope_frequencies: truncate is {scaling['truncate']!r}, it must be true or false")
    if scaling.get("ramp", "dims") not in ("dims", "turns"):
        raise ValueError(f"rope_frequencies: ramp is {scaling['ramp']!r}, it must be 'dims' or 'turns'")
    n_hat = scaling.get("n_hat", 0)
    if not isinstance(n_hat, int) or isinstance(n_hat, bool) or n_hat < 0:
        raise ValueError(f"rope_frequencies: n_hat is {n_hat!r}, it must be a whole number of at least 0")
    for small, large, default in (("low_freq_factor", "high_freq_factor", (1, 4)), ("beta_slow", "beta_fast", (1, 32))):
        if not scaling.get(small, default[0]) < scaling.get(large, default[1]):
            raise ValueError(f"rope_frequencies: {small}={scaling.get(small, default[0])} must be below "
                             f"{large}={scaling.get(large, default[1])}")
    if not _is_number(base) or not base > 1:
        raise ValueError(f"rope_frequencies: base={base!r}, it must be a number above 1")
    if kind in ("ntk", "dynamic") and dim == 2:
        raise ValueError(f"rope_frequencies: rope_type {kind!r} needs more than dim=2 rotated dims")


def _is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


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
        angle = phase.to(tl.float64) * 3.4061215800865545e-19  # 2 pi / 2^64
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
