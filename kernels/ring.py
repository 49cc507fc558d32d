"""
Sequence parallelism: attention over a sequence whose tokens are spread over the ranks of a process group.

Ring attention (Liu et al., arXiv 2310.01889). Rank r keeps its queries; the shards of keys and values travel. At each hop
a rank posts one exchange, then computes the block of scores between its queries and the shard at hand by kernels.attention,
while the next shard arrives. Blocks merge in float32, a row's own block first:
    out += sigmoid(lse_b - lse) (out_b - out),   lse = ln(exp(lse) + exp(lse_b))
The backward pass goes round once more. delta = dout . out - dlse and lse are those of the whole row at every hop, so that
each block gives its own share: dq stays, dk and dv, in float32, travel with their k and v, one hop behind, and come home.

Which positions a rank holds, of T tokens on P ranks:
    contiguous   c = T / P in order: r c .. (r + 1) c - 1. The last rank sees the most: half of all time is waiting
    striped      r, r + P, r + 2 P, .. (Brandon et al., arXiv 2311.09431)
    zigzag       of 2 P chunks the r-th and the r-th from the end: the same work on every rank at every hop
Hops at which no rank has a pair to compute are left out: a window on contiguous shards takes ceil((W - 1) / c) + 1 of P.

Bytes that a rank sends, e per element of q: forward at each hop but the last 2 B c G D e; backward the same, and 8 B c G D at
each hop but the first, with one message more that takes dk and dv home (16 instead of 8 in float64). Document ids travel
too where there are any, 4 B c. Only kv heads are sent, and no number depends on T but by c.
"""

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.distributed_c10d import _resolve_process_group

from kernels.attention import _validate, attention, attention_backward
from kernels.backend import register
from kernels.merge import merge_into

LAYOUTS = ("contiguous", "striped", "zigzag")


class Ring(NamedTuple):
    """The ranks that share every sequence, and how."""

    group: dist.ProcessGroup
    layout: str


# ----------------------------------------------------------------------------------------------------------------------
# shards

class _Piece(NamedTuple):
    """n rows of a shard, from `row` on, at the positions start, start + step, ..."""

    row: int
    n: int
    start: int
    step: int


def _pieces(rank, P, c, layout) -> list[_Piece]:
    """The shard of c tokens that a rank holds."""
    if layout == "striped":
        return [_Piece(0, c, rank, P)]
    if layout == "contiguous":
        return [_Piece(0, c, rank * c, 1)]
    half = c // 2
    return [_Piece(0, half, rank * half, 1), _Piece(half, half, (2 * P - 1 - rank) * half, 1)]


def _check_layout(layout):
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown: use one of {', '.join(LAYOUTS)}")


def staged(x, group):
    """x where the group can send it from: gloo carries CPU tensors only."""
    return x.cpu() if dist.get_backend(group) == "gloo" else x


