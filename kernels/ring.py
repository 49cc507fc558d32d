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
Hops at which no rank has a pair to compute are left out: a window on contiguous shards takes ceil((W - 1) / c) + 1 of P,
and of a shard only the last n = min(c, W - 1) tokens travel, with others all n = c.

Bytes that a rank sends, e per element of q: forward at each hop but the last 2 B n G D e; backward the same, and from the
third hop on 8 B n G D besides, with one message more that takes dk and dv home (16 instead of 8 in float64). Document ids
travel too where there are any, 4 B n. Only kv heads are sent, and no number depends on T but by c.
"""

import functools
import math
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
        raise ValueError(f"{T} tokens cannot be shared by {P} ranks in layout {layout}, which cuts them into {n} equal parts: "
                         f"use {f'{T // n * n} or ' if T >= n else ''}{(T // n + 1) * n} tokens")
    if layout == "striped":
        return x.unflatten(dim, (T // P, P)).select(dim % x.dim() + 1, group.rank())
    return torch.cat([x.narrow(dim, piece.start, piece.n) for piece in _pieces(group.rank(), P, T // P, layout)], dim)


def unshard_sequence(x, group, layout="zigzag", dim=1):
    """The inverse of shard_sequence, on every rank: the shards x of all ranks -> the whole. No gradient flows through it."""
    _check_layout(layout)
    P, c = group.size(), x.shape[dim]
    if layout == "zigzag" and c % 2:
        raise ValueError(f"a shard of {c} tokens is not of layout zigzag, whose shards are two chunks of equal size")
    mine, dim = staged(x.detach().contiguous(), group), dim % x.dim()
    shards = mine.new_empty(P, *mine.shape)
    dist.all_gather(list(shards.unbind()), mine, group=group)
    shards = shards.to(x.device)
    if layout == "striped":
        return shards.movedim(0, dim + 1).flatten(dim, dim + 1)
    placed = [(piece.start, shards[rank].narrow(dim, piece.row, piece.n)) for rank in range(P)
              for piece in _pieces(rank, P, c, layout)]
    return torch.cat([part for _, part in sorted(placed, key=lambda x: x[0])], dim)


def shard_positions(c, group, layout="zigzag", device=None):
    """The positions (c,) int64 of this rank's c tokens in the sequence."""
    _check_layout(layout)
    return torch.cat([piece.start + piece.step * torch.arange(piece.n, device=device)
                      for piece in _pieces(group.rank(), group.size(), c, layout)])


