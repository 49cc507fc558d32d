"""Infini-attention over a sequence shared by several processes (gloo) against one process that has all of it."""

import contextlib
import functools
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import relative_error, run_ranks

from kernels import infini_attention
from kernels.backend import HAVE_TRITON

B, H, G, D, N = 2, 4, 2, 8, 4  # N tokens per segment
NAMES = "q", "k", "v", "q_rot", "k_rot", "beta", "M", "z"
CASES = [(rule, what) for rule in ("delta", "linear") for what in ("state", "documents", "empty")]
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-6}  # and the relative error allowed


def runs(world):
    """(backend, dtype, rule, what): all with the reference, some with the kernels, in the interpreter, which is slow."""
    yield from (("reference", dtype, *case) for dtype in DTYPES for case in CASES)
    if HAVE_TRITON and 2 <= world <= 4:
        yield "triton", torch.float64, "delta", "documents"
    if HAVE_TRITON and world == 3:
        for dtype, *case in ((torch.float32, "delta", "documents"), (torch.float64, "delta", "empty"),
                             (torch.float64, "linear", "documents")):
            yield "triton", dtype, *case



def tensors(T, seed=0):
    """The whole sequence's q, k, v, q_rot, k_rot, beta, M, z and the upstream gradient of out, in float64."""
    random = functools.partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, k, v, q_rot, k_rot = (random(B, T, heads, D) for heads in (H, G, G, H, G))
    return [q, k, v, q_rot, k_rot, random(H), random(B, G, D, D).mT, 5 * random(B, G, D).abs()], random(B, T, H, D)


def end_gradients(rank):
    """Upstream gradients of the (M, z) that a rank returns."""
    random = functools.partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + rank))
    return random(B, G, D, D).mT, random(B, G, D)


def documents(T, c):
    """Texts that begin with the second shard, inside a segment, in the first shard's last segment (and go on over all of the
    second), with the third's last token."""
    borders = torch.zeros(B, T, dtype=torch.int64)
    for row, at in ((0, c), (0, 2 * c + 3), (1, c - 2), (1, 3 * c - 1)):
        if at < T:
            borders[row, at] = 1
    return borders.cumsum(1) * 7 % 5


def call(inputs, rule, what, docs, group=None):
    q, k, v, q_rot, k_rot, beta, M, z = inputs
    out, state = infini_attention(q, k, v, beta, q_rot=q_rot, k_rot=k_rot, segment=N, rule=rule, group=group,
                                  docs=docs if what == "documents" else None, state=None if what == "empty" else (M, z))
    return out, *state


def on_ranks(rank, world, c):
    """Every run: this rank's out, M', z' and gradients, given its rows, and the first state on every rank."""
    results, rows = {}, slice(rank * c, (rank + 1) * c)
    for backend, dtype, *case in runs(world):
        os.environ["NANOLONG_KERNELS"] = backend
        inputs, dout = tensors(world * c)
        inputs = [(x[:, rows] if i < 5 else x).to(dtype).requires_grad_() for i, x in enumerate(inputs)]
        outs = call(inputs, *case, documents(world * c, c)[:, rows], dist.group.WORLD)
        upstream = [x.to(dtype) for x in (dout[:, rows], *end_gradients(rank))]
        grads = torch.autograd.grad(outs, inputs, upstream, allow_unused=True, materialize_grads=True)
        results[(backend, dtype, *case)] = [x.detach() for x in (*outs, *grads)]
    return results


def one_process(world, c, dtype, *case):
    """The same where one process has all: out, the memories after each shard, and the gradients of all of these."""
    inputs, dout = tensors(world * c)
    inputs, docs = [x.to(dtype).requires_grad_() for x in inputs], documents(world * c, c)
    outs, upstream = [call(inputs, *case, docs)[0]], [dout.to(dtype)]
    for rank in range(world):  # the memory after a shard is that after the tokens up to there
        T = (rank + 1) * c
        outs += call([x[:, :T] for x in inputs[:5]] + inputs[5:], *case, docs[:, :T])[1:]
        upstream += [x.to(dtype) for x in end_gradients(rank)]
    grads = torch.autograd.grad(outs, inputs, upstream, allow_unused=True, materialize_grads=True)
    return [outs[0], torch.stack(outs[1::2]), torch.stack(outs[2::2]), *grads]


def together(shards):
    """What the ranks gave as what one process gives."""
    out, M, z, *grads = zip(*shards)
    rows = [torch.cat(x, 1) for x in (out, *grads[:5])]
    assert not any(x.any() for of_state in grads[6:] for x in of_state[1:]), "a later rank's state has a gradient"
    return [rows[0], torch.stack(M), torch.stack(z), *rows[1:], torch.stack(grads[5]).sum(0), *(x[0] for x in grads[6:])]


