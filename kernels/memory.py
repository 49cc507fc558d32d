"""
Infini-attention (Munkhdalai et al., arXiv 2404.07143): attention inside segments, and a memory of all before.

    A_mem = sigma(q) M / (sigma(q) . z), 0 where the memory is empty,   sigma(x) = ELU(x) + 1 = exp(min(x, 0)) + max(x, 0)
    out = g A_mem + (1 - g) A_dot,   g = sigmoid(beta), one per query head
    after each segment, over its tokens j, with M and z of before it, in v_j - A_mem(k_j) for the delta rule:
    M += sum_j sigma(k_j)^T v_j  (linear)  or  sum_j sigma(k_j)^T (v_j - sigma(k_j) M / (sigma(k_j) . z))  (delta),
    z += sum_j sigma(k_j)

q (B, Tq, H, D), k and v (B, Tk, G, D), M (B, G, D, D) and z (B, G, D) in float32; head h reads the memory h // (H / G).
A_dot is kernels.attention over rotated q and k; the memory takes them un-rotated.

Parallel over segments. With U = sum sigma(k_j)^T v_j and, for the delta rule, P = sum sigma(k_j)^T sigma(k_j) /
(sigma(k_j) . z) of each segment (0 for the linear one), M_(s+1) = (I - P_s) M_s + U_s: only this scan is sequential,
over segments, not tokens. All M_s and z_s, D (D + 1) floats per kv head and segment, are kept for the backward pass. P
is symmetric, so dM runs the same scan backwards: dM_s = (I - P_s) dM_(s+1) + sum_i sigma(q_i)^T g dout_i / (sigma(q_i)
. z_s). Reads do not change with the scale of sigma, which gives the gradient through the denominators without reading
again: with y = g dout M^T,
    dsigma(q) = (y - (sigma(q) . y) / (sigma(q) . z) z) / (sigma(q) . z),   so for the delta rule's reads by k.
No atomics: deterministic. Tokens move at D 64, in times: forward q, A_dot, out, v 1, k 1 (delta: 3); backward q 2, A_dot
1, dout 2, dq, dA_dot 1, k 2 (delta: 6), v, dk, dv 1; the sums over tokens read theirs again for each slice of a wider D
(TILES), from L2 where they fit. States move too, D^2 floats per kv head and segment, several times: with segments much
longer than D they are the smaller part. 16-bit inputs multiply in TF32: one side is always float32. A read whose weights
sum to less than 1e-38 counts as one of an empty memory.

Over the ranks of a sequence-parallel group, each with whole segments, a rank's part of the scan takes the memory x that it
finds to A x + B, A the product of its I - P_s (z: of what is carried) and B what it comes to from nothing. All ranks find
A and B at once; then only x goes from rank to rank, forwards and, as dM and dz, back: D (D + 1) floats per kv head, hop and
direction, whatever the length. P needs z, so z goes first; in the backward pass dz needs dM. A last scan from x gives the
memory before each segment.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed.distributed_c10d import _resolve_process_group

from kernels.attention import _strided, attention
from kernels.backend import arch, dot_precision, register, tl, triton, use_triton
from kernels.ring import staged

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)  # a smaller weight is that of an empty memory


# ----------------------------------------------------------------------------------------------------------------------
# across ranks

def _transfer(A, x):
    """A x for matrices A, or numbers (..., 1)."""
    return A * x if A.shape[-1] == 1 else A @ x


def _exchange(direction, x, peer, group):
    """Sends x to the rank `peer`, or fills it with what comes from there. A batch of one: NCCL then uses the group's rings."""
    for work in dist.batch_isend_irecv([dist.P2POp(direction, x, group=group, group_peer=peer)]):
        work.wait()


def _scan_ranks(B, A, own, group, reverse):
    """
    x = own + what the rank before this one sent, and A x + B goes on to the next -> x; reverse: from the last rank down. x,
    own, B (B, G, D, D) or (B, G, D); A (B, G, D, D), or one number per entry, with x's number of dimensions.
    """
    group = _resolve_process_group(group)
    rank, x = group.rank(), own.clone(memory_format=torch.contiguous_format)
    source, target = (rank + 1, rank - 1) if reverse else (rank - 1, rank + 1)
    if 0 <= source < group.size():
        came = torch.empty_like(staged(x, group))
        _exchange(dist.irecv, came, source, group)
        x += came.to(x.device)
    if 0 <= target < group.size():
        out = (_transfer(A.double(), x.double()) + B).to(x.dtype)  # small: one process's float32 has no TF32 here either
        _exchange(dist.isend, staged(out.contiguous(), group), target, group)
    return x


def _document_before(docs, group):
    """The id (B, 1) of the last token before this rank's docs (B, Tk); on the first rank that of the first token."""
    group = _resolve_process_group(group)
    last = staged(docs[:, -1:].contiguous(), group)
    of_rank = [torch.empty_like(last) for _ in range(group.size())]
    dist.all_gather(of_rank, last, group=group)
    return of_rank[group.rank() - 1].to(docs.device) if group.rank() else docs[:, :1].contiguous().clone()


register("scan_ranks", "(Tensor B, Tensor A, Tensor own, str group, bool reverse) -> Tensor", _scan_ranks,
         lambda B, A, own, *_: own.new_empty(own.shape))
register("document_before", "(Tensor docs, str group) -> Tensor", _document_before,
         lambda docs, _: docs.new_empty(docs.shape[0], 1))


class _ScanRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, B, A, own, group):
        x = torch.ops.nanolong.scan_ranks(B, A, own, group, False)
        ctx.save_for_backward(A, x)
        ctx.group = group
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        A, x = ctx.saved_tensors
        dB = torch.ops.nanolong.scan_ranks(dx, A.mT, torch.zeros_like(dx), ctx.group, True)  # the next rank's whole dx
        return dB, dB @ x.mT if ctx.needs_input_grad[1] else None, dx + _transfer(A.mT, dB), None


# ----------------------------------------------------------------------------------------------------------------------
# reference

