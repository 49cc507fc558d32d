"""
Attention of one new token per sequence over a ring buffer of un-rotated keys: StreamingLLM's decoding step (Xiao et
al., arXiv 2309.17453), where positions are assigned inside the cache.

    p the new token's position in the text, S sinks, W window, c(t) the in-cache position of token t, R(c) the rotation
    s_t = scale * (R(c(p)) q) . (R(c(t)) k_t) - slope (c(p) - c(t)),   out = sum_t softmax(s)_t v_t
    p < S + W: c(t) = t.   Else: c(t) = t for t < S, S + W - 1 - (p - t) for p - W < t <= p; other tokens are gone.

xPos (Sun et al., arXiv 2212.10554) multiplies what the dims i and i + R add to a score by zeta_i^((c(p) - c(t)) / 512),
zeta_i < 1. With segments of N and a lookback of A, only tokens t with t // N >= p // N - A are seen.

q (B, 1, H, D); k, v (B, S + W, G, D), token t in slot t for t < S, else in slot S + (t - S) % W. The caches of the
released code hold shifting copies; here nothing moves, and a slot is rotated when it is read.

A program holds the query heads of one kv head, 16 at most, and walks its share of the cache in order of in-cache
position, where a block of keys starts at some c and is consecutive: it rotates them by 0, 1, 2 ... (the same cos and
sin for every block) and the queries by c(p) - c instead, since a score depends on the distance only; xPos' factors
are split alike, and stay within 0 .. 1.2. With segments the walk starts at the first token that is seen. Shares are
partial results in float32, merged by a second kernel. The position is read on the device, so a CUDA graph can be
replayed for each token. Bytes moved, e per element: 2 B n G D e for n keys in the cache.
"""

import torch

