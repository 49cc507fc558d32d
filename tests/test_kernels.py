"""
RMSNorm, SwiGLU, RoPE and the linear cross entropy: the Triton kernels, run in the interpreter, and their plain torch
references, each against a dense formula written here, which shares no code with either.
"""

import collections
import dataclasses
import math
from typing import Callable
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import LiveBytes, assert_close_2x, guarded, poisoned_empty
from kernels.loss import _linear_cross_entropy_bwd, _linear_cross_entropy_fwd, linear_cross_entropy
from kernels.norm import rms_norm
from kernels.rope import rope, rope_frequencies, rope_turns
from kernels.swiglu import swiglu

EPS = 1e-5


def dense_rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.to(x.dtype)


def dense_swiglu(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


def dense_rope(x, positions, inv_freq, factor=1.0):
    """Angles as a float64 product: at 10^7 they are right to 1e-9."""
    R = inv_freq.shape[0]
    angle = (positions.double()[..., None] * inv_freq)[..., None, :]
    cos, sin = (angle.cos() * factor).to(x.dtype), (angle.sin() * factor).to(x.dtype)
    a, b = x[..., :R], x[..., R:2 * R]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., 2 * R:]), -1)


def dense_loss(x, weight, targets, reduction, ignore_index=-100):
    logits = F.linear(x, weight.to(x.dtype)).to(torch.promote_types(x.dtype, torch.float32))
    valid = targets != ignore_index
    nll = -torch.log_softmax(logits, -1).gather(-1, targets.where(valid, 0)[..., None])[..., 0].where(valid, 0)
    return nll if reduction == "none" else nll.sum() if reduction == "sum" else nll.sum() / valid.sum()


def strided(*shape):
    """Random, contiguous only in the last dim: every other row of a wider buffer, an odd offset in."""
    *lead, last = shape
    return torch.randn(*lead[:-1], 2 * lead[-1], last + 5, dtype=torch.float64)[..., ::2, 3:3 + last]


def cast(x, dtype):
    """x in `dtype`, its strides kept: x.to(dtype) would close the gaps between its rows."""
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)


def random_targets(shape, V):
    targets = torch.randint(0, V, shape)
    targets.view(-1)[::7] = -100
    return targets


@dataclasses.dataclass
class Case:
    name: str
    inputs: Callable  # () -> the differentiable inputs, float64
    kernel: Callable  # of the inputs
    dense: Callable
    keep_float32: tuple = ()  # which inputs stay float32 for low-precision x, as weights do in a model


def rope_case(name, B, T, H, D, dim, positions, factor=1.0, make=strided):
    inv_freq, _ = rope_frequencies(dim)
    return Case(f"rope {name}", lambda: [make(B, T, H, D)],
                lambda x: rope(x, positions, inv_freq, attention_factor=factor),
                lambda x: dense_rope(x, positions, inv_freq, factor))


def loss_case(name, shape, C, V, reduction, make=strided, keep_float32=()):
    targets = random_targets(shape, V)
    return Case(f"loss {name} {reduction}", lambda: [make(*shape, C), make(V, C) / 2],
                lambda x, w: linear_cross_entropy(x, w, targets, reduction=reduction),
                lambda x, w: dense_loss(x, w, targets, reduction), keep_float32)