def shard_sequence(x, group, layout="zigzag", dim=1):
    """
    This rank's shard of x, the same on every rank of `group`: ids, labels (shifted before), positions, document ids or
    activations, of T tokens along `dim` -> T / P of them. ValueError for a T that P ranks, for zigzag 2 P chunks, cannot
    share equally.
    """
    _check_layout(layout)
    T, P = x.shape[dim], group.size()
    n = 2 * P if layout == "zigzag" else P
    if T % n:
        raise ValueError(f"{T} tokens cannot be shared by {P} ranks in layout {layout}, which cuts them into {n} equal parts: use "
                         f"{f'{T // n * n} or ' if T >= n else ''}{(T // n + 1) * n} tokens")
    parts = [x.narrow(dim, piece.start, (piece.n - 1) * piece.step + 1).index_select(
        dim, torch.arange(0, (piece.n - 1) * piece.step + 1, piece.step, device=x.device)) if piece.step > 1 else
        x.narrow(dim, piece.start, piece.n) for piece in _pieces(group.rank(), P, T // P, layout) if piece.n]
    return torch.cat(parts, dim) if parts else x


def unshard_sequence(x, group, layout="zigzag", dim=1):
    """The inverse of shard_sequence, on every rank: the shards x of all ranks -> the whole. No gradient flows through it."""
    _check_layout(layout)
    P, c = group.size(), x.shape[dim]
    if layout == "zigzag" and c % 2:
        raise ValueError(f"a shard of {c} tokens is not of layout zigzag, whose shards are two chunks of equal size")
    mine, device = staged(x.detach().contiguous(), group), x.device
    shards = [torch.empty_like(mine) for _ in range(P)]
    dist.all_gather(shards, mine, group=group)
    shards = [shard.to(device) for shard in shards]
    if layout == "striped":
        return torch.stack(shards, dim % x.dim() + 1).flatten(dim % x.dim(), dim % x.dim() + 1)
    placed = [(piece.start, shard.narrow(dim, piece.row, piece.n)) for rank, shard in enumerate(shards)
              for piece in _pieces(rank, P, c, layout)]
    return torch.cat([part for _, part in sorted(placed, key=lambda x: x[0])], dim)


def shard_positions(c, group, layout="zigzag", device=None):
    """The positions (c,) int64 of this rank's c tokens in the sequence."""
    _check_layout(layout)
    return torch.cat([piece.start + piece.step * torch.arange(piece.n, device=device)
                      for piece in _pieces(group.rank(), group.size(), c, layout)])


def _first_tokens(x, n, group, layout):
    group = _resolve_process_group(group)
    whole = x.new_zeros(x.shape[0], n, *x.shape[2:])
    for rows, at in _first_rows(group, x.shape[1], n, layout):
        whole[:, at] = x[:, rows]
    dist.all_reduce(whole, group=group)
    return whole


def _first_rows(group, c, n, layout):
    """The rows of this rank's shard that are among the first n tokens of the sequence, and which tokens they are."""
    for piece in _pieces(group.rank(), group.size(), c, layout):
        k = max(0, min(piece.n, -(-(n - piece.start) // piece.step)))
        if k:
            yield slice(piece.row, piece.row + k), slice(piece.start, piece.start + (k - 1) * piece.step + 1, piece.step)


register("first_tokens", "(Tensor x, int n, str group, str layout) -> Tensor", _first_tokens,
         lambda x, n, group, layout: x.new_empty(x.shape[0], n, *x.shape[2:]))


class _BroadcastSinks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, n, group, layout):
        ctx.args = n, group, layout, x.shape
        return torch.ops.nanolong.first_tokens(x, n, group.group_name, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        n, group, layout, shape = ctx.args
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), memory_format=torch.contiguous_format, copy=True)
        dist.all_reduce(total, group=group)
        dx = grad.new_zeros(shape)
        for rows, at in _first_rows(group, shape[1], n, layout):
            dx[:, rows] = total[:, at].to(dx.dtype)
        return dx, None, None, None


def broadcast_sinks(x, n, group, layout="zigzag"):
    """
    The first n tokens' rows of a sequence, on every rank: x (B, c, ...), this rank's shard -> (B, n, ...). Differentiable:
    what all ranks' copies are due is summed, in float32, where the rows come from. For ring_attention's sinks. ValueError
    for more than all tokens.
    """
    _check_layout(layout)
    if n > group.size() * x.shape[1]:
        raise ValueError(f"broadcast_sinks: {n} tokens of {group.size()} shards of {x.shape[1]}: there are fewer")
    return _BroadcastSinks.apply(x, n, group, layout)


def from_last_rank(x, group):
    """The last rank's x, in place, on every rank. No gradient flows through it."""
    dist.broadcast(x, group=group, group_src=group.size() - 1)
    return x


# ----------------------------------------------------------------------------------------------------------------------
# who computes what, and when

class _Masks(NamedTuple):
    """What of attention's options goes by position, for a ring of P ranks with shards of c tokens."""

    P: int
    c: int
    layout: str
    causal: bool
    window: int | None
    segment: int | None
    lookback: int
    sinks: int
    by_distance: bool  # ALiBi or xPos


class _Block(NamedTuple):
    """Scores between some rows of this rank's shard and some keys of another's: one call of `attention`."""

    rows: slice
    keys: slice
    options: dict  # of attention
    stretch: int   # a step in the kernel's positions is so many tokens
    ahead: int     # and a row that the kernel sees at a key's position is so many tokens ahead of it


@functools.lru_cache(4096)
def _blocks(m: _Masks, rank: int, source: int) -> list[_Block]:
    """The blocks between the rows of `rank` and the keys of `source`; none where no pair sees one another."""
    everything, half = slice(0, m.c), m.c // 2
    bounded = m.window is not None or m.segment is not None or m.by_distance
    if m.layout == "striped":
        return _striped_block(m, rank, source)
    if not bounded and not (m.layout == "zigzag" and m.sinks > half):  # only the order counts: as few calls as can be
        first = max(0, min(m.c, m.sinks - source * m.c)) if m.layout == "contiguous" else m.sinks if source == 0 else 0
        rows, keys = everything, slice(first, m.c)
        if m.causal and source > rank:
            if m.layout == "contiguous":
                return []
            rows = slice(half, m.c)
        if m.causal and source < rank and m.layout == "zigzag":
            keys = slice(first, half)
        q_start = 0 if source == rank else m.c  # behind all keys: all are seen, by the same compiled kernel
        return [_Block(rows, keys, dict(q_start=q_start, k_start=first), 1, 0)] if keys.start < keys.stop else []
    blocks = []
    for q in _pieces(rank, m.P, m.c, m.layout):
        for k in _pieces(source, m.P, m.c, m.layout):
            left_out = max(0, min(k.n, m.sinks - k.start))  # they are sinks
            k_start, q_last, k_last = k.start + left_out, q.start + q.n - 1, k.start + k.n - 1
            seen = left_out < k.n and not (m.causal and k_start > q_last)
            seen = seen and not (m.window is not None and k_last <= q.start - m.window)
            if seen and m.segment is not None:
                N = m.segment
                seen = q.start // N - m.lookback <= k_last // N and k_start // N <= q_last // N
            if seen:
                options = dict(q_start=q.start, k_start=k_start, window=m.window, segment=m.segment, lookback=m.lookback)
                blocks.append(_Block(slice(q.row, q.row + q.n), slice(k.row + left_out, k.row + k.n), options, 1, 0))
    return blocks


def _striped_block(m, rank, source):
    """
    Row i is at i P + rank, key j at j P + source. With n = i - j the distance is n P + rank - source: causal is n >= 0, or n
    >= 1 for sources ahead, which begin one step later; a window of W ends at n < (W - rank + source) / P.
    """
    ahead, later = rank - source, int(source > rank and m.causal)
    first = max(0, min(m.c, -(-(m.sinks - source) // m.P)))
    window = None if m.window is None else -(-(m.window - ahead) // m.P) - later
    if first == m.c or window is not None and window < 1:
        return []
    options = dict(q_start=0, k_start=first + later, window=window)
    return [_Block(slice(0, m.c), slice(first, m.c), options, m.P, ahead + m.P * later)]


@functools.cache
def _hops(m: _Masks) -> list[int]:
    """At hop i a rank has the shard of the rank that is _hops[i] before it. The first is its own."""
    return [0] + [hop for hop in range(1, m.P) if any(_blocks(m, rank, (rank - hop) % m.P) for rank in range(m.P))]


def _sink_blocks(m, rank) -> list[tuple[slice, int]]:
    """Rows that see the sinks in one call, and the position of the first."""
    if m.layout != "striped":
        return [(slice(piece.row, piece.row + piece.n), piece.start) for piece in _pieces(rank, m.P, m.c, m.layout)]
    few = min(m.c, max(0, -(-(m.sinks - 1 - rank) // m.P)))  # rows among the sinks: they do not see them all
    each = [(slice(i, i + 1), i * m.P + rank) for i in range(few)]
    return each + ([(slice(few, m.c), few * m.P + rank)] if few < m.c else [])


def _sink_shift(m, rows, start, rank, slopes):
    """
    What ALiBi's scores of the sinks lack in such a call, (H, rows) or None: a striped row's position grows by P per row, the
    kernel counts 1. Its distance ends at sinks + window - 1.
    """
    if m.layout != "striped" or slopes is None:
        return None
    i = torch.arange(rows.start, rows.stop, device=slopes.device)
    positions = torch.stack([start + i - rows.start, i * m.P + rank])
    if m.window is not None:
        positions = positions.clamp(max=m.sinks + m.window - 1)
    return slopes[:, None] * (positions[0] - positions[1])


# ----------------------------------------------------------------------------------------------------------------------
# communication

def _post(group, sent):
    """
    Posts one exchange of the tensors in `sent`, each (tensor, n): to the n-th rank from here, and from the n-th before, all
    in one batch. -> a function that waits and returns what has come, one for each.
    """
    P, rank, ops, came = group.size(), group.rank(), [], []
    for x, n in sent:
        out = staged(x, group)
        came.append(torch.empty_like(out))
        ops.append(dist.P2POp(dist.isend, out, group=group, group_peer=(rank + n) % P))
        ops.append(dist.P2POp(dist.irecv, came[-1], group=group, group_peer=(rank - n) % P))
    works = dist.batch_isend_irecv(ops) if ops else []

    def wait():
        for work in works:
            work.wait()
        return [y.to(x.device) for y, (x, _) in zip(came, sent)]

    return wait


# ----------------------------------------------------------------------------------------------------------------------
# ring attention

class _Call(NamedTuple):
    """One rank's part of a ring attention: its tensors and all that every hop shares."""

    q: torch.Tensor
    sinks: tuple | None
    slopes: torch.Tensor | None
    q_docs: torch.Tensor | None
    rank: int
    masks: _Masks
    scale: float
    xpos: int | None


def _call(q, q_sink, k_sink, v_sink, slopes, q_docs, rank, P, layout, scale, causal, window, segment, lookback, xpos):
    S = 0 if k_sink is None else k_sink.shape[1]
    masks = _Masks(P, q.shape[1], layout, causal or window is not None, window, segment, lookback, S,
                   slopes is not None or xpos is not None)
    return _Call(q, (q_sink, k_sink, v_sink) if S else None, slopes, q_docs, rank, masks, scale, xpos)


def _options(call, block, k_docs):
    """-> what `attention` takes for a block, and what ALiBi's part of its lse lacks, (H, 1) or None."""
    slopes, shift, docs = call.slopes, None, (None, None)
    if slopes is not None and block.stretch > 1:
        shift, slopes = -(slopes * block.ahead)[:, None], slopes * block.stretch
    if call.q_docs is not None:
        docs = call.q_docs[:, block.rows], k_docs[:, block.keys]
    options = dict(window=None, segment=None, lookback=0) | block.options
    return options | dict(scale=call.scale, causal=call.masks.causal, sinks=None, alibi_slopes=slopes, xpos=call.xpos,
                          q_docs=docs[0], k_docs=docs[1]), shift


def _sink_options(call, rows, start):
    """The same for the sinks, which all rows see: no keys, and sinks=..."""
    q_sink, k_sink, v_sink = call.sinks
    options = dict(scale=call.scale, causal=True, window=call.masks.window, segment=None, lookback=0, xpos=call.xpos,
                   sinks=(q_sink[:, rows], k_sink, v_sink), alibi_slopes=call.slopes, q_docs=None, k_docs=None, q_start=start,
                   k_start=0)
    return options, _sink_shift(call.masks, rows, start, call.rank, call.slopes)


def _forward_block(call, out, lse, rows, k, v, options, shift):
    """Merges what `rows` attend to among k and v into out (B, c, H, D) and lse (B, H, c), in place."""
    part, part_lse = attention(call.q[:, rows], k, v, out_dtype=out.dtype, return_lse=True, **options)
    merge_into(out[:, rows], lse[:, :, rows], part, part_lse if shift is None else part_lse + shift)


def _forward_hop(call, out, lse, kv, k_docs, source):
    """All blocks of the rows with the shard of `source`."""
    for block in _blocks(call.masks, call.rank, source):
        options, shift = _options(call, block, k_docs)
        _forward_block(call, out, lse, block.rows, *kv[:, :, block.keys], options, shift)


def _forward_sinks(call, out, lse, kv):
    for rows, start in _sink_blocks(call.masks, call.rank):
        _forward_block(call, out, lse, rows, *kv[:, :, :0], *_sink_options(call, rows, start))


def _ring_fwd(q, k, v, q_sink, k_sink, v_sink, slopes, q_docs, k_docs, group, layout, scale, causal, window, segment,
              lookback, xpos, out_dtype):
    group = _resolve_process_group(group)
    rank, P = group.rank(), group.size()
    call = _call(q, q_sink, k_sink, v_sink, slopes, q_docs, rank, P, layout, scale, causal, window, segment, lookback, xpos)
    (B, c, H, D), acc = q.shape, torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(B, c, H, D, dtype=acc, device=q.device)
    lse = torch.full((B, H, c), -torch.inf, dtype=acc, device=q.device)
    hops, here = _hops(call.masks), [torch.stack([k, v]), *([] if k_docs is None else [k_docs])]
    for i, hop in enumerate(hops):
        arrive = _post(group, [(x, hops[i + 1] - hop) for x in here] if i + 1 < len(hops) else [])
        _forward_hop(call, out, lse, here[0], here[-1], (rank - hop) % P)
        if hop == 0 and call.sinks:
            _forward_sinks(call, out, lse, here[0])
        here = arrive()
    return out.to(out_dtype), lse


def _backward_block(call, dout, dlse, out, lse, rows, k, v, options, shift):
    """attention_backward of these rows, from the results of the whole."""
    lse = lse[:, :, rows] if shift is None else lse[:, :, rows] - shift
    return attention_backward(dout[:, rows], None if dlse is None else dlse[:, :, rows], call.q[:, rows], k, v, out[:, rows],
                              lse, **options)


def _backward_hop(call, dout, dlse, out, lse, dq, kv, k_docs, source):
    """Adds to dq -> dk and dv of the shard of `source`, (2, B, c, G, D)."""
    dkv = torch.zeros(kv.shape, dtype=dq.dtype, device=dq.device)
    for block in _blocks(call.masks, call.rank, source):
        options, shift = _options(call, block, k_docs)
        grads = _backward_block(call, dout, dlse, out, lse, block.rows, *kv[:, :, block.keys], options, shift)
        for total, grad in zip((dq[:, block.rows], *dkv[:, :, block.keys]), grads):
            total += grad
    return dkv


def _backward_sinks(call, dout, dlse, out, lse, kv):
    """-> dq_sink, dk_sink, dv_sink."""
    totals = [torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in call.sinks]
    for rows, start in _sink_blocks(call.masks, call.rank):
        options, shift = _sink_options(call, rows, start)
        grads = _backward_block(call, dout, dlse, out, lse, rows, *kv[:, :, :0], options, shift)[3:]
        for total, grad in zip((totals[0][:, rows], *totals[1:]), grads):
            total += grad
    return totals


def _ring_bwd(dout, dlse, q, k, v, q_sink, k_sink, v_sink, out, lse, slopes, q_docs, k_docs, group, layout, scale, causal,
              window, segment, lookback, xpos):
    group = _resolve_process_group(group)
    rank, P = group.rank(), group.size()
    call = _call(q, q_sink, k_sink, v_sink, slopes, q_docs, rank, P, layout, scale, causal, window, segment, lookback, xpos)
    dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
    hops, here = _hops(call.masks), [torch.stack([k, v]), *([] if k_docs is None else [k_docs])]
    steps, dsinks, dkv = [b - a for a, b in zip(hops, hops[1:])], [], None
    for i, hop in enumerate(hops):
        onward = [(x, steps[i]) for x in here] if i < len(steps) else []
        arrive = _post(group, onward + ([(dkv, steps[i - 1])] if i else []))  # what this shard is due so far: one hop behind
        dkv = _backward_hop(call, dout, dlse, out, lse, dq, here[0], here[-1], (rank - hop) % P)
        if hop == 0 and call.sinks:
            dsinks = _backward_sinks(call, dout, dlse, out, lse, here[0])
        came = arrive()
        if i:
            dkv += came.pop()
        here = came
    if len(hops) > 1:
        dkv, = _post(group, [(dkv, -hops[-1])])()
    return [x.to(q.dtype) for x in (dq, *dkv, *dsinks)]


_ARGUMENTS = ("Tensor? alibi_slopes, Tensor? q_docs, Tensor? k_docs, str group, str layout, float scale, bool causal, int? "
              "window, int? segment, int lookback, int? xpos")
register("ring_attention_fwd", f"(Tensor q, Tensor k, Tensor v, Tensor? q_sink, Tensor? k_sink, Tensor? v_sink, {_ARGUMENTS}, "
         "ScalarType out_dtype) -> (Tensor, Tensor)", _ring_fwd,
         lambda q, *rest: (
             q.new_empty(q.shape, dtype=rest[-1]),
             q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))))
register("ring_attention_bwd", "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? q_sink, Tensor? k_sink, "
         f"Tensor? v_sink, Tensor out, Tensor lse, {_ARGUMENTS}) -> Tensor[]", _ring_bwd,
         lambda dout, dlse, q, k, v, q_sink, k_sink, v_sink, *_: [
             x.new_empty(x.shape) for x in (q, k, v, q_sink, k_sink, v_sink) if x is not None])


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, q_sink, k_sink, v_sink, slopes, q_docs, k_docs, *options):
        """options: group's name, layout, scale, causal, window, segment, lookback, xpos, out_dtype."""
        ctx.set_materialize_grads(False)
        out, lse = torch.ops.nanolong.ring_attention_fwd(q, k, v, q_sink, k_sink, v_sink, slopes, q_docs, k_docs, *options)
        ctx.save_for_backward(q, k, v, q_sink, k_sink, v_sink, out, lse, slopes, q_docs, k_docs)
        ctx.options = options[:-1]
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        saved = ctx.saved_tensors  # once: checkpoint unpacks no tensor twice
        dout = torch.zeros_like(saved[6]) if dout is None else dout
        grads = torch.ops.nanolong.ring_attention_bwd(dout, dlse, *saved, *ctx.options)
        return *grads, *(18 - len(grads)) * (None,)


def ring_attention(q, k, v, group, *, layout="zigzag", scale=None, causal=True, window=None, sinks=None, segment=None,
                   lookback=0, alibi_slopes=None, xpos=None, q_docs=None, k_docs=None, out_dtype=None, return_lse=False):
    """
    `attention` over a sequence of which each rank of the process group `group` holds a shard, in `layout` (shard_sequence):
    q (B, c, H, D), k and v (B, c, G, D), equal shapes on all ranks -> this rank's rows of out [, lse], as if one process had
    all P c tokens; positions run from 0. All ranks must call it, in the same order. The keywords are attention's, with
    shards for q_docs and k_docs. sinks=(q_sink, k_sink, v_sink): q_sink is this rank's, k_sink and v_sink (B, S, G, D)
    the same on all ranks (broadcast_sinks makes them so); what they get as gradient is this rank's share. A sink logit is
    applied to (out, lse) afterwards, once. Differentiable once; the gradient of the sum of all ranks' losses.

    Memory on a rank grows with c alone. ValueError for sizes that do not fit; in layout striped for xpos and lookback,
    whose blocks its strides would tear apart. Document ids times segments must stay below 2^32 there. A rank that is gone
    or never calls raises what the process group raises at its timeout. Liu et al., arXiv 2310.01889.
    """
    _check_layout(layout)
    _validate(q, k, v, causal, window, sinks, segment, lookback, alibi_slopes, xpos, q_docs, k_docs)
    B, c, H, D = q.shape
    if k.shape[1] != c:
        raise ValueError(f"ring_attention: {c} queries and {k.shape[1]} keys: a rank holds the same tokens of both")
    if layout == "zigzag" and c % 2:
        raise ValueError(f"ring_attention: layout zigzag with {c} tokens on a rank: they are two chunks of equal size, "
                         f"use a multiple of 2 x {group.size()} tokens in all")
    if layout == "striped" and (xpos is not None or lookback):
        raise ValueError(f"ring_attention: layout striped with xpos {xpos} and lookback {lookback}: use zigzag or contiguous")
    scale = D ** -0.5 if scale is None else float(scale)
    if scale <= 0:
        raise ValueError(f"ring_attention: scale is {scale}, it must be greater than 0")
    if layout == "striped" and segment is not None:  # its borders lie across the stripes: segments as documents
        of_row = shard_positions(c, group, layout, q.device) // segment
        n = -(-group.size() * c // segment)
        q_docs, k_docs = ((of_row if x is None else x.long() * n + of_row).expand(B, c) for x in (q_docs, k_docs))
        segment = None
    if q_docs is not None:
        q_docs, k_docs = (x.to(torch.int32).contiguous() for x in (q_docs, k_docs.view_as(k_docs)))
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.detach().to(torch.promote_types(q.dtype, torch.float32)).contiguous()
    if sinks is not None and sinks[0] is q:
        sinks = q.view_as(q), *sinks[1:]  # torch.compile takes no tensor twice
    out, lse = _RingAttention.apply(q, k, v, *sinks or 3 * (None,), alibi_slopes, q_docs, k_docs, group.group_name, layout,
                                    scale, causal, window, segment, lookback, xpos, out_dtype or q.dtype)
    return (out, lse) if return_lse else out
