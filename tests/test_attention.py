"""kernels/attention.py: the Triton kernels and the references against an independent dense formula in float64."""

import random
import sys

import pytest
import torch
from helpers import LiveBytes, assert_close_2x, guarded, poisoned_empty, relative_error
from torch.utils.flop_counter import FlopCounterMode

from kernels import attention, merge_attention
from kernels.attention import _attention_bwd_ref, _attention_fwd_ref, _doc_ranges
from kernels.merge import merge_attention_ref


def xpos_factors(xpos, q, k, sinks=None, window=None, q_start=0, k_start=0):
    """
    What q and k, and the sinks' q and k, are multiplied with: (T, 1, D) or 1. The exponents count from the first query,
    however far: in float64 that reaches some 10^5 tokens ahead.
    """
    q_pos, k_pos = (torch.arange(x.shape[1]) + start for x, start in ((q, q_start), (k, k_start)))
    distances = [(q_pos - q_start, q_start - k_pos)]
    if sinks is not None:
        S = sinks[1].shape[1]
        q_pos = q_pos if window is None else q_pos.clamp(max=S + window - 1)
        distances.append((q_pos - q_pos[:1], q_pos[:1] - torch.arange(S)))
    if xpos is None:
        return [(1.0, 1.0) for _ in distances]
    zeta = [(2 * (i % (xpos // 2)) / xpos + 0.4) / 1.4 if i < xpos else 1.0 for i in range(q.shape[3])]
    return [[(torch.tensor(zeta, dtype=torch.float64) ** (n[:, None] / 512))[:, None] for n in pair] for pair in distances]


def every_score(q, k, v, scale=None, causal=True, window=None, sinks=None, segment=None, lookback=0, alibi_slopes=None,
                xpos=None, q_docs=None, k_docs=None, q_start=0, k_start=0):
    """
    By the positions, one part of the definition at a time: what each query gives each key, the sinks first. Scores
    (B, H, Tq, S + Tk) in q's dtype, which of them count (B, 1, Tq, S + Tk), and the values (B, S + Tk, H, D).
    """
    B, group, scale = q.shape[0], q.shape[2] // k.shape[2], q.shape[3] ** -0.5 if scale is None else scale
    q_pos, k_pos = (torch.arange(x.shape[1])[None] + start for x, start in ((q, q_start), (k, k_start)))
    distance = q_pos.mT - k_pos
    seen = torch.ones(B, 1, *distance.shape, dtype=torch.bool)
    if causal or window is not None:
        seen = seen & (distance >= 0)
    if window is not None:
        seen = seen & (distance < window)
    if segment is not None:
        back = q_pos.mT // segment - k_pos // segment
        seen = seen & (back >= 0) & (back <= lookback)
    if q_docs is not None:
        seen = seen & (q_docs[:, None, :, None] == k_docs[:, None, None, :])
    factors = xpos_factors(xpos, q, k, sinks, window, q_start, k_start)
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    q, k = ((x * f).to(x.dtype) for x, f in zip((q, k), factors[0]))
    s = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if sinks is not None:
        q_sink, k_sink, v_sink = sinks
        j = torch.arange(k_sink.shape[1])[None]
        to_sink = (q_pos if window is None else q_pos.clamp(max=j.shape[1] + window - 1)).mT - j
        distance = torch.cat([to_sink, distance], 1)
        seen = torch.cat([(j <= q_pos.mT).expand(B, 1, *to_sink.shape), seen & (k_pos >= j.shape[1])], -1)
        k_sink, v_sink = (x.repeat_interleave(group, 2) for x in (k_sink, v_sink))
        q_sink, k_sink = ((x * f).to(x.dtype) for x, f in zip((q_sink, k_sink), factors[1]))
        s = torch.cat([torch.einsum("bthd,bshd->bhts", q_sink, k_sink) * scale, s], -1)
        v = torch.cat([v_sink, v], 1)
    if alibi_slopes is not None:
        s = s - (alibi_slopes.double()[:, None, None] * distance).to(s.dtype)
    return s, seen, v


def dense(q, k, v, **options):
    """Attention with every score written out, in the inputs' dtype: (out, lse). Rows that see nothing: 0 and -inf."""
    s, seen, v = every_score(q, k, v, **options)
    any_seen = seen.any(-1, keepdim=True)
    s = s.masked_fill(~seen & any_seen, -torch.inf)  # rows that see nothing stay finite here and are zeroed below
    out = torch.einsum("bhts,bshd->bthd", s.softmax(-1) * any_seen, v)
    return out, s.logsumexp(-1).masked_fill(~any_seen.squeeze(-1).expand(s.shape[:3]), -torch.inf)


def same_maths(q, k, v, douts, sinks=None, **options):
    """What `run` of the kernel computes, in plain torch: p again in the backward pass, base 2, from the rounded lse."""
    options["scale"] = scale = options.get("scale") or q.shape[3] ** -0.5
    (B, Tk, G, D), S, (dout, dlse) = k.shape, 0 if sinks is None else sinks[1].shape[1], (x.to(q.dtype) for x in douts)
    out, lse = dense(q, k, v, sinks=sinks, **options)
    s, seen, v = every_score(q, k, v, sinks=sinks, **options)
    log2e = 1.4426950408889634
    p = (s * log2e - (lse * log2e)[..., None]).exp2().masked_fill(~seen, 0.0)
    delta = (dout * out).sum(-1).transpose(1, 2) - dlse
    ds = p * (torch.einsum("bthd,bshd->bhts", dout, v) - delta[..., None])
    result = dict(out=out, lse=lse)
    factors = xpos_factors(options.get("xpos"), q, k, sinks, *(options.get(x, y) for x, y in (
        ("window", None), ("q_start", 0), ("k_start", 0))))
    for name, (q, k), (q_f, k_f), columns in zip(("", "_sink"), ((q, k), (sinks or ())[:2]), factors,
                                                 (slice(S, None), slice(S))):
        q, k = (q * q_f).to(q.dtype), (k * k_f).to(k.dtype)
        dk, dv = torch.einsum("bhts,bthd->bshd", ds[..., columns], q), torch.einsum("bhts,bthd->bshd", p[..., columns], dout)
        dk, dv = (x.view(*k.shape[:3], -1, D).sum(3) for x in (dk * scale, dv))
        dq = torch.einsum("bhts,bshd->bthd", ds[..., columns], k.repeat_interleave(q.shape[2] // G, 2)) * scale
        result.update({f"dq{name}": dq * q_f, f"dk{name}": dk * k_f, f"dv{name}": dv})
    return result


def draw_case(seed):
    """
    Arguments of one random call: sizes, options, layout. Consecutive seeds have window, sinks and ALiBi in turn, segments
    two of three, half of these a lookback; every other one xPos.
    """
    rng = random.Random(seed)
    B, G, group, D = rng.choice([1, 2]), rng.choice([1, 2]), rng.choice([1, 1, 2, 3]), rng.choice([8, 16, 24, 33, 64])
    Tq, Tk = rng.randint(8, 44), rng.randint(8, 44)  # a row with one key has a gradient of rounding errors only
    if rng.random() < 0.4:
        Tk = Tq
    options = dict(causal=rng.random() < 0.75, scale=rng.choice([None, 0.31]),
                   q_start=rng.choice([0, 0, rng.randint(0, 60), 10**9]),
                   k_start=rng.choice([0, 0, rng.randint(0, 60)]))
    if rng.random() < 0.4:
        options["q_start"], options["k_start"] = 10**9 + rng.randint(0, 20), 10**9
    if rng.random() < 0.5:
        ids = rng.choice([2, 4])
        options["q_docs"], options["k_docs"] = torch.randint(0, ids, (B, Tq)), torch.randint(0, ids + 1, (B, Tk))
        if rng.random() < 0.7:
            options["q_docs"], options["k_docs"] = options["q_docs"].sort(1).values, options["k_docs"].sort(1).values
    layout = rng.choice(["contiguous", "fused", "heads_first"])
    S = 0
    if seed % 2:
        options["window"] = rng.choice([rng.randint(4, 12), rng.randint(4, 40)])
    if seed // 2 % 2:
        S = rng.choice([2, 4, 20])
        if rng.random() < 0.5:  # the first or some of the sinks are not among the keys
            options["k_start"] = rng.randint(0, S)
            options["q_start"] = options["k_start"] + rng.choice([0, rng.randint(0, 40)])
    if seed // 4 % 2:
        options["alibi_slopes"] = torch.rand(G * group) * 0.2
        if options["q_start"] > 10**6 and (options["k_start"] < 10**6 or S and "window" not in options):
            options["q_start"], options["k_start"] = 31, 7  # a score of -10^8 has no digits left for the keys' differences
    if seed % 3:
        options["segment"] = rng.choice([rng.randint(6, 15), rng.randint(6, 40), 16, 10**9 + 10, 2**40])
        options["lookback"] = rng.choice([0, 0, 1, 2, 10**9])
    if seed % 4 in (0, 3):
        options.update(xpos=min(D // 2 * 2, rng.choice([4, 64])), causal=True)
    return (B, Tq, Tk, S, G * group, G, D), options, layout


def tensors(sizes, layout, dtype):
    """
    q, k, v, and if there are sinks q_sink, k_sink, v_sink, of these sizes: contiguous, as views of one fused projection
    (when Tq = Tk), or stored (B, H, T, D).
    """
    B, Tq, Tk, S, H, G, D = sizes
    shapes = [(B, Tq, H, D), (B, Tk, G, D), (B, Tk, G, D), *((B, Tq, H, D), (B, S, G, D), (B, S, G, D))[:3 * bool(S)]]
    if layout == "fused" and Tq == Tk:
        q, k, v, *rest = torch.randn(B, Tq, 2 * H + 2 * G, D, dtype=dtype).split([H, G, G, H], dim=2)
        return [q, k, v, *rest[:bool(S)], *(torch.randn(shape, dtype=dtype) for shape in shapes[4:])]
    if layout == "heads_first":
        return [torch.randn(b, h, t, d, dtype=dtype).transpose(1, 2) for b, t, h, d in shapes]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def with_sinks(inputs, options):
    """q, k, v, [q_sink, k_sink, v_sink] and options -> q, k, v and options with sinks."""
    return inputs[:3], {**options, "sinks": tuple(inputs[3:])} if len(inputs) > 3 else options


def run(f, inputs, douts, **options):
    """
    (out, lse, dq, dk, dv), and (dq_sink, dk_sink, dv_sink) for inputs of six, for upstream gradients on out and on the
    finite lse.
    """
    inputs = [x.detach().requires_grad_() for x in inputs]
    first, options = with_sinks(inputs, options)
    out, lse = f(*first, **options)
    dout, dlse = (x.to(out.dtype) for x in douts)
    seen = lse > -torch.inf
    grads = torch.autograd.grad([out, lse.masked_fill(~seen, 0.0)], inputs, [dout, dlse])
    return dict(zip(("out", "lse", "dq", "dk", "dv", "dq_sink", "dk_sink", "dv_sink"), (out, lse, *grads)))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("seed", range(14))
def test_random_draws(seed, dtype, backend, monkeypatch):
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    monkeypatch.setattr(sys.modules["kernels.attention"], "SPLIT_BLOCKS", 1)  # several programs share the rows of a sink
    monkeypatch.setattr(sys.modules["kernels.attention"], "XPOS_CHUNK", 16)  # each tile has factors of its own
    sizes, options, layout = draw_case(seed)
    torch.manual_seed(seed)
    inputs = tensors(sizes, layout, dtype)
    q = inputs[0]
    dout = dict(contiguous=torch.randn(q.shape), fused=torch.randn(q.shape[:2])[..., None, None].expand(q.shape),
                heads_first=torch.randn(q.transpose(1, 2).shape).transpose(1, 2))[layout]  # strides of all kinds
    douts = [x.to(dtype).double() for x in (dout, torch.randn(q.shape[0], q.shape[2], q.shape[1]))]
    guards = [guarded(x) for x in inputs]
    with poisoned_empty():
        actual = run(attention, [x.tensor for x in guards], douts, return_lse=True, **options)
    for guard in guards:
        guard.check()
    oracle = run(dense, [x.double() for x in inputs], douts, **options)
    first, same_options = with_sinks(inputs, options)
    plain = same_maths(*first, douts, **same_options)
    assert actual.keys() == oracle.keys() == plain.keys()
    for name, value in actual.items():
        assert_close_2x(value, oracle[name], plain[name].to(value.dtype), f"{name} {sizes} {layout} {options}")


def test_gradcheck(triton_kernels, monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.attention"], "XPOS_CHUNK", 16)
    inputs = tensors((1, 18, 20, 3, 2, 1, 4), "contiguous", torch.float64)
    inputs = [x.requires_grad_() for x in inputs]
    docs = dict(q_docs=torch.tensor([[0] * 4 + [1] * 14]), k_docs=torch.tensor([[0] * 9 + [1] * 11]))
    for n, options in ((3, dict(q_start=2)), (3, dict(causal=False, **docs)), (3, dict(causal=False, segment=7, q_start=2)),
                       (6, dict(window=7, segment=9, q_start=2, alibi_slopes=torch.rand(2))),
                       (6, dict(segment=5, lookback=1, q_start=2, xpos=4))):
        def f(*x):
            first, more = with_sinks(x, options)
            return attention(*first, return_lse=True, **more)
        assert torch.autograd.gradcheck(f, inputs[:n], fast_mode=True)


def test_lse_gradient_alone(triton_kernels):
    """lse is differentiable when out is not used at all, and out when lse is not."""
    q, k, v = (torch.randn(1, 20, 2, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    dlse = torch.randn(1, 2, 20, dtype=torch.float64)
    actual = torch.autograd.grad(attention(q, k, v, return_lse=True)[1], (q, k), dlse)
    oracle = torch.autograd.grad(dense(q, k, v)[1], (q, k), dlse)
    for a, o in zip(actual, oracle):
        torch.testing.assert_close(a, o, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("sizes", [
    (1, 1, 1, 0, 1, 1, 1), (2, 1, 37, 0, 4, 2, 16), (1, 33, 1, 0, 2, 1, 256), (0, 9, 9, 0, 2, 1, 16)], ids=str)
def test_extreme_sizes(sizes, backend, monkeypatch):
    """One row, key or dim, the largest head, an empty batch; documents of negative ids; some gradients unwanted."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    q, k, v = tensors(sizes, "contiguous", torch.float64)
    B, Tq, Tk = sizes[:3]
    douts = torch.randn_like(q), torch.randn(B, q.shape[2], Tq, dtype=torch.float64)
    docs = dict(q_docs=torch.randint(-2, 1, (B, Tq)), k_docs=torch.randint(-2, 1, (B, 2 * Tk))[:, ::2])
    for options in (dict(q_start=Tk), docs):
        actual = run(attention, (q, k, v), douts, return_lse=True, **options)
        oracle = run(dense, (q, k, v), douts, **options)
        for name in oracle:
            torch.testing.assert_close(actual[name], oracle[name], rtol=1e-10, atol=1e-11, msg=name)
    only_v = torch.autograd.grad(attention(q, k, v.requires_grad_(), q_start=Tk), v, douts[0])[0]
    expected_v = torch.autograd.grad(dense(q, k, v, q_start=Tk)[0], v, douts[0])[0]
    torch.testing.assert_close(only_v, expected_v, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("docs", [False, True])
@pytest.mark.parametrize("Tq, Tk, q_start", [(5, 0, 0), (0, 5, 0), (20, 20, -7), (3, 40, -3), (3, 40, -2)])
def test_rows_that_see_nothing(Tq, Tk, q_start, docs, backend, monkeypatch):
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    q, k, v = (torch.randn(1, t, 2, 16, requires_grad=True) for t in (Tq, Tk, Tk))
    q_docs, k_docs = (torch.zeros(1, n, dtype=torch.int32) for n in (Tq, Tk))
    docs = dict(q_docs=q_docs, k_docs=k_docs) if docs else {}
    out, lse = attention(q, k, v, q_start=q_start, return_lse=True, **docs)
    empty = min(Tq, max(0, -q_start)) if Tk else Tq
    assert (out[:, :empty] == 0).all() and (lse[..., :empty] == -torch.inf).all()
    assert lse[..., empty:].isfinite().all()
    for grad in torch.autograd.grad((out * torch.randn_like(out)).sum() + lse[..., empty:].sum(), (q, k, v)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("window, S, q_start, k_start, Tq, Tk", [
    (1, 2, 0, 0, 20, 20),  # each row sees itself and the sinks
    (100, 30, 0, 0, 20, 20),  # more sinks and window than keys: no key is left, and not all sinks are seen
    (15, 3, 5, 5, 40, 40),  # the window ends within the first block of rows; no sink is among the keys
    (47, 3, 0, 0, 66, 66),  # blocks that are seen whole lie between the window's edge and the diagonal, by one key or row
    (10**9, 3, 7, 2, 20, 25), (17, 3, -4, 0, 40, 40), (33, 1, 60, 0, 3, 63), (3, 3, 50, 0, 20, 20), (9, 2, 0, 0, 9, 0)])
def test_extreme_windows(window, S, q_start, k_start, Tq, Tk, alibi, backend, monkeypatch):
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    inputs = tensors((1, Tq, Tk, S, 2, 1, 8), "contiguous", torch.float64)
    douts = torch.randn_like(inputs[0]), torch.randn(1, 2, Tq, dtype=torch.float64)
    options = dict(window=window, q_start=q_start, k_start=k_start, causal=False,
                   alibi_slopes=torch.rand(2) if alibi else None)
    for some in (inputs, inputs[:3]):  # with and without sinks
        actual, oracle = (run(f, some, douts, **options, **more)
                          for f, more in ((attention, dict(return_lse=True)), (dense, {})))
        for name in oracle:
            torch.testing.assert_close(actual[name], oracle[name], rtol=1e-10, atol=1e-11, msg=name)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("N, q_start, k_start, Tq, Tk", [
    (1, 5, 5, 20, 20), (16, 0, 0, 70, 70), (64, 0, 0, 150, 150),  # borders between the blocks
    (19, 0, 0, 57, 57), (23, 46, 46, 60, 60), (40, 53, 40, 20, 33),  # whole segments; a part; the last rows of one
    (24, 29, 24, 60, 65), (33, -40, -20, 60, 50), (9, 50, 45, 5, 20),  # from within a segment; some keys are not there
    (12, 0, 70, 20, 20), (12, 10**12 + 3, 10**12 - 2, 30, 40), (10**12 + 9, 10**12, 10**12, 20, 25), (7, 10**12, 0, 9, 9)])
def test_each_segment_is_a_call_of_its_own(N, q_start, k_start, Tq, Tk, causal, backend, monkeypatch):
    """Outputs and gradients, with lse and without, of the rows of each segment and the keys of that segment alone."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    q, k, v = inputs = [x.requires_grad_() for x in tensors((1, Tq, Tk, 0, 2, 1, 8), "contiguous", torch.float64)]
    dout, starts = torch.randn_like(q), (q_start, k_start)
    alone = torch.zeros_like(q)
    for number in {(q_start + i) // N for i in range(Tq)}:
        rows, keys = ([i for i in range(T) if (start + i) // N == number] for T, start in ((Tq, q_start), (Tk, k_start)))
        if keys:
            positions = (start + x[0] for x, start in zip((rows, keys), starts))
            alone = alone.index_copy(1, torch.tensor(rows), dense(
                q[:, rows], k[:, keys], v[:, keys], causal=causal, **dict(zip(("q_start", "k_start"), positions)))[0])
    expected = [alone, *torch.autograd.grad(alone, inputs, dout, materialize_grads=True)] if alone.requires_grad else [
        torch.zeros_like(x) for x in (q, *inputs)]
    for return_lse in (False, True) if backend == "reference" else (True,):  # without lse that is plain SDPA
        with poisoned_empty():
            out = attention(*inputs, segment=N, causal=causal, q_start=q_start, k_start=k_start, return_lse=return_lse)
            out = out[0] if return_lse else out
            actual = [out, *torch.autograd.grad(out, inputs, dout)]
        for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11, msg=name)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("N, lookback, q_start, k_start, Tq, Tk", [
    (16, 1, 0, 0, 70, 70), (24, 1, 29, 5, 60, 84), (7, 3, 40, 12, 30, 58),  # some keys in reach, and some before them
    (9, 2, 50, 45, 5, 20), (5, 1, -12, -20, 30, 40), (50, 10**12, 0, 0, 60, 60), (1, 0, 0, 0, 20, 20),
    (12, 10**12, 10**13 + 3, 10**12, 20, 25), (12, 3, 10**12 + 40, 10**12 - 2, 30, 40),  # an edge of the reach, far out
    (12, 3, 10**12, 0, 9, 9), (10**12, 1, 10**12 - 5, 10**12 - 9, 20, 24), (10**12, 1, 10**12 + 4, 10**12 - 9, 20, 24)])
def test_lookback(N, lookback, q_start, k_start, Tq, Tk, causal, backend, monkeypatch):
    """Every edge of the rows and keys in reach of each other, outputs and gradients, against a mask."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    inputs = tensors((1, Tq, Tk, 0, 2, 1, 8), "contiguous", torch.float64)
    douts = torch.randn_like(inputs[0]), torch.randn(1, 2, Tq, dtype=torch.float64)
    options = dict(segment=N, lookback=lookback, causal=causal, q_start=q_start, k_start=k_start)
    with poisoned_empty():
        actual = run(attention, inputs, douts, return_lse=True, **options)
    oracle = run(dense, inputs, douts, **options)
    for name in oracle:
        torch.testing.assert_close(actual[name], oracle[name], rtol=1e-10, atol=1e-11, msg=name)


XPOS = {  # Tq, Tk, S, H, G, D; the rest
    "gqa, part of the head": (90, 90, 0, 4, 2, 24, dict(xpos=14)),
    "offset": (40, 133, 0, 2, 1, 16, dict(xpos=16, q_start=93)),
    "far from the keys": (20, 90, 0, 2, 2, 16, dict(xpos=16, q_start=2100, k_start=3)),
    "window, sinks": (120, 120, 40, 2, 1, 16, dict(xpos=16, window=50)),
    "sinks without a window": (50, 30, 40, 2, 1, 16, dict(xpos=8, q_start=30, k_start=25)),
    "documents": (125, 125, 0, 2, 2, 16, dict(xpos=16, docs=True)),
    "segment, lookback": (120, 150, 0, 2, 1, 16, dict(xpos=16, segment=33, lookback=1, q_start=37, k_start=7)),
    "rows before the keys": (130, 130, 0, 2, 1, 16, dict(xpos=16, q_start=-70)),
}


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("case", XPOS)
def test_xpos(case, dtype, backend, monkeypatch):
    """Across chunks of 32 positions, every gradient alone, against the definition with factors from the first query."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    monkeypatch.setattr(sys.modules["kernels.attention"], "XPOS_CHUNK", 32)
    monkeypatch.setattr(sys.modules["kernels.attention"], "SPLIT_BLOCKS", 2)
    Tq, Tk, S, H, G, D, options = XPOS[case]
    options = dict(options)
    if options.pop("docs", False):
        options.update(dict.fromkeys(("q_docs", "k_docs"), torch.arange(Tq)[None] // 50))
    compare_xpos((1, Tq, Tk, S, H, G, D), dtype, options)


def compare_xpos(sizes, dtype, options):
    inputs = tensors(sizes, "contiguous", dtype)
    douts = [x.to(dtype).double() for x in (torch.randn(inputs[0].shape), torch.randn(sizes[0], sizes[4], sizes[1]))]
    with poisoned_empty():
        actual = run(attention, inputs, douts, return_lse=True, **options)
    oracle = run(dense, [x.double() for x in inputs], douts, **options)
    first, same_options = with_sinks(inputs, options)
    plain = same_maths(*first, douts, **same_options)
    for name, value in actual.items():
        assert_close_2x(value, oracle[name], plain[name].to(value.dtype), name)


def large_tiles(monkeypatch, block_m):
    """Tiles of the interpreter for many keys."""
    tiles = dict.fromkeys(("fwd", "dq", "dkdv"), (block_m, 512, 4, 1)) | dict(sinks=(block_m, 16, 4, 1))
    monkeypatch.setattr(sys.modules["kernels.attention"], "_tiles", lambda *_: (tiles, 16))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=lambda x: str(x)[6:])
def test_xpos_over_64k_keys(dtype, backend, monkeypatch):
    """The last 16 queries of 65,536 positions, and as many keys."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    large_tiles(monkeypatch, 16)
    compare_xpos((1, 16, 65536, 0, 1, 1, 16), dtype, dict(xpos=16, q_start=65536 - 16))


@pytest.mark.parametrize("backend, dtype", [
    ("triton", torch.float32), ("reference", torch.float16), ("reference", torch.bfloat16)], ids=str)
def test_xpos_over_64k_rows(backend, dtype, monkeypatch):
    """65,536 rows, sinks and a window: against the reference in float64, which test_xpos has checked."""
    T, S = 65536, 4
    large_tiles(monkeypatch, 512)
    inputs = tensors((1, T, T, S, 1, 1, 4), "contiguous", dtype)
    douts = [x.to(dtype).double() for x in (torch.randn(1, T, 1, 4), torch.randn(1, 1, T))]
    options = dict(xpos=4, window=600, return_lse=True)
    oracle = run(attention, [x.double() for x in inputs], douts, **options)
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    for name, value in run(attention, inputs, douts, **options).items():
        assert relative_error(value, oracle[name]) < 4 * torch.finfo(value.dtype).eps, name


@pytest.mark.parametrize("backend, dtype", [
    ("triton", torch.float16), ("reference", torch.float16), ("reference", torch.bfloat16)], ids=str)
def test_xpos_far_into_a_text(backend, dtype, monkeypatch):
    """At position 10^7, bit for bit what position 50 gives; over 10^7 positions, only the dims without xPos count."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    q, k, v, q_sink, k_sink, v_sink = inputs = tensors((1, 70, 70, 3, 2, 1, 16), "contiguous", dtype)
    douts = torch.randn(q.shape), torch.randn(1, 2, 70)
    near, far = (run(attention, inputs, douts, window=30, xpos=12, q_start=start, k_start=start, return_lse=True)
                 for start in (50, 10**7))
    for name, value in far.items():
        assert value.isfinite().all() and torch.equal(value, near[name]), name
    actual = run(attention, inputs[:3], douts, xpos=12, q_start=10**7, return_lse=True)
    expected = run(attention, inputs[:3], douts, xpos=None, q_start=10**7, return_lse=True)
    cut = run(attention, [x * (torch.arange(16) >= 12) for x in (q, k)] + [v], douts, q_start=10**7, return_lse=True)
    for name in ("out", "lse", "dv", "dq", "dk"):
        assert not torch.equal(actual[name], expected[name]) and actual[name].isfinite().all()
        torch.testing.assert_close(actual[name][..., 12:] if name[1:] in "qk" else actual[name],
                                   cut[name][..., 12:] if name[1:] in "qk" else cut[name])
    assert (actual["dq"][..., :12] == 0).all() and (actual["dk"][..., :12] == 0).all()


def test_reference_xpos_across_blocks_of_rows():
    """More rows than one block of the reference has."""
    inputs = tensors((1, 2100, 2100, 0, 1, 1, 4), "contiguous", torch.float64)
    douts = torch.randn_like(inputs[0]), torch.randn(1, 1, 2100, dtype=torch.float64)
    actual, oracle = (run(f, inputs, douts, xpos=4, **more) for f, more in ((attention, dict(return_lse=True)), (dense, {})))
    for name in oracle:
        torch.testing.assert_close(actual[name], oracle[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("wanted", range(6))
def test_each_gradient_alone(wanted, backend, monkeypatch):
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    inputs = tensors((1, 40, 40, 3, 2, 1, 8), "contiguous", torch.float64)
    inputs[wanted].requires_grad_()
    dout, options = torch.randn_like(inputs[0]), dict(window=9, alibi_slopes=torch.rand(2), xpos=6)
    actual, oracle = (torch.autograd.grad(f(*inputs[:3], sinks=tuple(inputs[3:]), **options), inputs[wanted], dout)[0]
                      for f in (attention, lambda *x, **y: dense(*x, **y)[0]))
    torch.testing.assert_close(actual, oracle, rtol=1e-10, atol=1e-12)


def rotated(x, positions):
    """RoPE in complex numbers: x (B, T, H, D) float64, positions (T,)."""
    D = x.shape[-1]
    inv_freq = 100.0 ** -(torch.arange(D // 2).double() / (D / 2))
    turns = torch.polar(torch.ones(()).double(), positions[:, None, None] * inv_freq)
    return torch.view_as_real(torch.complex(x[..., :D // 2], x[..., D // 2:]) * turns).mT.flatten(-2)


def streaming_llm(q, k, v, S, W, slopes):
    """StreamingLLM as published, token by token: a cache of un-rotated keys that evicts, positions counted within it."""
    cache_k, cache_v, outs = k[:, :0], v[:, :0], []
    for t in range(q.shape[1]):
        cache_k, cache_v = (torch.cat([cache, x[:, t:t + 1]], 1) for cache, x in ((cache_k, k), (cache_v, v)))
        if cache_k.shape[1] > S + W:
            cache_k, cache_v = (torch.cat([x[:, :S], x[:, S + 1:]], 1) for x in (cache_k, cache_v))
        positions = torch.arange(cache_k.shape[1])
        last = q[:, t:t + 1]
        if slopes is None:
            outs.append(dense(rotated(last, positions[-1:]), rotated(cache_k, positions), cache_v, causal=False)[0])
        else:
            outs.append(dense(last, cache_k, cache_v, q_start=len(positions) - 1, alibi_slopes=slopes)[0])
    return torch.cat(outs, 1)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_streaming_llm(position, backend, monkeypatch):
    """One call over the whole text, and one per chunk, equal the token by token loop far past the first eviction."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    T, S, W = 70, 3, 11
    q, k, v = (torch.randn(1, T, h, 8, dtype=torch.float64) for h in (2, 1, 1))
    slopes, t = torch.rand(2) if position == "alibi" else None, torch.arange(T)
    expected = streaming_llm(q, k, v, S, W, slopes)
    q_sink, k_sink = q, k[:, :S]
    if position == "rope":
        q_sink, k_sink = rotated(q, t.clamp(max=S + W - 1)), rotated(k_sink, t[:S])
        q, k = rotated(q, t), rotated(k, t)
    for chunk in (T, 33, 1):
        for first in range(0, T, chunk) if chunk > 1 else (0, 13, 14, 60):
            rows, keys = slice(first, first + chunk), slice(max(0, first - W + 1), first + chunk)  # what a state holds
            out = attention(q[:, rows], k[:, keys], v[:, keys], sinks=(q_sink[:, rows], k_sink, v[:, :S]), window=W,
                            alibi_slopes=slopes, q_start=first, k_start=keys.start)
            torch.testing.assert_close(out, expected[:, rows], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("causal", [True, False])
def test_other_segments_are_not_visited(causal, backend, monkeypatch):
    """NaN in rows, keys and values of the other segments goes unnoticed: forward and backward, in the last and the first."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    N, T = 48, 144
    inputs = tensors((1, T, T, 0, 2, 1, 8), "contiguous", torch.float64)
    douts = torch.randn_like(inputs[0]), torch.randn(1, 2, T, dtype=torch.float64)
    expected = run(attention, inputs, douts, segment=N, causal=causal, return_lse=True)
    for nan, left in ((slice(0, 96), slice(96, 144)), (slice(48, 144), slice(0, 48))):
        poisoned = [x.clone() for x in inputs]
        for x in poisoned:
            x[:, nan] = torch.nan
        actual = run(attention, poisoned, douts, segment=N, causal=causal, return_lse=True)
        for name in ("out", "dq", "dk", "dv"):
            torch.testing.assert_close(actual[name][:, left], expected[name][:, left], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_segments_out_of_reach_are_not_visited(backend, monkeypatch):
    """NaN two segments back goes unnoticed with a lookback of one, and NaN two segments on in the keys' gradients."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    N, T = 64, 256
    inputs = tensors((1, T, T, 0, 1, 1, 8), "contiguous", torch.float64)
    douts = torch.randn_like(inputs[0]), torch.randn(1, 1, T, dtype=torch.float64)
    options = dict(segment=N, lookback=1, xpos=8, return_lse=True)
    expected = run(attention, inputs, douts, **options)
    for nan, rows, keys in ((slice(0, 64), slice(128, T), slice(128, T)), (slice(128, T), slice(0, 128), slice(0, 64))):
        poisoned = [x.clone() for x in inputs]
        for x in poisoned:
            x[:, nan] = torch.nan
        actual = run(attention, poisoned, douts, **options)
        for name, left in (("out", rows), ("dq", rows), ("dk", keys), ("dv", keys)):
            torch.testing.assert_close(actual[name][:, left], expected[name][:, left], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_keys_out_of_the_window_are_not_visited(backend, monkeypatch):
    """NaN in keys and values that no row sees, and in rows for the gradients of keys they do not see, goes unnoticed."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    T, W, S = 120, 10, 3
    inputs = tensors((1, T, T, S, 2, 1, 8), "contiguous", torch.float64)
    douts = torch.randn_like(inputs[0]), torch.randn(1, 2, T, dtype=torch.float64)
    expected = run(attention, inputs, douts, window=W, return_lse=True)
    q, k, v, *sinks = inputs
    late = 64  # rows from here on see keys from 55 on; keys before 48 lie in other blocks
    k_nan, v_nan = (x.clone().index_fill_(1, torch.arange(48), torch.nan) for x in (k, v))
    actual = run(attention, [q[:, late:], k_nan, v_nan, sinks[0][:, late:], *sinks[1:]],
                 [douts[0][:, late:], douts[1][:, :, late:]], window=W, q_start=late, return_lse=True)
    for name in ("out", "dq", "dq_sink"):
        torch.testing.assert_close(actual[name], expected[name][:, late:], rtol=1e-10, atol=1e-12, msg=name)
    assert (actual["dk"][:, :48] == 0).all() and actual["dk"].isfinite().all()
    late = 112  # rows from here on do not see the keys before 48, and lie in blocks of rows that do not either
    q_nan = q.clone().index_fill_(1, torch.arange(late, T), torch.nan)
    actual = run(attention, [q_nan, *inputs[1:]], douts, window=W, return_lse=True)
    for name in ("dk", "dv"):
        torch.testing.assert_close(actual[name][:, :48], expected[name][:, :48], rtol=1e-10, atol=1e-12, msg=name)


def test_reference_work_grows_with_the_window():
    """Products over T = 4096 rows and W = 512 keys each, sinks included: at most 1.25 times those that count."""
    T, W, H, D = 4096, 512, 2, 16
    q, k, v = (torch.randn(1, T, H, D) for _ in range(3))
    sinks, rest = (q, k[:, :4], v[:, :4]), (None, None, None, 0.25, True, W, None, 0, None, 0, 0)
    with FlopCounterMode(display=False) as forward:
        out, lse = _attention_fwd_ref(q, k, v, *sinks, *rest, torch.float32)
    with FlopCounterMode(display=False) as backward:
        _attention_bwd_ref(out, lse, q, k, v, *sinks, out, lse, *rest, q.dtype)
    useful = 4 * H * D * T * (W + 4)
    assert useful < forward.get_total_flops() < 1.25 * useful
    assert backward.get_total_flops() < 1.25 * 2.5 * useful
    with FlopCounterMode(display=False) as segments:  # half of a segment's scores count
        _attention_fwd_ref(q, k, v, *6 * (None,), 0.25, True, None, W, 0, None, 0, 0, torch.float32)
    assert segments.get_total_flops() == 4 * H * D * T * W


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("options", [dict(), dict(segment=20), dict(segment=20, lookback=1), dict(xpos=16)], ids=str)
@pytest.mark.parametrize("return_lse", [False, True])
def test_future_leak(backend, return_lse, options, monkeypatch):
    """Keys and values from t on are replaced by others: rows before t do not change by a bit."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    q, k, v = (torch.randn(2, 70, 2, 16) for _ in range(3))
    first = attention(q, k, v, return_lse=return_lse, **options)
    for t in (69, 33, 16, 1):  # each change keeps the keys before t
        k[:, t:], v[:, t:] = torch.randn_like(k[:, t:]) * 100, torch.randn_like(v[:, t:]) * 100
        second = attention(q, k, v, return_lse=return_lse, **options)
        for x, y in zip(first, second) if return_lse else [(first, second)]:
            x, y = (a if a.shape[1] == 70 else a.transpose(1, 2) for a in (x, y))
            assert torch.equal(x[:, :t], y[:, :t])
        assert not torch.equal(x[:, t:], y[:, t:])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_out_dtype(backend, monkeypatch):
    """A partial result leaves in float32 although the inputs are float16, and is closer to the truth for it."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    q, k, v = (torch.randn(1, 40, 2, 32).half() for _ in range(3))
    oracle = dense(q.double(), k.double(), v.double())[0]
    out = attention(q, k, v, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert (out - oracle).norm() < (attention(q, k, v) - oracle).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("options", [dict(), dict(causal=False), dict(docs=True), dict(window=1020), dict(xpos=16)], ids=str)
def test_reference_memory_is_bounded(options, dtype):
    """At T = 8192 the scores are 512 MiB in float32; forward and backward keep a few blocks of 2^23 of them."""
    T, H, D = 8192, 2, 16
    q, k, v = (torch.randn(1, T, H, D, dtype=dtype) for _ in range(3))
    docs = dict.fromkeys(("q_docs", "k_docs"), torch.arange(T)[None] // 3000) if "docs" in options else {}
    sinks = (q, k[:, :4], v[:, :4]) if "window" in options else 3 * (None,)
    rest = (None, docs.get("q_docs"), docs.get("k_docs"), 0.25, options.get("causal", True), options.get("window"), None, 0,
            options.get("xpos"), 0, 0)
    with LiveBytes() as live:
        out, lse = _attention_fwd_ref(q, k, v, *sinks, *rest, dtype)
        _attention_bwd_ref(out, lse, q, k, v, *sinks, out, lse, *rest, q.dtype)
    assert live.peak < 4 * 2**23 * 4 + 20 * q.nbytes, f"{live.peak / 2**20:.0f} MiB"


def test_64_bit_offsets(triton_kernels, tmp_path):
    """Rows more than 2^31 elements from the tensor's start, in a sparse file: batch and token strides are both huge."""
    T, D = 40, 16
    path = tmp_path / "sparse"
    huge = torch.from_file(str(path), shared=True, size=2**31 + 2**27, dtype=torch.float16)
    try:
        for shape, stride in (((2, T, 1, D), (2**31 + 64, D, D, 1)), ((1, 273, 1, D), (0, 2**23 - 8, D, 1))):
            k = huge.as_strided(shape, stride)
            k.copy_(torch.randn(shape))
            q = torch.randn(shape[0], 20, 1, D).half()
            douts = torch.randn(q.shape), torch.randn(shape[0], 1, 20)
            actual = run(attention, (q, k, k), douts, causal=False, return_lse=True)
            expected = run(attention, (q, k.contiguous(), k.contiguous()), douts, causal=False, return_lse=True)
            for name in expected:
                assert torch.equal(actual[name], expected[name]), name
    finally:
        del huge
        path.unlink()


def test_doc_ranges():
    """Every pair of equal ids lies in its blocks' range, for ids in any order; for sorted ids the range is tight."""
    for ordered in (True, False):
        for _ in range(20):
            a, b = torch.randint(0, 6, (2, 53)), torch.randint(0, 6, (2, 71))
            if ordered:
                a, b = a.sort(1).values, b.sort(1).values
            lo, hi = _doc_ranges(a, b, 8, 16)
            for i in range(2):
                for block in range(lo.shape[1]):
                    equal = (a[i, block * 8:block * 8 + 8, None] == b[i, None]).any(0).nonzero().flatten() // 16
                    if len(equal):
                        assert lo[i, block] <= equal.min() and equal.max() < hi[i, block]
                        if ordered and len(a[i, block * 8:block * 8 + 8].unique()) == 1:
                            assert lo[i, block] == equal.min() and hi[i, block] == equal.max() + 1


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_merge_is_attention_over_the_union(backend, monkeypatch):
    """Three parts of the keys, one of which the first rows do not see, merged: out, lse and gradients of the whole."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    q, k, v = (torch.randn(2, 40, h, 16, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))

    def by_parts(q, k, v):
        parts = [attention(q, k[:, a:b], v[:, a:b], q_start=0, k_start=a, return_lse=True)
                 for a, b in ((20, 29), (0, 20), (29, 40))]
        return merge_attention(*merge_attention(*parts[0], *parts[1]), *parts[2])

    douts = torch.randn_like(q), torch.randn(2, 4, 40, dtype=torch.float64)
    actual, oracle = run(by_parts, (q, k, v), douts), run(dense, (q, k, v), douts)
    for name in oracle:
        torch.testing.assert_close(actual[name], oracle[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_merge_of_nothing(backend, monkeypatch):
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    out_a, out_b = (torch.randn(1, 3, 2, 8, requires_grad=True) for _ in range(2))
    lse_a, lse_b = (torch.randn(1, 2, 3).index_fill_(2, torch.tensor([1]), -torch.inf).requires_grad_()
                    for _ in range(2))
    with torch.no_grad():
        lse_b[:, :, 2] = -torch.inf
        out_a[:, 1], out_b[:, 1:] = 0, 0
    out, lse = merge_attention(out_a, lse_a, out_b, lse_b)
    assert (out[:, 1] == 0).all() and (lse[:, :, 1] == -torch.inf).all()
    torch.testing.assert_close(out[:, 2], out_a[:, 2])
    torch.testing.assert_close(lse[:, :, 2], lse_a[:, :, 2])
    douts = [torch.randn_like(out), torch.randn_like(lse)]
    for grad in torch.autograd.grad([out, lse], (out_a, lse_a, out_b, lse_b), douts):
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=lambda x: str(x)[6:])
def test_merge_2x(dtype, triton_kernels):
    outs = [torch.randn(2, 37, 3, 24).to(dtype) for _ in range(2)]
    lses = [torch.randn(2, 3, 37) * 3 for _ in range(2)]
    inputs = [outs[0], lses[0], outs[1], lses[1]]
    douts = torch.randn(2, 37, 3, 24), torch.randn(2, 3, 37)

    def results(f, *args):
        args = [x.detach().requires_grad_() for x in args]
        values = f(*args)
        return (*values, *torch.autograd.grad(values, args, [d.to(y.dtype) for d, y in zip(douts, values)]))

    with poisoned_empty():
        actual = results(merge_attention, *inputs)
    assert actual[0].dtype == actual[1].dtype == torch.float32
    oracle = results(merge_attention_ref, *(x.double() for x in inputs))
    plain = results(merge_attention_ref, *inputs)
    for name, a, o, p in zip(("out", "lse", "dout_a", "dlse_a", "dout_b", "dlse_b"), actual, oracle, plain):
        assert_close_2x(a, o, p, name)


def test_opcheck(triton_kernels):
    q, k, v = (torch.randn(1, t, h, 16, requires_grad=True) for t, h in ((20, 2), (24, 1), (24, 1)))
    docs = torch.zeros(1, 20, dtype=torch.int64), torch.zeros(1, 24, dtype=torch.int64)
    for sinks, slopes, window, segment, xpos in (
            (3 * (None,), None, None, None, None), ((q, k[:, :3], v[:, :3]), torch.rand(2), 9, 7, 16)):
        inputs = [x if x is None else x.detach() for x in (q, k, v, *sinks)]
        rest = slopes, *docs, 0.25, True, window, segment, 1, xpos, 4, 0
        out, lse = torch.ops.nanolong.attention_fwd(*inputs, *rest, torch.float32, True)
        torch.library.opcheck(torch.ops.nanolong.attention_fwd.default, (*inputs, *rest, torch.float32, True))
        torch.library.opcheck(torch.ops.nanolong.attention_bwd.default,
                               (out, lse, *inputs, out, lse, *rest, torch.float32, True))
    torch.library.opcheck(torch.ops.nanolong.merge_attention_fwd.default, (out, lse, out, lse))
    torch.library.opcheck(torch.ops.nanolong.merge_attention_bwd.default, (out, lse) * 4)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_whole(backend, monkeypatch):
    """torch.compile(fullgraph=True), forward and backward, equal to eager; another offset gives another result."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    torch.compiler.reset()

    def f(q, k, v, start):
        out, lse = attention(q, k, v, q_start=start, return_lse=True)
        out = out + attention(q, k, v, segment=6, q_start=start, k_start=start)
        out = out + attention(q, k, v, segment=4, lookback=1, xpos=8, q_start=start, k_start=start)
        return merge_attention(out, lse, *attention(q, k, v, window=5, sinks=(q, k[:, :3], v[:, :3]), q_start=start,
                                                    k_start=start, return_lse=True))[0]

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    q, k, v = (torch.randn(1, 20, 2, 16, requires_grad=True) for _ in range(3))
    dout = torch.randn(1, 20, 2, 16)
    for start in (0, 5, 9):
        out, ref = compiled(q, k, v, start), f(q, k, v, start)
        torch.testing.assert_close(out, ref)
        for a, b in zip(torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(ref, (q, k, v), dout)):
            torch.testing.assert_close(a, b)
    torch.compiler.reset()


@pytest.mark.parametrize("change, message", [
    (dict(k=(1, 8, 3, 16), v=(1, 8, 3, 16)), "4 query heads are not a multiple of 3"),
    (dict(k=(1, 8, 2, 8)), r"k \(1, 8, 2, 8\), v \(1, 8, 2, 16\)"),
    (dict(scale=-1.0), "scale is -1.0"),
    (dict(q_docs=torch.zeros(1, 8, dtype=torch.int64)), "pass both or neither"),
    (dict(q_docs=torch.zeros(1, 8), k_docs=torch.zeros(1, 8)), "document ids must be integers"),
    (dict(q_docs=torch.zeros(1, 8, dtype=torch.int32), k_docs=torch.zeros(1, 9, dtype=torch.int32)),
     r"must be \(1, 8\) and \(1, 8\)"),
    (dict(window=0), "window is 0, it must be at least 1"),
    (dict(segment=0), "segment is 0, it must be at least 1"),
    (dict(lookback=1), "lookback is 1 and segment None"), (dict(segment=4, lookback=-1), "lookback is -1 and segment 4"),
    (dict(xpos=7), "xpos is 7, it must be an even number from 2 to the head dim, 16"), (dict(xpos=18), "xpos is 18"),
    (dict(xpos=0), "xpos is 0"), (dict(xpos=8, causal=False), "xpos is 8 and causal False"),
    (dict(sinks=((1, 8, 4, 16), (1, 3, 4, 16), (1, 3, 4, 16))),
     r"\(1, 3, 4, 16\): they must be q_sink \(1, 8, 4, 16\) like q, k_sink and v_sink \(1, S, 2, 16\)"),
    (dict(sinks=((1, 7, 4, 16), (1, 3, 2, 16), (1, 3, 2, 16))), r"q_sink \(1, 8, 4, 16\) like q"),
    (dict(sinks=((1, 8, 4, 16), (1, 3, 2, 16))), "sinks are 2 tensors"),
    (dict(alibi_slopes=torch.rand(2)), r"alibi_slopes are \(2,\), they must be one per query head, \(4,\)"),
    (dict(q=(1, 8, 4, 512), k=(1, 8, 2, 512), v=(1, 8, 2, 512)), "head dim 512 is more than 256")])
def test_wrong_arguments(change, message):
    shapes = dict(q=(1, 8, 4, 16), k=(1, 8, 2, 16), v=(1, 8, 2, 16))
    shapes.update({name: change.pop(name) for name in list(change) if name in shapes})
    if "sinks" in change:
        change["sinks"] = tuple(torch.zeros(shape) for shape in change["sinks"])
    with pytest.raises(ValueError, match=message):
        attention(*(torch.zeros(shape) for shape in shapes.values()), **change)
    with pytest.raises(ValueError, match="must be equal"):
        attention(torch.zeros(1, 8, 2, 16), torch.zeros(1, 8, 2, 16).half(), torch.zeros(1, 8, 2, 16).half())
    x = torch.zeros(1, 8, 2, 16)
    with pytest.raises(ValueError, match="sinks are torch.float32, torch.float16, torch.float16, q is torch.float32"):
        attention(x, x, x, sinks=(x, x.half(), x.half()))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_alibi_far_into_a_text(backend, monkeypatch):
    """Positions around 2^31 give what positions around 1000 give: only distances and the cache's positions count."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    q, k, v, k_sink, v_sink = (torch.randn(1, n, 2, 16, dtype=torch.float64) for n in (40, 55, 55, 3, 3))
    options = dict(window=16, sinks=(q, k_sink, v_sink), alibi_slopes=torch.tensor([0.3, 0.05]))
    near = attention(q, k, v, q_start=1000, k_start=985, **options)
    for start in (2**31 - 60, 2**31 - 10, 2**31 + 100, 2**40):
        far = attention(q, k, v, q_start=start, k_start=start - 15, **options)
        torch.testing.assert_close(far, near, rtol=1e-12, atol=1e-12)