def cases(small):
    """Small ones for gradcheck, which differentiates each input element numerically; larger ones for the rest."""
    torch.manual_seed(1)
    n = 3 if small else 37
    far = torch.randint(-10**7, 10**7, (2, n))
    yield Case("rms_norm", lambda: [strided(2, n, 7), torch.randn(7).double()],
               lambda x, w: rms_norm(x, w, EPS), dense_rms_norm)
    yield Case("swiglu", lambda: [*strided(2, n, 6 if small else 12).chunk(2, -1)], swiglu, dense_swiglu)
    yield rope_case("partial, factor", 2, n, 3, 7 if small else 14, 6, far, 1.25)
    for reduction in ("mean", "sum", "none"):
        yield loss_case("odd", (2, n), 3, 7 if small else 4101, reduction)
    if not small:
        yield Case("rms_norm wide", lambda: [strided(3, 3, 4100), torch.randn(4100).double()],
                   lambda x, w: rms_norm(x, w, EPS), dense_rms_norm, (1,))
        yield Case("swiglu wide", lambda: [strided(2, 3, 1030), strided(2, 3, 1030)], swiglu, dense_swiglu)
        yield rope_case("whole head, int32", 3, 50, 5, 64, 64, torch.arange(50, dtype=torch.int32) + 10**7)
        yield rope_case("one token", 2, 1, 1, 2, 2, torch.tensor([-(10**9)]))
        yield rope_case("transposed", 2, 9, 4, 24, 24, far[:, ::4][:, :9],
                        make=lambda B, T, H, D: torch.randn(B, H, D, T).double().permute(0, 3, 1, 2))
        yield loss_case("many chunks", (60,), 8, 30000, "mean", keep_float32=(1,))


def run(function, inputs, dout):
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, dout.to(out.dtype))


