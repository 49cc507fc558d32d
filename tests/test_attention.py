"""kernels/attention.py: the Triton kernels and the references against an independent dense formula in float64."""

import random

import pytest
import torch
from helpers import LiveBytes, assert_close_2x, guarded, poisoned_empty

from kernels import attention, merge_attention
from kernels.attention import _attention_bwd_ref, _attention_fwd_ref, _doc_ranges
from kernels.merge import merge_attention_ref


def visible(q, k, causal=True, q_start=0, k_start=0, q_docs=None, k_docs=None, scale=None):
    """(B, 1, Tq, Tk) bool."""
    seen = torch.ones(q.shape[0], 1, q.shape[1], k.shape[1], dtype=torch.bool)
    if causal:
        seen = seen & (torch.arange(k.shape[1])[None] + k_start <= torch.arange(q.shape[1])[:, None] + q_start)
    if q_docs is not None:
        seen = seen & (q_docs[:, None, :, None] == k_docs[:, None, None, :])
    return seen


def dense(q, k, v, scale=None, **options):
    """Attention with every score written out, in the inputs' dtype: (out, lse). Rows that see nothing: 0 and -inf."""
    group = q.shape[2] // k.shape[2]
    seen = visible(q, k, **options)
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = torch.einsum("bthd,bshd->bhts", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    any_seen = seen.any(-1, keepdim=True)
    s = s.masked_fill(~seen & any_seen, -torch.inf)  # rows that see nothing stay finite here and are zeroed below
    out = torch.einsum("bhts,bshd->bthd", s.softmax(-1) * any_seen, v)
    return out, s.logsumexp(-1).masked_fill(~any_seen.squeeze(-1).expand(s.shape[:3]), -torch.inf)


def same_maths(q, k, v, douts, scale=None, **options):
    """What `run` of the kernel computes, in plain torch: p again in the backward pass, base 2, from the rounded lse."""
    (B, Tk, G, D), group = k.shape, q.shape[2] // k.shape[2]
    scale, (dout, dlse) = D ** -0.5 if scale is None else scale, (x.to(q.dtype) for x in douts)
    out, lse = dense(q, k, v, scale, **options)
    seen, k, v = visible(q, k, **options), k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    log2e = 1.4426950408889634
    s = torch.einsum("bthd,bshd->bhts", q, k) * (scale * log2e)
    p = (s - (lse * log2e)[..., None]).exp2().masked_fill(~seen, 0.0)
    delta = (dout * out).sum(-1).transpose(1, 2) - dlse
    ds = p * (torch.einsum("bthd,bshd->bhts", dout, v) - delta[..., None])
    dk, dv = torch.einsum("bhts,bthd->bshd", ds, q) * scale, torch.einsum("bhts,bthd->bshd", p, dout)
    dk, dv = (x.view(B, Tk, G, group, D).sum(3) for x in (dk, dv))
    return dict(out=out, lse=lse, dq=torch.einsum("bhts,bshd->bthd", ds, k) * scale, dk=dk, dv=dv)


def draw_case(rng):
    """Arguments of one random call: sizes, offsets, documents, layout."""
    B, G, group, D = rng.choice([1, 2]), rng.choice([1, 2]), rng.choice([1, 2, 3]), rng.choice([8, 16, 24, 33, 64])
    Tq, Tk = rng.randint(8, 50), rng.randint(8, 50)  # a row with one key has a gradient of rounding errors only
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
    return (B, Tq, Tk, G * group, G, D), options, rng.choice(["contiguous", "fused", "heads_first"])


def tensors(sizes, layout, dtype):
    """q, k, v of these sizes: contiguous, as views of one fused projection (when Tq = Tk), or stored (B, H, T, D)."""
    B, Tq, Tk, H, G, D = sizes
    if layout == "fused" and Tq == Tk:
        return torch.randn(B, Tq, H + 2 * G, D, dtype=dtype).split([H, G, G], dim=2)
    shapes = [(B, Tq, H, D), (B, Tk, G, D), (B, Tk, G, D)]
    if layout == "heads_first":
        return [torch.randn(b, h, t, d, dtype=dtype).transpose(1, 2) for b, t, h, d in shapes]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def run(f, inputs, douts, **options):
    """(out, lse, dq, dk, dv) for random upstream gradients on out and on the finite lse."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, lse = f(*inputs, **options)
    dout, dlse = (x.to(out.dtype) for x in douts)
    seen = lse > -torch.inf
    grads = torch.autograd.grad([out, lse.masked_fill(~seen, 0.0)], inputs, [dout, dlse])
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads)))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("seed", range(14))
def test_random_draws(seed, dtype, backend, monkeypatch):
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    sizes, options, layout = draw_case(random.Random(seed))
    torch.manual_seed(seed)
    q, k, v = tensors(sizes, layout, dtype)
    dout = dict(contiguous=torch.randn(q.shape), fused=torch.randn(q.shape[:2])[..., None, None].expand(q.shape),
                heads_first=torch.randn(q.transpose(1, 2).shape).transpose(1, 2))[layout]  # strides of all kinds
    douts = [x.to(dtype).double() for x in (dout, torch.randn(q.shape[0], q.shape[2], q.shape[1]))]
    guards = [guarded(x) for x in (q, k, v)]
    with poisoned_empty():
        actual = run(attention, [x.tensor for x in guards], douts, return_lse=True, **options)
    for guard in guards:
        guard.check()
    oracle = run(dense, [x.double() for x in (q, k, v)], douts, **options)
    plain = same_maths(q, k, v, douts, **options)
    for name, value in actual.items():
        assert_close_2x(value, oracle[name], plain[name].to(value.dtype), f"{name} {sizes} {layout} {options}")


def test_gradcheck(triton_kernels):
    q, k, v = (torch.randn(1, t, h, 4, dtype=torch.float64, requires_grad=True) for t, h in ((18, 2), (20, 1), (20, 1)))
    docs = dict(q_docs=torch.tensor([[0] * 4 + [1] * 14]), k_docs=torch.tensor([[0] * 9 + [1] * 11]))
    for options in (dict(q_start=2), dict(causal=False, **docs)):
        assert torch.autograd.gradcheck(lambda *x: attention(*x, return_lse=True, **options), (q, k, v), fast_mode=True)


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
    (1, 1, 1, 1, 1, 1), (2, 1, 37, 4, 2, 16), (1, 33, 1, 2, 1, 256), (0, 9, 9, 2, 1, 16)], ids=str)
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
@pytest.mark.parametrize("return_lse", [False, True])
def test_future_leak(backend, return_lse, monkeypatch):
    """Keys and values from t on are replaced by others: rows before t do not change by a bit."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    q, k, v = (torch.randn(2, 70, 2, 16) for _ in range(3))
    first = attention(q, k, v, return_lse=return_lse)
    for t in (69, 33, 16, 1):  # each change keeps the keys before t
        k[:, t:], v[:, t:] = torch.randn_like(k[:, t:]) * 100, torch.randn_like(v[:, t:]) * 100
        second = attention(q, k, v, return_lse=return_lse)
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
@pytest.mark.parametrize("options", [dict(), dict(causal=False), dict(docs=True)], ids=str)
def test_reference_memory_is_bounded(options, dtype):
    """At T = 8192 the scores are 512 MiB in float32; forward and backward keep a few blocks of 2^23 of them."""
    T, H, D = 8192, 2, 16
    q, k, v = (torch.randn(1, T, H, D, dtype=dtype) for _ in range(3))
    docs = dict.fromkeys(("q_docs", "k_docs"), torch.arange(T)[None] // 3000) if "docs" in options else {}
    args = (q, k, v, docs.get("q_docs"), docs.get("k_docs"), 0.25, options.get("causal", True), 0)
    with LiveBytes() as live:
        out, lse = _attention_fwd_ref(*args, dtype)
        _attention_bwd_ref(out, lse, q, k, v, out, lse, *args[3:])
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
    fwd = (q.detach(), k.detach(), v.detach(), *docs, 0.25, True, 4, torch.float32, True)
    out, lse = torch.ops.nanolong.attention_fwd(*fwd)
    torch.library.opcheck(torch.ops.nanolong.attention_fwd.default, fwd)
    bwd = (out, lse, *fwd[:3], out, lse, *docs, 0.25, True, 4, True)
    torch.library.opcheck(torch.ops.nanolong.attention_bwd.default, bwd)
    torch.library.opcheck(torch.ops.nanolong.merge_attention_fwd.default, (out, lse, out, lse))
    torch.library.opcheck(torch.ops.nanolong.merge_attention_bwd.default, (out, lse) * 4)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_whole(backend, monkeypatch):
    """torch.compile(fullgraph=True), forward and backward, equal to eager; another offset gives another result."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    torch.compiler.reset()

    def f(q, k, v, start):
        out, lse = attention(q, k, v, q_start=start, return_lse=True)
        return merge_attention(out, lse, *attention(q, k, v, causal=False, return_lse=True))[0]

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
    (dict(q=(1, 8, 4, 512), k=(1, 8, 2, 512), v=(1, 8, 2, 512)), "head dim 512 is more than 256")])
def test_wrong_arguments(change, message):
    shapes = dict(q=(1, 8, 4, 16), k=(1, 8, 2, 16), v=(1, 8, 2, 16))
    shapes.update({name: change.pop(name) for name in list(change) if name in shapes})
    with pytest.raises(ValueError, match=message):
        attention(*(torch.zeros(shape) for shape in shapes.values()), **change)
    with pytest.raises(ValueError, match="must be equal"):
        attention(torch.zeros(1, 8, 2, 16), torch.zeros(1, 8, 2, 16).half(), torch.zeros(1, 8, 2, 16).half())