def _rows_between(group, c, start, stop, layout):
    """The rows of this rank's shard that are tokens start .. stop - 1, and which of these they are."""
    for piece in _pieces(group.rank(), group.size(), c, layout):
        first, last = (max(0, min(piece.n, -(-(at - piece.start) // piece.step))) for at in (start, stop))
        if first < last:
            at = piece.start + first * piece.step - start
            yield (slice(piece.row + first, piece.row + last), slice(at, at + (last - first - 1) * piece.step + 1, piece.step))


def _gather_tokens(k, v, start, stop, group, layout):
    group = _resolve_process_group(group)
    whole = k.new_zeros(2, k.shape[0], stop - start, *k.shape[2:])
    for rows, at in _rows_between(group, k.shape[1], start, stop, layout):
        whole[0, :, at], whole[1, :, at] = k[:, rows], v[:, rows]
    dist.all_reduce(whole, group=group)  # one of the summands is not 0
    return whole


register("gather_tokens", "(Tensor k, Tensor v, int start, int stop, str group, str layout) -> Tensor", _gather_tokens,
         lambda k, v, start, stop, *_: k.new_empty(2, k.shape[0], stop - start, *k.shape[2:]))


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, v, start, stop, group, layout):
        ctx.args = start, stop, group, layout, k.shape
        return torch.ops.nanolong.gather_tokens(k, v, start, stop, group.group_name, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        start, stop, group, layout, shape = ctx.args
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), memory_format=torch.contiguous_format, copy=True)
        dist.all_reduce(total, group=group)
        grads = grad.new_zeros(2, *shape)
        for rows, at in _rows_between(group, shape[1], start, stop, layout):
            grads[:, :, rows] = total[:, :, at].to(grad.dtype)
        return grads[0], grads[1], None, None, None, None


def gather_tokens(k, v, start, stop, group, layout="zigzag"):
    """
    The keys and values of a few tokens of the sequence, start .. stop - 1, on every rank: k, v (B, c, G, D), this rank's
    shards -> (B, stop - start, G, D) twice, in one message. From 0 on: ring_attention's sinks. Differentiable: what the
    ranks' copies are due, each in k's dtype, is summed in float32 where the tokens come from. ValueError for tokens that
    are not there.
    """
    _check_layout(layout)
    if not 0 <= start <= stop <= group.size() * k.shape[1]:
        raise ValueError(f"gather_tokens: tokens {start} to {stop} of {group.size()} shards of {k.shape[1]} are not all there")
    return _GatherTokens.apply(k, v, start, stop, group, layout).unbind(0)


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
    options: dict        # of attention
    ahead: int = 0       # striped: a row that the kernel sees at a key's position is so many tokens ahead of it
    sinks: bool = False  # the rows attend to the sinks, too


@functools.lru_cache(4096)
def _blocks(m: _Masks, rank: int, source: int) -> list[_Block]:
    """
    The blocks between the rows of `rank` and the keys of `source`, without rows and keys at their ends that see nobody;
    none where no pair sees one another.
    """
    if m.layout == "striped":
        return _striped_blocks(m, rank, source)
    if m.layout == "zigzag" and not (m.window or m.segment or m.by_distance or m.sinks):  # only the order counts: one call
        half, everything = m.c // 2, slice(0, m.c)
        rows = slice(half, m.c) if m.causal and source > rank else everything
        keys = slice(0, half) if m.causal and source < rank else everything
        q_start = 0 if source == rank else m.c  # behind all keys: all are seen, by the same compiled kernel
        return [_Block(rows, keys, dict(q_start=q_start, k_start=0))]
    blocks, N = [], m.segment
    for q in _pieces(rank, m.P, m.c, m.layout):
        for k in _pieces(source, m.P, m.c, m.layout):
            rows, keys = [q.start, q.start + q.n], [max(k.start, min(m.sinks, k.start + k.n)), k.start + k.n]  # positions
            own = q.start == k.start and m.sinks > 0
            if m.causal:
                keys[1] = min(keys[1], rows[1])
            if m.window is not None:
                keys[0] = max(keys[0], rows[0] - m.window + 1)
                rows[1] = min(rows[1], keys[1] - 1 + m.window)
            if N is not None:
                keys = [max(keys[0], (rows[0] // N - m.lookback) * N), min(keys[1], ((rows[1] - 1) // N + 1) * N)]
                rows = [max(rows[0], keys[0] // N * N), min(rows[1], ((keys[1] - 1) // N + m.lookback + 1) * N)]
            empty = rows[0] >= rows[1] or keys[0] >= keys[1]
            if own:
                rows, keys = [q.start, q.start + q.n], [k.start, k.start] if empty else keys
            if own or not empty:
                options = dict(q_start=rows[0], k_start=keys[0], window=m.window, segment=N, lookback=m.lookback)
                blocks.append(_Block(*(slice(piece.row + x[0] - piece.start, piece.row + x[1] - piece.start)
                                       for piece, x in ((q, rows), (k, keys))), options, sinks=own))
    return blocks


def _striped_blocks(m, rank, source):
    """
    Row i is at i P + rank, key j at j P + source. With n = i - j the distance is n P + rank - source: causal is n >= 0, or n
    >= 1 for sources ahead, which begin one step later; a window of W ends at n < (W - rank + source) / P. The rows that
    are sinks themselves see them one by one, the others all at once.
    """
    blocks, ahead, later = [], rank - source, int(source > rank and m.causal)
    first = max(0, min(m.c, -(-(m.sinks - source) // m.P)))
    window = None if m.window is None else -(-(m.window - ahead) // m.P) - later
    if first < m.c and (window is None or window > 0):
        options = dict(q_start=0, k_start=first + later, window=window)
        blocks.append(_Block(slice(0, m.c), slice(first, m.c), options, ahead + m.P * later))
    if m.sinks and source == rank:
        few = min(m.c, max(0, -(-(m.sinks - 1 - rank) // m.P)))
        for rows in (*(slice(i, i + 1) for i in range(few)), *([slice(few, m.c)] if few < m.c else [])):
            options = dict(q_start=rows.start * m.P + rank, k_start=0, window=m.window)
            blocks.append(_Block(rows, slice(0, 0), options, sinks=True))
    return blocks


def _reach(m: _Masks) -> float:
    """How far from a query its keys are at most, in tokens."""
    window = math.inf if m.window is None else m.window - 1
    return window if m.segment is None else min(window, (m.lookback + 1) * m.segment - 1)


def _pairs(m: _Masks):
    """(rank, source), among which are the first to see one another at each hop that is needed."""
    if m.layout == "striped" or _reach(m) == math.inf:  # the same for all ranks, but for sinks and for what lies ahead
        return ((rank, source) for rank in (range(m.P) if m.sinks >= m.c // 2 else (m.P - 1, 0)) for source in range(m.P))
    size, n = (m.c, m.P) if m.layout == "contiguous" else (m.c // 2, 2 * m.P)
    near = ((i, i - d) for d in range(1, -(-_reach(m) // size) + 1) for i in range(d, n))
    both_ways = (pair for i, j in near for pair in ((i, j), (j, i))[:1 if m.causal else 2])
    return (tuple(min(x, 2 * m.P - 1 - x) for x in pair) for pair in both_ways)


@functools.lru_cache(256)
def _hops(m: _Masks) -> list[int]:
    """At hop i a rank has the shard of the rank that is _hops[i] before it. The first is its own."""
    hops = {0}
    for rank, source in _pairs(m):
        if (rank - source) % m.P not in hops and _blocks.__wrapped__(m, rank, source):
            hops.add((rank - source) % m.P)
        if len(hops) == m.P:
            break
    return sorted(hops)


def _first_sent(m: _Masks) -> int:
    """The first row of a shard that other ranks can see."""
    return m.c - min(m.c, _reach(m)) if m.layout == "contiguous" and m.causal else 0


def _sink_shift(m, rows, rank, slopes):
    """
    What ALiBi's scores of the sinks lack in a striped call, (H, rows): a row's position grows by P per row, the kernel
    counts 1. Its distance ends at sinks + window - 1.
    """
    i = torch.arange(rows.start, rows.stop, device=slopes.device)
    positions = torch.stack([rows.start * m.P + rank + i - rows.start, i * m.P + rank])
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


def _options(call, block, keys, k_docs):
    """-> what `attention` takes for a block, and what ALiBi's part of its lse lacks, (H, 1), (H, rows) or None."""
    slopes, shift, docs, m = call.slopes, None, (None, None), call.masks
    if slopes is not None and m.layout == "striped" and block.sinks:
        shift = _sink_shift(m, block.rows, call.rank, slopes)
    elif slopes is not None and m.layout == "striped":
        shift, slopes = -(slopes * block.ahead)[:, None], slopes * m.P
    if call.q_docs is not None and keys.start < keys.stop:
        docs = call.q_docs[:, block.rows], k_docs[:, keys]
    sinks = (call.sinks[0][:, block.rows], *call.sinks[1:]) if block.sinks else None
    options = dict(window=None, segment=None, lookback=0) | block.options
    return options | dict(scale=call.scale, causal=m.causal, sinks=sinks, alibi_slopes=slopes, xpos=call.xpos, q_docs=docs[0],
                          k_docs=docs[1]), shift


def _forward_hop(call, out, lse, kv, k_docs, source, first=0):
    """
    Merges what the rows see of the shard of `source` into out (B, c, H, D) and lse (B, H, c), in place. kv (2, B, n, G, D)
    and k_docs (B, n) begin with the shard's row `first`.
    """
    for block in _blocks(call.masks, call.rank, source):
        rows, keys = block.rows, slice(block.keys.start - first, block.keys.stop - first)
        options, shift = _options(call, block, keys, k_docs)
        part, part_lse = attention(call.q[:, rows], *kv[:, :, keys], out_dtype=out.dtype, return_lse=True, **options)
        merge_into(out[:, rows], lse[:, :, rows], part, part_lse if shift is None else part_lse + shift)


def _ring_fwd(q, k, v, q_sink, k_sink, v_sink, slopes, q_docs, k_docs, group, layout, scale, causal, window, segment,
              lookback, xpos, out_dtype):
    group = _resolve_process_group(group)
    rank, P = group.rank(), group.size()
    call = _call(q, q_sink, k_sink, v_sink, slopes, q_docs, rank, P, layout, scale, causal, window, segment, lookback, xpos)
    (B, c, H, D), acc = q.shape, torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(B, c, H, D, dtype=acc, device=q.device)
    lse = torch.full((B, H, c), -torch.inf, dtype=acc, device=q.device)
    own, hops, first = torch.stack([k, v]), _hops(call.masks), _first_sent(call.masks)
    here = _sent(own, k_docs, first)
    for i, hop in enumerate(hops):
        arrive = _post(group, [(x, hops[i + 1] - hop) for x in here] if i + 1 < len(hops) else [])
        if i == 0:
            _forward_hop(call, out, lse, own, k_docs, rank)
        else:
            _forward_hop(call, out, lse, here[0], here[1] if len(here) > 1 else None, (rank - hop) % P, first)
        here = arrive()
        del arrive  # and with it the shard that was sent
    return out.to(out_dtype), lse


def _sent(kv, k_docs, first):
    """What travels of a shard: its keys and values, and its document ids if there are any."""
    return [kv[:, :, first:].contiguous()] + ([] if k_docs is None else [k_docs[:, first:].contiguous()])


def _backward_hop(call, dout, dlse, out, lse, dq, dsinks, kv, k_docs, source, first=0):
    """Adds to dq and dsinks, the gradients of q_sink, k_sink, v_sink -> dk and dv, like kv. See _forward_hop."""
    dkv = torch.zeros(kv.shape, dtype=dq.dtype, device=dq.device)
    for block in _blocks(call.masks, call.rank, source):
        rows, keys = block.rows, slice(block.keys.start - first, block.keys.stop - first)
        options, shift = _options(call, block, keys, k_docs)
        grads = attention_backward(dout[:, rows], None if dlse is None else dlse[:, :, rows], call.q[:, rows],
                                   *kv[:, :, keys], out[:, rows], lse[:, :, rows] - (0 if shift is None else shift), **options)
        dq[:, rows].add_(grads[0])
        dkv[0][:, keys].add_(grads[1])
        dkv[1][:, keys].add_(grads[2])
        if block.sinks:
            dsinks[0][:, rows].add_(grads[3])
            dsinks[1].add_(grads[4])
            dsinks[2].add_(grads[5])
    return dkv


def _ring_bwd(dout, dlse, q, k, v, q_sink, k_sink, v_sink, out, lse, slopes, q_docs, k_docs, group, layout, scale, causal,
              window, segment, lookback, xpos):
    group = _resolve_process_group(group)
    rank, P = group.rank(), group.size()
    call = _call(q, q_sink, k_sink, v_sink, slopes, q_docs, rank, P, layout, scale, causal, window, segment, lookback, xpos)
    dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
    dsinks = [torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q_sink, k_sink, v_sink) if x is not None]
    results = dout, dlse, out, lse, dq, dsinks
    own, hops, first = torch.stack([k, v]), _hops(call.masks), _first_sent(call.masks)
    steps, here, dkv = [b - a for a, b in zip(hops, hops[1:])], _sent(own, k_docs, first), None
    for i, hop in enumerate(hops):
        onward = [(x, steps[i]) for x in here] if i < len(steps) else []
        arrive = _post(group, onward + ([(dkv, steps[i - 1])] if i > 1 else []))  # what a shard is due so far: one hop behind
        if i == 0:
            mine = _backward_hop(call, *results, own, k_docs, rank)
        else:
            dkv = _backward_hop(call, *results, here[0], here[1] if len(here) > 1 else None, (rank - hop) % P, first)
        here = arrive()
        del arrive
        if i > 1:
            dkv += here.pop()
    if len(hops) > 1:
        dkv, = _post(group, [(dkv, -hops[-1])])()
        mine[:, :, first:].add_(dkv)
    dk, dv = (x.to(k.dtype, copy=True) for x in mine)  # not two views of one tensor
    return [x.to(q.dtype) for x in (dq, dk, dv, *dsinks)]


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
    the same on all ranks (gather_tokens makes them so); what they get as gradient is this rank's share. A sink logit is
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