@pytest.mark.parametrize("world, c", [(1, 3 * N), (2, 3 * N), (3, 2 * N), (4, 2 * N), (8, N)])
def test_equals_one_process(world, c):
    """Output, the memory after each rank, and each gradient alone, given gradients of all of these."""
    ranks = run_ranks(world, on_ranks, c, timeout=240)
    for run in runs(world):
        actual = together([of_rank[run] for of_rank in ranks])
        for name, x, expected in zip(("out", "M'", "z'", *(f"d{name}" for name in NAMES)), actual,
                                     one_process(world, c, *run[1:])):
            error = relative_error(x, expected)
            assert error <= DTYPES[run[1]], f"{name} on {world} ranks, {run}: {error:.2e}"


def count_bytes(rank, world, backend, segments):
    """Bytes that this rank sends forward, and by the end of the backward pass: (to other ranks, of document ids) each."""
    os.environ["NANOLONG_KERNELS"], sent = backend, []
    inputs, dout = tensors(segments * N)
    inputs = [x.float().requires_grad_() for x in inputs]

    def counted(name, sizes):
        real = getattr(dist, name)

        def f(*args, **kwargs):
            sent.extend((name, n) for n in sizes(args))
            return real(*args, **kwargs)
        return mock.patch.object(dist, name, f)

    def posted(args):
        return [op.tensor.nbytes for op in args[0] if op.op is dist.isend]

    with contextlib.ExitStack() as stack:
        stack.enter_context(counted("batch_isend_irecv", posted))
        for name, which in (("send", 0), ("all_gather", 1), ("all_reduce", 0), ("broadcast", 0)):
            stack.enter_context(counted(name, lambda args, which=which: [args[which].nbytes]))
        outs = call(inputs, "delta", "documents", documents(segments * N, N), dist.group.WORLD)
        forward, sent = sent, []
        torch.autograd.grad(outs, inputs[:5], [torch.ones_like(x) for x in outs])
    return forward, sent


@pytest.mark.parametrize("backend, segments", [("reference", 8), ("triton", 1)])
def test_bytes(backend, segments):
    """D (D + 1) floats per kv head, hop and direction, and one document id per sequence, whatever the length."""
    if backend == "triton":
        pytest.importorskip("triton")
    z, M, ids = ("batch_isend_irecv", B * G * D * 4), ("batch_isend_irecv", B * G * D * D * 4), ("all_gather", B * 8)
    assert run_ranks(3, count_bytes, backend, segments) == [([ids, z, M], []), ([ids, z, M], [M, z]), ([ids], [M, z])]


def mistakes(rank, world):
    (q, k, v, q_rot, k_rot, beta, *state), _ = tensors(3 * N)
    messages = []
    for queries, keys in ((7, 7), (3, 3), (N, 2 * N), (2 * N, 2 * N)):
        try:
            infini_attention(q[:, :queries], k[:, :keys], v[:, :keys], beta, q_rot=q_rot[:, :queries],
                             k_rot=k_rot[:, :keys], segment=N, group=dist.group.WORLD)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_mistakes():
    """Both numbers, on every rank, and no rank left waiting: the right call after them works."""
    first, second = run_ranks(2, mistakes)
    assert first == second == [
        *(f"infini_attention: the {n} tokens of each of 2 ranks are not whole segments of 4: give each 4, or choose a "
          f"segment that divides {n}" for n in (7, 3)),
        "infini_attention: 4 queries and 8 keys: a rank of a group holds the same tokens of both"]


def compiled(rank, world):
    """The largest relative error of the compiled call against the eager one; the operators as PyTorch checks them."""
    inputs, dout = tensors(2 * N)
    inputs, docs, results = [x.requires_grad_() for x in inputs], documents(2 * N, N), []
    for f in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        outs = f(inputs, "delta", "documents", docs, dist.group.WORLD)
        results.append([*outs, *torch.autograd.grad(outs, inputs[:5], [dout, *end_gradients(rank)])])
    M, group = inputs[6].detach(), dist.group.WORLD.group_name
    for reverse in (False, True):
        torch.library.opcheck(torch.ops.nanolong.scan_ranks.default, (M, M.mT, M, group, reverse))
    torch.library.opcheck(torch.ops.nanolong.document_before.default, (docs, group))
    return max(relative_error(x, y) for x, y in zip(*results))


def test_compiles_whole():
    """In one graph, equal to eager, on two ranks."""
    assert max(run_ranks(2, compiled)) < 1e-12
