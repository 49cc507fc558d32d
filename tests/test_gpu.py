"""
The compiled kernels on a CUDA GPU: every tile-table entry of that GPU against float64, and what only a GPU shows.
pytest runs this file in a process of its own, because the other tests interpret the kernels; by hand:
TRITON_INTERPRET=0 python -m pytest tests/test_gpu.py
"""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_2x, relative_error, run_ranks
from test_attention import dense, run, same_maths, tensors, with_sinks
from test_memory import dense as dense_memory
from test_memory import ours as infini
from test_memory import run as run_memory
from test_memory import tensors as memory_tensors
from test_model import tiny
from test_ring import ALL, NAMES, compare
from test_stream import fed_in
from test_stream import tiny as streaming

from kernels import (apply_sink_logit, attention, backend, decode_attention, linear_cross_entropy, merge_attention,
                     rms_norm, rope, rope_frequencies, swiglu)
from kernels.bench_ring import emulated_ring
from kernels.ring import LAYOUTS
from kernels.rope import rope_ref

HERE = torch.cuda.is_available() and not backend.INTERPRET
on_gpu = pytest.mark.skipif(not HERE, reason="needs CUDA and TRITON_INTERPRET=0")
DEVICE, T = "cuda", 1024
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.skipif(not torch.cuda.is_available() or HERE, reason="needs CUDA")
def test_this_file_without_the_interpreter():
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", __file__], env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0


@pytest.fixture(autouse=True)
def _device(monkeypatch):
    if not HERE:
        return
    torch.set_float32_matmul_precision("highest")
    monkeypatch.delenv("NANOLONG_KERNELS", raising=False)
    with torch.device(DEVICE):
        yield