from kernels.attention import _xpos_exponents, xpos_exponents
from kernels.backend import arch, dot_precision, register, tl, triton, use_triton
from kernels.rope import cos_sin, rope_ref, rope_turns

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def decode_attention_ref(q, k, v, position, *, sinks, scale, inv_freq=None, attention_factor=1.0, alibi_slopes=None,
                         xpos=None, segment=None, lookback=0):
    """
    The meaning of `decode_attention`, in plain torch: (out in q's dtype, lse in float32, or float64 for float64). Here
    `position` is a tensor.
    """
    (B, _, H, D), (_, N, G, _), acc = q.shape, k.shape, torch.promote_types(q.dtype, torch.float32)
    slots, position = torch.arange(N, device=q.device), position.reshape(1)
    last = position.clamp(max=N - 1)  # the new token's in-cache position
    where = torch.where(slots < sinks, slots, last - (position - slots) % (N - sinks))  # each slot's
    hidden = slots > position  # not written yet
    if segment is not None:
        hidden = hidden | (where + (position - last) < (position // segment - lookback) * segment)
    if inv_freq is not None:
        q, k = rope_ref(q, last, inv_freq, attention_factor), rope_ref(k, where, inv_freq, attention_factor)
    if xpos is not None:
        exponents = xpos_exponents(xpos, D, acc, q.device)
        k = k.to(acc) * ((last - where)[:, None] * exponents).exp2()[:, None]
    s = q.to(acc).view(B, G, H // G, D) @ k.to(acc).permute(0, 2, 3, 1) * scale
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(acc).view(G, H // G, 1) * (last - where)
    s = s.masked_fill(hidden, -torch.inf)
    top = s.amax(-1, keepdim=True)
    p = (s - top.masked_fill(top == -torch.inf, 0.0)).exp()
    total = p.sum(-1, keepdim=True)
    v = v.to(acc).masked_fill(hidden[:, None, None], 0.0)  # what was never written may be NaN
    out = (p / total.masked_fill(total == 0, 1.0)) @ v.transpose(1, 2)
    return out.view(B, 1, H, D).to(q.dtype), (top + total.log()).view(B, H, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Triton kernels. b_x is a block's value; a and b are the halves of the rotated dims, which rotate in pairs (i, i + R).

@triton.jit
def _rotate(a, b, cos, sin, DTYPE: tl.constexpr):
    return (a * cos - b * sin).to(DTYPE), (b * cos + a * sin).to(DTYPE)


@triton.jit
def _load(X, dims, mask, size):
    """Dims `dims` < size of the rows at X (n, 1), those of `mask` (n, 1); elsewhere 0."""
    return tl.load(X + dims[None, :], mask & (dims < size)[None, :], 0.0)


@triton.jit(do_not_specialize=["slots", "sinks", "segment", "lookback"])
def _decode_kernel(Q, K, V, POSITION, TURNS, SLOPES, ZETA, OUT, LSE, slots, sinks, segment, lookback,
                   stride_qb, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
                   H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, R: tl.constexpr, FACTOR: tl.constexpr,
                   ALIBI: tl.constexpr, XPOS: tl.constexpr, SEGMENT: tl.constexpr, SCALE: tl.constexpr,
                   PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_TAIL: tl.constexpr):
    row_blocks: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    kv_head = (tl.program_id(0) // row_blocks).to(tl.int64)  # over batch and heads
    b = kv_head // (H // GROUP)
    g = kv_head % (H // GROUP)
    m = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    tail = tl.arange(0, BLOCK_TAIL)
    heads = g * GROUP + m
    row_mask = (m < GROUP)[:, None]
    Q += b * stride_qb + heads[:, None] * stride_qh
    K += b * stride_kb + g * stride_kh
    V += b * stride_vb + g * stride_vh

    position = tl.load(POSITION)
    last = tl.minimum(position, slots - 1).to(tl.int32)  # the queries' in-cache position; the keys' are 0 .. last
    window = slots - sinks
    # in-cache position c >= sinks lies in slot sinks + (c - sinks + oldest) % window
    oldest = tl.where(position < slots, 0, (position - sinks + 1) % window).to(tl.int32)
    seen = 0  # the first in-cache position that is
    if SEGMENT:
        token = (position // segment - lookback) * segment
        seen = tl.minimum(tl.maximum(0, token - (position - last)), slots).to(tl.int32)
    share = tl.cdiv(tl.cdiv(last + 1 - seen, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    first = seen + tl.program_id(1) * share

    if R > 0:
        turns = tl.load(TURNS + r, r < R, 0)
        # declared not contiguous, so that a thread gets a column of q and not a row: it computes 2 angles, not 16
        q_r = tl.max_contiguous(tl.arange(0, BLOCK_R), 1)
        b_qa = _load(Q, q_r, row_mask, R).to(ACC) * FACTOR
        b_qb = _load(Q + R, q_r, row_mask, R).to(ACC) * FACTOR
        k_cos, k_sin = cos_sin(n.to(tl.int64)[:, None] * turns[None, :], ACC)
        k_cos *= FACTOR
        k_sin *= FACTOR
        if XPOS:
            zeta = tl.load(ZETA + r, r < R, 0.0)
            k_decay = tl.exp2(-n.to(ACC)[:, None] * zeta[None, :])
            k_cos *= k_decay
            k_sin *= k_decay
    if D > 2 * R:
        b_qt = _load(Q + 2 * R, tail, row_mask, D - 2 * R)
    if ALIBI:
        slopes = tl.load(SLOPES + heads, m < GROUP, 0.0).to(ACC) * LOG2E
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    b_sum = tl.zeros((BLOCK_M,), ACC)
    b_max = tl.full((BLOCK_M,), float("-inf"), ACC)
    for start in range(first, tl.minimum(first + share, last + 1), BLOCK_N):
        ring = start + n - sinks + oldest
        ring = tl.where(ring >= window, ring - window, ring)
        slot = tl.where(start + n < sinks, start + n, sinks + ring).to(tl.int64)[:, None]
        mask = (start + n <= last)[:, None]
        b_s = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        if R > 0:
            q_cos, q_sin = cos_sin((last - start).to(tl.int64) * turns, ACC)
            if XPOS:
                q_decay = tl.exp2((last - start).to(ACC) * zeta)
                q_cos *= q_decay
                q_sin *= q_decay
            b_ra, b_rb = _rotate(b_qa, b_qb, q_cos[None, :], q_sin[None, :], K.dtype.element_ty)
            b_ka = _load(K + slot * stride_kt, r, mask, R).to(ACC)
            b_kb = _load(K + slot * stride_kt + R, r, mask, R).to(ACC)
            b_ka, b_kb = _rotate(b_ka, b_kb, k_cos, k_sin, K.dtype.element_ty)
            b_s = tl.dot(b_ra, tl.trans(b_ka), b_s, input_precision=PRECISION, out_dtype=ACC)
            b_s = tl.dot(b_rb, tl.trans(b_kb), b_s, input_precision=PRECISION, out_dtype=ACC)
        if D > 2 * R:
            b_kt = _load(K + slot * stride_kt + 2 * R, tail, mask, D - 2 * R)
            b_s = tl.dot(b_qt, tl.trans(b_kt), b_s, input_precision=PRECISION, out_dtype=ACC)
        b_s *= SCALE
        if ALIBI:
            b_s -= slopes[:, None] * (last - start - n)[None, :].to(ACC)
        b_s = tl.where((start + n <= last)[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_decay = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_v = _load(V + slot * stride_vt, tl.arange(0, BLOCK_D), mask, D)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision=PRECISION, out_dtype=ACC)
        b_max = b_new
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # this share holds no key: 0, and b_max is -inf
    rows = (b * H + heads) * tl.num_programs(1) + tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    tl.store(OUT + rows[:, None] * D + d[None, :], (b_acc / b_sum[:, None]).to(OUT.dtype.element_ty),
             row_mask & (d < D)[None, :])
    tl.store(LSE + rows, b_max + tl.log2(b_sum), m < GROUP)


@triton.jit
def _combine_kernel(PART, PART_LSE, OUT, LSE, SPLITS: tl.constexpr, D: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
                    BLOCK_D: tl.constexpr):
    """Row of (B, H): the SPLITS partial results, merged; a row without a key gives 0 and -inf."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_SPLITS)
    d = tl.arange(0, BLOCK_D)
    b_lse = tl.load(PART_LSE + row * SPLITS + split, split < SPLITS, float("-inf"))
    top = tl.max(b_lse, 0)
    empty = top == float("-inf")
    b_share = tl.exp2(b_lse - tl.where(empty, 0.0, top))
    total = tl.where(empty, 1.0, tl.sum(b_share, 0))
    b_part = tl.load(PART + (row * SPLITS + split)[:, None] * D + d[None, :],
                     (split < SPLITS)[:, None] & (d < D)[None, :], 0.0)
    b_out = tl.sum(b_part * b_share[:, None], 0) / total
    tl.store(OUT + row * D + d, b_out.to(OUT.dtype.element_ty), d < D)
    tl.store(LSE + row, top + tl.log2(total))


# ----------------------------------------------------------------------------------------------------------------------
# launchers

# (bytes per element, BLOCK_D from 64 up): BLOCK_N, warps, stages. One table serves every architecture: memory is the
# limit, and no tile needs more than 64 KiB of shared memory.
TILES = {
    (2, 64): (64, 4, 3), (2, 128): (32, 4, 3), (2, 256): (32, 8, 2),
    (4, 64): (32, 4, 2), (4, 128): (16, 4, 2), (4, 256): (16, 8, 2),
}


def _tile(q, R):
    D = q.shape[3]
    block_d = max(16, triton.next_power_of_2(D))
    block_n, num_warps, num_stages = TILES[min(4, q.element_size()), max(64, block_d)]
    if arch(q) == "cpu":  # the interpreter: small blocks, so that a small cache has several
        block_n = 16
    return dict(BLOCK_M=16, BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_R=max(16, triton.next_power_of_2(R)),
                BLOCK_TAIL=max(16, triton.next_power_of_2(D - 2 * R)), num_warps=num_warps, num_stages=num_stages)


def _splits(q, programs, blocks):
    """
    How many shares of the cache: two programs for each multiprocessor, a block of keys for each share at least, 64 at
    most. It depends on shapes alone, not on the position.
    """
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 8
    return max(1, min(2 * processors // programs, blocks, 64))


def _decode_attention(q, k, v, position, turns, slopes, xpos, segment, lookback, sinks, attention_factor, scale):
    """-> out, and log2 of the softmax denominator (B, H, 1)."""
    (B, _, H, D), (_, N, G, _), acc = q.shape, k.shape, torch.promote_types(q.dtype, torch.float32)
    q, R = q if q.stride(3) == 1 else q.contiguous(), 0 if turns is None else turns.shape[0]
    out = torch.empty(B, 1, H, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, 1, dtype=acc, device=q.device)
    if not B:
        return out, lse
    tile = _tile(q, R)
    zeta = None if xpos is None else _xpos_exponents(xpos, D, acc, q.device)
    programs = B * G * triton.cdiv(H // G, tile["BLOCK_M"])
    splits = _splits(q, programs, triton.cdiv(N, tile["BLOCK_N"]))
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty(B, H, splits, D, dtype=acc, device=q.device)
        part_lse = torch.empty(B, H, splits, dtype=acc, device=q.device)
    _decode_kernel[(programs, splits)](
        q, k, v, position, turns if turns is None else turns.contiguous(), slopes, zeta, part, part_lse, N, sinks,
        segment or 1, lookback, q.stride(0), q.stride(2), *k.stride()[:3], *v.stride()[:3], H=H, GROUP=H // G, D=D, R=R,
        FACTOR=attention_factor, ALIBI=slopes is not None, XPOS=xpos is not None, SEGMENT=segment is not None,
        SCALE=scale * LOG2E.value, PRECISION=dot_precision(q.dtype), ACC=getattr(tl, str(acc)[6:]), **tile)
    if splits > 1:
        _combine_kernel[(B * H,)](part, part_lse, out, lse, SPLITS=splits, D=D,
                                  BLOCK_SPLITS=triton.next_power_of_2(splits), BLOCK_D=tile["BLOCK_D"], num_warps=4)
    return out, lse


register("decode_attention",
         "(Tensor q, Tensor k, Tensor v, Tensor position, Tensor? turns, Tensor? slopes, int? xpos, int? segment, "
         "int lookback, int sinks, float attention_factor, float scale) -> (Tensor, Tensor)", _decode_attention,
         lambda q, k, *_: (
             q.new_empty(q.shape),
             q.new_empty(q.shape[0], q.shape[2], 1, dtype=torch.promote_types(q.dtype, torch.float32))))


# ----------------------------------------------------------------------------------------------------------------------
# public function

def _validate(q, k, v, position, sinks, inv_freq, alibi_slopes, xpos, segment, lookback, scale):
    if q.dim() != 4 or q.shape[1] != 1 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or \
            q.shape[3] != k.shape[3]:
        raise ValueError(f"decode_attention: q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
                         "q must be (B, 1, H, D), k and v (B, sinks + window, G, D)")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"decode_attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: they must be equal")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"decode_attention: {q.shape[2]} query heads are not a multiple of {k.shape[2]} kv heads")
    if q.shape[3] > 256:
        raise ValueError(f"decode_attention: head dim {q.shape[3]} is more than 256")
    if k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError(f"decode_attention: the last dim of k and v has strides {k.stride(3)} and {v.stride(3)}, "
                         "they must be 1: the cache is not copied")
    if not 0 <= sinks < k.shape[1]:
        raise ValueError(f"decode_attention: {sinks} sinks in a cache of {k.shape[1]} slots: at least one slot must be "
                         "left for the window")
    if isinstance(position, torch.Tensor):
        if position.dtype != torch.int64 or position.numel() != 1 or position.device != q.device:
            raise ValueError(f"decode_attention: position is {position.dtype} of shape {tuple(position.shape)} on "
                             f"{position.device}: as a tensor it must be int64, of one element, on q's {q.device}")
    elif position < 0:
        raise ValueError(f"decode_attention: position is {position}, it must be 0 or more")
    if inv_freq is not None and inv_freq.dtype not in (torch.float64, torch.int64):
        raise ValueError(f"decode_attention: inv_freq is {inv_freq.dtype}, it must be float64, or int64 (rope_turns)")
    if inv_freq is not None and (inv_freq.dim() != 1 or not 0 < 2 * inv_freq.shape[0] <= q.shape[3]):
        raise ValueError(f"decode_attention: inv_freq has shape {tuple(inv_freq.shape)} for head dim {q.shape[3]}: "
                         "it must be (R,) with 2 R <= D")
    if alibi_slopes is not None and (alibi_slopes.dtype != torch.float32 or alibi_slopes.shape != q.shape[2:3]):
        raise ValueError(f"decode_attention: alibi_slopes are {alibi_slopes.dtype}, of shape "
                         f"{tuple(alibi_slopes.shape)} for {q.shape[2]} query heads: they must be float32, one for each")
    if xpos is not None and (inv_freq is None or xpos != 2 * inv_freq.shape[0]):
        pairs = 0 if inv_freq is None else inv_freq.shape[0]
        raise ValueError(f"decode_attention: xpos is {xpos}, it must be the number of rotated dims: 2 x {pairs} by inv_freq")
    if segment is not None and segment < 1 or lookback < 0 or lookback and segment is None:
        raise ValueError(f"decode_attention: segment is {segment} and lookback {lookback}: they must be at least 1 "
                         "and 0, and a lookback needs a segment")
    if segment is not None and sinks:
        raise ValueError(f"decode_attention: segment is {segment} and sinks {sinks}: with segments there are no sinks")
    if scale <= 0:
        raise ValueError(f"decode_attention: scale is {scale}, it must be greater than 0")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("decode_attention has no backward pass, and q, k or v require grad: call it under "
                         "torch.no_grad() or torch.inference_mode(), or train with `attention`")


def decode_attention(q, k, v, position, *, sinks=0, inv_freq=None, attention_factor=1.0, alibi_slopes=None, xpos=None,
                     segment=None, lookback=0, scale=None, return_lse=False):
    """
    Attention of one new token per sequence over a ring-buffer cache, positions assigned inside the cache.

    q: (B, 1, H, D), un-rotated. k, v: (B, sinks + W, G, D), the same float dtype, un-rotated keys, any strides with a
    contiguous last dim; H a multiple of G, D <= 256. Token t lies in slot t if t < sinks, else in slot sinks + (t -
    sinks) % W; the new token's key and value are already there. Slots not written yet are never read into the result.
    position: the new token's 0-based index in the text, an int, or an int64 tensor of one element on q's device, which
    is read there: nothing on the host depends on it, so a CUDA graph that counts it up can be replayed.
    inv_freq: (R,) with 2 R <= D, as for `rope`, rotates q and keys by their in-cache positions, in pairs (i, i + R),
    times attention_factor; None rotates nothing. alibi_slopes: (H,) float32, -slope * in-cache distance is added to the
    scaled score. xpos=2 R: what dims i and i + R add to a score is multiplied by zeta_i^(in-cache distance / 512), with
    zeta_i = (i / R + 0.4) / 1.4 (xPos, Sun et al., arXiv 2212.10554). segment=N, lookback=A, without sinks: only tokens t with
    t // N >= p // N - A are seen, p the new token's index; time grows with N x (1 + A). scale > 0, default 1/sqrt(D).
    -> out (B, 1, H, D) in q's dtype, and with return_lse lse (B, H, 1) float32 (float64 for float64), natural
    logarithm. Inference only: ValueError where autograd would need its gradient, as for sizes, dtypes and positions
    that do not fit. A negative position in a tensor sees nothing: out 0, lse -inf. StreamingLLM, Xiao et al., arXiv
    2309.17453.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    _validate(q, k, v, position, sinks, inv_freq, alibi_slopes, xpos, segment, lookback, scale)
    if not isinstance(position, torch.Tensor):
        position = torch.full((1,), position, dtype=torch.int64, device=q.device)
    if use_triton(q):
        turns = None if inv_freq is None else rope_turns(inv_freq)
        slopes = None if alibi_slopes is None else alibi_slopes.contiguous()
        out, log2_sum = torch.ops.nanolong.decode_attention(q, k, v, position, turns, slopes, xpos, segment,
                                                            lookback, sinks, float(attention_factor), scale)
        return (out, log2_sum * LN2.value) if return_lse else out
    out, lse = decode_attention_ref(q, k, v, position, sinks=sinks, scale=scale, inv_freq=inv_freq,
                                    attention_factor=attention_factor, alibi_slopes=alibi_slopes, xpos=xpos,
                                    segment=segment, lookback=lookback)
    return (out, lse) if return_lse else out
