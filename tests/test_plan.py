"""
The planner's figures against what a training step takes. Peaks are counted without a GPU on the path that a GPU takes:
tensors on the device "meta" say that they are on CUDA, the Triton kernels' launchers allocate all they do there and
launch nothing, and every tensor that lives is counted, the launchers' own too. That this count is the allocator's is
checked with tensors that hold memory. Bytes sent are those that the ring posts.
"""

import contextlib
import functools
import importlib
import itertools
import json
import math
import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("triton")

import kernels.ring
import plan
from helpers import LiveBytes, run_ranks
from kernels import backend
from model import GPT, GPTConfig
from plan import GPUS, Case, Sizes, gradient_bytes, hops, longest, memory, traffic
from train import PEAK_FLOPS, Place, TrainConfig, main, spread

SMALL = dict(n_layer=4, n_head=4, n_kv_head=2, n_embd=256, vocab_size=512, block_size=4096, window=500, segment=1024)
VARIANTS = [dict(), dict(attention="window"), dict(attention="infini"),
            dict(attention="window,full", position="xpos"), dict(attention="blockwise", position="alibi"),
            dict(attention="infini,full", memory_norm=1.0, segment=64),
            dict(attention="infini", memory_rule="linear", segment=512), dict(mlp="gelu", norm="layernorm", bias=True),
            dict(parallel_residual=True, shared_norm=True, tie_embeddings=False), dict(sink_logit=True, n_kv_head=4),
            dict(n_embd=1024, n_head=8, n_layer=2), dict(n_inner=128, vocab_size=50304, tie_embeddings=False)]


def launchers():
    """The Triton kernels' launchers, by their operator."""
    names = ("attention", "loss", "memory", "merge", "norm", "ring", "rope", "swiglu")
    attention, loss, memory, merge, norm, ring, rope, swiglu = (importlib.import_module(f"kernels.{x}") for x in names)
    return dict(attention_fwd=lambda *x: attention._attention_fwd(*x[:-1]),
                attention_bwd=lambda *x: attention._attention_bwd(*x[:-1]), memory_fwd=memory._memory_fwd,
                memory_bwd=memory._memory_bwd, linear_cross_entropy_fwd=loss._linear_cross_entropy_fwd,
                apply_sink_logit_fwd=merge._sink_logit_fwd, apply_sink_logit_bwd=merge._sink_logit_bwd, rope=rope._rope,
                rms_norm_fwd=norm._rms_norm_fwd, rms_norm_bwd=norm._rms_norm_bwd, swiglu_fwd=swiglu._swiglu_fwd,
                swiglu_bwd=swiglu._swiglu_bwd,
                ring_attention_fwd=ring._ring_fwd, ring_attention_bwd=ring._ring_bwd,
                gather_tokens=ring._gather_tokens)


class StepBytes(LiveBytes):
    """LiveBytes that looks into the kernels' launchers."""

    def __init__(self):
        super().__init__()
        self.launchers = launchers()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        launcher = self.launchers.get(func._schema.name.removeprefix("nanolong::"))
        if launcher is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        with self:
            return launcher(*args)


class Ranks:
    """A process group of which there is one rank."""

    group_name = ""

    def __init__(self, rank, size):
        self.at, self.n = rank, size

    def rank(self):
        return self.at

    def size(self):
        return self.n


@contextlib.contextmanager
def as_on_a_gpu(group, sent, alone=True):
    """
    Tensors take the GPU's path, kernels are not launched. alone: the other ranks of `group` are not there, and `sent`
    collects the bytes of each hop.
    """
    from triton.runtime.interpreter import GridExecutor

    def post(_, tensors):
        sent.append(sum(x.nbytes for x, _ in tensors))
        came = [torch.empty_like(x) for x, _ in tensors]
        return lambda: came

    def scan(B, A, own, group, reverse):
        sent.append(own.nbytes)
        return own.clone()

    def reduce(x, group):
        sent.append(x.nbytes * 2 * (group.size() - 1) / group.size())

    patched = [(GridExecutor, "__call__", lambda *args, **options: None), (backend, "aot_arch", 90),
               (backend, "_decide", lambda *_: True)]
    if alone:
        patched += [(kernels.ring, "_post", post), (kernels.memory, "_scan_ranks", scan), (dist, "all_reduce", reduce),
                    (kernels.ring, "_resolve_process_group", lambda _: group),
                    (torch.Tensor, "is_cuda", property(lambda _: True)),
                    (torch, "autocast", lambda *args, **options: contextlib.nullcontext())]
    with contextlib.ExitStack() as stack:
        for target, name, new in patched:
            stack.enter_context(mock.patch.object(target, name, new))
        yield