def _sigma(x):
    return x.clamp(max=0).exp() + F.relu(x)  # at 0 the gradient is 1, once


def _weight(s, z):
    """s (..., n, D), z (..., D) -> s . z (..., n, 1), what a read is divided by: inf where the memory is empty."""
    weight = s @ z[..., None]
    return weight.masked_fill(weight < torch.finfo(torch.float32).tiny, torch.inf)


def _ownership(docs, segment):
    """
    docs (B, 1 + Tk), the first that of the memory before the first token -> whose memory it is, as bools: carry (B, S),
    whole segment s ends in the document of the memory it found; writes (B, S N), the token is of the document its segment
    ends in; reads (B, Tk), of the memory's document.
    """
    owner, docs = docs[:, ::segment], docs[:, 1:]  # of the memory before each segment, and at the end
    of_token = torch.arange(docs.shape[1], device=docs.device) // segment
    whole = of_token[:docs.shape[1] // segment * segment]
    return owner[:, 1:] == owner[:, :-1], docs[:, :len(whole)] == owner[:, whole + 1], docs == owner[:, of_token]


def _segments(x, segment, G):
    """(B, n N, heads, D) -> (n, B, G, heads / G N, D), contiguous: the rows of a segment and a kv head together."""
    B, T, heads, D = x.shape
    x = x.reshape(B, T // segment, segment, G, heads // G, D).permute(1, 0, 3, 4, 2, 5)
    return x.reshape(T // segment, B, G, heads // G * segment, D)


def _read_ref(q, Ms, zs, Tk, segment):
    """A_mem of the last rows of Tk, q (B, Tq, H, D), from the memories before each segment (B, G, D, D), (B, G, D)."""
    (B, Tq, H, D), G, first = q.shape, zs[0].shape[1], (Tk - q.shape[1]) // segment
    if not Tq:
        return q
    before, behind, rows = Tk - Tq - first * segment, -Tk % segment, segment  # rows that ask nothing
    if first == (Tk - 1) // segment:
        before, behind, rows = 0, 0, Tq
    sq = _sigma(_segments(F.pad(q, (0, 0, 0, 0, before, behind)), rows, G))
    states = slice(first, first + len(sq))
    read = sq @ torch.stack(Ms[states]) / _weight(sq, torch.stack(zs[states]))
    read = read.view(len(sq), B, G, H // G, rows, D).permute(1, 0, 4, 2, 3, 5).reshape(B, len(sq) * rows, H, D)
    return read[:, before:before + Tq]


def _scan_ref(sums, P, start, carry, group=None):
    """
    The states start, x_1, .., x_S: x_(s+1) = carry_s (I - P_s) x_s + sums_s. sums (S, B, G, D, D) or (S, B, G, D); P None is
    0, carry (S, B, 1, ..) None 1. With a group the first rank's start counts, the others go on from the rank before.
    """
    if group is not None:
        if P is None:
            A = start.new_ones(start.dim() * (1,)) if carry is None else carry.prod(0)
            B = _scan_ref(sums, None, torch.zeros_like(start), carry)[-1]
        else:
            D = start.shape[-1]
            eye = torch.eye(D, 2 * D, dtype=start.dtype, device=start.device).expand(*start.shape[:-1], 2 * D)
            A, B = _scan_ref(F.pad(sums, (D, 0)), P, eye, carry)[-1].split(D, -1)
        start = _ScanRanks.apply(B, A, start, group)
    states = [start]
    for s, (u, p) in enumerate(zip(sums.unbind(), len(sums) * [None] if P is None else P.unbind())):
        x = states[-1] if carry is None else states[-1] * carry[s]
        states.append(x + u if p is None else x - p @ x + u)
    return states


def _memory_ref(q, k, v, local, beta, M, z, docs, segment, delta, group=None):
    """The meaning of the memory: q, k un-rotated, local = A_dot -> (out, M, z). A loop over segments, nothing Tq x Tk."""
    (B, Tq, H, D), (_, Tk, G, _), acc = q.shape, k.shape, M.dtype
    S, carry, P = Tk // segment, None, None
    sk, vs = (_segments(x[:, :S * segment].to(acc), segment, G) for x in (k, v))
    sk = skw = _sigma(sk)
    if docs is not None:
        carry, writes, reads = _ownership(docs, segment)
        carry = carry.T[:, :, None, None].to(acc)
        skw = sk * _segments(writes[..., None, None].to(acc), segment, 1)
    zs = _scan_ref(skw.sum(-2), None, z, carry, group)
    if delta and S:
        found = torch.stack(zs[:-1])
        P = skw.mT @ (sk / _weight(sk, found if carry is None else found * carry))
    Ms = _scan_ref(skw.mT @ vs, P, M, None if carry is None else carry[..., None], group)
    read = _read_ref(q.to(acc), Ms, zs, Tk, segment)
    if docs is not None:
        read = read * reads[:, Tk - Tq:, None, None]
    gate = beta.to(acc).sigmoid()[:, None]
    return (gate * read + (1 - gate) * local.to(acc)).to(q.dtype), Ms[-1], zs[-1]


# ----------------------------------------------------------------------------------------------------------------------
# Triton kernels. Each program works inside one segment. `rows` count from a block's first row, which its pointers include;
# those from `lo` up to `hi` exist. Matrices are read in slices of BLOCK_K of the dimension that a product sums over.

@triton.jit
def _load(X, rows, cols, lo, hi, stride, D: tl.constexpr):
    """(rows, cols) of a tensor with rows of D; 0 outside."""
    mask = ((rows >= lo) & (rows < hi))[:, None] & (cols < D)[None, :]
    return tl.load(X + rows[:, None] * stride + cols[None, :], mask, 0.0)


@triton.jit
def _store(X, x, rows, cols, lo, hi, stride, D: tl.constexpr):
    mask = ((rows >= lo) & (rows < hi))[:, None] & (cols < D)[None, :]
    tl.store(X + rows[:, None] * stride + cols[None, :], x.to(X.dtype.element_ty), mask)


@triton.jit
def _sigma_kernel(x, ACC: tl.constexpr):
    x = x.to(ACC)
    return tl.where(x > 0, x + 1.0, tl.exp(x))


@triton.jit
def _inverse(weight):
    """1 / weight; 0 for the 0 of an empty memory."""
    return tl.where(weight < TINY, 0.0, 1.0 / tl.where(weight < TINY, 1.0, weight))


@triton.jit
def _row_block(T_Q, T_K, N, first, per_segment, segments, HEADS: tl.constexpr, BLOCK_M: tl.constexpr):
    """
    (batch entry, head, segment, first row, lo, hi) of this program, among the last T_Q of T_K tokens; the row counts from
    the first of them and may be negative.
    """
    block = tl.program_id(0) % per_segment
    segment = first + tl.program_id(0) // per_segment % segments
    head = (tl.program_id(0) // per_segment // segments).to(tl.int64)
    token = tl.cast(segment, tl.int64) * N + block * BLOCK_M
    lo = tl.maximum(0, tl.minimum(BLOCK_M, T_K - T_Q - token)).to(tl.int32)
    hi = tl.minimum(tl.minimum(BLOCK_M, N - block * BLOCK_M), T_K - token).to(tl.int32)
    return head // HEADS, head % HEADS, tl.cast(segment, tl.int64), token - (T_K - T_Q), lo, hi


@triton.jit(do_not_specialize=["T", "N", "before", "slots", "stride_wb", "stride_wh"])
def _outer_kernel(X, Y, Z, W, C, OUT, SUMS, T, N, before, slots, stride_xb, stride_xt, stride_xh, stride_yb, stride_yt,
                  stride_yh, stride_wb, stride_wh, G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                  SHIFT: tl.constexpr, PROJECT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """
    For each kv head and segment, over its rows and query heads: OUT = sum sigma(x)^T (w y), SUMS = sum c sigma(x), c = w
    where C is None and w = 1 where W is. PROJECT: y = sigma(x) and w is divided by sigma(x) . z. Row 0 is token `before`;
    segment s goes to slot s + SHIFT of the `slots` that OUT and SUMS have.
    """
    blocks: tl.constexpr = (D + BLOCK_V - 1) // BLOCK_V
    v = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    segment = (tl.program_id(0) // blocks % (slots - SHIFT)).to(tl.int64)
    head = (tl.program_id(0) // blocks // (slots - SHIFT)).to(tl.int64)
    b = head // G
    g = head % G
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    start = tl.maximum(0, segment * N - before)
    stop = tl.minimum(T, (segment + 1) * N - before)
    per_head = tl.maximum(0, tl.cdiv(stop - start, BLOCK_M)).to(tl.int32)
    b_out = tl.zeros((BLOCK_D, BLOCK_V), ACC)
    b_sums = tl.zeros((BLOCK_D,), ACC)
    if PROJECT:
        b_z = tl.load(Z + (head * (slots + 1) + segment) * D + d, d < D, 0.0)
    for i in range(0, GROUP * per_head):
        h = g * GROUP + i // per_head
        row = start + i % per_head * BLOCK_M
        hi = tl.minimum(BLOCK_M, stop - row).to(tl.int32)
        x_block = X + b * stride_xb + h * stride_xh + row * stride_xt
        b_x = _sigma_kernel(_load(x_block, m, d, 0, hi, stride_xt, D), ACC)
        b_w = (m < hi).to(ACC)
        if W is not None:
            b_w = tl.load(W + b * stride_wb + h * stride_wh + row + m, m < hi, 0.0)
        if PROJECT:
            b_y = _sigma_kernel(_load(x_block, m, v, 0, hi, stride_xt, D), ACC)
            b_w *= _inverse(tl.sum(b_x * b_z[None, :], 1))
        else:
            b_y = _load(Y + b * stride_yb + h * stride_yh + row * stride_yt, m, v, 0, hi, stride_yt, D).to(ACC)
        if W is not None or PROJECT:
            b_y = b_y * b_w[:, None]
        b_out = tl.dot(tl.trans(b_x), b_y, b_out, input_precision=PRECISION, out_dtype=ACC)
        if C is not None:
            b_w = tl.load(C + b * stride_wb + h * stride_wh + row + m, m < hi, 0.0)
        if SUMS is not None:
            b_sums += tl.sum(b_x * b_w[:, None], 0)
    at = head * slots + segment + SHIFT
    _store(OUT + at * D * D, b_out, d, v, 0, D, D, D)
    if SUMS is not None:
        if tl.program_id(0) % blocks == 0:
            tl.store(SUMS + at * D + d, b_sums, d < D)


@triton.jit(do_not_specialize=["S"])
def _scan_kernel(X, P, CARRY, S, G: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr, REVERSE: tl.constexpr,
                 PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
                 BLOCK_D: tl.constexpr):
    """
    X (B G, S + 1, D, COLS) in place: X[s + 1] += carry_s (I - P_s) X[s], s upwards; REVERSE: X[s] += carry_s (I - P_s)
    X[s + 1], s downwards. P None is 0, CARRY None 1.
    """
    blocks: tl.constexpr = (COLS + BLOCK_V - 1) // BLOCK_V
    head = (tl.program_id(0) // blocks).to(tl.int64)
    v = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    d = tl.arange(0, BLOCK_D)
    X += (head * (S + 1) + (S if REVERSE else 0)) * D * COLS
    b_x = _load(X, d, v, 0, D, COLS, COLS)
    step: tl.constexpr = (-1 if REVERSE else 1) * D * COLS
    for i in range(0, S):
        segment = S - 1 - i if REVERSE else i
        b_u = _load(X + step, d, v, 0, D, COLS, COLS)  # known long before: under way while the product is computed
        if P is not None:
            tl.debug_barrier()  # the product reads what all threads of this program wrote
            b_px = tl.zeros((BLOCK_D, BLOCK_V), ACC)
            for start in range(0, D, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                b_p = _load(P + (head * S + segment) * D * D, d, k, 0, D, D, D)
                b_px = tl.dot(b_p, _load(X, k, v, 0, D, COLS, COLS), b_px, input_precision=PRECISION, out_dtype=ACC)
            b_x -= b_px
        if CARRY is not None:
            b_x *= tl.load(CARRY + head // G * S + segment)
        X += step
        b_x += b_u
        _store(X, b_x, d, v, 0, D, COLS, COLS)


@triton.jit(do_not_specialize=["T_Q", "T_K", "N", "first", "per_segment", "segments", "slots"])
def _read_fwd_kernel(Q, LOCAL, BETA, M, Z, READS, OUT, T_Q, T_K, N, first, per_segment, segments, slots,
                     stride_qb, stride_qt, stride_qh, H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                     PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
                     BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """OUT = g sigma(q) M / (sigma(q) . z) + (1 - g) LOCAL."""
    b, h, segment, row, lo, hi = _row_block(T_Q, T_K, N, first, per_segment, segments, H, BLOCK_M)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    at = (b * (H // GROUP) + h // GROUP) * slots + segment
    Q += b * stride_qb + h * stride_qh + row * stride_qt
    contiguous = ((b * T_Q + row) * H + h) * D  # where this block lies in LOCAL and OUT
    b_read = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    b_weight = tl.zeros((BLOCK_M,), ACC)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        b_q = _sigma_kernel(_load(Q, m, k, lo, hi, stride_qt, D), ACC)
        b_weight += tl.sum(b_q * tl.load(Z + at * D + k, k < D, 0.0)[None, :], 1)
        b_m = _load(M + at * D * D, k, d, 0, D, D, D)
        b_read = tl.dot(b_q, b_m, b_read, input_precision=PRECISION, out_dtype=ACC)
    b_inverse = _inverse(b_weight)
    if READS is not None:
        b_inverse *= tl.load(READS + b * T_K + (T_K - T_Q) + row + m, (m >= lo) & (m < hi), 0.0)
    gate = tl.sigmoid(tl.load(BETA + h).to(ACC))
    b_local = _load(LOCAL + contiguous, m, d, lo, hi, H * D, D).to(ACC)
    _store(OUT + contiguous, (gate * b_inverse)[:, None] * b_read + (1.0 - gate) * b_local, m, d, lo, hi, H * D, D)


@triton.jit(do_not_specialize=["T_Q", "T_K", "N", "first", "per_segment", "segments", "slots"])
def _read_bwd_kernel(DOUT, Q, LOCAL, BETA, M, Z, READS, DQ, DLOCAL, DBETA, W, C, T_Q, T_K, N, first, per_segment, segments,
                     slots, stride_ob, stride_ot, stride_oh, stride_qb, stride_qt, stride_qh, H: tl.constexpr,
                     GROUP: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """
    dq, dlocal, a part of dbeta per program, and the weights for the sums dM = sum sigma(q)^T (w dout) and dz = sum c
    sigma(q). With y = dout M^T: dout . A_mem = sigma(q) . y / (sigma(q) . z), so that A_mem is not computed again.
    """
    b, h, segment, row, lo, hi = _row_block(T_Q, T_K, N, first, per_segment, segments, H, BLOCK_M)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    at = (b * (H // GROUP) + h // GROUP) * slots + segment
    DOUT += b * stride_ob + h * stride_oh + row * stride_ot
    Q += b * stride_qb + h * stride_qh + row * stride_qt
    contiguous = ((b * T_Q + row) * H + h) * D  # where this block lies in LOCAL, DLOCAL and DQ
    gate = tl.sigmoid(tl.load(BETA + h).to(ACC))
    b_y = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    b_dgate = tl.zeros((BLOCK_M,), ACC)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        b_dout = _load(DOUT, m, k, lo, hi, stride_ot, D).to(ACC)
        b_dgate -= tl.sum(b_dout * _load(LOCAL + contiguous, m, k, lo, hi, H * D, D).to(ACC), 1)
        _store(DLOCAL + contiguous, (1.0 - gate) * b_dout, m, k, lo, hi, H * D, D)
        b_m = _load(M + at * D * D, d, k, 0, D, D, D)
        b_y = tl.dot(b_dout, tl.trans(b_m), b_y, input_precision=PRECISION, out_dtype=ACC)
    b_q = _sigma_kernel(_load(Q, m, d, lo, hi, stride_qt, D), ACC)
    b_z = tl.load(Z + at * D + d, d < D, 0.0)
    exists = (m >= lo) & (m < hi)
    b_w = _inverse(tl.sum(b_q * b_z[None, :], 1))
    if READS is not None:
        b_w *= tl.load(READS + b * T_K + (T_K - T_Q) + row + m, exists, 0.0)
    b_dot = tl.sum(b_q * b_y, 1) * b_w  # dout . A_mem
    b_dgate += b_dot
    b_w *= gate
    b_dq = b_w[:, None] * (b_y - b_dot[:, None] * b_z[None, :]) * tl.where(b_q > 1.0, 1.0, b_q)
    _store(DQ + contiguous, b_dq, m, d, lo, hi, H * D, D)
    tl.store(W + (b * H + h) * T_Q + row + m, b_w, exists)
    tl.store(C + (b * H + h) * T_Q + row + m, -b_w * b_dot, exists)
    tl.store(DBETA + tl.program_id(0), gate * (1.0 - gate) * tl.sum(b_dgate, 0))


@triton.jit(do_not_specialize=["T", "N", "per_segment", "segments"])
def _delta_bwd_kernel(K, Z, F, WRITES, CARRY, INVERSE, RHO, DZ, T, N, per_segment, segments, stride_kb, stride_kt, stride_kh,
                      G: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """
    Per token, with F = dM M^T + M dM^T: w / (sigma(k) . z) and rho = w sigma(k) F sigma(k) / (2 (sigma(k) . z)^2); per
    program DZ = sum rho sigma(k), a part of what the delta rule's reads give z.
    """
    b, g, segment, row, _, hi = _row_block(T, T, N, 0, per_segment, segments, G, BLOCK_M)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    at = b * G + g
    K += b * stride_kb + g * stride_kh + row * stride_kt
    b_kf = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        b_k = _sigma_kernel(_load(K, m, k, 0, hi, stride_kt, D), ACC)
        b_f = _load(F + (at * (segments + 1) + segment) * D * D, k, d, 0, D, D, D)
        b_kf = tl.dot(b_k, b_f, b_kf, input_precision=PRECISION, out_dtype=ACC)
    b_k = _sigma_kernel(_load(K, m, d, 0, hi, stride_kt, D), ACC)
    b_z = tl.load(Z + (at * (segments + 1) + segment) * D + d, d < D, 0.0)
    b_inverse = _inverse(tl.sum(b_k * b_z[None, :], 1))
    b_w = b_inverse
    if WRITES is not None:
        b_w *= tl.load(WRITES + b * T + row + m, m < hi, 0.0) * tl.load(CARRY + b * segments + segment)
    b_rho = tl.where(m < hi, 0.5 * tl.sum(b_kf * b_k, 1) * b_w * b_inverse, 0.0)
    tl.store(INVERSE + at * T + row + m, b_w, m < hi)
    tl.store(RHO + at * T + row + m, b_rho, m < hi)
    tl.store(DZ + tl.program_id(0).to(tl.int64) * D + d, tl.sum(b_rho[:, None] * b_k, 0), d < D)


@triton.jit(do_not_specialize=["T", "T_K", "N", "per_segment", "segments"])
def _write_bwd_kernel(K, V, Z, DM, DSUM, F, WRITES, INVERSE, RHO, DK, DV, T, T_K, N, per_segment, segments,
                      stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, G: tl.constexpr, D: tl.constexpr,
                      PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
                      BLOCK_D: tl.constexpr):
    """
    dv = w sigma(k) dM, dsigma(k) = w (v dM^T + dz) [- w sigma(k) F / (sigma(k) . z) + rho z: delta]; dM and dz are those
    of the memory after the segment, z that before it.
    """
    b, g, segment, row, _, hi = _row_block(T, T, N, 0, per_segment, segments, G, BLOCK_M)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    at = b * G + g
    slot = at * (segments + 1) + segment
    K += b * stride_kb + g * stride_kh + row * stride_kt
    V += b * stride_vb + g * stride_vh + row * stride_vt
    DM += (slot + 1) * D * D
    contiguous = ((b * T_K + row) * G + g) * D
    b_w = (m < hi).to(ACC)
    if WRITES is not None:
        b_w = tl.load(WRITES + b * T + row + m, m < hi, 0.0)
    if F is not None:
        b_inverse = tl.load(INVERSE + at * T + row + m, m < hi, 0.0)
    b_dk = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    b_dv = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        b_k = _sigma_kernel(_load(K, m, k, 0, hi, stride_kt, D), ACC)
        b_v = _load(V, m, k, 0, hi, stride_vt, D).to(ACC) * b_w[:, None]
        b_dv = tl.dot(b_k * b_w[:, None], _load(DM, k, d, 0, D, D, D), b_dv, input_precision=PRECISION, out_dtype=ACC)
        b_dk = tl.dot(b_v, tl.trans(_load(DM, d, k, 0, D, D, D)), b_dk, input_precision=PRECISION, out_dtype=ACC)
        if F is not None:
            b_f = _load(F + slot * D * D, k, d, 0, D, D, D)
            b_dk = tl.dot(b_k * -b_inverse[:, None], b_f, b_dk, input_precision=PRECISION, out_dtype=ACC)
    _store(DV + contiguous, b_dv, m, d, 0, hi, G * D, D)
    b_dk += b_w[:, None] * tl.load(DSUM + (slot + 1) * D + d, d < D, 0.0)[None, :]
    if F is not None:
        b_rho = tl.load(RHO + at * T + row + m, m < hi, 0.0)
        b_dk += b_rho[:, None] * tl.load(Z + slot * D + d, d < D, 0.0)[None, :]
    b_k = _sigma_kernel(_load(K, m, d, 0, hi, stride_kt, D), ACC)
    _store(DK + contiguous, b_dk * tl.where(b_k > 1.0, 1.0, b_k), m, d, 0, hi, G * D, D)


# ----------------------------------------------------------------------------------------------------------------------
# launchers

# ([architecture,] bytes per element, BLOCK_D) -> (BLOCK_M, BLOCK_K, num_warps): what compiles without spilling a register in
# 16 bits on Triton 3.6 and 3.9. Not yet timed against others on a GPU.
TILES = {(2, 64): (64, 32, 4), (2, 128): (64, 32, 8), (2, 256): (32, 16, 8), (89, 2, 128): (32, 32, 8),
         (4, 64): (32, 16, 8), (4, 128): (16, 16, 8), (4, 256): (16, 16, 8)}


def _options(kernel, x, dtype=None):
    """The head dim of x (B, T or G, heads or slots, D, ...), and precision, accumulator and tile for inputs of `dtype`."""
    dtype, D = dtype or x.dtype, x.shape[3]
    element, block_d = min(4, dtype.itemsize), max(16, triton.next_power_of_2(D))
    key = element, max(64, block_d)
    block_m, block_k, warps = (16, 32, 4) if arch(x) == "cpu" else TILES.get((arch(x), *key)) or TILES[key]
    precision = dot_precision(dtype)
    if element == 2 and arch(x) != "gfx":  # one side of each product is float32
        precision = "tf32"
    if kernel == "scan" and precision == "tf32":  # its errors add up over the segments
        precision = "ieee" if arch(x) == "gfx" else "tf32x3"
    blocks = {"outer": dict(BLOCK_M=block_m, BLOCK_V=min(2 * block_k, block_d)),
              "scan": dict(BLOCK_V=16, BLOCK_K=min(block_k, block_d)),
              "rows": dict(BLOCK_M=block_m, BLOCK_K=min(block_k, block_d))}[kernel]
    return dict(D=D, PRECISION=precision, ACC=getattr(tl, str(torch.promote_types(dtype, torch.float32))[6:]),
                BLOCK_D=block_d, num_warps=warps, num_stages=2, **blocks)


def _outer(x, y, out, sums, segment, before, shift, z=None, w=None, c=None):
    """x, y (B, T, heads, D); out (B, G, slots, D, D), sums (B, G, slots, D); w, c (B, heads or 1, T). See the kernel."""
    options, (B, T, heads, D), (G, slots) = _options("outer", x), x.shape, out.shape[1:3]
    programs = B * G * (slots - shift) * triton.cdiv(D, options["BLOCK_V"])
    if programs:
        _outer_kernel[(programs,)](
            x, y, z, w, c, out, sums, T, segment, before, slots, *x.stride()[:3], *y.stride()[:3],
            *((0, 0) if w is None else (w.stride(0), w.stride(1) if w.shape[1] > 1 else 0)), G=G, GROUP=heads // G,
            SHIFT=shift, PROJECT=z is not None, **options)


def _projections(k, zs, writes, segment):
    """P (B, G, S, D, D) float32: sum over each segment of w sigma(k)^T sigma(k) / (sigma(k) . z)."""
    B, G, slots, D = zs.shape
    P = torch.empty(B, G, slots - 1, D, D, dtype=zs.dtype, device=zs.device)
    _outer(k, k, P, None, segment, 0, 0, z=zs, w=writes)
    return P


def _scan(x, P, carry, dtype, group=None, reverse=False):
    """
    In place over the slots of x (B, G, S + 1, D, D), or (B, G, S + 1, D) without P. With a group the slot where the scan
    starts becomes the sum of what it is and of where the rank before (reverse: after) ends.
    """
    (B, G, slots, D), cols = x.shape[:4], x.stride(3)
    if group is not None:
        start, end = (-1, 0) if reverse else (0, -1)
        local = x.clone() if P is None else F.pad(x, (D, 0))  # [A | B]
        local[:, :, start] = 0 if P is None else torch.eye(D, 2 * D, dtype=x.dtype, device=x.device)
        _scan(local, P, carry, dtype, reverse=reverse)
        if P is None:
            A = x.new_ones(1) if carry is None else carry.prod(1)
            A, b = A.view(-1, *(x.dim() - 2) * (1,)), local[:, :, end]
        else:
            A, b = local[:, :, end].split(D, -1)
        x[:, :, start] = _scan_ranks(b, A, x[:, :, start], group, reverse)
    options = _options("scan", x, dtype) | ({} if x.dim() == 5 else dict(BLOCK_V=1))
    if B * G * (slots - 1):
        _scan_kernel[(B * G * triton.cdiv(cols, options["BLOCK_V"]),)](
            x, P, carry, slots - 1, G=G, COLS=cols, REVERSE=reverse, **options)


def _grid(Tq, Tk, segment, block_m):
    """The first segment with a query, the blocks of rows per segment, and the segments with queries."""
    first = (Tk - Tq) // segment
    return first, triton.cdiv(min(segment, Tk), block_m), triton.cdiv(Tk, segment) - first


def _flags(docs, segment, dtype):
    """_ownership in `dtype`: carry (B, S), writes (B, 1, S N), reads (B, Tk)."""
    if docs is None:
        return None, None, None
    carry, writes, reads = (x.to(dtype).contiguous() for x in _ownership(docs, segment))
    return carry, writes[:, None], reads


def _memory_fwd(q, k, v, local, beta, M, z, docs, segment, delta, group):
    """-> out, and the memory before each whole segment and after the last: M (B, G, S + 1, D, D), z (B, G, S + 1, D)."""
    (B, Tq, H, D), (_, Tk, G, _) = q.shape, k.shape
    q, k, v, local, beta = _strided(q), _strided(k), _strided(v), local.contiguous(), beta.contiguous()
    whole, slots = Tk // segment * segment, Tk // segment + 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    Ms = torch.empty(B, G, slots, D, D, dtype=M.dtype, device=q.device)
    zs = torch.empty(B, G, slots, D, dtype=M.dtype, device=q.device)
    Ms[:, :, 0], zs[:, :, 0] = M, z
    carry, writes, reads = _flags(docs, segment, M.dtype)
    _outer(k[:, :whole], v[:, :whole], Ms, zs, segment, 0, 1, w=writes)
    _scan(zs, None, carry, q.dtype, group)
    _scan(Ms, _projections(k[:, :whole], zs, writes, segment) if delta else None, carry, q.dtype, group)
    options = _options("rows", q)
    first, per_segment, segments = _grid(Tq, Tk, segment, options["BLOCK_M"])
    if q.numel():
        _read_fwd_kernel[(B * H * segments * per_segment,)](
            q, local, beta, Ms, zs, reads, out, Tq, Tk, segment, first, per_segment, segments, slots, *q.stride()[:3], H=H,
            GROUP=H // G, **options)
    return out, Ms, zs


def _memory_read(q, local, beta, M, z):
    """memory_read: one segment, whose memory is the only one."""
    (B, T, H, D), G, q, options = q.shape, M.shape[1], _strided(q), _options("rows", q)
    out, per_segment = torch.empty(q.shape, dtype=q.dtype, device=q.device), triton.cdiv(T, options["BLOCK_M"])
    if q.numel():
        _read_fwd_kernel[(B * H * per_segment,)](
            q, local.contiguous(), beta.contiguous(), M.contiguous(), z.contiguous(), None, out, T, T, T, 0, per_segment, 1,
            1, *q.stride()[:3], H=H, GROUP=H // G, **options)
    return out


def _memory_bwd(dout, dM, dz, q, k, v, local, beta, Ms, zs, docs, segment, delta, group):
    """-> [dq, dk, dv, dlocal, dbeta, dM, dz], the last two of the state before the first key."""
    (B, Tq, H, D), (_, Tk, G, _) = q.shape, k.shape
    q, k, v, dout, local, beta = *(_strided(x) for x in (q, k, v, dout)), local.contiguous(), beta.contiguous()
    S, whole, like = Tk // segment, Tk // segment * segment, dict(dtype=Ms.dtype, device=q.device)
    carry, writes, reads = _flags(docs, segment, Ms.dtype)
    dq, dlocal = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    w, c = (torch.empty(B, H, Tq, **like) for _ in range(2))
    options = _options("rows", q)
    first, per_segment, segments = _grid(Tq, Tk, segment, options["BLOCK_M"])
    dbeta = torch.zeros(B, H, per_segment * segments, **like)  # without queries no program writes it
    if q.numel():
        _read_bwd_kernel[(dbeta.numel(),)](
            dout, q, local, beta, Ms, zs, reads, dq, dlocal, dbeta, w, c, Tq, Tk, segment, first, per_segment, segments,
            S + 1, *dout.stride()[:3], *q.stride()[:3], H=H, GROUP=H // G, **options)
    dMs, dzs = torch.empty_like(Ms), torch.empty_like(zs)
    _outer(q, dout, dMs, dzs, segment, Tk - Tq, 0, w=w, c=c)
    dMs[:, :, -1] += dM
    dzs[:, :, -1] += dz
    k_whole, F_, inverse, rho = k[:, :whole], None, None, None
    _scan(dMs, _projections(k_whole, zs, writes, segment) if delta else None, carry, q.dtype, group, reverse=True)
    if delta:
        with torch.autocast(q.device.type, enabled=False):  # by slots, as views: those where a head ends are not read
            F_ = dMs.flatten(0, 2)[1:] @ Ms.flatten(0, 2)[:-1].mT
        F_ = F_ + F_.mT
        inverse, rho = (torch.empty(B, G, whole, **like) for _ in range(2))
        options = _options("rows", k)
        per_segment = triton.cdiv(segment, options["BLOCK_M"])
        parts = torch.empty(B, G, S, per_segment, D, **like)
        if parts.numel():
            _delta_bwd_kernel[(parts.numel() // D,)](
                k, zs, F_, writes, carry, inverse, rho, parts, whole, segment, per_segment, S, *k.stride()[:3], G=G,
                **options)
        dzs[:, :, :-1] += parts.sum(3)
    _scan(dzs, None, carry, q.dtype, group, reverse=True)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    dk[:, whole:], dv[:, whole:] = 0, 0
    options = _options("rows", k)
    per_segment = triton.cdiv(segment, options["BLOCK_M"])
    if k_whole.numel():
        _write_bwd_kernel[(B * G * S * per_segment,)](
            k, v, zs, dMs, dzs, F_, writes, inverse, rho, dk, dv, whole, Tk, segment, per_segment, S, *k.stride()[:3],
            *v.stride()[:3], G=G, **options)
    return [dq, dk, dv, dlocal, dbeta.sum((0, 2)).to(beta.dtype), dMs[:, :, 0].clone(), dzs[:, :, 0].clone()]


# ----------------------------------------------------------------------------------------------------------------------
# registration, autograd

register("memory_fwd",
         "(Tensor q, Tensor k, Tensor v, Tensor local, Tensor beta, Tensor M, Tensor z, Tensor? docs, SymInt segment, "
         "bool delta, str? group) -> (Tensor, Tensor, Tensor)", _memory_fwd,
         lambda q, k, v, local, beta, M, z, docs, segment, *_: (
             q.new_empty(q.shape), *(x.new_empty(*x.shape[:2], k.shape[1] // segment + 1, *x.shape[2:]) for x in (M, z))))
register("memory_bwd",
         "(Tensor dout, Tensor dM, Tensor dz, Tensor q, Tensor k, Tensor v, Tensor local, Tensor beta, Tensor Ms, "
         "Tensor zs, Tensor? docs, SymInt segment, bool delta, str? group) -> Tensor[]", _memory_bwd,
         lambda dout, dM, dz, q, k, v, local, beta, *_: [x.new_empty(x.shape) for x in (q, k, v, q, beta, dM, dz)])


register("memory_read", "(Tensor q, Tensor local, Tensor beta, Tensor M, Tensor z) -> Tensor", _memory_read,
         lambda q, local, beta, M, z: q.new_empty(q.shape))


class _Memory(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, local, beta, M, z, docs, segment, delta, group):
        out, Ms, zs = torch.ops.nanolong.memory_fwd(q, k, v, local, beta, M, z, docs, segment, delta, group)
        ctx.save_for_backward(q, k, v, local, beta, Ms, zs, docs)
        ctx.options = segment, delta, group
        return out, Ms[:, :, -1].clone(), zs[:, :, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dM, dz):
        grads = torch.ops.nanolong.memory_bwd(dout, dM, dz, *ctx.saved_tensors, *ctx.options)
        return *grads, None, None, None, None


# ----------------------------------------------------------------------------------------------------------------------
# public function

def _validate(q, k, v, beta, q_rot, k_rot, segment, rule, state, docs, group):
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"infini_attention: q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
                         "q must be (B, Tq, H, D), k and v (B, Tk, G, D)")
    (B, Tq, H, D), (_, Tk, G, _) = q.shape, k.shape
    if q_rot.shape != q.shape or k_rot.shape != k.shape:
        raise ValueError(f"infini_attention: q_rot is {tuple(q_rot.shape)} and k_rot {tuple(k_rot.shape)}, they must be "
                         f"like q {tuple(q.shape)} and k {tuple(k.shape)}")
    if not q.dtype == k.dtype == v.dtype == q_rot.dtype == k_rot.dtype:
        raise ValueError("infini_attention: q, k, v, q_rot, k_rot are "
                         f"{', '.join(str(x.dtype) for x in (q, k, v, q_rot, k_rot))}: they must be equal")
    if H % G:
        raise ValueError(f"infini_attention: {H} query heads are not a multiple of {G} key/value heads")
    if D > 256:
        raise ValueError(f"infini_attention: head dim {D} is more than 256")
    if Tq > Tk:
        raise ValueError(f"infini_attention: {Tq} queries are more than {Tk} keys: they are the last rows of these")
    if beta.shape != (H,):
        raise ValueError(f"infini_attention: beta is {tuple(beta.shape)}, it must be one per query head, ({H},)")
    if segment < 1:
        raise ValueError(f"infini_attention: segment is {segment}, it must be at least 1 token")
    if rule not in ("delta", "linear"):
        raise ValueError(f"infini_attention: rule {rule!r} is unknown, it must be 'delta' or 'linear'")
    if state is not None and tuple(x.shape for x in state) != ((B, G, D, D), (B, G, D)):
        raise ValueError(f"infini_attention: state is {', '.join(str(tuple(x.shape)) for x in state)}, it must be "
                         f"M {(B, G, D, D)} and z {(B, G, D)}")
    if docs is not None and (docs.shape != (B, Tk) or docs.is_floating_point()):
        raise ValueError(f"infini_attention: docs are {docs.dtype} {tuple(docs.shape)}, they must be integers {(B, Tk)}")
    if group is not None and Tq != Tk:
        raise ValueError(f"infini_attention: {Tq} queries and {Tk} keys: a rank of a group holds the same tokens of both")
    if group is not None and Tk % segment:
        raise ValueError(f"infini_attention: the {Tk} tokens of each of {group.size()} ranks are not whole segments of "
                         f"{segment}: give each {Tk // segment * segment or segment}, or choose a segment that divides {Tk}")


def infini_attention(q, k, v, beta, *, q_rot, k_rot, segment, rule="delta", state=None, docs=None, scale=None,
                     alibi_slopes=None, xpos=None, group=None):
    """
    Attention inside segments and a compressive memory of the segments before, mixed by a learned gate -> (out like q,
    (M, z)). Infini-attention, Munkhdalai et al., arXiv 2404.07143.

    k, v (B, Tk, G, D) start at a segment boundary: key j is in segment j // segment. q (B, Tq, H, D), H a multiple of G,
    D <= 256, are the last Tq of the Tk rows: all of them in training, fewer where a stream goes on inside a segment whose
    keys come again. q and k, un-rotated, go to the memory; q_rot and k_rot, like them and rotated, to causal attention
    inside each segment, with `scale` (default 1/sqrt(D)), alibi_slopes (H,) and xpos as in `attention`. beta (H,):
    out = sigmoid(beta) A_mem + (1 - sigmoid(beta)) A_dot. rule: "delta" writes only what the memory does not yet
    return for a key, "linear" adds.

    state = (M (B, G, D, D), z (B, G, D)), float32 (float64 for float64): the memory before the first key; None is empty, and
    reads of an empty memory are 0. Returned: the memory after all whole segments of this call. The tokens of a trailing
    partial segment are attended to, not yet written.

    docs (B, Tk) int, ids below 2^31: attention and memory stay inside a document. Segments lie as without documents; after
    each the memory is that of the document of its last token. An incoming state is that of the first key's document: pass an
    empty one where a document begins with the call.

    group: a process group whose ranks hold the sequence in order, each the same number of whole segments: q, k, v, docs are
    this rank's tokens, Tq = Tk, and so is out, as if one process had them all. Every rank must call it, and its backward
    pass. Only the first rank's `state` counts, other ranks' is not read and has no gradient. Returned: the memory after this
    rank's last segment, on the last rank the sequence's.

    Differentiable once in q, k, v, q_rot, k_rot, beta and the state, also through the returned one. ValueError on sizes
    that do not fit.
    """
    _validate(q, k, v, beta, q_rot, k_rot, segment, rule, state, docs, group)
    (B, Tq, H, D), (_, Tk, G, _), acc = q.shape, k.shape, torch.promote_types(q.dtype, torch.float32)
    state = state if group is None or group.rank() == 0 else None
    group = None if group is None or group.size() == 1 else group.group_name
    M, z = (x.to(acc) for x in state) if state is not None else (q.new_zeros(B, G, *n, dtype=acc) for n in ((D, D), (D,)))
    docs = docs if Tk else None
    q_docs = k_docs = None
    if docs is not None:
        q_docs, k_docs = docs[:, Tk - Tq:], docs
        before = docs[:, :1] if group is None else torch.ops.nanolong.document_before(docs, group)
        docs = torch.cat([before, docs], 1)
    local = attention(q_rot, k_rot, v, segment=segment, q_start=Tk - Tq, scale=scale, alibi_slopes=alibi_slopes, xpos=xpos,
                      q_docs=q_docs, k_docs=k_docs)
    memory = _Memory.apply if use_triton(q) else _memory_ref
    with torch.autocast(q.device.type, enabled=False):  # the state is float32 there too
        out, M, z = memory(q, k, v, local, beta, M, z, docs, segment, rule == "delta", group)
    return out, (M, z)


def memory_read(q, local, beta, state):
    """
    What infini_attention puts out where the local attention is known, for decoding: sigmoid(beta) A_mem + (1 -
    sigmoid(beta)) local, like q. q un-rotated and local (B, T, H, D), all in one segment; beta (H,); state (M, z) as
    there, of before that segment. Inference only: ValueError where autograd would need its gradient, as for sizes.
    """
    B, T, H, D = q.shape
    M, z = (x.to(torch.promote_types(q.dtype, torch.float32)) for x in state)
    G = M.shape[1]
    if local.shape != q.shape or beta.shape != (H,) or M.shape != (B, G, D, D) or z.shape != (B, G, D) or H % G or D > 256:
        raise ValueError(f"memory_read: q is {tuple(q.shape)}, local {tuple(local.shape)}, beta {tuple(beta.shape)}, M "
                         f"{tuple(M.shape)}, z {tuple(z.shape)}: they must be (B, T, H, D) twice, (H,), (B, G, D, D), "
                         "(B, G, D)")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, local, beta, M, z)):
        raise ValueError("memory_read has no backward pass, and one of its inputs requires grad: call it under "
                         "torch.no_grad() or torch.inference_mode(), or use infini_attention")
    if use_triton(q):
        return torch.ops.nanolong.memory_read(q, local, beta, M, z)
    none = q.new_empty(B, T, G, D)  # keys of a segment that is not full: nothing is written
    return _memory_ref(q, none, none, local, beta, M, z, None, T + 1, False)[0]
