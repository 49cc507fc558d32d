"""
kernels/decode.py: the Triton kernels and the reference against StreamingLLM's loop written out, a list of tokens per
cache, and apply_sink_logit against a softmax with one more logit.
"""

import math
import random

import pytest
import torch
from helpers import assert_close_2x, guarded, poisoned_empty

from kernels import apply_sink_logit, attention, decode_attention, rope, rope_frequencies, rope_turns
from kernels.decode import LN2, _decode_attention, decode_attention_ref

BACKENDS = ["triton", "reference"]


# ---- the oracle

def rotated(x, position, inv_freq, factor):
    """One head's vector x (D,), rotated in pairs (i, i + R), the angle below a turn in float32 as x's sums are."""
    R = inv_freq.shape[0]
    angle = (position * inv_freq % (2 * math.pi)).to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = (angle.cos() * factor).to(x.dtype), (angle.sin() * factor).to(x.dtype)
    a, b = x[:R], x[R:2 * R]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[2 * R:]))


def one_head(q, keys, values, inv_freq, factor, slope, scale, xpos=None):
    """The query (D,) after the cached tokens (n, D), their positions 0 .. n - 1: (out, lse) by a dense softmax."""
    last = len(keys) - 1
    if xpos is not None:  # a pair shares its factor, so these may be taken before the rotation
        zeta = [(2 * (i % (xpos // 2)) / xpos + 0.4) / 1.4 if i < xpos else 1.0 for i in range(len(q))]
        zeta = torch.tensor(zeta, dtype=torch.float64)
        keys = [(k * zeta ** ((last - c) / 512)).to(k.dtype) for c, k in enumerate(keys)]
    if inv_freq is not None:
        q, keys = rotated(q, last, inv_freq, factor), [rotated(k, c, inv_freq, factor) for c, k in enumerate(keys)]
    scores = torch.stack(keys) @ q * scale
    if slope is not None:
        scores = scores - slope.to(q.dtype) * (last - torch.arange(last + 1)).to(q.dtype)
    return scores.softmax(0) @ torch.stack(values), scores.logsumexp(0)


def streaming(q, cached, G, inv_freq=None, attention_factor=1.0, alibi_slopes=None, scale=None, xpos=None):
    """StreamingLLM's step: q (H, D) and the cache, a list of (key (G, D), value (G, D)) in order -> (H, D), (H,)."""
    H, D = q.shape
    heads = [one_head(q[h], [k[h // (H // G)] for k, _ in cached], [v[h // (H // G)] for _, v in cached], inv_freq,
                      attention_factor, None if alibi_slopes is None else alibi_slopes[h],
                      D ** -0.5 if scale is None else scale, xpos) for h in range(H)]
    return torch.stack([out for out, _ in heads]), torch.stack([lse for _, lse in heads])


def from_ring(q, k, v, position, sinks=0, segment=None, lookback=0, **options):
    """
    The oracle for a filled ring: its tokens are put in a list, oldest first, sinks at the front; those of segments that are
    not seen are dropped (the distances between the others stay).
    """
    B, _, H, D = q.shape
    N, G = k.shape[1:3]
    tokens = [t for t in range(min(sinks, position + 1))] + [
        t for t in range(max(sinks, position - (N - sinks) + 1), position + 1)
        if segment is None or position // segment - t // segment <= lookback]
    slots = [t if t < sinks else sinks + (t - sinks) % (N - sinks) for t in tokens]
    rows = [streaming(q[b, 0], [(k[b, s], v[b, s]) for s in slots], G, **options) for b in range(B)]
    return torch.stack([out for out, _ in rows])[:, None], torch.stack([lse for _, lse in rows])[..., None]


def compare(results):
    """[(actual, oracle, plain torch)], each (out, lse): all positions together, since one lse may be close to 0."""
    for i, name in enumerate(("out", "lse")):
        actual, oracle, plain = (torch.stack([result[i] for result in each]) for each in zip(*results))
        assert_close_2x(actual, oracle, plain.to(actual.dtype), name)


# ---- decode_attention

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position", ["rope", "both", "none"])
def test_stream(position, backend, monkeypatch):
    """A text of 46 tokens through a cache of 3 sinks and a window of 14: every step, over two turns of the ring."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    B, H, G, D, S, W, T = 2, 2, 1, 16, 3, 14, 46
    options = dict(inv_freq=None if position == "none" else rope_frequencies(D)[0], attention_factor=1.2,
                   alibi_slopes=torch.tensor([0.5, 0.25]) if position == "both" else None)
    q, k, v = (torch.randn(T, B, heads, D, dtype=torch.float64) for heads in (H, G, G))
    ring_k, ring_v = (torch.full((B, S + W, G, D), torch.nan, dtype=torch.float64) for _ in range(2))
    caches = [[] for _ in range(B)]
    for t in range(T):
        slot = t if t < S else S + (t - S) % W
        ring_k[:, slot], ring_v[:, slot] = k[t], v[t]
        out, lse = decode_attention(q[t][:, None], ring_k, ring_v, t, sinks=S, return_lse=True, **options)
        for b, cache in enumerate(caches):
            cache.append((k[t, b], v[t, b]))
            if len(cache) > S + W:
                del cache[S]  # the oldest that is no sink
            expected, expected_lse = streaming(q[t, b], cache, G, **options)
            torch.testing.assert_close(out[b, 0], expected, rtol=1e-9, atol=1e-11, msg=f"token {t}")
            torch.testing.assert_close(lse[b, :, 0], expected_lse, rtol=1e-9, atol=1e-11, msg=f"token {t}")


CASES = {  # B, H, G, D, R (rotated pairs), S, W; slopes
    "whole head": (2, 4, 2, 64, 32, 4, 61, False),
    "head dim 8, no sinks": (1, 2, 2, 8, 4, 0, 37, False),
    "a quarter of the head": (1, 4, 1, 80, 10, 1, 40, False),
    "head dim 96, both": (1, 3, 3, 96, 48, 4, 33, True),
    "head dim 128, alibi": (2, 2, 1, 128, 0, 4, 45, True),
    "no positions": (1, 2, 1, 64, 0, 4, 29, False),
    "window of one": (2, 2, 2, 16, 8, 4, 1, True),
    "one slot": (1, 2, 1, 16, 8, 0, 1, False),
    "xpos, sinks": (2, 4, 2, 32, 16, 4, 45, False),
    "xpos, part of the head": (1, 2, 1, 24, 7, 0, 50, True),
    "segments": (1, 2, 1, 16, 8, 0, 70, False),
    "xpos, segments": (2, 2, 2, 16, 8, 0, 53, False),
    "more heads than one program's": (1, 35, 1, 16, 4, 1, 50, True),
}


def inputs(case, dtype):
    """q, a ring of which every slot is written, and decode_attention's other arguments."""
    B, H, G, D, R, S, W, alibi = CASES[case]
    q, k, v = (torch.randn(B, n, h, D, dtype=torch.float64).to(dtype) for n, h in ((1, H), (S + W, G), (S + W, G)))
    options = dict(sinks=S)
    if R:
        options.update(inv_freq=rope_frequencies(2 * R)[0], attention_factor=1.25, xpos=2 * R if "xpos" in case else None)
    if "segments" in case:
        options.update(segment=19, lookback=1)
    if alibi:
        options["alibi_slopes"] = torch.rand(H) / 5
    return (q, k, v), options, S + W


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("case", CASES)
def test_values(case, dtype, backend, monkeypatch):
    """Before the ring is full, at its edge, after some turns, and far out; slots not written yet are NaN."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    (q, k, v), options, N = inputs(case, dtype)
    results, doubles = [], [x.double() for x in (q, k, v)]
    for position in sorted({0, N - 2, N - 1, N, 5 * N + 2, 10**7 + 13} - {-1}):
        ring = [x.clone() for x in (k, v)]
        for x in ring:
            x[:, position + 1:] = torch.nan
        guards = [guarded(x) for x in (q, *ring)]
        with poisoned_empty():
            actual = decode_attention(*(x.tensor for x in guards), position, return_lse=True, **options)
        for guard in guards:
            guard.check()
        results.append((actual, *(from_ring(*x, position, **options) for x in (doubles, (q, k, v)))))
    compare(results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(8))
def test_random_draws(seed, backend, monkeypatch):
    """Sizes, dtype, layout and position at random: the ring a view into a larger buffer, or stored heads first."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    rng = random.Random(seed)
    B, G, group, D = rng.choice([2, 3]), rng.choice([1, 2]), rng.choice([2, 3]), rng.choice([8, 24, 33, 64])
    S, W = rng.choice([0, 1, 4]), rng.choice([1, 15, 32, 70])
    options = dict(sinks=S, scale=rng.choice([None, 0.2]))
    if rng.random() < 0.7:
        options["inv_freq"] = rope_frequencies(2 * rng.randint(1, D // 2))[0]
    if rng.random() < 0.5:
        options["alibi_slopes"] = torch.rand(2 * G * group)[::2] / 5
    if "inv_freq" in options and rng.random() < 0.5:
        options["xpos"] = 2 * len(options["inv_freq"])
    if not S:
        options.update(segment=rng.randint(1, 60), lookback=rng.choice([0, 1, 2, 10**6]))
    torch.manual_seed(seed)
    dtype = rng.choice([torch.float16, torch.float32, torch.float64])
    q = torch.randn(B, 1, D, G * group).to(dtype).transpose(2, 3)  # its last dim is not contiguous
    if rng.random() < 0.5:
        k, v = torch.randn(B, S + W + 9, 2, G, D + 8).to(dtype)[:, 5:5 + S + W, ..., 3:3 + D].unbind(2)
    else:
        k, v = torch.randn(2, B, G, S + W, D).to(dtype).transpose(2, 3)
    guards = [guarded(x) for x in (q, k, v)]
    results, doubles = [], [x.double() for x in (q, k, v)]
    for position in (rng.randint(0, S + W), rng.randint(S + W, 10**12)):
        with poisoned_empty():
            actual = decode_attention(*(x.tensor for x in guards), position, return_lse=True, **options)
        results.append((actual, *(from_ring(*x, position, **options) for x in (doubles, (q, k, v)))))
    compare(results)
    for guard in guards:
        guard.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_attention_while_nothing_is_evicted(backend, monkeypatch):
    """The last row of `attention` with sinks and a window, one step after another."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    q, k, v = (torch.randn(1, 30, h, 16, dtype=torch.float64) for h in (4, 2, 2))
    whole, whole_lse = attention(q, k, v, return_lse=True)
    for t in (0, 5, 29):
        out, lse = decode_attention(q[:, t:t + 1], k, v, t, sinks=4, return_lse=True)
        torch.testing.assert_close(out[:, 0], whole[:, t], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(lse[..., 0], whole_lse[..., t], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [dict(xpos=16), dict(segment=12), dict(segment=7, lookback=2, xpos=16)], ids=str)
def test_equals_the_last_row_of_attention(options, backend, monkeypatch):
    """Of keys rotated one after another: xPos and segments, in a ring that has room for what is seen."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    q, k, v = (torch.randn(1, 50, h, 16, dtype=torch.float64) for h in (4, 2, 2))
    inv_freq, N = rope_frequencies(16)[0], 50 if "segment" not in options else 24
    rotated_q, rotated_k = (rope(x, torch.arange(50), inv_freq) for x in (q, k))
    whole, whole_lse = attention(rotated_q, rotated_k, v, return_lse=True, **options)
    ring_k, ring_v = (torch.full((1, N, 2, 16), torch.nan, dtype=torch.float64) for _ in range(2))
    for t in range(50):
        ring_k[:, t % N], ring_v[:, t % N] = k[:, t], v[:, t]
        if t in (0, 11, 12, 23, 24, 37, 49):
            out, lse = decode_attention(q[:, t:t + 1], ring_k, ring_v, t, inv_freq=inv_freq, return_lse=True, **options)
            torch.testing.assert_close(out[:, 0], whole[:, t], rtol=1e-7, atol=1e-8)
            torch.testing.assert_close(lse[..., 0], whole_lse[..., t], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_out_of_reach_are_not_read(backend, monkeypatch):
    """NaN in them goes unnoticed, and a cache of 2000 slots costs no more blocks than the segments have."""
    monkeypatch.setenv("NANOLONG_KERNELS", "reference")
    q, k, v = (torch.randn(1, n, h, 16) for n, h in ((1, 2), (2000, 1), (2000, 1)))
    expected = decode_attention(q, k, v, 1990, segment=50, lookback=1, alibi_slopes=torch.rand(2).fill_(0.1))
    k[:, :1850], v[:, :1850] = torch.nan, torch.nan
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    actual = decode_attention(q, k, v, 1990, segment=50, lookback=1, alibi_slopes=torch.rand(2).fill_(0.1))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_position_as_a_tensor(backend, monkeypatch):
    """Bit for bit what the int gives, also for other shapes of one element and turns instead of frequencies."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    (q, k, v), options, N = inputs("head dim 8, no sinks", torch.float32)
    for position in (2, N, 10**9):
        expected = decode_attention(q, k, v, position, return_lse=True, **options)
        for tensor in (torch.tensor(position), torch.tensor([position]), torch.tensor([[7, position]])[:, 1:]):
            actual = decode_attention(q, k, v, tensor, return_lse=True,
                                      **dict(options, inv_freq=rope_turns(options["inv_freq"])))
            assert all(map(torch.equal, actual, expected))
        assert torch.equal(decode_attention(q, k, v, position, **options), expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sees_nothing(backend, monkeypatch):
    """A position below 0, which only a tensor can hold; no sequence at all."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    (q, k, v), options, _ = inputs("head dim 96, both", torch.float32)
    for position in (-1, -(10**10)):
        out, lse = decode_attention(q, k * torch.nan, v * torch.nan, torch.tensor([position]), return_lse=True, **options)
        assert (out == 0).all() and (lse == -torch.inf).all()
    out, lse = decode_attention(q[:0], k[:0], v[:0], 3, return_lse=True, **options)
    assert out.shape == (0, 1, 3, 96) and lse.shape == (0, 3, 1)


def test_bits_do_not_depend_on_what_was_evicted(triton_kernels):
    """The same tokens at another turn of the ring, so in other slots: the same blocks, the same bits."""
    (q, k, v), options, N = inputs("whole head", torch.float32)
    S, W = options["sinks"], N - options["sinks"]
    first = decode_attention(q, k, v, 3 * W + S - 1, **options)
    for turn in (1, 30, W - 1):
        moved_k, moved_v = (torch.cat((x[:, :S], x[:, S:].roll(turn, 1)), 1) for x in (k, v))
        assert torch.equal(decode_attention(q, moved_k, moved_v, 3 * W + S - 1 + turn, **options), first)


def test_64_bit_offsets(triton_kernels, tmp_path):
    """A ring whose slots, heads and batch lie more than 2^31 elements apart, in a sparse file."""
    path = tmp_path / "sparse"
    huge = torch.from_file(str(path), shared=True, size=2**31 + 2**27, dtype=torch.float16)
    try:
        for shape, stride in (((2, 20, 1, 16), (2**31 + 64, 16, 16, 1)), ((1, 20, 2, 16), (0, 32, 2**31, 1)),
                              ((1, 266, 1, 16), (0, 2**23 - 8, 16, 1))):
            ring = huge.as_strided(shape, stride)
            ring.copy_(torch.randn(shape))
            q = torch.randn(shape[0], 1, 2, 16).half()
            far, near = (decode_attention(q, x, x, 1000, sinks=4, inv_freq=rope_frequencies(16)[0], return_lse=True)
                         for x in (ring, ring.contiguous()))
            assert all(map(torch.equal, far, near))
    finally:
        del huge
        path.unlink()


def test_opcheck(triton_kernels):
    (q, k, v), options, _ = inputs("whole head", torch.float32)
    turns = rope_turns(options["inv_freq"])
    for arguments in ((turns, torch.rand(4), None, None, 0), (None, None, None, None, 0), (turns, None, 64, 16, 1)):
        torch.library.opcheck(torch.ops.nanolong.decode_attention.default,
                              (q, k, v, torch.tensor([7]), *arguments, 4, 1.0, 0.125))
    out, lse = _decode_attention(q, k, v, torch.tensor([7]), turns, None, None, None, 0, 4, 1.0, 0.125)
    reference = decode_attention_ref(q, k, v, torch.tensor([7]), sinks=4, inv_freq=turns, scale=0.125)
    torch.testing.assert_close((out, lse * LN2.value), reference)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_compiles_whole(backend, monkeypatch):
    """torch.compile(fullgraph=True), the position an int or a tensor; one graph serves every position."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    torch.compiler.reset()
    (q, k, v), options, N = inputs("head dim 8, no sinks", torch.float32)
    z, options = torch.randn(2), dict(options, xpos=8, segment=10, lookback=1)

    def step(position):
        return apply_sink_logit(*decode_attention(q, k, v, position, return_lse=True, **options), z)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for position in (3, 4, 5, N, 10**8):
            assert torch.equal(compiled(torch.tensor([position])), step(position))
            assert torch.equal(compiled(position), step(position))
    torch.compiler.reset()


def test_no_gradient():
    (q, k, v), options, _ = inputs("window of one", torch.float32)
    q.requires_grad_()
    with pytest.raises(ValueError, match="no backward pass.*torch.no_grad"):
        decode_attention(q, k, v, 3, **options)
    with torch.no_grad():
        assert not decode_attention(q, k, v, 3, **options).requires_grad


@pytest.mark.parametrize("change, message", [
    (dict(q=(1, 2, 4, 16)), r"q is \(1, 2, 4, 16\)"), (dict(k=(1, 9, 2, 16)), r"k \(1, 9, 2, 16\), v \(1, 8, 2, 16\)"),
    (dict(k=(2, 8, 2, 16), v=(2, 8, 2, 16)), r"q is \(1, 1, 4, 16\), k \(2, 8, 2, 16\)"),
    (dict(k=(1, 8, 3, 16), v=(1, 8, 3, 16)), "4 query heads are not a multiple of 3"),
    (dict(q=(1, 1, 4, 264), k=(1, 8, 2, 264), v=(1, 8, 2, 264)), "head dim 264 is more than 256"),
    (dict(sinks=8), "8 sinks in a cache of 8 slots"), (dict(sinks=-1), "-1 sinks in a cache of 8"),
    (dict(position=-1), "position is -1"), (dict(position=torch.tensor([3, 4])), r"torch.int64 of shape \(2,\)"),
    (dict(position=torch.tensor([3], dtype=torch.int32)), "torch.int32"),
    (dict(inv_freq=torch.ones(9).double()), r"\(9,\) for head dim 16"), (dict(inv_freq=torch.ones(4)), "torch.float32"),
    (dict(inv_freq=torch.ones(0).double()), r"\(0,\) for head dim 16"),
    (dict(alibi_slopes=torch.ones(2)), r"\(2,\) for 4 query heads"),
    (dict(alibi_slopes=torch.ones(4).double()), "torch.float64"), (dict(scale=0.0), "scale is 0.0"),
    (dict(xpos=8), "xpos is 8, it must be the number of rotated dims: 2 x 0"),
    (dict(xpos=6, inv_freq=torch.ones(4).double()), "2 x 4 by inv_freq"),
    (dict(segment=4), "segment is 4 and sinks 4"), (dict(segment=0, sinks=0), "segment is 0 and lookback 0"),
    (dict(lookback=1, sinks=0), "segment is None and lookback 1")], ids=str)
def test_wrong_arguments(change, message):
    shapes = dict(q=(1, 1, 4, 16), k=(1, 8, 2, 16), v=(1, 8, 2, 16))
    change = dict(position=3, sinks=4, **shapes) | change
    tensors = {name: torch.zeros(change.pop(name)) for name in shapes}
    with pytest.raises(ValueError, match=message):
        decode_attention(**tensors, **change)


def test_wrong_layout_or_dtype():
    q, ring = torch.zeros(1, 1, 4, 16), torch.zeros(1, 8, 2, 16)
    with pytest.raises(ValueError, match="float32, torch.float16, torch.float32"):
        decode_attention(q, ring.half(), ring, 3)
    turned = torch.zeros(1, 8, 16, 2).transpose(2, 3)
    with pytest.raises(ValueError, match="strides 2 and 1.*not copied"):
        decode_attention(q, turned, ring, 3)


# ---- apply_sink_logit

def dense_sink_logit(scores, v, z):
    """Attention (B, H, T, keys) over v (B, keys, H, D) with one more logit z (H,), whose value is 0."""
    logits = torch.cat((scores, z[:, None, None].expand(*scores.shape[:3], 1)), -1)
    return torch.einsum("bhts,bshd->bthd", logits.softmax(-1)[..., :-1], v)


def sink_logit_results(f, out, lse, z, dout):
    tensors = [x.detach().requires_grad_() for x in (out, lse, z)]
    result = f(*tensors)
    return result, *torch.autograd.grad(result, tensors, dout.to(result.dtype))


def plain_sink_logit(out, lse, z):
    share = 1 / (1 + (z[:, None].to(out.dtype) - lse.to(out.dtype)).exp())
    return out * share.transpose(1, 2)[..., None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("shape", [(2, 37, 3, 24), (1, 1, 5, 64), (1, 300, 1, 8)], ids=str)
def test_sink_logit(shape, dtype, backend, monkeypatch):
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    B, T, H, D = shape
    out, dout = torch.randn(B, D, T, H).permute(0, 2, 3, 1).to(dtype), torch.randn(shape[:3])[..., None].expand(shape)
    lse, z = (3 * torch.randn(B, T, H)).transpose(1, 2), 3 * torch.randn(H)
    lse, z = (x.to(torch.promote_types(dtype, torch.float32)) for x in (lse, z))
    guards = [guarded(x) for x in (out, lse, z)]
    with poisoned_empty():
        actual = sink_logit_results(apply_sink_logit, *(x.tensor for x in guards), dout.to(dtype))
    for guard in guards:
        guard.check()
    assert [x.dtype for x in actual] == [dtype, dtype, lse.dtype, z.dtype]
    dout = dout.to(dtype).double()
    oracle = sink_logit_results(plain_sink_logit, out.double(), lse.double(), z.double(), dout)
    plain = sink_logit_results(plain_sink_logit, out, lse, z, dout)
    for name, a, o, p in zip(("out", "dout", "dlse", "dz"), actual, oracle, plain):
        assert_close_2x(a, o, p, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sink_logit_is_one_more_logit(backend, monkeypatch):
    """After attention, with gradients through both; with z = 0 softmax-off-by-one."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    q, k, v = (torch.randn(2, 20, 3, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    dout = torch.randn(2, 20, 3, 16, dtype=torch.float64)
    future = torch.ones(20, 20, dtype=torch.bool).triu(1)
    for z in (torch.randn(3, dtype=torch.float64, requires_grad=True), torch.zeros(3, dtype=torch.float64)):
        leaves = [x for x in (q, k, v, z) if x.requires_grad]
        actual = apply_sink_logit(*attention(q, k, v, return_lse=True), z)
        scores = (torch.einsum("bthd,bshd->bhts", q, k) / 4).masked_fill(future, -torch.inf)
        expected = dense_sink_logit(scores, v, z)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
        for a, e in zip(torch.autograd.grad(actual, leaves, dout), torch.autograd.grad(expected, leaves, dout)):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


def test_sink_logit_gradcheck(triton_kernels):
    shapes = (1, 3, 2, 3), (1, 2, 3), (2,)
    out, lse, z = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(apply_sink_logit, (out, lse, z))
    for i in range(3):  # one gradient alone
        tensors = [x.detach().requires_grad_(i == j) for j, x in enumerate((out, lse, z))]
        assert torch.autograd.gradcheck(apply_sink_logit, tensors, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sink_logit_at_infinity(backend, monkeypatch):
    """Rows that saw nothing stay 0, with finite gradients, also beside logits of -inf (no sink) and 10^4 (all sink)."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    out, lse = torch.randn(1, 4, 3, 8), torch.randn(1, 3, 4)
    out[:, 1], lse[..., 1] = 0, -torch.inf
    z = torch.tensor([0.3, -torch.inf, 1e4])
    dout = torch.randn_like(out)
    result, *grads = sink_logit_results(apply_sink_logit, out, lse, z, dout)
    assert (result[:, 1] == 0).all() and torch.equal(result[:, :, 1], out[:, :, 1]) and (result[:, :, 2] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, 1] == 0).all() and (grads[1][..., 1] == 0).all() and (grads[2][1:] == 0).all()
    seen = [0, 2, 3]
    expected = sink_logit_results(plain_sink_logit, out[:, seen, :1], lse[:, :1, seen], z[:1], dout[:, seen, :1])
    torch.testing.assert_close(result[:, seen, :1], expected[0])
    torch.testing.assert_close(grads[2][:1], expected[3])


def test_sink_logit_opcheck_and_mistakes(triton_kernels):
    out, lse, z = torch.randn(2, 5, 3, 8).half(), torch.randn(2, 3, 5), torch.randn(3)
    torch.library.opcheck(torch.ops.nanolong.apply_sink_logit_fwd.default, (out, lse, z))
    torch.library.opcheck(torch.ops.nanolong.apply_sink_logit_bwd.default, (out, out, lse, z))
    assert apply_sink_logit(out[:, :0], lse[..., :0], z).shape == (2, 0, 3, 8)
    assert math.isclose(apply_sink_logit(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1)).item(), 0.5)
    for arguments, message in (((out, lse.mT, z), r"lse \(2, 5, 3\)"), ((out, lse, z[:2]), r"z \(2,\)"),
                               ((out[0], lse, z), r"out \(5, 3, 8\)")):
        with pytest.raises(ValueError, match=message):
            apply_sink_logit(*arguments)