@functools.cache
def model_on_meta(options):
    options = dict(options)
    if "rope_scaling" in options:
        options["rope_scaling"] = json.loads(options["rope_scaling"])
    config = GPTConfig(**SMALL | options)
    with torch.device("meta"):
        model = GPT(config)
    for name, x in model.named_buffers():
        model._buffers[name] = x.to("meta")
    return model


def step(options, B, T, dtype, recompute, ranks=1, rank=0, docs=False, skips=False):
    """
    One forward and backward pass -> bytes alive at most, without weights; those after the forward pass; bytes sent; the
    planner's Case. skips: positions are given.
    """
    model, sent = model_on_meta(tuple(options.items())), []
    model.compute_dtype = None if dtype == torch.float32 else dtype
    model.activation_checkpointing = recompute
    group = Ranks(rank, ranks)
    model.ring = kernels.ring.Ring(group, model.config.layout) if ranks > 1 else None
    ids = torch.zeros(B, T // ranks, dtype=torch.int64, device="meta")
    with as_on_a_gpu(group, sent), StepBytes() as live:
        _, loss = model(ids, ids, reduction="sum", docs=ids if docs else None, positions=ids[0] if skips else None)
        kept = live.now
        (loss * 1.0).backward()
    for p in model.parameters():
        p.grad = None
    case = Case(config := model.config, Sizes.of(config), B, T, ranks, 1, dtype.itemsize, recompute, False, False, docs,
                skips)
    return live.peak + 2 * ids.nbytes, kept, sum(sent), case


def planned(case):
    """memory's peak without weights and the optimizer's moments."""
    return memory(case).peak - 12 * case.sizes.all


def allocated(model, ids):
    """The most bytes that the allocator had given out at a time in a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(ids, ids, reduction="sum")[1].backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
    return live.max().item() + 2 * ids.nbytes


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("attention", ("full", "window", "infini,full"))
def test_the_count_is_the_allocators(attention, recompute):
    """The count on "meta" against the allocator's own events, for the same step on tensors that hold memory."""
    options = dict(attention=attention, n_embd=128)
    expected = step(options, 1, 1024, torch.float32, recompute)[0]
    model = GPT(GPTConfig(**SMALL | options))
    model.activation_checkpointing = recompute
    with as_on_a_gpu(None, []):
        peak = allocated(model, torch.zeros(1, 1024, dtype=torch.int64))
    assert abs(peak / expected - 1) < 0.03, f"{peak} and {expected}"


@pytest.mark.parametrize("tied", (False, True))
def test_large_vocabulary(tied):
    """The end of the backward pass is the fullest point: a tied weight's gradient comes in two parts."""
    model = GPT(config := GPTConfig(**SMALL | dict(vocab_size=8192, tie_embeddings=tied)))
    case = Case(config, Sizes.of(config), 1, 16, 1, 1, 4, False, False, False)
    with as_on_a_gpu(None, []):
        peak = allocated(model, torch.zeros(1, 16, dtype=torch.int64))
    assert abs(planned(case) / peak - 1) < 0.05, f"allocated {peak}, planned {planned(case):.0f}"


def on_two_ranks(rank, world):
    """Steps in a ring and with fsdp over gloo, on tensors that hold memory -> allocated and planned bytes of each."""
    found, ids, config = [], torch.zeros(1, 512, dtype=torch.int64), GPTConfig(**SMALL | dict(n_embd=128))
    for fsdp, recompute in ((False, False), (False, True), (True, False)):
        sp, dp = (1, 2) if fsdp else (2, 1)
        case = Case(config, Sizes.of(config), 1, 512 * sp, sp, dp, 4, recompute, fsdp, accumulate=True)
        model, held = GPT(config), 16 * case.sizes.all  # weights, gradients, moments
        model.activation_checkpointing = recompute
        if fsdp:
            spread(model, TrainConfig(compile=False), Place(rank, world, torch.device("cpu"), torch.float32, []))
            held //= 2
        else:
            model.sequence_parallel(dist.group.WORLD)
        with as_on_a_gpu(None, [], alone=False):
            model(ids, ids, reduction="sum")[1].backward()
            found.append((allocated(model, ids), memory(case).peak - held, f"{fsdp=}, {recompute=}"))
    return found


def test_on_two_ranks():
    for found in run_ranks(2, on_two_ranks):
        for allocated, planned, case in found:
            assert abs(planned / allocated - 1) < 0.15, f"{case}: allocated {allocated}, planned {planned:.0f}"


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_peak(options, recompute):
    for B, T, dtype in ((2, 4096, torch.bfloat16), (1, 1024, torch.float32)):
        peak, _, _, case = step(options, B, T, dtype, recompute)
        assert abs(planned(case) / peak - 1) < 0.1, f"{dtype}: measured {peak}, planned {planned(case):.0f}"


LONGROPE = dict(rope_type="longrope", short_factor=[1.0] * 32, long_factor=[2.0] * 32, factor=4.0,
                original_max_position_embeddings=2048)


@pytest.mark.parametrize("recompute", (False, True))
def test_documents_and_positions(recompute):
    scaled = dict(rope_scaling=json.dumps(LONGROPE))
    for options, more in ((dict(), dict(docs=True)), (dict(attention="infini"), dict(docs=True)), (scaled, dict()),
                          (scaled, dict(skips=True)), (scaled, dict(ranks=4, rank=1))):
        peak, _, _, case = step(options, 1, 4096, torch.bfloat16, recompute, **more)
        assert abs(planned(case) / peak - 1) < 0.15, f"{options}, {more}: measured {peak}, planned {planned(case):.0f}"


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_what_the_forward_pass_keeps(options):
    _, kept, _, case = step(options, 2, 4096, torch.bfloat16, False)
    N, config = 2 * 4096, case.config
    loss = N * config.n_embd * 2 * 2 + 4 * config.vocab_size * config.n_embd  # the last norm's input and dx; dw
    blocks = sum(sum(plan.attention_bytes(case, kind, N).values()) + sum(plan.mlp_bytes(case, N).values())
                 + plan.cast_bytes(case, case.sizes.qkv + case.sizes.others) for kind in config.layer_kinds)
    assert abs((blocks + loss) / kept - 1) < 0.001, f"measured {kept}, planned {blocks + loss}"


RING = [dict(), dict(attention="window"), dict(attention="window,full", n_kv_head=1),
        dict(attention="infini", segment=128), dict(attention="blockwise", n_inner=128, block_size=8192),
        dict(attention="infini,full", memory_rule="linear", segment=128, n_inner=128)]


@pytest.mark.parametrize("options", RING, ids=str)
def test_a_rank_of_a_ring(options):
    """Peak memory, and every byte that it posts."""
    for P, dtype, recompute in ((2, torch.float32, False), (8, torch.bfloat16, True)):
        peak, _, sent, case = step(options, 1, 8192, dtype, recompute, P, P // 2)
        assert abs(planned(case) / peak - 1) < 0.15, f"{P} ranks, {dtype}: measured {peak}, planned {planned(case):.0f}"
        assert traffic(case, 1e12, 1e9).sent == pytest.approx(sent), f"{P} ranks"


@pytest.mark.parametrize("W", (None, 1, 9, 40, 200))
@pytest.mark.parametrize("attention", ("window", "window,full"))
def test_hops_and_pairs(attention, W):
    """The hops that kernels.ring makes, and at each of them every pair that is seen, one by one."""
    kind, config = "window" if W else "full", GPTConfig(**SMALL | dict(attention=attention, sinks=0, window=W or 1))
    for P, c in ((2, 48), (5, 16), (8, 12)):
        case = Case(config, Sizes(0, 0, 0, 0, 0), 1, P * c, P, 1, 2, False, False, False, explicit=True)
        masks = kernels.ring._Masks(P, c, config.layout, True, W, None, 0, 0, False)
        there, rank = kernels.ring._hops(masks), P // 2 if config.layout == "zigzag" else P - 1
        at = [kernels.ring.shard_positions(c, Ranks(r, P), config.layout) for r in range(P)]
        distance = [at[rank][:, None] - at[(rank - hop) % P][None] for hop in there]
        assert hops(case, kind) == [((d >= 0) & (d < (W or P * c))).sum().item() for d in distance], (P, c)


def test_thresholds():
    """Ring Attention's rule and its figures for an A100, our factors on it, and the hops by themselves."""
    config, a100 = GPTConfig(n_layer=1, n_head=4, n_kv_head=4, n_embd=256, vocab_size=64), PEAK_FLOPS["A100"]
    assert a100 / GPUS["A100"].node == 1040 and a100 / 12.5e9 == 24960
    case = Case(config, Sizes.of(config), 1, 2**20, 8, 1, 2, False, False, False)
    for W, plain in ((300e9, 1040), (12.5e9, 24960)):
        forward, backward = (plan.threshold(case, a100, W, x) for x in (False, True))
        assert (forward, backward) == (pytest.approx(2 * plain), pytest.approx(2.4 * plain))
        mixed = replace(config, n_layer=2, attention="full,infini", segment=64)  # contiguous
        for one, seen in ((replace(case, config=replace(config, n_kv_head=1)), 1 / 4), (replace(case, e=4), 2),
                          (replace(case, config=mixed), 1 / 2)):
            assert plan.threshold(one, a100, W, False) == pytest.approx(seen * forward)
        for c, hides in ((math.ceil(forward / 2 + 1) * 2, True), (math.floor(forward / 2 - 1) * 2, False)):
            t = traffic(replace(case, T=8 * c), a100, W)
            assert (t.hidden_forward == t.forward) == hides
        c = round(backward / 2) * 2
        below, above = (traffic(replace(case, T=8 * x), a100, W) for x in (c - 16, c + 16))
        assert above.hidden_backward == pytest.approx(above.backward - above.backward_hop + above.forward_hop)
        assert below.hidden_backward < below.backward - below.backward_hop + below.forward_hop


def test_weights_gradients_moments():
    for options in (dict(), dict(attention="infini", tie_embeddings=False)):
        model = GPT(config := GPTConfig(**SMALL | options))
        optimizer = torch.optim.AdamW(model.parameters())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        weights = sum(p.nbytes for p in model.parameters())
        moments = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.dim())
        case = Case(config, Sizes.of(config), 2, 4096, 1, 1, 2, False, False, False)
        m = memory(case)
        assert (m.weights, m.gradients, m.optimizer) == (weights, weights, moments)
        assert max(m.activations, weights) + weights + moments <= m.peak <= m.activations + 2 * weights + moments
        spread = memory(replace(case, sp=4, dp=2, fsdp=True))
        assert (spread.gradients, spread.optimizer) == (weights / 8, moments / 8)
        assert weights / 8 < spread.weights < weights
        assert gradient_bytes(replace(case, dp=8), 5) == 2 * weights * 7 / 8


def test_longest():
    case = Case(config := GPTConfig(**SMALL), Sizes.of(config), 4, 4096, 4, 1, 2, True, False, True)
    last = 0
    for gib in (1, 2, 4, 8):
        T = longest(case, gib * 2**30)
        config.check_shards(T, 4)
        fits, more = (memory(replace(case, B=1, T=x)).peak for x in (T, T + T // 500 // 8 * 8))
        assert fits <= gib * 2**30 < more and T > last
        last = T
    assert longest(case, 1e6) is None


def test_command(tmp_path, capsys):
    """No data, no folder, no GPU; a table of 11 lines; mistakes in one line."""
    command = ["--plan", "--out", str(tmp_path / "runs"), "--data", str(tmp_path / "none"), "--block-size", "4096"]
    for more in ([], ["--sp", "6", "--block-size", "4128"], ["--attention", "window", "--window", "500", "--sp", "2", "--fsdp"],
                 ["--attention", "infini", "--activation-checkpointing"],
                 ["--attention", "window", "--sink-tokens", "2"], ["--n-kv-head", "1"],
                 ["--plan-gpu", "l4", "--dtype", "float32", "--plan-bandwidth", "12.5"]):
        with pytest.raises(SystemExit) as stop:
            main(command + more)
        assert not stop.value.code
        lines = capsys.readouterr().out.splitlines()
        assert all(line.isascii() for line in lines)
        rows = [line.split() for line in lines if re.match(r"[* ] +\d+ x \d+ ", line)]
        assert len(rows) == 11 + ("6" in more) and sum(row[0] == "*" for row in rows) == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="plan_bandwidth is 5.0, which training has no use for: add --plan"):
        main(["--plan-bandwidth", "5"])
    for more, words in ((["--plan-gpu", "H1000"], "plan_gpu is 'H1000'"),
                        (["--plan-bandwidth", "0"], "plan_bandwidth is 0.0"), (["--fsdp"], "fsdp with 1 rank"),
                        (["--sp", "3"], "4096 tokens with 3 ranks"), (["--batch-tokens", "5"], "batch_tokens 5")):
        with pytest.raises(SystemExit, match=words) as stop:
            main(command + more)
        assert "\n" not in str(stop.value.code)


def test_sizes():
    assert [plan.size(n * 2**10) for n in (0, 0.5, 812, 999.4, 999.6, 2**40 * 5, 2**50)] == \
        ["-", "0.5 K", "812 K", "999 K", "0.976 M", "5 P", "1.02e+03 P"]
