"""
Exact attention, forward and backward.

    s_ij = scale * q_i . k_j for the keys j that i sees,   lse_i = ln sum_j exp(s_ij),   out_i = sum_j exp(s_ij - lse_i) v_j
    delta_i = dout_i . out_i - dlse_i,   ds_ij = p_ij (dout_i . v_j - delta_i),   p_ij = exp(s_ij - lse_i)
    dq_i = scale * sum_j ds_ij k_j,   dk_j = scale * sum_i ds_ij q_i,   dv_j = sum_i p_ij dout_i

q (B, Tq, H, D), k and v (B, Tk, G, D) with H a multiple of G (head h reads kv head h // (H / G)), out like q, lse (B,
H, Tq). Row i sits at position q_start + i, key j at k_start + j. With offset = q_start - k_start, causal: j <= i + offset;
a window of W: also j > i + offset - W; segments of N: (q_start + i) // N == (k_start + j) // N. ALiBi takes slope_h * (i +
offset - j) off the score. Sinks are a second set of few keys with queries of their own, in the same softmax; row i sees
sink j if j <= q_start + i. A lookback of B adds the B segments before the row's own.

xPos (Sun et al., arXiv 2212.10554) gives dim c of the product q_i . k_j the factor zeta_c^(n / 512), n = i + offset - j,
zeta_c < 1. n is split at the chunk (XPOS_CHUNK rows or keys) that the walk is in, which begins at b: zeta^((i + offset -
b) / 512) for q and zeta^((b - j) / 512) for k. The side that streams by is scaled in memory, relative to its own chunks;
the block that stays is scaled once per chunk; neither factor exceeds 13, and one that underflows is 0 in truth, too. dq
and dk are sums over chunks in Horner's form, far chunks first: sum <- sum * zeta^(step / 512) + the chunk's share.

FlashAttention-2's scheme (Dao, arXiv 2307.08691): a program holds one block of queries and walks the keys, the running
maximum and sum in base 2 with the scale folded in (LSE below is log2 of the sum; the public functions speak natural
logarithms); blocks that every row sees whole skip all masks, those that no row sees are not visited. The backward pass
is two deterministic kernels, dq (which also writes delta) and dk/dv (which computes S^T = K Q^T, so that no product is
ever transposed, and sums over the query heads of its kv head); both run a second time for the sinks, whose dk and dv are
sums over all rows: several programs share these. Bytes moved by the forward: q, out and lse once, k and v once per block
of queries (from L2 where they fit). No tensor is ever Tq x Tk.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.backend import arch, dot_precision, register, tl, triton, use_triton

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_POSITIONS = ["T_Q", "T_K", "offset", "back", "segment", "q_phase", "k_phase", "shift", "width", "distance"]  # see _Part
XPOS_CHUNK = 1024  # rows, or keys, whose xPos factors are relative to the same position: a multiple of every tile's


def xpos_exponents(xpos, D, dtype, device):
    """
    What a token of distance to its query costs each of D dims, as a power of 2: log2(zeta_i) / 512 with zeta_i =
    (2 i / xpos + 0.4) / 1.4 for the dims i and i + xpos / 2, 0 from xpos on (arXiv 2212.10554). (D,) of `dtype`.
    """
    exponents = ((torch.arange(0, xpos, 2, dtype=torch.float64, device="cpu") / xpos + 0.4) / 1.4).log2() / 512
    exponents = torch.cat([exponents, exponents, exponents.new_zeros(D - xpos)])
    return exponents.to(dtype).to(device)


_xpos_exponents = functools.cache(xpos_exponents)  # nothing to compute or to copy while a CUDA graph is captured


# ----------------------------------------------------------------------------------------------------------------------
# references

def _grouped(x, G):
    """(B, n, H, D) -> (B, G, H/G n, D): the queries of a kv head together."""
    B, n, H, D = x.shape
    return x.view(B, n, G, H // G, D).permute(0, 2, 3, 1, 4).reshape(B, G, H // G * n, D)


def _ungrouped(x, n, H):
    """_grouped's inverse."""
    B, G, _, D = x.shape
    return x.view(B, G, H // G, n, D).permute(0, 3, 1, 2, 4).reshape(B, n, H, D)


class _Part(NamedTuple):
    """
    The keys, or the sinks, with the queries for them; positions as indices. Row i sees key j if j <= i + offset (causal)
    and j > i + back (None: no such bound), and for segment = (N, q_phase, k_phase, shift, width) if j is one of the `width`
    keys from (i + q_phase) // N * N + shift - k_phase on. Its distance, for ALiBi and xPos, is min(i + distance, cap) - j.
    zeta (D,): xpos_exponents, None without xPos.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_docs: torch.Tensor | None
    causal: bool
    offset: int
    back: int | None
    segment: tuple[int, int, int, int, int] | None
    distance: int
    cap: int
    zeta: torch.Tensor | None

    def first_key(self, i):
        """The first key of the segments that row i sees, for an int or a tensor of them."""
        N, q_phase, k_phase, shift, _ = self.segment
        return (i + q_phase) // N * N + shift - k_phase


def _segment_grid(segment, lookback, q_start, k_start, Tq, Tk):
    """_Part.segment, in numbers below 8 (Tq + Tk); None where it hides no key from any row."""
    (q_segment, q_phase), (k_segment, k_phase) = divmod(q_start, segment), divmod(k_start, segment)
    limit = Tq + Tk + 1
    if segment > limit:  # at most one border among the rows and one among the keys: no other counts
        q_phase, k_phase = (limit - min(limit, segment - phase) for phase in (q_phase, k_phase))
        segment = limit
    # rows lie in segments 0 .. last_q from the first row's on, keys in 0 .. last_k; seen is what is fewest .. most segments
    # further in its own count: 0 .. lookback segments back
    last_q, last_k = (max(0, phase + T - 1) // segment for phase, T in ((q_phase, Tq), (k_phase, Tk)))
    fewest, most = (max(-last_q - 1, min(last_k + 1, q_segment - k_segment - n)) for n in (lookback, 0))
    if fewest <= -last_q and most >= last_k:
        return None
    return segment, q_phase, k_phase, fewest * segment, (most - fewest + 1) * segment


def _parts(q, k, v, q_sink, k_sink, v_sink, k_docs, causal, window, segment, lookback, xpos, q_start,
           k_start) -> list[_Part]:
    """The keys without those that are sinks, and the sinks if there are any."""
    zeta = xpos and _xpos_exponents(xpos, q.shape[3], torch.promote_types(q.dtype, torch.float32), q.device)

    def part(q, k, v, k_docs, causal, window, segment, k_start, cap):
        Tq, Tk, distance = q.shape[1], k.shape[1], q_start - k_start
        segment = None if segment is None else _segment_grid(segment, lookback, q_start, k_start, Tq, Tk)
        offset, back = (max(-Tq, min(Tk, distance - n)) for n in (0, window or 0))
        hides = window is not None and back > -Tq
        distance, cap = (distance, distance + Tq) if cap is None else (min(distance, cap), cap)
        return _Part(q, k, v, k_docs, causal or segment is not None, offset if causal else Tk, back if hides else None,
                     segment, distance, cap, zeta)

    causal = causal or window is not None
    if q_sink is None:
        return [part(q, k, v, k_docs, causal, window, segment, k_start, None)]
    S = k_sink.shape[1]
    first = max(0, min(k.shape[1], S - k_start))
    if k_docs is not None:
        k_docs = k_docs[:, first:]
    return [part(q, k[:, first:], v[:, first:], k_docs, causal, window, segment, k_start + first, None),
            part(q_sink, k_sink, v_sink, None, True, None, None, 0, None if window is None else S + window - 1)]


def _hide(s, seen, at):
    """The scores s (B, H, n, keys) from key `at` on become -inf where `seen`, a mask that broadcasts, is false."""
    s[..., at:at + seen.shape[-1]].masked_fill_(~seen, -torch.inf)


def _xpos_factors(part, rows, keys):
    """
    xPos relative to the first of these rows: what q[:, rows] (n, 1, D) and k[:, keys] (keys, 1, D) are multiplied with, at
    most 13 for 1024 rows; a key too far back gives 0 where the true factor does.
    """
    i, j = (torch.arange(x.start, x.stop, device=part.q.device) for x in (rows, keys))
    i = (i + part.distance).clamp(max=part.cap)
    return [(n[:, None] * part.zeta).exp2()[:, None] for n in (i - i[0], i[0] - j)]


def _operands(part, rows, keys, scale):
    """q[:, rows] * scale and k[:, keys] in float32, or float64 for float64, with xPos in them."""
    acc = torch.promote_types(part.q.dtype, torch.float32)
    q, k = part.q[:, rows].to(acc) * scale, part.k[:, keys].to(acc)
    return (q, k) if part.zeta is None else [x * f for x, f in zip((q, k), _xpos_factors(part, rows, keys))]


def _scores(part, rows, alibi_slopes, q_docs, scale):
    """
    The keys of `part` that some of these rows see, as a slice, and the masked scores (B, G, H/G n, keys) in float32, or
    float64 for float64. Only those keys are read.
    """
    (B, Tk, G, _), H, acc = part.k.shape, part.q.shape[2], torch.promote_types(part.q.dtype, torch.float32)
    first, stop = 0 if part.back is None else rows.start + part.back + 1, rows.stop + part.offset if part.causal else Tk
    if part.segment is not None:
        first, last = max(first, part.first_key(rows.start)), part.first_key(rows.stop - 1)
        stop = min(stop, last + part.segment[-1])
    first = min(Tk, max(0, first))
    keys = slice(first, max(first, min(Tk, stop)))
    b_q, b_k = _operands(part, rows, keys, scale)
    s = _grouped(b_q, G) @ b_k.permute(0, 2, 3, 1)
    i, j = (torch.arange(x.start, x.stop, device=s.device) for x in (rows, keys))
    i, by_head = i[:, None], s.view(B, H, len(i), len(j))
    if alibi_slopes is not None:
        distance = (i + part.distance).clamp(max=part.cap) - j
        by_head.addcmul_(alibi_slopes.to(acc).view(H, 1, 1), distance.to(acc), value=-1)
    if part.causal:  # the first row sees the keys up to rows.start + offset, the others at least those
        at = max(0, min(len(j), rows.start + part.offset + 1 - first))
        _hide(by_head, j[at:] <= i + part.offset, at)
    if part.back is not None:  # the last row sees the keys from rows.stop + back on
        _hide(by_head, j[:max(0, rows.stop + part.back - first)] > i + part.back, 0)
    if part.segment is not None and last != part.first_key(rows.start):
        _hide(by_head, (j >= part.first_key(i)) & (j < part.first_key(i) + part.segment[-1]), 0)
    if part.k_docs is not None:
        _hide(by_head, (q_docs[:, rows, None] == part.k_docs[:, None, keys])[:, None], 0)
    return keys, s


def _row_blocks(parts):
    """
    Slices of the rows: 2^23 scores at most; with a window few rows, so that most scores count and stay in the cache; from
    one segment, or from several small ones; with xPos 1024, so that their factors are neither large nor small.
    """
    (B, Tq, H, _), main = parts[0].q.shape, parts[0]
    n, keys, edges = Tq, main.k.shape[1], [0, Tq if B else 0]
    if main.segment is not None:
        N, phase, *_, width = main.segment
        n = N * max(1, 64 // N)
        keys, edges = min(keys, n - N + width), [0, *range(n - phase, edges[1], n), edges[1]]
    if main.back is not None:
        window = main.offset - main.back
        n = min(n, max(64, window // 16))
        keys = min(keys, n + window)
    if main.zeta is not None:
        n = min(n, 1024)
    n = max(1, min(n, 2**23 // max(1, B * H * (keys + sum(part.k.shape[1] for part in parts[1:])))))
    return [slice(i, min(stop, i + n)) for start, stop in zip(edges, edges[1:]) for i in range(start, stop, n)]


def _attention_fwd_ref(q, k, v, q_sink, k_sink, v_sink, alibi_slopes, q_docs, k_docs, scale, causal, window, segment,
                       lookback, xpos, q_start, k_start, out_dtype):
    (B, Tq, H, D), acc = q.shape, torch.promote_types(q.dtype, torch.float32)
    parts = _parts(q, k, v, q_sink, k_sink, v_sink, k_docs, causal, window, segment, lookback, xpos, q_start,
                   k_start)
    out = torch.zeros(q.shape, dtype=out_dtype, device=q.device)
    lse = torch.full((B, H, Tq), -torch.inf, dtype=acc, device=q.device)
    for rows in _row_blocks(parts):
        scores = [(part, *_scores(part, rows, alibi_slopes, q_docs, scale)) for part in parts]
        tops = [s.amax(-1, keepdim=True) for *_, s in scores if s.shape[-1]]
        if not tops:
            continue
        top = functools.reduce(torch.maximum, tops)
        top = top.masked_fill_(top == -torch.inf, 0.0)
        total = b_out = 0.0
        for part, keys, s in scores:
            p = s.sub_(top).exp_()
            total = total + p.sum(-1, keepdim=True)
            b_out = b_out + p @ part.v[:, keys].to(acc).transpose(1, 2)
        b_out = b_out / total.masked_fill(total == 0, 1.0)
        out[:, rows] = _ungrouped(b_out, rows.stop - rows.start, H)
        lse[:, :, rows] = (top + total.log()).view(B, H, -1)
    return out, lse


def _attention_bwd_ref(dout, dlse, q, k, v, q_sink, k_sink, v_sink, out, lse, alibi_slopes, q_docs, k_docs, scale, causal,
                       window, segment, lookback, xpos, q_start, k_start, dtype):
    """-> [dq, dk, dv], and with sinks [..., dq_sink, dk_sink, dv_sink], in `dtype`."""
    H, G, acc = q.shape[2], k.shape[2], torch.promote_types(q.dtype, torch.float32)
    parts = _parts(q, k, v, q_sink, k_sink, v_sink, k_docs, causal, window, segment, lookback, xpos, q_start,
                   k_start)
    grads = [[torch.zeros(x.shape, dtype=to, device=q.device)
              for x, to in ((part.q, dtype), (part.k, acc), (part.v, acc))] for part in parts]
    for rows in _row_blocks(parts):
        b_lse, b_dlse = (0 if x is None else x[:, :, rows].reshape(q.shape[0], G, -1, 1) for x in (lse, dlse))
        empty = b_lse == -torch.inf
        b_lse = b_lse.masked_fill(empty, 0.0)
        b_out, b_dout = (_grouped(x[:, rows].to(acc), G) for x in (out, dout))
        delta = ((b_dout * b_out).sum(-1, keepdim=True) - b_dlse).masked_fill(empty, 0.0)
        for part, (dq, dk, dv) in zip(parts, grads):
            keys, s = _scores(part, rows, alibi_slopes, q_docs, scale)
            b_v = part.v[:, keys].to(acc).transpose(1, 2)
            p = s.sub_(b_lse).exp_()
            dv.transpose(1, 2)[:, :, keys] += p.mT @ b_dout
            ds = p.mul_((b_dout @ b_v.mT).sub_(delta))
            b_q, b_k = _operands(part, rows, keys, scale)
            b_dq = _ungrouped(ds @ b_k.transpose(1, 2) * scale, rows.stop - rows.start, H)
            b_dk = (ds.mT @ _grouped(b_q, G)).transpose(1, 2)
            if part.zeta is not None:
                b_dq, b_dk = (x * f for x, f in zip((b_dq, b_dk), _xpos_factors(part, rows, keys)))
            dq[:, rows] = b_dq
            dk[:, keys] += b_dk
    left_out = k.shape[1] - parts[0].k.shape[1]
    grads[0][1:] = (F.pad(x, (0, 0, 0, 0, left_out, 0)) for x in grads[0][1:])
    return [x.to(dtype) for part in grads for x in part]


def attention_ref(q, k, v, *, scale, causal, window=None, sinks=None, segment=None, lookback=0, alibi_slopes=None,
                  xpos=None, q_docs=None, k_docs=None, q_start=0, k_start=0):
    """
    The meaning of `attention`, in plain torch: (out, lse) in float32, or float64 for float64 inputs. Memory stays
    bounded: a block of rows at a time, recomputed in the backward pass. With a window, time grows with Tq x window, with
    segments with Tq x segment x (1 + lookback).
    """
    acc = torch.promote_types(q.dtype, torch.float32)
    return _Attention.apply(q, k, v, *sinks or 3 * (None,), alibi_slopes, q_docs, k_docs, scale, causal, window, segment,
                            lookback, xpos, q_start, k_start, acc, False)


# ----------------------------------------------------------------------------------------------------------------------
# Triton kernels. b_x is a block's value; rows and keys are indices into q and k (not positions).

@triton.jit
def _tile_load(X, rows, T, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr):
    """(rows, D) of a tensor whose row 0 is at X; what lies outside is 0. `rows` are few enough for 32-bit offsets."""
    d = tl.arange(0, BLOCK_D)
    x = X + rows[:, None] * stride + d[None, :]
    if MASK_ROWS and D == BLOCK_D:
        return tl.load(x, (rows < T)[:, None], 0.0)
    elif MASK_ROWS:
        return tl.load(x, (rows < T)[:, None] & (d < D)[None, :], 0.0)
    elif D == BLOCK_D:
        return tl.load(x)
    else:
        return tl.load(x, (d < D)[None, :], 0.0)


@triton.jit
def _tile_store(X, x, rows, T, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    tl.store(X + rows[:, None] * stride + d[None, :], x.to(X.dtype.element_ty), (rows < T)[:, None] & (d < D)[None, :])


@triton.jit
def _query_block(T_Q, H: tl.constexpr, BLOCK_M: tl.constexpr):
    """(batch entry, head, number of the block among all of the batch entry's, its first row) of this program."""
    blocks = tl.cdiv(T_Q, BLOCK_M)
    m_block = blocks - 1 - tl.program_id(0) % blocks  # the last blocks see the most keys: they go first
    head = tl.program_id(0) // blocks
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    return b, h, b * blocks + m_block, m_block * BLOCK_M


@triton.jit
def _reach(x, T, lower, upper, segment, phase, shift, width, LOWER: tl.constexpr, UPPER: tl.constexpr,
           SEGMENT: tl.constexpr):
    """
    The first and the last of T keys that row x sees (or of T rows that see key x), for one x or a block of them: from
    x + lower to x + upper, among the `width` from x's segment of `segment` on, shifted. Both grow with x.
    """
    low = x * 0
    high = low + (T - 1)
    if LOWER:
        low = x + lower
    if UPPER:
        high = tl.minimum(high, x + upper)
    if SEGMENT:
        start = (x + phase) // segment * segment + shift
        low = tl.maximum(low, start)
        high = tl.minimum(high, start + (width - 1))
    return low, high


@triton.jit
def _key_range(K_LO, K_HI, block, m0, T_Q, T_K, offset, back, segment, phase, shift, width, CAUSAL: tl.constexpr,
               WINDOW: tl.constexpr, DOCS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """
    For the rows from m0: every row sees all keys in [inner, mid); some row may see keys in [lo, inner) (the edge of the
    window or the segment) and in [mid, hi); none sees others. lo, inner and mid are multiples of BLOCK_N.
    """
    first_low, first_high = _reach(m0, T_K, back + 1, offset, segment, phase, shift, width, WINDOW, CAUSAL, WINDOW)
    last_low, last_high = _reach(tl.minimum(T_Q, m0 + BLOCK_M) - 1, T_K, back + 1, offset, segment, phase, shift, width,
                                 WINDOW, CAUSAL, WINDOW)
    lo = 0
    inner = 0
    mid = tl.maximum(0, first_high + 1) // BLOCK_N * BLOCK_N
    hi = tl.maximum(0, last_high + 1)
    if WINDOW:
        lo = tl.maximum(0, tl.minimum(hi, first_low)) // BLOCK_N * BLOCK_N
        inner = tl.maximum(lo, tl.cdiv(tl.minimum(hi, last_low), BLOCK_N) * BLOCK_N)
        mid = tl.maximum(mid, inner)
    if DOCS:
        lo = tl.maximum(lo, tl.load(K_LO + block) * BLOCK_N)
        inner = lo
        mid = lo
        hi = tl.minimum(hi, tl.load(K_HI + block) * BLOCK_N)
    return lo, inner, mid, hi


@triton.jit
def _visible(low, high, keys, T_K, row_docs, K_DOCS, WINDOW: tl.constexpr, DOCS: tl.constexpr):
    """(rows, keys) mask."""
    mask = keys[None, :] <= high[:, None]
    if WINDOW:
        mask = mask & (keys[None, :] >= low[:, None])
    if DOCS:
        mask = mask & (row_docs[:, None] == tl.load(K_DOCS + keys, keys < T_K, 0)[None, :])
    return mask


@triton.jit
def _clip(x, start, CHUNK: tl.constexpr):
    return tl.minimum(tl.maximum(x, start), start + CHUNK)


@triton.jit
def _xpos(b_x, ZETA, distance, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr):
    """
    xPos for rows at these distances from where a chunk begins. What is seen lies less than a chunk and a tile ahead of its
    query; the factor of what is not, which is multiplied with 0, is kept finite.
    """
    d = tl.arange(0, BLOCK_D)
    b_zeta = tl.load(ZETA + d, d < D, 0.0, volatile=True)
    distance = tl.maximum(distance, -2 * CHUNK).to(b_zeta.dtype)
    return (b_x.to(b_zeta.dtype) * tl.exp2(distance[:, None] * b_zeta[None, :])).to(b_x.dtype)


@triton.jit
def _xpos_load(X, rows, T, stride, ZETA, distance, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr):
    """_tile_load, with xPos. Volatile: loaded for each chunk again, or the compiler keeps what it can in registers."""
    d = tl.arange(0, BLOCK_D)
    b_x = tl.load(X + rows[:, None] * stride + d[None, :], (rows < T)[:, None] & (d < D)[None, :], 0.0, volatile=True)
    return _xpos(b_x, ZETA, distance, D, BLOCK_D, CHUNK)


@triton.jit
def _xpos_decay(ZETA, distance, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The factors (1, D) of one distance, of 0 or more."""
    d = tl.arange(0, BLOCK_D)
    b_zeta = tl.load(ZETA + d, d < D, 0.0, volatile=True)
    return tl.exp2(tl.cast(distance, b_zeta.dtype) * b_zeta)[None, :]


@triton.jit
def _fwd_step(b_acc, b_sum, b_max, b_q, K, V, start, low, high, row_docs, K_DOCS, T_K, b_pos, slope,
              stride_kt, stride_vt, MASK: tl.constexpr, WINDOW: tl.constexpr, DOCS: tl.constexpr,
              ALIBI: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
              BLOCK_N: tl.constexpr):
    """Keys [start, start + BLOCK_N) join the running softmax. SCALE and slope include log2(e)."""
    n = tl.arange(0, BLOCK_N)
    b_k = _tile_load(K + tl.cast(start, tl.int64) * stride_kt, n, T_K - start, stride_kt, D, BLOCK_D, MASK)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    scale: tl.constexpr = 1.0 if ALIBI else SCALE
    if ALIBI:
        b_s = b_s * SCALE - slope * ((b_pos - start).to(b_s.dtype)[:, None] - n.to(b_s.dtype)[None, :])
    if MASK:
        mask = _visible(low, high, start + n, T_K, row_docs, K_DOCS, WINDOW, DOCS)
        b_s = tl.where(mask, b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
    b_pivot = b_new
    if MASK:
        b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)  # rows that have seen nothing yet
    b_p = tl.exp2(b_s * scale - b_pivot[:, None])
    b_decay = tl.exp2(b_max - b_pivot)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_v = _tile_load(V + tl.cast(start, tl.int64) * stride_vt, n, T_K - start, stride_vt, D, BLOCK_D, MASK)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision=PRECISION,
                   out_dtype=b_acc.dtype)
    return b_acc, b_sum, b_new


@triton.jit
def _fwd_blocks(b_acc, b_sum, b_max, b_q, K, V, lo, inner, mid, hi, low, high, row_docs, K_DOCS, T_K, b_pos, slope,
                stride_kt, stride_vt, WHOLE: tl.constexpr, WINDOW: tl.constexpr, DOCS: tl.constexpr, ALIBI: tl.constexpr,
                SCALE: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                BLOCK_N: tl.constexpr):
    """The keys in [lo, hi), those in [inner, mid) unmasked; WHOLE: there can be such."""
    if WHOLE:
        for start in range(inner, mid, BLOCK_N):
            b_acc, b_sum, b_max = _fwd_step(
                b_acc, b_sum, b_max, b_q, K, V, start, low, high, row_docs, K_DOCS, T_K, b_pos, slope,
                stride_kt, stride_vt, False, WINDOW, DOCS, ALIBI, SCALE, PRECISION, D, BLOCK_D, BLOCK_N)
    for i in range(mid - (inner - lo), hi, BLOCK_N):  # [lo, inner) and [mid, hi) in one loop: registers
        start = i
        if WINDOW:
            start = tl.where(i < mid, i - mid + inner, i)
        b_acc, b_sum, b_max = _fwd_step(
            b_acc, b_sum, b_max, b_q, K, V, start, low, high, row_docs, K_DOCS, T_K, b_pos, slope,
            stride_kt, stride_vt, True, WINDOW, DOCS, ALIBI, SCALE, PRECISION, D, BLOCK_D, BLOCK_N)
    return b_acc, b_sum, b_max


@triton.jit(do_not_specialize=[*_POSITIONS, "S", "sink_offset", "sink_distance", "cap"])
def _attention_fwd_kernel(Q, K, V, Q_SINK, K_SINK, V_SINK, SLOPES, ZETA, OUT, LSE, Q_DOCS, K_DOCS, K_LO, K_HI,
                          T_Q, T_K, offset, back, segment, q_phase, k_phase, shift, width, distance,
                          S, sink_offset, sink_distance, cap,
                          stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
                          H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
                          SINKS: tl.constexpr, ALIBI: tl.constexpr, CHUNK: tl.constexpr, DOCS: tl.constexpr,
                          SCALE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
                          BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    b, h, block, m0 = _query_block(T_Q, H, BLOCK_M)
    m = tl.arange(0, BLOCK_M)
    rows = m0 + m
    Q += b * stride_qb + h * stride_qh + m0.to(tl.int64) * stride_qt
    K += b * stride_kb + h // GROUP * stride_kh
    V += b * stride_vb + h // GROUP * stride_vh
    contiguous = (b * T_Q + m0) * H * D + h * D  # where this block lies in OUT and Q_SINK
    row_docs = rows
    if DOCS:
        row_docs = tl.load(Q_DOCS + b * T_Q + rows, rows < T_Q, 0)
        K_DOCS += b * T_K
    slope = 0.0
    if ALIBI:
        slope = tl.load(SLOPES + h) * LOG2E
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    b_sum = tl.zeros((BLOCK_M,), ACC)
    b_max = tl.full((BLOCK_M,), float("-inf"), ACC)
    if SINKS:
        BLOCK_S: tl.constexpr = 16
        stride_s: tl.constexpr = H // GROUP * D
        K_SINK += b * S * stride_s + h // GROUP * D
        V_SINK += b * S * stride_s + h // GROUP * D
        b_pos = tl.minimum(rows + sink_distance, cap)
        sink_high = tl.minimum(S - 1, rows + sink_offset)
        stop = tl.minimum(S, tl.minimum(T_Q, m0 + BLOCK_M) + sink_offset)
        if CHUNK:
            for at in range(0, stop, CHUNK):
                b_q = _xpos_load(Q_SINK + contiguous, m, T_Q - m0, H * D, ZETA, b_pos - at, D, BLOCK_D, CHUNK)
                b_acc, b_sum, b_max = _fwd_blocks(
                    b_acc, b_sum, b_max, b_q, K_SINK, V_SINK, at, at, at, tl.minimum(stop, at + CHUNK), rows, sink_high,
                    rows, K_DOCS, S, b_pos, slope, stride_s, stride_s, False, False, False, ALIBI, SCALE, PRECISION, D,
                    BLOCK_D, BLOCK_S)
        else:
            b_q = _tile_load(Q_SINK + contiguous, m, T_Q - m0, H * D, D, BLOCK_D, True)
            b_acc, b_sum, b_max = _fwd_blocks(
                b_acc, b_sum, b_max, b_q, K_SINK, V_SINK, 0, 0, 0, stop, rows, sink_high, rows, K_DOCS, S, b_pos,
                slope, stride_s, stride_s, False, False, False, ALIBI, SCALE, PRECISION, D, BLOCK_D, BLOCK_S)
    b_pos = rows + distance
    shift -= k_phase
    low, high = _reach(rows, T_K, back + 1, offset, segment, q_phase, shift, width, WINDOW, CAUSAL, WINDOW)
    lo, inner, mid, hi = _key_range(K_LO, K_HI, block, m0, T_Q, T_K, offset, back, segment, q_phase, shift, width, CAUSAL,
                                    WINDOW, DOCS, BLOCK_M, BLOCK_N)
    if CHUNK:  # K is relative to where its chunk begins, and so is q to it
        for at in range(lo // CHUNK * CHUNK, hi, CHUNK):
            b_q = _xpos_load(Q, m, T_Q - m0, stride_qt, ZETA, b_pos - at, D, BLOCK_D, CHUNK)
            b_acc, b_sum, b_max = _fwd_blocks(
                b_acc, b_sum, b_max, b_q, K, V, _clip(lo, at, CHUNK), _clip(inner, at, CHUNK), _clip(mid, at, CHUNK),
                _clip(hi, at, CHUNK), low, high, row_docs, K_DOCS, T_K, b_pos, slope, stride_kt, stride_vt, not DOCS,
                WINDOW, DOCS, ALIBI, SCALE, PRECISION, D, BLOCK_D, BLOCK_N)
    else:
        b_q = _tile_load(Q, m, T_Q - m0, stride_qt, D, BLOCK_D, True)
        b_acc, b_sum, b_max = _fwd_blocks(
            b_acc, b_sum, b_max, b_q, K, V, lo, inner, mid, hi, low, high, row_docs, K_DOCS, T_K, b_pos, slope,
            stride_kt, stride_vt, not DOCS, WINDOW, DOCS, ALIBI, SCALE, PRECISION, D, BLOCK_D, BLOCK_N)
    empty = b_sum == 0.0
    b_sum = tl.where(empty, 1.0, b_sum)
    b_lse = tl.where(empty, float("-inf"), b_max + tl.log2(b_sum))
    _tile_store(OUT + contiguous, b_acc / b_sum[:, None], m, T_Q - m0, H * D, D, BLOCK_D)
    tl.store(LSE + (b * H + h) * T_Q + rows, b_lse, rows < T_Q)


@triton.jit
def _dq_step(b_dq, b_q, b_dout, b_lse, b_delta, K, V, start, low, high, row_docs, K_DOCS, T_K, b_pos, slope,
             stride_kt, stride_vt, MASK: tl.constexpr, WINDOW: tl.constexpr, DOCS: tl.constexpr,
             ALIBI: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
             BLOCK_N: tl.constexpr):
    n = tl.arange(0, BLOCK_N)
    b_k = _tile_load(K + tl.cast(start, tl.int64) * stride_kt, n, T_K - start, stride_kt, D, BLOCK_D, MASK)
    b_v = _tile_load(V + tl.cast(start, tl.int64) * stride_vt, n, T_K - start, stride_vt, D, BLOCK_D, MASK)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * SCALE
    if ALIBI:
        b_s -= slope * ((b_pos - start).to(b_s.dtype)[:, None] - n.to(b_s.dtype)[None, :])
    b_p = tl.exp2(b_s - b_lse[:, None])
    if MASK:
        b_p = tl.where(_visible(low, high, start + n, T_K, row_docs, K_DOCS, WINDOW, DOCS), b_p, 0.0)
    b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION, out_dtype=b_dq.dtype)


@triton.jit
def _dq_blocks(b_dq, b_q, b_dout, b_lse, b_delta, K, V, lo, inner, mid, hi, low, high, row_docs, K_DOCS, T_K, b_pos, slope,
               stride_kt, stride_vt, WINDOW: tl.constexpr, DOCS: tl.constexpr, ALIBI: tl.constexpr, SCALE: tl.constexpr,
               PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    if not DOCS:
        for start in range(inner, mid, BLOCK_N):
            b_dq = _dq_step(
                b_dq, b_q, b_dout, b_lse, b_delta, K, V, start, low, high, row_docs, K_DOCS, T_K, b_pos, slope,
                stride_kt, stride_vt, False, WINDOW, DOCS, ALIBI, SCALE, PRECISION, D, BLOCK_D, BLOCK_N)
    for i in range(mid - (inner - lo), hi, BLOCK_N):
        start = i
        if WINDOW:
            start = tl.where(i < mid, i - mid + inner, i)
        b_dq = _dq_step(
            b_dq, b_q, b_dout, b_lse, b_delta, K, V, start, low, high, row_docs, K_DOCS, T_K, b_pos, slope,
            stride_kt, stride_vt, True, WINDOW, DOCS, ALIBI, SCALE, PRECISION, D, BLOCK_D, BLOCK_N)
    return b_dq


@triton.jit(do_not_specialize=[*_POSITIONS, "cap"])
def _attention_dq_kernel(Q, K, V, SLOPES, ZETA, OUT, DOUT, LSE, DLSE, DQ, DELTA, Q_DOCS, K_DOCS, K_LO, K_HI,
                         T_Q, T_K, offset, back, segment, q_phase, k_phase, shift, width, distance, cap,
                         stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
                         stride_ob, stride_ot, stride_oh,
                         H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
                         ALIBI: tl.constexpr, CHUNK: tl.constexpr, DOCS: tl.constexpr, HAS_DLSE: tl.constexpr,
                         SCALE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
                         BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    b, h, block, m0 = _query_block(T_Q, H, BLOCK_M)
    m = tl.arange(0, BLOCK_M)
    rows = m0 + m
    Q += b * stride_qb + h * stride_qh + m0.to(tl.int64) * stride_qt
    K += b * stride_kb + h // GROUP * stride_kh
    V += b * stride_vb + h // GROUP * stride_vh
    DOUT += b * stride_ob + h * stride_oh + m0.to(tl.int64) * stride_ot
    contiguous = (b * T_Q + m0) * H * D + h * D  # where this block lies in OUT and DQ
    row_docs = rows
    if DOCS:
        row_docs = tl.load(Q_DOCS + b * T_Q + rows, rows < T_Q, 0)
        K_DOCS += b * T_K
    slope = 0.0
    if ALIBI:
        slope = tl.load(SLOPES + h) * LOG2E
    at_row = (b * H + h) * T_Q + rows
    b_dout = _tile_load(DOUT, m, T_Q - m0, stride_ot, D, BLOCK_D, True)
    b_out = _tile_load(OUT + contiguous, m, T_Q - m0, H * D, D, BLOCK_D, True)
    b_lse = tl.load(LSE + at_row, rows < T_Q, 0.0)
    b_delta = tl.sum(b_out.to(ACC) * b_dout.to(ACC), 1)
    if HAS_DLSE:
        b_delta -= tl.where(b_lse == float("-inf"), 0.0, tl.load(DLSE + at_row, rows < T_Q, 0.0) * LOG2E)
    tl.store(DELTA + at_row, b_delta, rows < T_Q)
    b_dout = b_dout.to(Q.dtype.element_ty)  # OUT and its gradient may be float32 partials
    b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)
    b_dq = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    b_pos = tl.minimum(rows + distance, cap)
    shift -= k_phase
    low, high = _reach(rows, T_K, back + 1, offset, segment, q_phase, shift, width, WINDOW, CAUSAL, WINDOW)
    lo, inner, mid, hi = _key_range(K_LO, K_HI, block, m0, T_Q, T_K, offset, back, segment, q_phase, shift, width, CAUSAL,
                                    WINDOW, DOCS, BLOCK_M, BLOCK_N)
    if CHUNK:  # what the chunks so far give counts from the end of each: they come nearer
        for at in range(lo // CHUNK * CHUNK, hi, CHUNK):
            b_q = _xpos_load(Q, m, T_Q - m0, stride_qt, ZETA, b_pos - at, D, BLOCK_D, CHUNK)
            b_dq *= _xpos_decay(ZETA, CHUNK, D, BLOCK_D)
            b_dq = _dq_blocks(
                b_dq, b_q, b_dout, b_lse, b_delta, K, V, _clip(lo, at, CHUNK), _clip(inner, at, CHUNK),
                _clip(mid, at, CHUNK), _clip(hi, at, CHUNK), low, high, row_docs, K_DOCS, T_K, b_pos, slope,
                stride_kt, stride_vt, WINDOW, DOCS, ALIBI, SCALE, PRECISION, D, BLOCK_D, BLOCK_N)
        b_dq = _xpos(b_dq, ZETA, b_pos - tl.maximum(hi - 1, 0) // CHUNK * CHUNK, D, BLOCK_D, CHUNK)
    else:
        b_q = _tile_load(Q, m, T_Q - m0, stride_qt, D, BLOCK_D, True)
        b_dq = _dq_blocks(
            b_dq, b_q, b_dout, b_lse, b_delta, K, V, lo, inner, mid, hi, low, high, row_docs, K_DOCS, T_K, b_pos, slope,
            stride_kt, stride_vt, WINDOW, DOCS, ALIBI, SCALE, PRECISION, D, BLOCK_D, BLOCK_N)
    _tile_store(DQ + contiguous, b_dq * (SCALE * LN2), m, T_Q - m0, H * D, D, BLOCK_D)


@triton.jit
def _dkdv_step(b_dk, b_dv, b_k, b_v, Q, DOUT, LSE, DELTA, start, n0, low, high, key_docs, Q_DOCS, T_Q,
               distance, cap, SLOPES, stride_qt, stride_ot, MASK: tl.constexpr, WINDOW: tl.constexpr, DOCS: tl.constexpr,
               ALIBI: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr,
               BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows [start, start + BLOCK_M), transposed throughout: keys down, queries across."""
    m = tl.arange(0, BLOCK_M)
    rows = start + m
    b_q = _tile_load(Q + tl.cast(start, tl.int64) * stride_qt, m, T_Q - start, stride_qt, D, BLOCK_D, MASK)
    if MASK:
        b_lse = tl.load(LSE + rows, rows < T_Q, 0.0)
        b_delta = tl.load(DELTA + rows, rows < T_Q, 0.0)
    else:
        b_lse = tl.load(LSE + rows)
        b_delta = tl.load(DELTA + rows)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * SCALE
    if ALIBI:
        b_pos = tl.minimum(rows + distance, cap) - start
        n = n0 - start + tl.arange(0, b_k.shape[0])
        b_s -= tl.load(SLOPES) * LOG2E * (b_pos.to(b_s.dtype)[None, :] - n.to(b_s.dtype)[:, None])
    b_p = tl.exp2(b_s - b_lse[None, :])
    if MASK:
        mask = (rows < T_Q)[None, :] & (rows[None, :] >= low[:, None])
        if WINDOW:
            mask = mask & (rows[None, :] <= high[:, None])
        if DOCS:
            mask = mask & (key_docs[:, None] == tl.load(Q_DOCS + rows, rows < T_Q, 0)[None, :])
        b_p = tl.where(mask, b_p, 0.0)
    b_dout = _tile_load(DOUT + tl.cast(start, tl.int64) * stride_ot, m, T_Q - start, stride_ot, D, BLOCK_D, MASK)
    b_dout = b_dout.to(b_q.dtype)
    b_dv = tl.dot(b_p.to(b_q.dtype), b_dout, b_dv, input_precision=PRECISION, out_dtype=b_dv.dtype)
    b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION, out_dtype=b_dk.dtype)
    return b_dk, b_dv


@triton.jit
def _dkdv_blocks(b_dk, b_dv, b_k, b_v, Q, DOUT, LSE, DELTA, lo, mid, full, end, n0, low, high, key_docs, Q_DOCS, T_Q,
                 distance, cap, SLOPES, stride_qt, stride_qh, stride_ot, stride_oh, GROUP: tl.constexpr,
                 WINDOW: tl.constexpr, DOCS: tl.constexpr, ALIBI: tl.constexpr, SCALE: tl.constexpr,
                 PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows [lo, mid) and [full, end) masked, [mid, full) not; with documents [lo, mid) alone."""
    masked = (mid - lo) // BLOCK_M
    if not DOCS:
        masked += tl.cdiv(tl.maximum(0, end - full), BLOCK_M)
    for i in range(0, GROUP * masked):  # the query heads in one loop, which keeps more in registers than two
        h = tl.cast(i // masked, tl.int64)
        start = lo + i % masked * BLOCK_M
        start = tl.where(start < mid, start, full + start - mid)
        b_dk, b_dv = _dkdv_step(
            b_dk, b_dv, b_k, b_v, Q + h * stride_qh, DOUT + h * stride_oh, LSE + h * T_Q, DELTA + h * T_Q, start, n0,
            low, high, key_docs, Q_DOCS, T_Q, distance, cap, SLOPES + h if ALIBI else SLOPES, stride_qt, stride_ot,
            True, WINDOW, DOCS, ALIBI, SCALE, PRECISION, D, BLOCK_D, BLOCK_M)
    if not DOCS:
        whole = (full - mid) // BLOCK_M
        for i in range(0, GROUP * whole):
            h = tl.cast(i // whole, tl.int64)
            b_dk, b_dv = _dkdv_step(
                b_dk, b_dv, b_k, b_v, Q + h * stride_qh, DOUT + h * stride_oh, LSE + h * T_Q, DELTA + h * T_Q,
                mid + i % whole * BLOCK_M, n0, low, high, key_docs, Q_DOCS, T_Q, distance, cap,
                SLOPES + h if ALIBI else SLOPES, stride_qt, stride_ot, False, WINDOW, DOCS, ALIBI, SCALE, PRECISION,
                D, BLOCK_D, BLOCK_M)
    return b_dk, b_dv


@triton.jit(do_not_specialize=[*_POSITIONS, "cap", "batch", "split_rows"])
def _attention_dkdv_kernel(Q, K, V, SLOPES, ZETA, DOUT, LSE, DELTA, DK, DV, Q_DOCS, K_DOCS, Q_LO, Q_HI,
                           T_Q, T_K, offset, back, segment, q_phase, k_phase, shift, width, distance, cap, batch, split_rows,
                           stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
                           stride_ob, stride_ot, stride_oh, stride_db,
                           H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr,
                           WINDOW: tl.constexpr, ALIBI: tl.constexpr, CHUNK: tl.constexpr, DOCS: tl.constexpr,
                           SPLIT: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
                           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    blocks = tl.cdiv(T_K, BLOCK_N)
    n_block = tl.program_id(0) % blocks  # the first blocks are seen by the most rows: they go first
    head = tl.program_id(0) // blocks
    G: tl.constexpr = H // GROUP
    b = (head // G).to(tl.int64)
    g = (head % G).to(tl.int64)
    n0 = n_block * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    keys = n0 + n
    DK += b * stride_db + n0.to(tl.int64) * G * D + g * D
    DV += b * stride_db + n0.to(tl.int64) * G * D + g * D
    row0 = 0
    T_END = T_Q
    if SPLIT:  # rows [row0, T_END) alone; DK and DV hold a partial sum of every split
        row0 = (b // batch * split_rows).to(tl.int32)
        T_END = tl.minimum(T_Q, row0 + split_rows)
        b = b % batch
    K += b * stride_kb + g * stride_kh + n0.to(tl.int64) * stride_kt
    V += b * stride_vb + g * stride_vh + n0.to(tl.int64) * stride_vt
    b_v = _tile_load(V, n, T_K - n0, stride_vt, D, BLOCK_D, True)
    # rows [lo, mid) see some of these keys, [mid, full) all of them, [full, end) some: the window's edge, or T_END's block
    shift = segment - width - shift - q_phase
    low, high = _reach(keys, T_END, -offset, -back - 1, segment, k_phase, shift, width, CAUSAL, WINDOW, WINDOW)
    first_low, first_high = _reach(n0, T_END, -offset, -back - 1, segment, k_phase, shift, width, CAUSAL, WINDOW, WINDOW)
    last_low, last_high = _reach(tl.minimum(T_K, n0 + BLOCK_N) - 1, T_END, -offset, -back - 1, segment, k_phase, shift, width,
                                 CAUSAL, WINDOW, WINDOW)
    lo = tl.minimum(T_END, tl.maximum(row0, first_low)) // BLOCK_M * BLOCK_M
    mid = tl.cdiv(tl.minimum(T_END, tl.maximum(row0, last_low)), BLOCK_M) * BLOCK_M
    full = tl.maximum(lo, first_high + 1) // BLOCK_M * BLOCK_M
    end = tl.maximum(lo, last_high + 1)
    mid = tl.minimum(mid, tl.cdiv(end, BLOCK_M) * BLOCK_M)
    key_docs = keys
    if DOCS:
        key_docs = tl.load(K_DOCS + b * T_K + keys, keys < T_K, 0)
        Q_DOCS += b * T_Q
        lo = tl.maximum(lo, tl.load(Q_LO + b * blocks + n_block) * BLOCK_M)
        mid = tl.maximum(lo, tl.minimum(tl.load(Q_HI + b * blocks + n_block), tl.cdiv(end, BLOCK_M)) * BLOCK_M)
    full = tl.maximum(full, mid)
    Q += b * stride_qb + g * GROUP * stride_qh  # the first query head of this kv head
    DOUT += b * stride_ob + g * GROUP * stride_oh
    LSE += (b * H + g * GROUP) * T_Q
    DELTA += (b * H + g * GROUP) * T_Q
    if ALIBI:
        SLOPES += g * GROUP
    b_dk = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    b_dv = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    if CHUNK:  # Q is relative to where its chunk begins, and so is k to it; they come nearer
        first = lo // CHUNK * CHUNK
        last = mid
        if not DOCS:
            last = tl.maximum(mid, end)
        last = tl.maximum(first, (last - 1) // CHUNK * CHUNK)
        for i in range(0, last - first + 1, CHUNK):
            at = last - i
            base = tl.minimum(at + distance, cap)
            b_k = _xpos_load(K, n, T_K - n0, stride_kt, ZETA, base - keys, D, BLOCK_D, CHUNK)
            b_dk *= _xpos_decay(ZETA, tl.minimum(at + CHUNK + distance, cap) - base, D, BLOCK_D)
            b_dk, b_dv = _dkdv_blocks(
                b_dk, b_dv, b_k, b_v, Q, DOUT, LSE, DELTA, _clip(lo, at, CHUNK), _clip(mid, at, CHUNK),
                _clip(full, at, CHUNK), _clip(end, at, CHUNK), n0, low, high, key_docs, Q_DOCS, T_Q, distance, cap, SLOPES,
                stride_qt, stride_qh, stride_ot, stride_oh, GROUP, WINDOW, DOCS, ALIBI, SCALE, PRECISION, D, BLOCK_D,
                BLOCK_M)
        b_dk = _xpos(b_dk, ZETA, tl.minimum(first + distance, cap) - keys, D, BLOCK_D, CHUNK)
    else:
        b_k = _tile_load(K, n, T_K - n0, stride_kt, D, BLOCK_D, True)
        b_dk, b_dv = _dkdv_blocks(
            b_dk, b_dv, b_k, b_v, Q, DOUT, LSE, DELTA, lo, mid, full, end, n0, low, high, key_docs, Q_DOCS, T_Q, distance,
            cap, SLOPES, stride_qt, stride_qh, stride_ot, stride_oh, GROUP, WINDOW, DOCS, ALIBI, SCALE, PRECISION, D,
            BLOCK_D, BLOCK_M)
    _tile_store(DK, b_dk * (SCALE * LN2), n, T_K - n0, G * D, D, BLOCK_D)
    _tile_store(DV, b_dv, n, T_K - n0, G * D, D, BLOCK_D)


# ----------------------------------------------------------------------------------------------------------------------
# launchers

# (architecture, bytes per element, BLOCK_D) -> kernel -> (BLOCK_M, BLOCK_N, num_warps, num_stages). The largest tiles
# that compile without spilling a register in 16 bits on Triton 3.6 and 3.9, for MHA and GQA, with and without
# documents. Not yet timed against each other on a GPU.
TILES = {
    (80, 2, 64): dict(fwd=(128, 64, 8, 3), dq=(128, 64, 8, 3), dkdv=(32, 64, 8, 2)),
    (80, 2, 128): dict(fwd=(64, 64, 4, 2), dq=(64, 64, 8, 2), dkdv=(64, 64, 8, 2)),
    (80, 2, 256): dict(fwd=(64, 64, 8, 2), dq=(64, 32, 8, 2), dkdv=(16, 64, 8, 3)),
    (89, 2, 64): dict(fwd=(128, 64, 8, 3), dq=(128, 64, 8, 3), dkdv=(32, 64, 8, 2)),
    (89, 2, 128): dict(fwd=(128, 64, 8, 3), dq=(64, 64, 8, 2), dkdv=(32, 64, 8, 2)),
    (89, 2, 256): dict(fwd=(64, 32, 8, 2), dq=(64, 16, 8, 2), dkdv=(32, 32, 8, 2)),
    (90, 2, 64): dict(fwd=(128, 64, 8, 3), dq=(128, 64, 8, 3), dkdv=(64, 128, 8, 2)),
    (90, 2, 128): dict(fwd=(128, 64, 8, 3), dq=(128, 64, 8, 2), dkdv=(32, 128, 8, 3)),
    (90, 2, 256): dict(fwd=(64, 64, 8, 2), dq=(64, 32, 8, 2), dkdv=(32, 32, 8, 2)),
    (100, 2, 64): dict(fwd=(64, 64, 4, 3), dq=(64, 64, 4, 2), dkdv=(64, 128, 8, 2)),
    (100, 2, 128): dict(fwd=(128, 64, 8, 3), dq=(128, 64, 8, 3), dkdv=(64, 128, 8, 2)),
    (100, 2, 256): dict(fwd=(64, 64, 8, 2), dq=(64, 32, 4, 2), dkdv=(32, 64, 8, 2)),
    ("gfx", 2, 64): dict(fwd=(128, 64, 8, 3), dq=(128, 64, 8, 2), dkdv=(32, 64, 4, 2)),
    ("gfx", 2, 128): dict(fwd=(64, 64, 4, 2), dq=(64, 32, 8, 2), dkdv=(32, 64, 4, 2)),
    ("gfx", 2, 256): dict(fwd=(64, 32, 8, 2), dq=(32, 16, 4, 1), dkdv=(16, 32, 8, 2)),
    ("gfx", 4, 64): dict(fwd=(64, 32, 8, 2), dq=(32, 32, 4, 2), dkdv=(32, 32, 4, 2)),
    ("gfx", 4, 128): dict(fwd=(32, 32, 8, 2), dq=(32, 16, 8, 2), dkdv=(16, 32, 8, 2)),
    ("gfx", 4, 256): dict(fwd=(32, 16, 8, 2), dq=(16, 16, 4, 1), dkdv=(16, 16, 4, 1)),
}
for _arch in (80, 89, 90, 100):  # float32 products without TF32 are scalar arithmetic: small tiles keep it in registers
    TILES[_arch, 4, 64] = dict(fwd=(32, 32, 8, 2), dq=(32, 32, 8, 2), dkdv=(32, 32, 8, 2))
    TILES[_arch, 4, 128] = dict(fwd=(16, 16, 4, 2), dq=(32, 16, 8, 2), dkdv=(16, 32, 8, 2))
    TILES[_arch, 4, 256] = dict(fwd=(16, 16, 4, 1), dq=(16, 16, 8, 2), dkdv=(16, 16, 8, 1))
# What takes their place in calls with a window, segments, sinks, ALiBi or xPos, which need more registers.
RICH_TILES = {
    (80, 2, 128): dict(fwd=(64, 64, 8, 2)),
    (80, 2, 256): dict(dkdv=(32, 32, 8, 2)),
    (89, 2, 128): dict(fwd=(64, 64, 8, 2)),
    (90, 2, 128): dict(fwd=(128, 64, 8, 2), dq=(128, 32, 8, 2), dkdv=(32, 128, 8, 2)),
    (90, 2, 256): dict(fwd=(64, 16, 8, 2), dq=(64, 16, 8, 2)),
    (100, 2, 256): dict(fwd=(64, 32, 8, 2)),
    (100, 4, 256): dict(fwd=(16, 16, 4, 2)),
    ("gfx", 2, 64): dict(fwd=(128, 64, 8, 2), dq=(64, 64, 4, 2)),
    ("gfx", 2, 256): dict(fwd=(32, 32, 8, 2)),
}
XPOS_TILES = {  # and theirs with xPos, which walks chunk by chunk and needs more still
    (80, 2, 64): dict(dq=(64, 32, 4, 2)),
    (80, 2, 128): dict(dkdv=(32, 64, 8, 2)),
    (80, 2, 256): dict(fwd=(64, 16, 8, 2), dq=(32, 32, 8, 2)),
    (89, 2, 64): dict(dq=(64, 32, 4, 2), sinks=(32, 16, 4, 2)),
    (89, 2, 128): dict(sinks=(32, 16, 4, 2)),
    (90, 2, 128): dict(fwd=(128, 32, 8, 2), dq=(64, 64, 8, 2), dkdv=(32, 64, 8, 2), sinks=(32, 16, 4, 2)),
    (90, 2, 256): dict(dq=(32, 32, 8, 2)),
    (100, 2, 64): dict(dq=(64, 32, 4, 2)),
    (100, 2, 128): dict(fwd=(64, 64, 8, 2), dq=(64, 64, 8, 2), dkdv=(32, 64, 8, 1), sinks=(32, 16, 4, 2)),
    (100, 2, 256): dict(fwd=(32, 32, 8, 2), dq=(32, 32, 8, 2), dkdv=(32, 32, 8, 2)),
}
for _arch in (80, 89, 90, 100):
    XPOS_TILES[_arch, 4, 64] = dict(fwd=(32, 16, 8, 2), dkdv=(16, 32, 8, 2))
    XPOS_TILES[_arch, 4, 128] = dict(dkdv=(16, 16, 8, 2))
    XPOS_TILES[_arch, 4, 256] = dict(fwd=(16, 16, 8, 1), dq=(16, 16, 4, 1))
SINK_TILES = {(2, 64): (64, 16, 4, 2), (2, 128): (64, 16, 4, 2), (2, 256): (16, 16, 4, 2),  # dk and dv of sinks
              (4, 64): (32, 16, 4, 2), (4, 128): (16, 16, 4, 2), (4, 256): (16, 16, 4, 1)}
SPLIT_BLOCKS = 16  # blocks of rows whose sum over the sinks' gradients one program makes


def _tiles(q, rich, xpos):
    """The kernels' tiles for these queries, and BLOCK_D: the head dim rounded up to a power of two, 16 at least."""
    block_d = max(16, triton.next_power_of_2(q.shape[-1]))
    key = (arch(q), min(4, q.element_size()), max(64, block_d))
    if key[0] == "cpu":  # the interpreter: small tiles, so that small tensors have several
        return dict.fromkeys(("fwd", "dq", "dkdv", "sinks"), (16, 16, 4, 1)), block_d
    tiles = TILES[key] | dict(sinks=SINK_TILES[key[1:]])
    return tiles | (RICH_TILES.get(key, {}) if rich or xpos else {}) | (XPOS_TILES.get(key, {}) if xpos else {}), block_d


def _launch_options(tile, kernel_block_d):
    block_m, block_n, num_warps, num_stages = tile
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=kernel_block_d, num_warps=num_warps, num_stages=num_stages)


def _strided(x):
    """x itself where the kernels can read it: a contiguous last dim, and a tile's rows within 32-bit offsets."""
    return x if x.stride(-1) == 1 and x.stride(1) < 2**23 else x.contiguous()


def _doc_ranges(docs_a, docs_b, block_a, block_b):
    """
    For each block of `docs_a` (B, Ta), the range [lo, hi) of blocks of `docs_b` (B, Tb) that can hold an equal id:
    int32 (B, blocks of a) twice. Exact for sorted ids; for ids in any order a superset (the kernels compare every pair
    within it).
    """
    def bounds(docs, block):
        B, T = docs.shape
        padded = torch.cat([docs, docs[:, -1:].expand(B, -T % block)], 1).view(B, (T + block - 1) // block, block)
        return padded.amin(2), padded.amax(2)

    (a_min, a_max), (b_min, b_max) = bounds(docs_a, block_a), bounds(docs_b, block_b)
    upto_max = b_max.cummax(1).values  # blocks before the first whose running maximum reaches a_min are all below it
    from_min = b_min.flip(1).cummin(1).values.flip(1)  # and those after the last whose minimum-from-here is <= a_max, above
    lo = torch.searchsorted(upto_max.contiguous(), a_min.contiguous(), out_int32=True)
    hi = torch.searchsorted(from_min.contiguous(), a_max.contiguous(), right=True, out_int32=True)
    return lo.contiguous(), torch.maximum(lo, hi).contiguous()


def _implementation(triton_kernel, reference):
    """The operator's implementation: its last argument says which of the two runs."""
    return lambda *args: (triton_kernel if args[-1] else reference)(*args[:-1])


def _relative(x, part, steps):
    """x (B, T, heads, D) times zeta^(steps / 512), steps (T,): rounded once, to x's dtype."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.mul(x, (steps[:, None] * part.zeta).exp2()[:, None], out=out)


def _relative_rows(part):
    """With xPos, q relative to the position of the first row of each chunk; else q."""
    if part.zeta is None:
        return part.q
    i = torch.arange(part.q.shape[1], device=part.q.device)
    position, base = ((x + part.distance).clamp(max=part.cap) for x in (i, i // XPOS_CHUNK * XPOS_CHUNK))
    return _relative(part.q, part, position - base)


def _relative_keys(part):
    """With xPos, k relative to the first key of each chunk; else k."""
    if part.zeta is None:
        return part.k
    return _relative(part.k, part, -(torch.arange(part.k.shape[1], device=part.k.device) % XPOS_CHUNK))


def _shared_arguments(part, slopes, scale):
    """(positions, constants) that the three kernels take for one _Part."""
    q, k = part.q, part.k
    acc, (Tq, Tk), H = torch.promote_types(q.dtype, torch.float32), (q.shape[1], k.shape[1]), q.shape[2]
    back = -Tq if part.back is None else part.back  # where only one of window and segment is absent, it hides nothing
    positions = Tq, Tk, part.offset, back, *(part.segment or (Tq + Tk, 0, 0, 0, Tq + Tk)), part.distance
    window = part.back is not None or part.segment is not None
    return positions, dict(H=H, GROUP=H // k.shape[2], D=q.shape[3], CAUSAL=part.causal, WINDOW=window,
                           ALIBI=slopes is not None, CHUNK=0 if part.zeta is None else XPOS_CHUNK,
                           DOCS=part.k_docs is not None, SCALE=scale * LOG2E.value, PRECISION=dot_precision(q.dtype),
                           ACC=getattr(tl, str(acc)[6:]))


def _attention_fwd(q, k, v, q_sink, k_sink, v_sink, alibi_slopes, q_docs, k_docs, scale, causal, window, segment, lookback,
                   xpos, q_start, k_start, out_dtype):
    """-> out, and log2 of the softmax denominator (B, H, Tq)."""
    main, *sinks = _parts(q, k, v, q_sink, k_sink, v_sink, k_docs, causal, window, segment, lookback, xpos, q_start,
                   k_start)
    B, Tq, H, D = q.shape
    out = torch.empty(B, Tq, H, D, dtype=out_dtype, device=q.device)
    lse = torch.empty(B, H, Tq, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    if not B or not Tq or not main.k.shape[1] + sum(part.k.shape[1] for part in sinks):
        return out.zero_(), lse.fill_(-torch.inf)
    positions, constants = _shared_arguments(main, alibi_slopes, scale)
    tiles, block_d = _tiles(q, constants["WINDOW"] or constants["ALIBI"] or bool(sinks), main.zeta is not None)
    options = _launch_options(tiles["fwd"], block_d)
    q, k, v = (_strided(x) for x in (main.q, _relative_keys(main), main.v))
    k_docs = k_lo = k_hi = None
    if main.k_docs is not None:
        k_docs = main.k_docs.contiguous()
        k_lo, k_hi = _doc_ranges(q_docs, k_docs, options["BLOCK_M"], options["BLOCK_N"])
    sink_arguments = 3 * (None,), 4 * (0,)
    if sinks:
        part = sinks[0]
        sink_arguments = ([x.contiguous() for x in (part.q, _relative_keys(part), part.v)],
                          (part.k.shape[1], part.offset, part.distance, part.cap))
    _attention_fwd_kernel[(triton.cdiv(Tq, options["BLOCK_M"]) * B * H,)](
        q, k, v, *sink_arguments[0], alibi_slopes, main.zeta, out, lse, q_docs, k_docs, k_lo, k_hi, *positions,
        *sink_arguments[1], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], SINKS=bool(sinks), **constants, **options)
    return out, lse


def _part_bwd(part, is_sinks, dout, dlse, out, lse, delta, dk, dv, alibi_slopes, q_docs, scale):
    """-> dq, in dk's dtype; dk and dv of the keys, or of the sinks, are written. delta is scratch."""
    q, k, v = (_strided(x) for x in part[:3])
    (B, Tq, H, D), (_, Tk, G, _) = q.shape, k.shape
    dq = torch.empty(q.shape, dtype=dk.dtype, device=q.device)
    positions, constants = _shared_arguments(part, alibi_slopes, scale)
    tiles, block_d = _tiles(q, constants["WINDOW"] or constants["ALIBI"], part.zeta is not None)
    options = _launch_options(tiles["dq"], block_d) | (dict(BLOCK_N=16) if is_sinks else {})
    k_docs, lo, hi = part.k_docs, None, None
    if k_docs is not None:
        k_docs = k_docs.contiguous()
        lo, hi = _doc_ranges(q_docs, k_docs, options["BLOCK_M"], options["BLOCK_N"])
    keys = k if part.zeta is None else _relative_keys(part)
    strides = *v.stride()[:3], *dout.stride()[:3]
    _attention_dq_kernel[(triton.cdiv(Tq, options["BLOCK_M"]) * B * H,)](
        q, keys, v, alibi_slopes, part.zeta, out, dout, lse, dlse, dq, delta, q_docs, k_docs, lo, hi, *positions, part.cap,
        *q.stride()[:3], *keys.stride()[:3], *strides, HAS_DLSE=dlse is not None, **constants, **options)
    if not Tk:
        return dq
    options = _launch_options(tiles["sinks" if is_sinks else "dkdv"], block_d)
    if k_docs is not None:
        lo, hi = _doc_ranges(k_docs, q_docs, options["BLOCK_N"], options["BLOCK_M"])
    split_rows = SPLIT_BLOCKS * options["BLOCK_M"]
    splits, sums = 1, [dk, dv]
    if is_sinks:  # few keys, seen by all rows: several programs share the rows
        splits = triton.cdiv(Tq, split_rows)
        sums = [torch.empty(splits, *k.shape, dtype=lse.dtype, device=q.device) for _ in range(2)]
    del keys
    rows = q if part.zeta is None else _relative_rows(part)
    _attention_dkdv_kernel[(triton.cdiv(Tk, options["BLOCK_N"]) * splits * B * G,)](
        rows, k, v, alibi_slopes, part.zeta, dout, lse, delta, *sums, q_docs, k_docs, lo, hi, *positions, part.cap, B,
        split_rows, *rows.stride()[:3], *k.stride()[:3], *strides, sums[0].stride(-4), SPLIT=is_sinks, **constants,
        **options)
    if is_sinks:
        for x, partial in zip((dk, dv), sums):
            x.copy_(partial.sum(0))
    return dq


def _attention_bwd(dout, dlse, q, k, v, q_sink, k_sink, v_sink, out, lse, alibi_slopes, q_docs, k_docs, scale, causal,
                   window, segment, lookback, xpos, q_start, k_start, dtype):
    """-> [dq, dk, dv], and with sinks [..., dq_sink, dk_sink, dv_sink], in `dtype`."""
    parts = _parts(q, k, v, q_sink, k_sink, v_sink, k_docs, causal, window, segment, lookback, xpos, q_start,
                   k_start)
    dout, dlse = _strided(dout), None if dlse is None else dlse.contiguous()
    delta, grads = torch.empty_like(lse), []
    for i, (part, k) in enumerate(zip(parts, (k, k_sink))):
        dk, dv = (torch.empty(k.shape, dtype=dtype, device=k.device) for _ in range(2))
        if not q.numel() or not sum(part.k.shape[1] for part in parts):
            grads += [torch.zeros_like(part.q, dtype=dtype), dk.zero_(), dv.zero_()]
            continue
        left_out = k.shape[1] - part.k.shape[1]
        if left_out:
            dk[:, :left_out], dv[:, :left_out] = 0, 0
        dq = _part_bwd(part, i == 1, dout, dlse, out, lse, delta, dk[:, left_out:], dv[:, left_out:], alibi_slopes, q_docs,
                       scale)
        grads += [dq, dk, dv]
    return grads


# ----------------------------------------------------------------------------------------------------------------------
# registration, autograd

register("attention_fwd",
         "(Tensor q, Tensor k, Tensor v, Tensor? q_sink, Tensor? k_sink, Tensor? v_sink, Tensor? alibi_slopes, "
         "Tensor? q_docs, Tensor? k_docs, float scale, bool causal, SymInt? window, SymInt? segment, SymInt lookback, "
         "int? xpos, SymInt q_start, SymInt k_start, ScalarType out_dtype, bool triton) -> (Tensor, Tensor)",
         _implementation(_attention_fwd, _attention_fwd_ref),
         lambda q, *rest: (
             q.new_empty(q.shape, dtype=rest[-2]),
             q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))))
register("attention_bwd",
         "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? q_sink, Tensor? k_sink, Tensor? v_sink, "
         "Tensor out, Tensor lse, Tensor? alibi_slopes, Tensor? q_docs, Tensor? k_docs, float scale, bool causal, "
         "SymInt? window, SymInt? segment, SymInt lookback, int? xpos, SymInt q_start, SymInt k_start, ScalarType dtype, "
         "bool triton) -> Tensor[]",
         _implementation(_attention_bwd, _attention_bwd_ref),
         lambda dout, dlse, q, k, v, q_sink, k_sink, v_sink, *rest: [
             x.new_empty(x.shape, dtype=rest[-2]) for x in (q, k, v, q_sink, k_sink, v_sink) if x is not None])


class _Attention(torch.autograd.Function):
    """(out, lse); lse in base 2 if it comes from the Triton kernels."""

    @staticmethod
    def forward(ctx, q, k, v, q_sink, k_sink, v_sink, alibi_slopes, q_docs, k_docs, *options):
        """options: scale, causal, window, segment, lookback, xpos, q_start, k_start, out_dtype, triton."""
        ctx.set_materialize_grads(False)
        inputs, rest = (q, k, v, q_sink, k_sink, v_sink), (alibi_slopes, q_docs, k_docs)
        out, lse = torch.ops.nanolong.attention_fwd(*inputs, *rest, *options)
        ctx.save_for_backward(*inputs, out, lse, *rest)
        ctx.options = *options[:-2], q.dtype, options[-1]
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        saved = ctx.saved_tensors  # once: checkpoint unpacks no tensor twice
        dout = torch.zeros_like(saved[6]) if dout is None else dout
        grads = torch.ops.nanolong.attention_bwd(dout, dlse, *saved, *ctx.options)
        return *grads, *(19 - len(grads)) * (None,)


# ----------------------------------------------------------------------------------------------------------------------
# public functions

def _validate(q, k, v, causal, window, sinks, segment, lookback, alibi_slopes, xpos, q_docs, k_docs):
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
                         "q must be (B, Tq, H, D), k and v (B, Tk, G, D)")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: they must be equal")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    if q.shape[3] > 256:
        raise ValueError(f"attention: head dim {q.shape[3]} is more than 256")
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}, it must be at least 1: the query's own position counts")
    if segment is not None and segment < 1:
        raise ValueError(f"attention: segment is {segment}, it must be at least 1: the query's own position counts")
    if lookback < 0 or lookback and segment is None:
        raise ValueError(f"attention: lookback is {lookback} and segment {segment}: lookback counts the segments before a "
                         "query's own, 0 or more of them, and needs a segment")
    if xpos is not None and not (xpos % 2 == 0 and 2 <= xpos <= q.shape[3]):
        raise ValueError(f"attention: xpos is {xpos}, it must be an even number from 2 to the head dim, {q.shape[3]}")
    if xpos is not None and not causal:
        raise ValueError(f"attention: xpos is {xpos} and causal {causal}: its scores grow without limit for keys ahead of "
                         "their query, so it needs causal=True")
    if sinks is not None:
        if len(sinks) != 3:
            raise ValueError(f"attention: sinks are {len(sinks)} tensors, they must be three: q_sink, k_sink, v_sink")
        q_sink, k_sink, v_sink = sinks
        B, S, (G, D) = q.shape[0], k_sink.shape[1], k.shape[2:]
        if q_sink.shape != q.shape or not tuple(k_sink.shape) == tuple(v_sink.shape) == (B, S, G, D):
            raise ValueError(f"attention: sinks are {', '.join(str(tuple(x.shape)) for x in sinks)}: they must be q_sink "
                             f"{tuple(q.shape)} like q, k_sink and v_sink ({B}, S, {G}, {D})")
        if not q_sink.dtype == k_sink.dtype == v_sink.dtype == q.dtype:
            raise ValueError(f"attention: sinks are {q_sink.dtype}, {k_sink.dtype}, {v_sink.dtype}, q is {q.dtype}: they "
                             "must be equal")
    if alibi_slopes is not None and alibi_slopes.shape != q.shape[2:3]:
        raise ValueError(f"attention: alibi_slopes are {tuple(alibi_slopes.shape)}, they must be one per query head, "
                         f"({q.shape[2]},)")
    if (q_docs is None) != (k_docs is None):
        raise ValueError("attention: q_docs and k_docs go together: pass both or neither")
    if q_docs is not None and (q_docs.is_floating_point() or k_docs.is_floating_point()):
        raise ValueError(f"attention: q_docs are {q_docs.dtype} and k_docs {k_docs.dtype}: document ids must be integers")
    if q_docs is not None and (q_docs.shape != q.shape[:2] or k_docs.shape != k.shape[:2]):
        raise ValueError(f"attention: q_docs {tuple(q_docs.shape)} and k_docs {tuple(k_docs.shape)} must be "
                         f"{tuple(q.shape[:2])} and {tuple(k.shape[:2])}")


