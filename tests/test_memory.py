"""kernels/memory.py: the Triton kernels and the reference against dense formulas; Infini-attention's identities."""

import random

import pytest
import torch
from helpers import LiveBytes, assert_close_2x, guarded, poisoned_empty

from kernels import attention, infini_attention, memory_read
from kernels.memory import _Memory

NAMES = "q", "k", "v", "q_rot", "k_rot", "beta", "M", "z"


def sigma(x):
    return torch.where(x > 0, x + 1, x.exp())


def token_by_token(q, k, v, q_rot, k_rot, beta, M, z, segment, rule, docs):
    """The definition as loops over the batch, tokens and heads -> (out, M, z). docs (B, Tk)."""
    (B, Tq, H, D), (_, Tk, G, _) = q.shape, k.shape
    M, z, out = M.clone(), z.clone(), torch.zeros_like(q)
    for b in range(B):
        owner = docs[b, 0]
        for t in range(Tk):
            start = t // segment * segment
            for h in range(H if t >= Tk - Tq else 0):
                g, i = h // (H // G), t - (Tk - Tq)
                keys = [j for j in range(start, t + 1) if docs[b, j] == docs[b, t]]
                p = torch.stack([q_rot[b, i, h] @ k_rot[b, j, g] / D**0.5 for j in keys]).softmax(0)
                local = sum(share * v[b, j, g] for share, j in zip(p, keys))
                weight = sigma(q[b, i, h]) @ z[b, g] if docs[b, t] == owner else 0
                memory = sigma(q[b, i, h]) @ M[b, g] / weight if weight > 0 else 0
                gate = beta[h].sigmoid()
                out[b, i, h] = gate * memory + (1 - gate) * local
            if (t + 1) % segment:
                continue
            if docs[b, t] != owner:
                M[b], z[b], owner = 0, 0, docs[b, t]
            before_M, before_z = M[b].clone(), z[b].clone()
            for j in range(start, t + 1):
                for g in range(G if docs[b, j] == owner else 0):
                    s, write = sigma(k[b, j, g]), v[b, j, g]
                    if rule == "delta" and (before_z[g] > 0).any():
                        write = write - s @ before_M[g] / (s @ before_z[g])
                    M[b, g] += torch.outer(s, write)
                    z[b, g] += s
    return out, M, z