ATTENTION_CASES = {
    "causal": dict(Tq=T, Tk=T, H=2, G=2),
    "gqa, odd lengths, offset": dict(Tq=T - 31, Tk=T + 77, H=4, G=1, q_start=108),
    "full": dict(Tq=T - 1, Tk=T // 2 + 3, H=2, G=1, causal=False),
    "documents": dict(Tq=T + 5, Tk=T + 5, H=2, G=2, docs=True),
    "rows that see nothing": dict(Tq=T, Tk=T, H=2, G=2, q_start=-130),
    "window": dict(Tq=T, Tk=T, H=2, G=1, window=300),
    "window, sinks": dict(Tq=T + 300, Tk=T + 300, H=4, G=2, window=130, S=4),
    "window, sinks, alibi": dict(Tq=T - 31, Tk=T + 77, H=4, G=1, q_start=108, window=201, S=20, alibi=True),
    "window, sinks, alibi, documents": dict(Tq=T + 5, Tk=T + 5, H=2, G=2, docs=True, window=77, S=3, alibi=True),
    "segment": dict(Tq=T, Tk=T, H=2, G=1, segment=256),
    "full segment, offset": dict(Tq=T - 31, Tk=T + 77, H=4, G=2, q_start=108, segment=177, causal=False),
    "segment, window, sinks, alibi": dict(Tq=T + 5, Tk=T + 5, H=2, G=2, segment=300, window=130, S=4, alibi=True),
    "alibi": dict(Tq=T - 1, Tk=T - 1, H=2, G=2, alibi=True),
    "segment, lookback": dict(Tq=T - 31, Tk=T + 77, H=4, G=2, q_start=108, segment=177, lookback=2),
    "xpos": dict(Tq=2 * T + 100, Tk=2 * T + 177, H=2, G=1, q_start=77, xpos=True),
    "xpos, window, sinks": dict(Tq=T + 300, Tk=T + 300, H=4, G=2, window=130, S=4, xpos=True),
    "xpos, documents": dict(Tq=T + 105, Tk=T + 105, H=2, G=2, docs=True, xpos=True),
    "xpos, far from the keys": dict(Tq=T // 2, Tk=T + 77, H=2, G=2, q_start=5 * T, xpos=True),
    "xpos, segment, lookback": dict(Tq=T + 300, Tk=T + 300, H=2, G=2, segment=400, lookback=1, xpos=True),
}


@on_gpu
@pytest.mark.parametrize("case", ATTENTION_CASES)
@pytest.mark.parametrize("D", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
def test_attention(dtype, D, case):
    options = dict(ATTENTION_CASES[case])
    Tq, Tk, H, G = (options.pop(name) for name in ("Tq", "Tk", "H", "G"))
    if options.pop("docs", False):
        options["q_docs"] = options["k_docs"] = (torch.arange(Tq) // 300).expand(2, Tq)
    if options.pop("alibi", False):
        options["alibi_slopes"] = torch.rand(H) * 0.1
    if options.pop("xpos", False):
        options["xpos"] = D
    inputs = tensors((2, Tq, Tk, options.pop("S", 0), H, G, D), "contiguous", dtype)
    douts = [x.to(dtype).double() for x in (torch.randn(inputs[0].shape), torch.randn(2, H, Tq))]
    actual = run(attention, inputs, douts, return_lse=True, **options)
    oracle = run(dense, [x.double() for x in inputs], douts, **options)
    first, same_options = with_sinks(inputs, options)
    plain = same_maths(*first, douts, **same_options)
    for name, value in actual.items():
        assert_close_2x(value, oracle[name], plain[name].to(value.dtype), name)
    again = run(attention, inputs, douts, return_lse=True, **options)
    assert all(torch.equal(actual[name], again[name]) for name in actual), "two runs differ"


@on_gpu
def test_attention_tf32():
    """float32 with TF32 allowed: errors of TF32's size, not of a wrong tile."""
    torch.set_float32_matmul_precision("high")
    q, k, v = (torch.randn(1, T, 2, 64) for _ in range(3))
    out, oracle = attention(q, k, v), dense(q.double(), k.double(), v.double())[0]
    assert 1e-7 < (out - oracle).norm() / oracle.norm() < 2e-3


@on_gpu
def test_attention_past_2_31_elements():
    """The second batch entry's keys lie more than 2^31 elements behind the first's."""
    k = torch.empty(2**31 + 2**20, dtype=torch.bfloat16).as_strided((2, 100, 2, 64), (2**31 + 64, 128, 64, 1))
    k.copy_(torch.randn(k.shape))
    q = torch.randn(2, 70, 2, 64).bfloat16()
    assert torch.equal(attention(q, k, k, causal=False), attention(q, k.contiguous(), k.contiguous(), causal=False))


@on_gpu
@pytest.mark.parametrize("D", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("options", [
    dict(rule="delta", segment=256), dict(rule="linear", segment=77),
    dict(rule="delta", segment=200, docs=torch.arange(T + 55).div(300, rounding_mode="floor").expand(2, -1))],
    ids=["delta", "linear", "documents"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
def test_infini_attention(dtype, options, D):
    """Every output and gradient, the last 1000 rows of 1079 tokens; two runs are the same bit for bit."""
    options = {name: x.cuda() if name == "docs" else x for name, x in options.items()}
    state_dtype = torch.promote_types(dtype, torch.float32)
    inputs = [x.to(d) for x, d in zip(memory_tensors(2, 1000, T + 55, 4, 2, D), 5 * [dtype] + 3 * [state_dtype])]
    douts = [torch.randn(inputs[i].shape).to(dtype).double() for i in (0, -2, -1)]
    actual, again = (run_memory(infini, inputs, douts, **options) for _ in range(2))
    oracle = run_memory(dense_memory, [x.double() for x in inputs], douts, **options)
    plain = run_memory(dense_memory, [x.to(dtype) for x in inputs], douts, **options)
    for name, value in actual.items():
        assert_close_2x(value, oracle[name], plain[name].to(value.dtype), name)
        assert torch.equal(value, again[name]), f"{name}: two runs differ"


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
def test_elementwise_kernels(dtype):
    """norm, swiglu and rope: outputs and every gradient, odd sizes."""
    inv_freq = rope_frequencies(64)[0]
    positions = torch.randint(0, 10**7, (3, 130))
    angle = positions.double()[..., None, None] * inv_freq

    def rotate(x):
        c, s = (y.to(x.dtype) for y in (angle.cos(), angle.sin()))
        a, b = x[..., :32], x[..., 32:64]
        return torch.cat([a * c - b * s, b * c + a * s, x[..., 64:]], -1)

    for ours, plain, shapes in (
            (lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, w.shape, w, 1e-5),
             [(3, 130, 1000), (1000,)]),
            (swiglu, lambda g, u: F.silu(g) * u, [(3, 130, 1000)] * 2),
            (lambda x: rope(x, positions, inv_freq), rotate, [(3, 130, 5, 80)])):
        inputs = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
        doubles = [x.detach().double().requires_grad_() for x in inputs]
        results = []
        for f, args in ((ours, inputs), (plain, doubles), (plain, inputs)):
            y = f(*args)
            torch.manual_seed(1)
            results.append([y, *torch.autograd.grad(y, args, torch.randn(y.shape).to(y.dtype))])
        for i, (a, o, p) in enumerate(zip(*results)):
            assert_close_2x(a, o, p, f"{plain} {i}")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss(reduction, dtype):
    x, w = torch.randn(1000, 128).to(dtype).requires_grad_(), (torch.randn(50257, 128) / 8).to(dtype).requires_grad_()
    targets = torch.randint(0, 50257, (1000,))
    targets[::7] = -100
    dloss = torch.randn(()) if reduction == "mean" else torch.randn(1000)

    def results(f, x, w):
        loss = f(x, w)
        return [loss, *torch.autograd.grad(loss, (x, w), dloss.to(loss.dtype))]

    plain = lambda x, w: F.cross_entropy(  # noqa: E731
        F.linear(x, w).to(torch.promote_types(x.dtype, torch.float32)), targets, reduction=reduction)
    actual = results(lambda x, w: linear_cross_entropy(x, w, targets, reduction=reduction), x, w)
    oracle = results(plain, *(t.detach().double().requires_grad_() for t in (x, w)))
    for name, a, o, p in zip(("loss", "dx", "dw"), actual, oracle, results(plain, x, w)):
        assert_close_2x(a, o, p, name)


@on_gpu
def test_merge():
    q, k, v = (torch.randn(2, T, 2, 64).bfloat16() for _ in range(3))
    half = T // 2
    parts = [attention(q, k[:, s], v[:, s], k_start=s.start, out_dtype=torch.float32, return_lse=True)
             for s in (slice(half, T), slice(0, half))]
    out, lse = merge_attention(*parts[0], *parts[1])
    whole, whole_lse = attention(q, k, v, out_dtype=torch.float32, return_lse=True)
    oracle = dense(q.double(), k.double(), v.double())
    assert_close_2x(out, oracle[0], whole, "out")  # as good as the pass over all keys
    assert_close_2x(lse, oracle[1], whole_lse, "lse")


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
def test_sink_logit(dtype):
    inputs = [torch.randn(2, 300, 5, 80).to(dtype), torch.randn(2, 5, 300), torch.randn(5)]
    dout = torch.randn(inputs[0].shape).to(dtype)

    def results(f, inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        y = f(*inputs)
        return [y, *torch.autograd.grad(y, inputs, dout.to(y.dtype))]

    def plain(out, lse, z):
        return out * (lse - z[:, None]).sigmoid().transpose(1, 2)[..., None].to(out.dtype)

    actual, oracle = results(apply_sink_logit, inputs), results(plain, [x.double() for x in inputs])
    for name, a, o, p in zip(("out", "dout", "dlse", "dz"), actual, oracle, results(plain, inputs)):
        assert_close_2x(a, o, p, name)


def in_order(q, k, v, position, sinks, inv_freq):
    """A ring's keys and values by in-cache position, q and the keys rotated by it."""
    N = k.shape[1]
    last = min(position, N - 1)
    cached = torch.arange(last + 1)
    slots = torch.where(cached < sinks, cached, sinks + (position - last + cached - sinks) % (N - sinks))
    if inv_freq is None:
        return q, k[:, slots], v[:, slots]
    return rope_ref(q, torch.tensor([last]), inv_freq), rope_ref(k[:, slots], cached, inv_freq), v[:, slots]


@on_gpu
@pytest.mark.parametrize("D, R", [(16, 8), (64, 32), (64, 0), (80, 10), (96, 48), (128, 64), (256, 128)])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
def test_decode(dtype, D, R):
    """One and many shares of the cache, groups of 1, 4 and 35 query heads, rings that are filling, full and turned."""
    inv_freq = rope_frequencies(2 * R)[0] if R else None
    for B, H, G, N in ((2, 4, 4, 1024), (1, 35, 1, 999), (70, 8, 2, 257)):
        q, k, v = (torch.randn(B, n, heads, D).to(dtype) for n, heads in ((1, H), (N, G), (N, G)))
        for position, xpos in itertools.product((N // 3, N - 1, 10**7 + 5), (None, 2 * R) if R else (None,)):
            options = dict(sinks=4, inv_freq=inv_freq, xpos=xpos, return_lse=True)
            actual = decode_attention(q, k, v, position, **options)
            same = dict(q_start=min(position, N - 1), xpos=xpos)
            plain = dense(*in_order(q, k, v, position, 4, inv_freq), **same)
            oracle = dense(*in_order(q.double(), k.double(), v.double(), position, 4, inv_freq), **same)
            for name, a, o, p in zip(("out", "lse"), actual, oracle, plain):
                assert_close_2x(a, o, p.to(a.dtype), f"{name} {B, H, G, N} at {position}, xpos {xpos}")
            again = decode_attention(q, k, v, position, **options)
            assert all(map(torch.equal, actual, again)), "two runs differ"


@on_gpu
def test_decode_in_a_cuda_graph():
    """One capture is replayed for every token: the position, counted up in the graph, is read on the device."""
    inv_freq = rope_frequencies(128)[0]
    q, k, v = (torch.randn(1, n, heads, 128).bfloat16() for n, heads in ((1, 8), (60, 2), (60, 2)))
    position = torch.tensor([0])
    decode_attention(q, k, v, position, sinks=4, inv_freq=inv_freq)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, position, sinks=4, inv_freq=inv_freq)
        position += 1
    position.zero_()
    for t in range(150):
        graph.replay()
        assert torch.equal(out, decode_attention(q, k, v, t, sinks=4, inv_freq=inv_freq))


@on_gpu
def test_model():
    """bfloat16 training, torch.compile(fullgraph=True): the float32 references' loss and gradients; streaming."""
    model = tiny(head_dim=64, block_size=256).cuda()
    idx, targets = torch.randint(0, 61, (2, 2, 200))

    def loss_and_grads(f):
        loss = f(idx, targets)[1]
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    os.environ["NANOLONG_KERNELS"] = "reference"
    expected = loss_and_grads(model)
    del os.environ["NANOLONG_KERNELS"]
    model.compute_dtype = torch.bfloat16
    compiled = torch.compile(model, fullgraph=True)
    for f in (model, compiled):
        for a, b in zip(loss_and_grads(f), expected):
            assert (a - b).norm() < 0.03 * b.norm() + 1e-4
    with torch.no_grad():
        whole, state = model(idx)[0].float(), model.new_state(2)
        parts = torch.cat([model(part, state=state)[0] for part in idx.split([100, 1, 99], 1)], 1).float()
    assert (parts - whole).norm() < 0.02 * whole.norm()


@on_gpu
@torch.no_grad()
@pytest.mark.parametrize("variant", ["rope", "partial rope", "alibi", "sink logit", "sink tokens", "hybrid"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["float32", "bfloat16"])
def test_stream(variant, dtype, tolerance):
    """Token by token, through the decode kernel and past many evictions, and in chunks: the numbers of one pass."""
    model, idx = streaming(variant, torch.float32).to(dtype), torch.randint(0, 61, (2, 130))
    whole = model(idx)[0].float()
    for sizes in ([1], [7, 1, 64, 1, 1]):
        assert (fed_in(model, idx, sizes).float() - whole).norm() < tolerance * whole.norm()


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("variant", ["rope", "alibi", "sink logit", "sink tokens"])
def test_cuda_graphs_change_nothing(variant, dtype):
    """Greedy tokens, and the state afterwards, with each step replayed from a graph and without; in two calls, past
    evictions."""
    model, prompt = streaming(variant, torch.float32).to(dtype), torch.randint(0, 61, (2, 5))
    states = [model.new_state(2), model.new_state(2)]
    assert model.can_graph(states[0])
    tokens = [torch.stack([*model.generate(prompt, 40, state, temperature=0, cuda_graphs=on),
                           *model.generate(prompt, 20, state, temperature=0, cuda_graphs=on)])
              for on, state in zip((True, False), states)]
    assert torch.equal(*tokens) and states[0].position == states[1].position == 68 + model.config.sink_tokens
    for a, b in zip(states[0].layers, states[1].layers):
        assert torch.equal(a.k, b.k) and torch.equal(a.v, b.v)


@on_gpu
def test_two_ranks_share_the_gpu():
    """Ring attention over gloo, which carries the shards from one process to the other through the CPU."""
    errors = run_ranks(2, compare, ALL, torch.float32, (2, 192, 4, 2, 64), DEVICE, timeout=600)[0]
    assert len(errors) == len(NAMES) * len(ALL)
    assert not [e for e in errors if not e[-1] < 2e-6]


@on_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_ranks_in_one_process(layout):
    q, k, v, dout = (torch.randn(1, 2048, heads, 128, dtype=torch.bfloat16) for heads in (8, 2, 2, 8))
    out, grads = emulated_ring(q, k, v, 8, layout, dout)
    exact = [x.float().requires_grad_() for x in (q, k, v)]
    attention(*exact).backward(dout.float())
    for a, b in zip((out, *grads), (attention(*exact), *(x.grad for x in exact))):
        assert relative_error(a, b) < 1e-2