SMALL, LARGE = list(cases(True)), list(cases(False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
@pytest.mark.parametrize("path", ["reference", "triton"])
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_values_and_gradients(case, path, dtype, request):
    if path == "triton":
        request.getfixturevalue("triton_kernels")
    exact = [cast(x, torch.float32 if i in case.keep_float32 else dtype) for i, x in enumerate(case.inputs())]
    guards = [guarded(x) for x in exact]
    with torch.no_grad():
        shape = case.dense(*exact).shape
    dout = torch.randn(shape, dtype=torch.float64).to(dtype)
    oracle = run(case.dense, [x.double().requires_grad_() for x in exact], dout)
    plain = run(case.dense, [x.requires_grad_() for x in exact], dout)
    with poisoned_empty():
        actual = run(case.kernel, [g.tensor.requires_grad_() for g in guards], guarded(dout).tensor)
    for guard in guards:
        guard.check()
    for i, (a, o, p) in enumerate(zip(actual, oracle, plain)):
        assert_close_2x(a, o, p, f"{case.name}: {'output' if i == 0 else f'gradient {i}'}")


@pytest.mark.parametrize("path", ["reference", "triton"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_gradcheck(case, path, request):
    if path == "triton":
        request.getfixturevalue("triton_kernels")
    inputs = [x.detach().requires_grad_() for x in case.inputs()]
    torch.testing.assert_close(case.kernel(*inputs), case.dense(*inputs))  # float64
    assert torch.autograd.gradcheck(case.kernel, inputs)


@pytest.mark.parametrize("path", ["reference", "triton"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_one_input_at_a_time_and_expanded_dout(case, path, request):
    """Gradients of one input alone; .sum() sends back a dout of strides 0; no_grad gives the same output."""
    if path == "triton":
        request.getfixturevalue("triton_kernels")
    values = case.inputs()
    for i in range(len(values)):
        inputs = [x.detach().requires_grad_(j == i) for j, x in enumerate(values)]
        out = case.kernel(*inputs)
        expected = torch.autograd.grad(case.dense(*inputs).sum(), inputs[i])
        torch.testing.assert_close(torch.autograd.grad(out.sum(), inputs[i]), expected)
    with torch.no_grad():
        assert torch.equal(case.kernel(*values), out)


@pytest.mark.parametrize("function", ["rms_norm", "swiglu", "rope"])
def test_offsets_past_int32(function, triton_kernels):
    """Row 4 of stride 2^29 lies 2^31 elements in: an int32 product reads elsewhere. Only touched pages take memory."""
    try:
        memory = torch.empty(2**31 + 64, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("4.3 GB of address space are not to be had")
    rows = memory.as_strided((5, 8), (2**29, 1))
    rows.copy_(torch.randn(5, 8))
    near = rows.clone()
    if function == "rope":
        inv_freq, _ = rope_frequencies(8)
        far, near = rows.view(5, 1, 1, 8), near.view(5, 1, 1, 8)
        assert torch.equal(rope(far, torch.tensor([3]), inv_freq), rope(near, torch.tensor([3]), inv_freq))
        far, near = far.transpose(0, 1), near.transpose(0, 1)  # 2^29 between tokens
        assert torch.equal(rope(far, torch.arange(5), inv_freq), rope(near, torch.arange(5), inv_freq))
        far, near = far.transpose(1, 2), near.transpose(1, 2)  # between heads
        assert torch.equal(rope(far, torch.tensor([3]), inv_freq), rope(near, torch.tensor([3]), inv_freq))
    elif function == "swiglu":
        assert torch.equal(swiglu(rows, rows), swiglu(near, near))
    else:
        assert torch.equal(rms_norm(rows, torch.ones(8), EPS), rms_norm(near, torch.ones(8), EPS))


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_rms_norm_weight_of_any_stride(path, request):
    if path == "triton":
        request.getfixturevalue("triton_kernels")
    x, buffer = torch.randn(5, 7, dtype=torch.float64), torch.randn(14, dtype=torch.float64)
    for weight in (buffer[::2], buffer[3].expand(7)):
        weight, dense = weight.detach().requires_grad_(), weight.clone().requires_grad_()
        out, expected = rms_norm(x, weight, EPS), dense_rms_norm(x, dense)
        torch.testing.assert_close(out, expected)
        dout = torch.randn(5, 7, dtype=torch.float64)
        torch.testing.assert_close(torch.autograd.grad(out, weight, dout), torch.autograd.grad(expected, dense, dout))


# ---- RoPE


def test_rope_turns():
    """Against 80-bit arithmetic; whole turns drop out; int64 passes through."""
    inv_freq = torch.cat((rope_frequencies(128)[0], torch.tensor([math.pi, 3.5, 100.0, 1e-12], dtype=torch.float64)))
    turns = rope_turns(inv_freq)
    exact = inv_freq.numpy().astype(np.longdouble) / (2 * np.longdouble("3.14159265358979323846264338327950288"))
    error = np.abs(turns.numpy().astype(np.longdouble) / np.longdouble(2) ** 64 - (exact - np.rint(exact)))
    assert np.minimum(error, 1 - error).max() < 2e-15  # float64's eps of the turns before the fraction is taken
    assert turns[64] == -2**63 and rope_turns(turns) is turns  # half a turn


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_rope_is_exact_far_out(path, request):
    """Positions around 10^7 and 10^9, float32, against 80-bit angles."""
    if path == "triton":
        request.getfixturevalue("triton_kernels")
    inv_freq, _ = rope_frequencies(64)
    positions = torch.cat((torch.arange(10**7 - 20, 10**7 + 20), torch.randint(-10**9, 10**9, (100,)), torch.arange(5)))
    x = torch.randn(1, len(positions), 2, 64)
    angle = positions.numpy().astype(np.longdouble)[:, None] * inv_freq.numpy().astype(np.longdouble)
    cos, sin = (torch.from_numpy(f(angle).astype(np.float64))[:, None] for f in (np.cos, np.sin))
    a, b = x.double().chunk(2, -1)
    expected = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    error = (rope(x, positions, inv_freq).double() - expected).abs().amax((0, 2, 3)) / x.abs().amax((0, 2, 3))
    assert error[:40].max() < 1e-6 and error[140:].max() < 1e-6
    assert error.max() < 1e-6  # at 10^9 too
    # float64 is as exact as inv_freq / 2 pi in float64 allows: 10^9 times its eps
    assert (rope(x.double(), positions, inv_freq) - expected).abs().max() < 1e-6
    assert torch.equal(rope(x, positions, rope_turns(inv_freq)), rope(x, positions, inv_freq))


def test_rope_scores_depend_on_distance_only():
    inv_freq, _ = rope_frequencies(32)
    q, k = torch.randn(2, 1, 40, 1, 32)
    scores = []
    for start in (0, 123_456_789_012):
        positions = torch.arange(40) + start
        scores.append(rope(q, positions, inv_freq)[0, :, 0] @ rope(k, positions, inv_freq)[0, :, 0].T)
    assert (scores[0] - scores[1]).norm() / scores[0].norm() < 1e-6


def test_rope_mistakes():
    inv_freq, _ = rope_frequencies(8)
    x = torch.randn(2, 3, 1, 8)
    for positions, frequencies, message in (
            (torch.arange(4), inv_freq, "positions"), (torch.arange(3.0), inv_freq, "int32 or int64"),
            (torch.arange(3), inv_freq.float(), "float64"), (torch.arange(3), inv_freq.repeat(2), "2 R <= D")):
        with pytest.raises(ValueError, match=message):
            rope(x, positions, frequencies)
    for dim, base in ((7, 1e4), (0, 1e4), (8, 0.0)):
        with pytest.raises(ValueError, match=str(dim if base else base)):
            rope_frequencies(dim, base)


# ---- linear cross entropy


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
@pytest.mark.parametrize("path", ["reference", "triton"])
def test_loss_memory(path, dtype, request):
    """Beyond inputs, outputs and gradients, at most a tenth of the float32 logits is ever live, in either pass."""
    if path == "triton":
        request.getfixturevalue("triton_kernels")
    N, C, V = 2048, 32, 16001
    logits = 4 * N * V
    assert logits >= 100e6
    x, weight, targets = torch.randn(N, C).to(dtype), torch.randn(V, C), torch.randint(0, V, (N,))
    options = -100, True, True, path == "triton"
    # An operator would hide what it allocates: the launchers show it. The kernel works in place, but takes the
    # interpreter a minute for 33M logits, so it is not launched.
    no_kernel = collections.defaultdict(lambda: lambda *args, **options: None)
    with mock.patch("kernels.loss._cross_entropy_kernel", no_kernel):
        for launch in (lambda: _linear_cross_entropy_fwd(x, weight, targets, *options),
                       lambda: _linear_cross_entropy_bwd(torch.ones(N), x, weight, targets, torch.zeros(N), *options)):
            with LiveBytes() as live:
                outputs = launch()
            assert live.peak - sum(t.nbytes for t in outputs) <= 0.1 * logits
    with LiveBytes() as live:
        dense_loss(x, weight, targets, "mean")
    assert live.peak >= logits  # the measure sees what the plain formula holds


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_loss_sums_past_float16(path, request):
    """The gradients' sums over tokens leave float16's range and precision before the mean brings them back."""
    if path == "triton":
        request.getfixturevalue("triton_kernels")
    targets = torch.zeros(129, dtype=torch.int64)
    weight = torch.zeros(8, 4, dtype=torch.float16, requires_grad=True)
    linear_cross_entropy(torch.full((128, 4), 640.0).half(), weight, targets[:128]).backward()
    assert (weight.grad[0] == -560).all() and (weight.grad[1:] == 80).all()  # the sum is -71680
    weight = torch.zeros(8, 4, requires_grad=True)
    for dtype in (torch.float16, torch.bfloat16) if path == "reference" else (torch.float16,):
        loss = linear_cross_entropy(torch.full((129, 4), 33 / 32, dtype=dtype), weight, targets, reduction="sum")
        gradient, = torch.autograd.grad(loss, weight)  # float32: not rounded to x's dtype on the way
        assert (gradient[0] == -129 * 33 * 7 / 256).all() and (gradient[1:] == 129 * 33 / 256).all()
    x = torch.full((100, 4), 1e-3, dtype=torch.float16, requires_grad=True)
    weight = torch.full((2, 4), 30000.0).half() * torch.tensor([[-1], [1]]).half()
    linear_cross_entropy(x, weight, targets[:100]).backward()
    assert (x.grad == 600).all()  # 60000 per token: the most that weights of 30000 can give


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_loss_strided_targets(path, request):
    if path == "triton":
        request.getfixturevalue("triton_kernels")
    x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    for targets in (random_targets((18,), 11)[::2], torch.tensor(4).expand(9)):
        for reduction in ("mean", "none"):
            results = [f(x, weight, targets, reduction=reduction) for f in (linear_cross_entropy, dense_loss)]
            torch.testing.assert_close(*results)
            torch.testing.assert_close(*[torch.autograd.grad(loss.square().sum(), (x, weight)) for loss in results])


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_loss_edge_cases(path, request):
    if path == "triton":
        request.getfixturevalue("triton_kernels")
    x, weight = torch.randn(3, 4, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    ignored = torch.full((3, 4), -1)
    for reduction in ("mean", "sum", "none"):  # all ignored: as torch, NaN for a mean, and no gradient
        loss = linear_cross_entropy(x, weight, ignored, ignore_index=-1, reduction=reduction)
        expected = F.cross_entropy(F.linear(x, weight).flatten(0, 1), ignored.flatten(), ignore_index=-1,
                                   reduction=reduction)
        torch.testing.assert_close(loss.flatten(), expected.flatten(), equal_nan=True)
        for gradient in torch.autograd.grad(loss.sum(), (x, weight)):
            assert (gradient == 0).all()
        empty = linear_cross_entropy(x[:0], weight, ignored[:0], reduction=reduction)  # no tokens at all
        assert empty.shape == ((0, 4) if reduction == "none" else ())
        assert all((g == 0).all() for g in torch.autograd.grad(empty.sum(), (x, weight)))
    targets = random_targets((3, 4), 11)
    loss = linear_cross_entropy(x, weight, targets)
    first = torch.autograd.grad(loss, (x, weight), torch.tensor(3.0), retain_graph=True)
    again = torch.autograd.grad(loss, (x, weight), torch.tensor(3.0))
    assert all(map(torch.equal, first, again))  # a second pass is not scaled twice
    expected = torch.autograd.grad(3 * dense_loss(x, weight, targets, "mean"), (x, weight))
    for a, e in zip(first, expected):
        torch.testing.assert_close(a, e)
    assert not linear_cross_entropy(x.detach(), weight.detach(), targets).requires_grad


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_loss_tied_embeddings(path, request):
    if path == "triton":
        request.getfixturevalue("triton_kernels")
    table = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    tokens, targets = torch.randint(0, 13, (2, 2, 9))
    expected, = torch.autograd.grad(dense_loss(F.embedding(tokens, table), table, targets, "mean"), table)
    actual, = torch.autograd.grad(linear_cross_entropy(F.embedding(tokens, table), table, targets), table)
    torch.testing.assert_close(actual, expected)


def test_loss_large_and_infinite_logits(triton_kernels):
    """Logits of 10^4, and of -inf for the whole first block of a row: the maximum's pivot keeps the sum finite."""
    weight = torch.randn(4100, 2) * 1e4
    weight[:4096, 1] = -torch.inf
    for column in weight.split(1, 1):
        expected = F.cross_entropy(column.double().T, torch.tensor([4099]))
        actual = linear_cross_entropy(torch.ones(1, 1), column, torch.tensor([4099]))
        torch.testing.assert_close(actual, expected.float())


def test_loss_targets_outside_the_vocabulary(triton_kernels):
    x, weight = torch.randn(4, 5), torch.randn(11, 5)
    targets = torch.tensor([3, 11, -7, -100])
    with pytest.raises(ValueError, match="target 11 is outside the vocabulary of 11"):
        linear_cross_entropy(x, weight, targets)
    with poisoned_empty():  # the kernel itself, as on a GPU: never read; NaN, in that row only
        far = torch.where(targets == 11, 10**15, targets)
        nll, _, dx, _ = _linear_cross_entropy_fwd(x, weight, far, -100, True, False, True)
    assert nll.isnan().tolist() == dx.isnan().any(1).tolist() == [False, True, True, False]
    torch.testing.assert_close(nll[0], dense_loss(x[:1], weight, targets[:1], "sum"))
    assert nll[3] == 0 and (dx[3] == 0).all()


def test_mistakes():
    x, weight, targets = torch.randn(2, 3, 4), torch.randn(9, 4), torch.zeros(2, 3, dtype=torch.int64)
    for arguments, keywords, message in (
            ((x, weight[:, :3], targets), {}, r"\(9, 3\)"), ((x, weight, targets[0]), {}, r"targets \(3,\)"),
            ((x, weight, targets.int()), {}, "int64"), ((x, weight, targets), {"reduction": "avg"}, "avg")):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments, **keywords)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(9, 4\)"):
        swiglu(x, weight)
    with pytest.raises(ValueError, match="float16"):
        swiglu(x, x.half())
    with pytest.raises(ValueError, match="ends in 4"):
        rms_norm(x, torch.ones(3), EPS)


# ---- torch.compile and the operators


def block(x, norm, weight, targets, positions, turns):
    """Every kernel once, in one graph."""
    x = rope(rms_norm(x, norm, EPS), positions, turns)
    x = swiglu(*x.chunk(2, -1)).flatten(2)
    each = linear_cross_entropy(x, weight, targets, reduction="none")
    return linear_cross_entropy(x, weight, targets) + each.square().sum()


@pytest.mark.parametrize("path, backend", [("triton", "aot_eager"), ("reference", "inductor")])
def test_compiles_whole(path, backend, request):
    if path == "triton":
        request.getfixturevalue("triton_kernels")
    turns = rope_turns(rope_frequencies(12)[0])
    constants = random_targets((2, 9), 21), torch.arange(9) + 10**7, turns
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    values = torch.randn(2, 9, 3, 16), torch.randn(16), torch.randn(21, 24)
    results = []
    for function, dtype in ((block, torch.float64), (block, torch.float32), (compiled, torch.float32)):
        inputs = [v.to(dtype).requires_grad_() for v in values]
        loss = function(*inputs, *constants)
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    for oracle, eager, fast in zip(*results):
        if path == "triton":
            assert torch.equal(eager, fast)
        else:
            assert_close_2x(fast, oracle, eager, "compiled")


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_loss_compiled_for_any_length(path, request):
    """Twelve lengths, more than torch.compile would compile anew for; their chunks differ in number."""
    if path == "triton":
        request.getfixturevalue("triton_kernels")

    def losses(x, weight, targets):
        each = linear_cross_entropy(x, weight, targets, reduction="none")
        return linear_cross_entropy(x, weight, targets) + each.square().mean()

    torch.compiler.reset()
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    weight = torch.randn(200_000 if path == "reference" else 21, 4, requires_grad=True)
    for n in range(2, 26, 2):
        x, targets = torch.randn(n, 4, requires_grad=True), random_targets((n,), weight.shape[0])
        results = []
        for function in (losses, compiled):
            loss = function(x, weight, targets)
            results.append((loss, *torch.autograd.grad(loss, (x, weight))))
        assert all(map(torch.equal, *results))


def test_operators(triton_kernels):
    """Schemas, fake implementations and tracing, as PyTorch checks them."""
    x, w, r, n = torch.randn(5, 8), torch.randn(8), torch.rand(5), torch.randint(0, 7, (5,))
    x4, positions, turns = torch.randn(2, 5, 3, 8), torch.arange(5), rope_turns(rope_frequencies(6)[0])
    table = torch.randn(7, 8)
    ops = torch.ops.nanolong
    for op, arguments in ((ops.rms_norm_fwd, (x, w, EPS)), (ops.rms_norm_bwd, (x, x, w, r)), (ops.swiglu_fwd, (x, x)),
                          (ops.swiglu_bwd, (x, x, x)), (ops.rope, (x4, positions, turns, 1.5, True)),
                          (ops.linear_cross_entropy_fwd, (x, table, n, -100, True, True, True)),
                          (ops.linear_cross_entropy_fwd, (x, table, n, -100, False, False, False)),
                          (ops.linear_cross_entropy_bwd, (r, x, table, n, r, -100, True, False, True)),
                          (ops.linear_cross_entropy_bwd, (r, x, table, n, r, -100, False, True, False))):
        torch.library.opcheck(op.default, arguments)