def attention_backward(dout, dlse, q, k, v, out, lse, *, scale, causal, window, sinks, segment, lookback, alibi_slopes, xpos,
                       q_docs, k_docs, q_start, k_start):
    """
    The gradients of `attention` where it is a part of a larger one, over more keys: out (B, Tq, H, D) and lse (B, H, Tq),
    natural logarithm, are those of the whole, dout and dlse (None: 0) their gradients -> [dq, dk, dv], with sinks also
    [dq_sink, dk_sink, dv_sink], in float32 (float64 for float64): what this part adds to the whole's. No autograd.
    """
    triton = use_triton(q)
    if triton:
        lse, dlse = lse / LN2.value, None if dlse is None else dlse * LN2.value
        q_docs, k_docs = (x if x is None else x.contiguous().to(torch.int32) for x in (q_docs, k_docs))
    return torch.ops.nanolong.attention_bwd(
        dout, dlse, q, k, v, *sinks or 3 * (None,), out.contiguous(), lse.contiguous(), alibi_slopes, q_docs, k_docs, scale,
        causal, window, segment, lookback, xpos, q_start, k_start, torch.promote_types(q.dtype, torch.float32), triton)


def _segments_apart(q, k, v, segment, q_start, k_start, **options):
    """
    Segmented attention as unsegmented calls: one for the rows up to the first border, one for all whole segments with
    segments for batch entries, one for the last rows. None if a whole segment's keys are not all there.
    """
    (B, Tq, *_), Tk = q.shape, k.shape[1]
    first = min(Tq, -q_start % segment)
    last = first + (Tq - first) // segment * segment
    ahead = q_start - k_start
    if first < last and not 0 <= first + ahead <= last + ahead <= Tk:
        return None
    outs = []
    for start, stop in ((0, first), (first, last), (last, Tq)):
        if start == stop:
            continue
        border = (q_start + start) // segment * segment - k_start  # the first key of row `start`'s segment
        keys = slice(min(Tk, max(0, border)), max(0, border + max(segment, (stop - start) // segment * segment)))
        parts = q[:, start:stop], k[:, keys], v[:, keys]
        if (start, stop) == (first, last):
            parts = (x.reshape(-1, segment, *x.shape[2:]) for x in parts)
            outs.append(attention(*parts, **options).reshape(B, stop - start, *q.shape[2:]))
        else:
            outs.append(attention(*parts, q_start=q_start + start, k_start=k_start + keys.start, **options))
    return torch.cat(outs, 1) if len(outs) > 1 else outs[0]


def attention(q, k, v, *, scale=None, causal=True, window=None, sinks=None, segment=None, lookback=0, alibi_slopes=None,
              xpos=None, q_docs=None, k_docs=None, q_start=0, k_start=0, out_dtype=None, return_lse=False):
    """
    Softmax attention of q (B, Tq, H, D) over k, v (B, Tk, G, D), H a multiple of G, D <= 256, any strides with a
    contiguous last dim -> out (B, Tq, H, D) in `out_dtype` (default q's), and with return_lse also lse (B, H, Tq)
    float32 (float64 for float64), the natural logarithm of the softmax denominator; both differentiable, once. A row
    that sees no key has out 0, lse -inf, gradient 0.

    scale > 0 multiplies the scores, default 1/sqrt(D). Row t of q sits at position q_start + t, row t of k at k_start +
    t; causal: a query sees keys at its own position and before. window=W: the keys k_pos with q_pos - W < k_pos <=
    q_pos, whatever `causal` says; time grows with Tq x W. segment=N, lookback=B: the keys with 0 <= q_pos // N - k_pos //
    N <= B (in the query's own segment all of them without `causal`); time grows with Tq x N x (1 + B). lookback=1 with N
    half the length that a model was trained at is LeX's blockwise causal attention (arXiv 2212.10554). q_docs (B, Tq),
    k_docs (B, Tk) int, ids below 2^31: a query sees keys of its own document only.

    sinks=(q_sink (B, Tq, H, D), k_sink, v_sink (B, S, G, D)): the text's first S tokens, seen from everywhere: q_sink
    attends to k_sink[j] for j <= q_pos in the same softmax, whatever window, segment and documents say, and keys of k at
    positions below S are left out (they are these). With RoPE, q_sink is the query rotated at min(q_pos, S + W - 1):
    then this equals StreamingLLM (arXiv 2309.17453) run token by token, with positions counted inside its cache.
    alibi_slopes (H,): slope_h * (q_pos - k_pos) is taken off the scaled scores (ALiBi, arXiv 2108.12409); for sink j
    the distance is min(q_pos, S + W - 1) - j, without a window q_pos - j. The slopes get no gradient.
    xpos=d, even, 2 <= d <= D, with `causal` only: what dims i and i + d/2 < d add to a score is multiplied by
    zeta_i^((q_pos - k_pos) / 512), zeta_i = (2 i / d + 0.4) / 1.4; for sinks the distance is ALiBi's. With q and k rotated
    by RoPE that is xPos (arXiv 2212.10554), at any distance: factors are taken relative to positions nearby, so nothing
    overflows, in the gradients neither.

    ValueError on sizes that do not fit. FlashAttention-2, Dao, arXiv 2307.08691.
    """
    _validate(q, k, v, causal, window, sinks, segment, lookback, alibi_slopes, xpos, q_docs, k_docs)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if scale <= 0:
        raise ValueError(f"attention: scale is {scale}, it must be greater than 0")
    out_dtype = out_dtype or q.dtype
    if sinks is not None and sinks[0] is q:
        sinks = q.view_as(q), *sinks[1:]  # torch.compile takes no tensor twice
    if q_docs is not None and k_docs is q_docs:
        k_docs = q_docs.view_as(q_docs)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.detach().to(torch.promote_types(q.dtype, torch.float32)).contiguous()
    if use_triton(q):
        docs = (x if x is None else x.contiguous().to(torch.int32) for x in (q_docs, k_docs))
        out, log2_sum = _Attention.apply(q, k, v, *sinks or 3 * (None,), alibi_slopes, *docs, scale, causal, window,
                                         segment, lookback, xpos, q_start, k_start, out_dtype, True)
        return (out, log2_sum * LN2.value) if return_lse else out
    Tq, Tk, offset = q.shape[1], k.shape[1], q_start - k_start
    all_seen = not causal and window is None or offset >= Tk - 1
    plain = sinks is None and alibi_slopes is None and (window is None or Tq + offset <= window)
    plain = plain and xpos is None and not lookback and q_docs is None
    plain = plain and not return_lse and out_dtype == q.dtype and Tq and Tk
    if plain and segment is not None:
        out = _segments_apart(q, k, v, segment, q_start, k_start, scale=scale, causal=causal)
        if out is not None:
            return out
    elif plain and (all_seen or offset == 0 and Tq == Tk):
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale,
                                             is_causal=not all_seen, enable_gqa=q.shape[2] != k.shape[2])
        return out.transpose(1, 2)
    out, lse = attention_ref(q, k, v, scale=scale, causal=causal, window=window, sinks=sinks, segment=segment,
                             lookback=lookback, alibi_slopes=alibi_slopes, xpos=xpos, q_docs=q_docs, k_docs=k_docs,
                             q_start=q_start, k_start=k_start)
    return (out.to(out_dtype), lse) if return_lse else out.to(out_dtype)