def dense(q, k, v, q_rot, k_rot, beta, M, z, segment, rule, docs=None, scale=None, alibi_slopes=None):
    """
    No memory is formed to read from: A_mem is linear attention over the tokens that were written and survive, with weights
    sigma(q_t) . sigma(k_j), and over the first state; the delta rule only changes the values. In the inputs' dtype.
    """
    (B, Tq, H, D), (_, Tk, G, _) = q.shape, k.shape
    S, t = Tk // segment, torch.arange(Tk)
    docs = torch.zeros(B, Tk, dtype=torch.int64) if docs is None else docs
    owner = torch.cat([docs[:, :1], docs[:, segment - 1::segment]], 1)  # (B, S + 1): whose the memory before each segment is
    # alive[b, s, j]: the memory before segment s holds token j, if j < s N, or for the last j, the first state
    kept = owner[:, 1:] == owner[:, :-1]
    alive = torch.zeros(B, S + 1, S * segment + 1, dtype=torch.bool)
    alive[:, 0, -1] = True
    for s in range(S):
        alive[:, s + 1] = alive[:, s] & kept[:, s, None]
        alive[:, s + 1, s * segment:(s + 1) * segment] = docs[:, s * segment:(s + 1) * segment] == owner[:, s + 1, None]

    def read(x, sk, written, M, z, alive):
        """x (B, n, heads, D), sk, written (B, j, heads, D), M, z of the first state, alive (B, n, j + 1)."""
        a = torch.einsum("bthd,bjhd->bhtj", sigma(x), sk) * alive[:, None, :, :-1]
        first = sigma(x).transpose(1, 2) * alive[:, None, :, -1:]
        weight = a.sum(-1) + torch.einsum("bhtd,bhd->bht", first, z)
        total = torch.einsum("bhtj,bjhe->bhte", a, written) + torch.einsum("bhtd,bhde->bhte", first, M)
        empty = (weight == 0)[..., None]
        return (total / weight[..., None].masked_fill(empty, 1)).masked_fill(empty, 0).transpose(1, 2)

    sk, written = sigma(k[:, :S * segment]), v[:, :0]
    for s in range(S):
        now = slice(s * segment, (s + 1) * segment)
        write = v[:, now]
        if rule == "delta":
            past = torch.cat([alive[:, s, :s * segment], alive[:, s, -1:]], 1) & kept[:, s, None]
            write = write - read(k[:, now], sk[:, :s * segment], written, M, z, past[:, None].expand(-1, segment, -1))
        written = torch.cat([written, write], 1)
    of_row = t[Tk - Tq:] // segment
    seen = alive[:, of_row] & (owner[:, of_row] == docs[:, Tk - Tq:])[..., None]
    memory = read(q, *(x.repeat_interleave(H // G, dim) for x, dim in ((sk, 2), (written, 2), (M, 1), (z, 1))), seen)
    distance = t[Tk - Tq:, None] - t
    same = (of_row[:, None] == t // segment) & (distance >= 0) & (docs[:, Tk - Tq:, None] == docs[:, None])
    scores = torch.einsum("bthd,bjhd->bhtj", q_rot, k_rot.repeat_interleave(H // G, 2)) * (scale or D**-0.5)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(q.dtype)[:, None, None] * distance.to(q.dtype)
    p = scores.masked_fill(~same[:, None], -torch.inf).softmax(-1)
    local = torch.einsum("bhtj,bjhd->bthd", p, v.repeat_interleave(H // G, 2))
    gate = beta.to(q.dtype).sigmoid()[:, None]
    end = alive[:, -1].to(q.dtype)
    held = sk * end[:, :-1, None, None]
    return (gate * memory + (1 - gate) * local,
            torch.einsum("bjgd,bjge->bgde", held, written) + M * end[:, -1, None, None, None],
            held.sum(1) + z * end[:, -1, None, None])


def ours(q, k, v, q_rot, k_rot, beta, M, z, segment, rule, **options):
    out, (M, z) = infini_attention(q, k, v, beta, q_rot=q_rot, k_rot=k_rot, segment=segment, rule=rule, state=(M, z),
                                   **options)
    return out, M, z


def tensors(B, Tq, Tk, H, G, D, layout="contiguous", empty=False):
    """
    q, k, v, q_rot, k_rot, beta, M, z in float64; `layout` "fused": views of one projection, q and k rows with gaps. beta
    and M are never contiguous.
    """
    def of(T, heads):
        if layout == "fused":
            return torch.randn(B, T, heads + 3, D, dtype=torch.float64)[:, :, 1:heads + 1]
        if layout == "heads_first":
            return torch.randn(B, heads, T, D, dtype=torch.float64).transpose(1, 2)
        return torch.randn(B, T, heads, D, dtype=torch.float64)

    M, z = torch.randn(B, G, D, D, dtype=torch.float64).mT, 5 * torch.rand(B, G, D, dtype=torch.float64)
    state = (torch.zeros_like(M), torch.zeros_like(z)) if empty else (M, z)
    return [of(Tq, H), of(Tk, G), of(Tk, G), of(Tq, H), of(Tk, G), torch.randn(2 * H, dtype=torch.float64)[::2], *state]


def documents(B, T, rng):
    """Documents in a row, each of its own id; the ids do not rise. None is very short: one key alone has no gradient."""
    borders = [[0, *sorted(rng.sample(range(5, T - 4, 6), rng.choice([1, 2, 3]))), T] for _ in range(B)]
    return torch.tensor([[(7 * i) % 5 for i in range(len(row) - 1) for _ in range(row[i + 1] - row[i])] for row in borders])


def draw_case(seed):
    """Sizes, options and layout of one random call, and whether the state is empty."""
    rng = random.Random(seed)
    B, (G, group), D = rng.choice([1, 1, 2]), [(2, 2), (1, 4), (2, 3), (4, 1)][seed % 4], [16, 64, 80, 24, 33, 8][seed % 6]
    Tk, segment = rng.randint(24, 34), [7, 16, 13, 20, 11, 50, 5, 9][seed % 8]
    Tq = Tk if seed % 5 < 3 else rng.randint(4, Tk)
    options = dict(segment=segment, rule=("delta", "linear")[seed // 2 % 2])
    if seed % 3:
        options["docs"] = documents(B, Tk, rng)
    if seed % 7 == 3:
        options |= dict(scale=0.31, alibi_slopes=torch.rand(G * group))
    return (B, Tq, Tk, G * group, G, D), options, ("contiguous", "fused", "heads_first")[seed % 3], seed % 4 == 1


def run(f, inputs, douts, **options):
    """Every output, and every input's gradient for upstream gradients on all outputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = f(*inputs, **options)
    grads = torch.autograd.grad(outputs, inputs, [x.to(y.dtype) for x, y in zip(douts, outputs)], materialize_grads=True)
    return dict(zip(("out", "M'", "z'", *(f"d{name}" for name in NAMES)), (*outputs, *grads)))


@pytest.fixture(params=["triton", "reference"])
def backend(request, monkeypatch):
    monkeypatch.setenv("NANOLONG_KERNELS", request.param)
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.mark.parametrize("rule", ["delta", "linear"])
@pytest.mark.parametrize("Tq, Tk, segment", [(17, 17, 5), (4, 13, 5), (3, 3, 9), (12, 12, 4)])
def test_definition(Tq, Tk, segment, rule, backend):
    """Loops over single tokens, and the dense formula that the other tests use; two documents that end inside segments."""
    inputs = tensors(2, Tq, Tk, 4, 2, 6)
    docs = torch.zeros(2, Tk, dtype=torch.int64)
    if Tk > 9:
        docs = torch.tensor([[3] * 7 + [0] * 2 + [2] * 11, [0] * 20])[:, :Tk]
    expected = token_by_token(*inputs, segment, rule, docs)
    for f in (ours, dense):
        for actual, e in zip(f(*inputs, segment, rule, docs=docs), expected):
            torch.testing.assert_close(actual, e, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_random_draws(seed, backend):
    (sizes, options, layout, empty), dtype = draw_case(seed), (torch.float32, torch.float16)[seed % 2]
    torch.manual_seed(seed)
    inputs = tensors(*sizes, layout, empty)
    douts = [torch.randn(inputs[i].shape, dtype=torch.float64).to(dtype).double() for i in (0, -2, -1)]
    state_dtype = torch.promote_types(dtype, torch.float32)
    low = [torch.empty_strided(x.shape, x.stride(), dtype=d).copy_(x)
           for x, d in zip(inputs, 5 * [dtype] + 3 * [state_dtype])]
    guards = [guarded(x) for x in low]
    with poisoned_empty():
        actual = run(ours, [x.tensor for x in guards], douts, **options)
    for guard in guards:
        guard.check()
    oracle = run(dense, [x.double() for x in low], douts, **options)
    plain = run(dense, [x.to(dtype) for x in low], douts, **options)
    for name, value in actual.items():
        assert_close_2x(value, oracle[name], plain[name].to(value.dtype), f"{name} {sizes} {layout} {options}")


def test_gradcheck(triton_kernels):
    """The memory's kernels against finite differences, in float64: every input, every output, both rules."""
    for delta, docs in ((True, torch.tensor([[0] * 7 + [1] * 4])), (False, None)):
        q, k, v, local, _, beta, M, z = (x.requires_grad_() for x in tensors(1, 8, 10, 2, 1, 3))
        assert torch.autograd.gradcheck(lambda *x: _Memory.apply(*x, docs, 4, delta, None), (q, k, v, local, beta, M, z),
                                        fast_mode=True, check_undefined_grad=False)


# ---- the identities


@pytest.mark.parametrize("rule", ["delta", "linear"])
def test_closed_gate_is_local_attention(rule, backend):
    """beta = -inf: plain causal attention in each segment."""
    q, k, v, q_rot, k_rot, beta, M, z = tensors(1, 23, 23, 4, 2, 8)
    out = ours(q, k, v, q_rot, k_rot, torch.full_like(beta, -torch.inf), M, z, 7, rule)[0]
    for rows in torch.arange(23).split(7):
        local = attention(q_rot[:, rows], k_rot[:, rows], v[:, rows])
        torch.testing.assert_close(out[:, rows], local, rtol=1e-12, atol=1e-12)


def test_order_and_repetition_of_the_past(backend):
    """
    Linear: past segments in another order change nothing later, nor does the past said three times. Both rules: tokens in
    another order inside one past segment change nothing later.
    """
    N, inputs = 5, tensors(1, 20, 20, 2, 1, 8, empty=True)
    rows, beta, state = inputs[:5], torch.full_like(inputs[5], torch.inf), inputs[6:]

    def last(order, rule):  # A_mem of the last segment, when the rows come in this order
        return ours(*(x[:, order] for x in rows), beta, *state, N, rule)[0][:, -N:]

    t = torch.arange(20)
    a, b, c, now = t.split(N)
    linear, delta = last(t, "linear"), last(t, "delta")
    torch.testing.assert_close(last(torch.cat([c, a, b, now]), "linear"), linear, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(last(torch.cat([a, b, c] * 3 + [now]), "linear"), linear, rtol=1e-11, atol=1e-12)
    assert (last(torch.cat([c, a, b, now]), "delta") - delta).norm() > 1e-3 * delta.norm()
    for rule, expected in (("linear", linear), ("delta", delta)):
        torch.testing.assert_close(last(torch.cat([a, b.flip(0), c, now]), rule), expected, rtol=1e-11, atol=1e-12)


def test_constant_values(backend):
    """Every value the same: the memory returns it. With the delta rule after the first segment, where it has all of it."""
    q, k, v, q_rot, k_rot, beta, M, z = tensors(1, 20, 20, 2, 1, 8, empty=True)
    v[:] = torch.randn(8, dtype=torch.float64)
    for rule, rows in (("linear", slice(5, 20)), ("delta", slice(5, 10))):
        out = ours(q, k, v, q_rot, k_rot, torch.full_like(beta, torch.inf), M, z, 5, rule)[0]
        torch.testing.assert_close(out[:, rows], v[:, rows].repeat_interleave(2, 2), rtol=1e-12, atol=1e-12)
        assert (out[:, :5] == 0).all()  # empty


@pytest.mark.parametrize("rule", ["delta", "linear"])
@pytest.mark.parametrize("docs", [False, True])
def test_any_chunking(docs, rule, backend):
    """A stream that keeps the keys of the segment it is in, and the state: chunks of any size give one pass's outputs."""
    T, N, inputs = 29, 6, tensors(1, 29, 29, 2, 1, 8)
    q, k, v, q_rot, k_rot, beta, *state = inputs
    ids = torch.tensor([[4] * 9 + [1] * 13 + [2] * 7]) if docs else None
    whole, *end = ours(*inputs, N, rule, docs=ids)
    for sizes in ([1] * T if backend == "reference" else [T - 2, 1, 1], [4, 2, 9, 14], [6, 12, 11]):
        kept, M, z, outs, t = slice(0, 0), *state, [], 0
        for n in sizes:
            rows, keys = slice(t, t + n), slice(kept.start, t + n)
            out, M, z = ours(q[:, rows], k[:, keys], v[:, keys], q_rot[:, rows], k_rot[:, keys], beta, M, z, N, rule,
                             docs=None if ids is None else ids[:, keys])
            t, outs = t + n, [*outs, out]
            kept = slice(t // N * N, t)
        torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close((M, z), tuple(end), rtol=1e-11, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 5])
def test_reading_alone(T, backend):
    """The last rows of a segment from their local attention and the memory before it, as a stream decodes."""
    torch.manual_seed(0)
    q, k, v, q_rot, k_rot = (torch.randn(2, 15, heads, 16, dtype=torch.float64) for heads in (4, 2, 2, 4, 2))
    beta = torch.randn(8, dtype=torch.float64)[::2]
    _, state = infini_attention(q[:, :8], k[:, :8], v[:, :8], beta, q_rot=q_rot[:, :8], k_rot=k_rot[:, :8], segment=8)
    whole, _ = infini_attention(q, k, v, beta, q_rot=q_rot, k_rot=k_rot, segment=8)
    local = attention(q_rot[:, -T:], k_rot[:, 8:], v[:, 8:], q_start=7 - T)
    torch.testing.assert_close(memory_read(q[:, -T:], local, beta, state), whole[:, -T:], rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"memory_read: q is \(2, 1, 4, 16\), local \(2, 15, 4, 16\)"):
        memory_read(q[:, -1:], q, beta, state)
    with torch.enable_grad(), pytest.raises(ValueError, match="memory_read has no backward pass"):
        memory_read(q.requires_grad_(), q, beta, state)


@pytest.mark.parametrize("rule", ["delta", "linear"])
def test_no_leak_from_the_future(rule, backend):
    """Other tokens from t on: every output before t is the same, bit for bit, inside a segment and at its borders."""
    inputs = [x.float() for x in tensors(1, 23, 23, 2, 1, 16)]
    out = ours(*inputs, 6, rule)[0]
    for t in (2, 12, 17, 22):
        changed = [torch.cat([x[:, :t], torch.randn_like(x[:, t:])], 1) for x in inputs[:5]]
        after = ours(*changed, *inputs[5:], 6, rule)[0]
        assert torch.equal(after[:, :t], out[:, :t]) and not torch.equal(after[:, t:], out[:, t:])


# ---- documents, empty memories, long texts


def test_packed_documents_equal_separate_runs(backend):
    """Documents of whole segments, one after another, against each on its own, and the state that the last one leaves."""
    N, inputs = 5, tensors(1, 25, 25, 2, 1, 8, empty=True)
    docs = torch.tensor([[1] * 10 + [0] * 5 + [2] * 10])
    out, M, z = ours(*inputs, N, "delta", docs=docs)
    for rows in (slice(0, 10), slice(10, 15), slice(15, 25)):
        alone, *state = ours(*(x[:, rows] for x in inputs[:5]), *inputs[5:], N, "delta")
        torch.testing.assert_close(out[:, rows], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close([M, z], state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["delta", "linear"])
def test_empty_memory(rule, backend):
    """No state, and keys whose sigma is 0 in float32: reads are 0, gradients are finite, and 0 where nothing is read."""
    q, k, v, q_rot, k_rot, beta, *_ = (x.float().requires_grad_() for x in tensors(1, 12, 12, 2, 1, 16))
    options = dict(q_rot=q_rot, k_rot=k_rot, segment=5, rule=rule)
    for keys in (k, k * 0 - 200):
        out, (M, z) = infini_attention(q, keys, v, torch.full_like(beta, torch.inf), **options)
        assert (out[:, :5] == 0).all() and out.isfinite().all() and (keys is k or (out == 0).all() and (z == 0).all())
        for x in torch.autograd.grad((out * torch.randn_like(out)).sum() + M.sum() + z.sum(), (q, k, v, q_rot, k_rot)):
            assert x.isfinite().all()
        dq, = torch.autograd.grad(infini_attention(q, keys, v, beta, **options)[0].sum(), q)
        assert (dq[:, :5] == 0).all()


@pytest.mark.parametrize("rule", ["delta", "linear"])
def test_a_million_tokens(rule):
    """bfloat16 inputs through a carried state: z is right to float32's accuracy, and what is read stays a value's size."""
    state, total, n = None, torch.zeros(1, 1, 8, dtype=torch.float64), 2**17
    for _ in range(8):
        q, k, v = (torch.randn(1, n, 1, 8).bfloat16() * size for size in (1, 10, 1))
        out, state = infini_attention(q[:, -4:], k, v + 3, torch.tensor([torch.inf]), q_rot=q[:, -4:], k_rot=k,
                                      segment=2**11, rule=rule, state=state)
        total += sigma(k.double()).sum(1)
    assert (state[1] - total).norm() < 1e-5 * total.norm() and state[0].isfinite().all()
    # linear: the mean of all values. Delta: the first segment writes it, then half of it comes to be missing each time
    assert (out - (3 if rule == "linear" else 1.5)).abs().max() < 0.1


@pytest.mark.parametrize("sizes", [
    (1, 1, 1, 1, 1, 1), (0, 9, 9, 2, 1, 16), (1, 0, 5, 2, 1, 4), (2, 0, 0, 2, 2, 4), (1, 2, 3, 1, 1, 256)], ids=str)
def test_extreme_sizes(sizes, backend):
    """One token or dim, empty tensors, queries in the last segment alone, the largest head; a segment of one token."""
    inputs = tensors(*sizes)
    B, Tq, Tk = sizes[:3]
    douts = [torch.randn(inputs[i].shape, dtype=torch.float64) for i in (0, -2, -1)]
    for segment in (1, 17, 10**12):
        actual = run(ours, inputs, douts, segment=segment, rule="delta", docs=torch.zeros(B, Tk, dtype=torch.int32))
        expected = run(dense, inputs, douts, segment=min(segment, 41), rule="delta")
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-10, msg=name)


def test_reference_memory_grows_with_the_tokens():
    """Twice the tokens, at most 2.2 times the bytes, forward and backward: no scores of all pairs."""
    peaks = []
    for T in (2048, 4096):
        q, k, v = (torch.randn(1, T, 2, 16, requires_grad=True) for _ in range(3))
        with LiveBytes() as live:
            infini_attention(q, k, v, torch.zeros(2), q_rot=q, k_rot=k, segment=64)[0].sum().backward()
        peaks.append(live.peak)
    assert peaks[1] < 2.2 * peaks[0] and peaks[0] < 40 * 2048 * 2 * 16 * 4


def test_mistakes():
    q, k, v, q_rot, k_rot, beta, M, z = tensors(2, 6, 6, 4, 2, 8)
    right = dict(q=q, k=k, v=v, beta=beta, q_rot=q_rot, k_rot=k_rot, segment=4, state=(M, z))
    for wrong, message in (
            (dict(k=k[:, :, :1]), r"k \(2, 6, 1, 8\)"), (dict(k_rot=k_rot[:, 1:]), r"k_rot \(2, 5, 2, 8\)"),
            (dict(v=v.float()), "float32"), (dict(beta=beta[:2]), r"beta is \(2,\).*\(4,\)"),
            (dict(segment=0), "segment is 0"), (dict(rule="Delta"), "'Delta'"), (dict(state=(M, z[:1])), r"z \(2, 2, 8\)"),
            (dict(docs=torch.zeros(2, 5).int()), r"\(2, 5\)"),
            (dict(q=q[:, :, :3], q_rot=q_rot[:, :, :3]), "3 query heads are not a multiple of 2"),
            (dict(k=k[:, :4], v=v[:, :4], k_rot=k_rot[:, :4]), "6 queries are more than 4 keys")):
        with pytest.raises(ValueError, match=message):
            infini_attention(**{**right, **wrong})


# ---- torch.compile and the operators


def test_compiles_whole(backend):
    """In one graph, equal to eager; a second length is no error."""
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for T in (12, 17) if backend == "triton" else (12,):
        inputs = [x.float() for x in tensors(1, T, T, 2, 1, 8)]
        docs = torch.tensor([[0] * 7 + [1] * (T - 7)])
        douts = [torch.randn_like(inputs[i]) for i in (0, -2, -1)]
        results = [run(f, inputs, douts, segment=5, rule="delta", docs=docs) for f in (ours, compiled)]
        for name in results[0]:
            torch.testing.assert_close(results[1][name], results[0][name], msg=name)
    torch.compiler.reset()


def test_operators(triton_kernels):
    """Schemas, fake implementations and tracing, as PyTorch checks them."""
    q, k, v, local, _, beta, M, z = (x.float() for x in tensors(1, 9, 9, 2, 1, 8))
    for delta, docs in ((True, None), (False, torch.tensor([[0] * 7 + [1] * 3]))):
        inputs = q, k, v, local, beta, M, z, docs, 4, delta, None
        torch.library.opcheck(torch.ops.nanolong.memory_fwd.default, inputs)
        out, Ms, zs = torch.ops.nanolong.memory_fwd(*inputs)
        torch.library.opcheck(torch.ops.nanolong.memory_bwd.default,
                              (q, M, z, q, k, v, local, beta, Ms, zs, docs, 4, delta, None))
