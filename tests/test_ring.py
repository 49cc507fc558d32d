"""
Sequence parallelism (kernels/ring.py and the model in a ring) against one process that has the whole sequence, over gloo:
every output and every gradient by itself, with random gradients from above.
"""

import contextlib
import importlib
import itertools
import random
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import kernels.ring
from helpers import assert_close_2x, randomised, relative_error, run_ranks
from kernels import attention
from kernels.bench_ring import causal_load, emulated_ring
from kernels.ring import LAYOUTS, gather_tokens, ring_attention, shard_positions, shard_sequence, unshard_sequence
from model import GPT, GPTConfig

B, T, H, G, D = 2, 48, 4, 2, 8
CASES = [dict(), dict(causal=False), dict(window=11), dict(window=1), dict(window=11, sinks=4), dict(window=40, sinks=13),
         dict(window=11, sinks=4, alibi=True), dict(alibi=True), dict(sinks=3), dict(sinks=3, alibi=True), dict(docs=True),
         dict(segment=10), dict(segment=10, docs=True), dict(segment=8, causal=False), dict(segment=6, lookback=1),
         dict(xpos=8), dict(xpos=4, window=13, sinks=4), dict(docs=True, sinks=2, window=9), dict(scale=0.3, window=100)]
NAMES = ("out", "lse", "dq", "dk", "dv", "dq_sink")


def drawn(layout, random):
    """Masks together, by chance."""
    chance, case = lambda p: random.random() < p, {}
    case |= dict(window=random.choice([1, 5, 16, 17, 40])) if chance(0.5) else {}
    case |= dict(sinks=random.choice([1, 4, 7, 19])) if chance(0.5) else {}
    case |= dict(segment=random.choice([1, 6, 7, 12, 30])) if chance(0.5) else {}
    case |= dict(lookback=random.choice([1, 2])) if "segment" in case and layout != "striped" and chance(0.5) else {}
    case |= dict(docs=True) if chance(0.4) else {}
    case |= dict(alibi=True) if chance(0.4) else {}
    if layout != "striped" and chance(0.3):
        return case | dict(xpos=random.choice([2, 8]))
    return case | (dict(causal=False) if chance(0.3) else {})


def on_a_ring(layout, case):
    return layout != "striped" or not {"xpos", "lookback"} & case.keys()


def attend(case, layout, group, dtype, shape=(B, T, H, G, D), device="cpu"):
    """NAMES of one case: by the ring, gathered, or with `group` None by one process."""
    (B, T, H, G, D), case = shape, dict(case)
    generator = torch.Generator().manual_seed(7)
    q, k, v, dout, q_sink = (torch.randn(B, T, heads, D, dtype=torch.float64, generator=generator).to(device, dtype)
                             for heads in (H, G, G, H, H))
    dlse = torch.randn(B, H, T, dtype=torch.float64, generator=generator).to(
        device, torch.promote_types(dtype, torch.float32))
    slopes = torch.rand(H, generator=generator).to(device)
    docs = torch.arange(T, device=device).expand(B, T) // 17 if case.pop("docs", False) else None
    S, options = case.pop("sinks", 0), case
    if options.pop("alibi", False):
        options["alibi_slopes"] = slopes
    shard = (lambda x, dim=1: x) if group is None else lambda x, dim=1: shard_sequence(x, group, layout, dim)
    whole = [x.requires_grad_() for x in (q, k, v, q_sink)]
    q, k, v, q_sink = map(shard, whole)
    if docs is not None:
        options |= dict(q_docs=shard(docs), k_docs=shard(docs))
    if S:
        options["sinks"] = q_sink, *((k[:, :S], v[:, :S]) if group is None else gather_tokens(k, v, 0, S, group, layout))
    call = attention if group is None else lambda *args, **options: ring_attention(*args, group, layout=layout, **options)
    out, lse = call(q, k, v, return_lse=True, **options)
    seen = lse.isfinite()
    ((out * shard(dout)).sum() + (lse[seen] * shard(dlse, 2)[seen]).sum()).backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in whole]
    if group is not None:
        out, lse = unshard_sequence(out, group, layout), unshard_sequence(lse, group, layout, 2)
        for grad in grads:
            dist.all_reduce(grad, group=group)  # each rank's is zero but for its own rows
    return [out.detach(), lse.detach(), *grads]


def compare(rank, world, cases, dtype, *where):
    """[(layout, case, name, error)] of the ring against one process."""
    errors = []
    for layout, case in cases:
        ring = attend(case, layout, dist.group.WORLD, dtype, *where)
        one = attend(case, None, None, dtype, *where) if rank == 0 else []
        errors += [(layout, str(case), name, relative_error(a.nan_to_num(neginf=0), b.nan_to_num(neginf=0)))
                   for name, a, b in zip(NAMES, ring, one)]
    return errors


ALL = [(layout, case) for layout in LAYOUTS for case in CASES if on_a_ring(layout, case)]
DRAWN = [(layout, drawn(layout, random)) for random in [random.Random(1)] for layout in LAYOUTS for _ in range(12)]


@pytest.mark.parametrize("P", [1, 2, 3, 4, 8])
def test_equals_one_process(P):
    errors = run_ranks(P, compare, ALL + DRAWN, torch.float64)[0]
    assert len(errors) == len(NAMES) * len(ALL + DRAWN)
    assert not [e for e in errors if not e[-1] < 1e-12]


@pytest.mark.parametrize("P", [2, 3, 4, 8])
def test_equals_one_process_in_float32(P):
    errors = run_ranks(P, compare, ALL, torch.float32)[0]
    assert not [e for e in errors if not e[-1] < 1e-6]


def compare_kernels(rank, world):
    """As `compare`, by the Triton kernels in the interpreter, whatever the session's backend."""
    with mock.patch.dict("os.environ", NANOLONG_KERNELS="triton"):
        return compare(rank, world, [("zigzag", {}), ("zigzag", dict(window=11, sinks=4, alibi=True)),
                                     ("striped", dict(window=11, sinks=4, alibi=True)), ("striped", dict(segment=10, docs=True)),
                                     ("contiguous", dict(segment=10, docs=True)), ("zigzag", dict(xpos=8))], torch.float64,
                       (1, 36, 2, 1, 8))


def test_the_kernels_equal_one_process():
    pytest.importorskip("triton")
    errors = run_ranks(2, compare_kernels)[0]
    assert len(errors) == 36 and not [e for e in errors if not e[-1] < 1e-12]


def in_16_bits(rank, world):
    return [attend(dict(window=19, sinks=4), layout, dist.group.WORLD, torch.bfloat16) for layout in LAYOUTS]


def test_partial_results_keep_their_precision():
    """bfloat16 over 4 ranks is within twice the error of one process: partial outputs, dk and dv are float32 between hops."""
    rings = run_ranks(4, in_16_bits)[0]
    exact, one = (attend(dict(window=19, sinks=4), None, None, dtype) for dtype in (torch.float64, torch.bfloat16))
    for layout, ring in zip(LAYOUTS, rings):
        for name, *results in zip(NAMES, ring, exact, one):
            assert_close_2x(*results, f"{layout} {name}")


def broken(rank, world, name):
    """The errors when something in the backward pass goes wrong."""
    real = getattr(kernels.ring, name)

    def forgetful(group, sent):  # dk and dv of other ranks are lost on their way home
        return real(group, [(x * 0 if n < 0 else x, n) for x, n in sent])

    def local(dout, dlse, q, k, v, out, lse, **options):  # lse of the block, not that of the row
        return real(dout, dlse, q, k, v, out, lse - 0.1, **options)

    with mock.patch.object(kernels.ring, name, dict(_post=forgetful, attention_backward=local)[name]):
        return {name: error for *_, name, error in compare(rank, world, [("zigzag", {})], torch.float64)}


def test_a_broken_backward_is_seen():
    lost, wrong = (run_ranks(2, broken, name)[0] for name in ("_post", "attention_backward"))
    assert max(lost[name] for name in ("out", "lse", "dq")) < 1e-12 and min(lost["dk"], lost["dv"]) > 0.1
    assert min(wrong[name] for name in ("dq", "dk", "dv")) > 0.01


# ----------------------------------------------------------------------------------------------------------------------
# what is sent, and when

def watch(rank, world, layout, case, dtype):
    """What happens, in order: ("post", bytes sent, messages), "block"; first in the forward pass, then in the backward."""
    events, real = [], (dist.batch_isend_irecv, kernels.ring.attention, kernels.ring.attention_backward)

    def post(ops):
        sent = [op.tensor.nbytes for op in ops if op.op is dist.isend]
        events.append(("post", sum(sent), len(sent)))
        return real[0](ops)

    def block(function):
        return lambda *args, **options: (events.append("block"), function(*args, **options))[1]

    with mock.patch.object(dist, "batch_isend_irecv", post), mock.patch.object(kernels.ring, "attention", block(real[1])), \
            mock.patch.object(kernels.ring, "attention_backward", block(real[2])):
        attend(case, layout, dist.group.WORLD, dtype)
    return events


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_and_order_of_the_hops(dtype):
    P, e = 4, dtype.itemsize
    kv, dkv = 2 * B * T // P * G * D * e, 2 * B * T // P * G * D * 4
    for events in run_ranks(P, watch, "contiguous", dict(causal=False), dtype):
        forward = [("post", kv, 1), "block"] * (P - 1) + ["block"]
        backward = [("post", kv, 1), "block"] * 2 + [("post", kv + dkv, 2), "block"] * (P - 3) + [("post", dkv, 1), "block"]
        assert events == forward + backward + [("post", dkv, 1)]  # each exchange before its block, and the way home


def test_a_window_takes_only_the_hops_and_tokens_it_needs():
    P, c, token = 4, T // 4, 2 * B * G * D * 4
    for W, sent in ((5, [4, 4, 4]), (c + 2, 6 * [c])):  # forward; backward: k and v, dk and dv
        for events in run_ranks(P, watch, "contiguous", dict(window=W), torch.float32):
            assert [event[1] // token for event in events if event[0] == "post"] == sent
    for W, hops in ((1, 1), (2, 2), (c + 1, 2), (c + 2, 3), (2 * c + 1, 3), (100, 4)):
        masks = kernels.ring._Masks(P, c, "contiguous", True, W, None, 0, 0, False)
        assert len(kernels.ring._hops(masks)) == hops == min(P, -(-(W - 1) // c) + 1)
    masks = kernels.ring._Masks(64, 100, "zigzag", True, 30, None, 0, 0, False)
    assert kernels.ring._hops(masks) == [0, 1, 63]  # the two neighbours of its two chunks


def test_hops_are_those_at_which_some_pair_sees_one_another():
    generator = random.Random(3)
    for layout, _ in itertools.product(LAYOUTS, range(60)):
        P, c, chance = generator.randint(1, 6), 2 * generator.randint(1, 5), lambda: generator.random() < 0.5
        segment = generator.randint(1, 20) if chance() and layout != "striped" else None
        causal = chance()
        window = generator.randint(1, 30) if causal and chance() else None
        masks = kernels.ring._Masks(P, c, layout, causal, window, segment, generator.randint(0, 2) if segment else 0,
                                    generator.choice([0, 1, 9]), chance())
        there = [hop for hop in range(P)
                 if hop == 0 or any(kernels.ring._blocks(masks, r, (r - hop) % P) for r in range(P))]
        assert kernels.ring._hops(masks) == there, masks


def test_causal_load():
    """SPEC's efficiencies, counted: what all ranks compute over what the slowest at each hop does."""
    for layout, P, expected in (("contiguous", 4, 0.57), ("contiguous", 8, 0.53), ("striped", 8, 0.999), ("zigzag", 8, 1.0)):
        load = causal_load(P, 1024, layout)  # (P, hops)
        assert load.sum() == P * 1024 * (P * 1024 + 1) // 2
        assert (load.sum() / P / load.amax(0).sum()).item() == pytest.approx(expected, abs=0.0075), (layout, P)
    load = causal_load(4, 512, "zigzag")
    assert (load[:, 0] == 512 * 513 // 2).all() and (load[:, 1:] == 512 * 256).all()


def test_one_process_in_the_place_of_many():
    q, k, v, dout = (torch.randn(B, T, heads, D, dtype=torch.float64) for heads in (H, G, G, H))
    for layout, P in itertools.product(LAYOUTS, (1, 3, 4)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        attention(*leaves).backward(dout)
        out, grads = emulated_ring(q, k, v, P, layout, dout)
        for a, b in zip((out, *grads), (attention(q, k, v), *(x.grad for x in leaves))):
            assert relative_error(a, b) < 1e-12


def test_one_compiled_kernel_serves_all_hops(triton_kernels):
    """The constants of the kernels do not depend on rank or hop."""
    module = importlib.import_module("kernels.attention")  # kernels.attention is the function
    constants, real = set(), module._shared_arguments

    def record(*args):
        result = real(*args)
        constants.add(str(sorted(result[1].items(), key=str)))
        return result

    q, k, v, dout = (torch.randn(1, 64, heads, 16) for heads in (2, 1, 1, 2))
    for layout in LAYOUTS:
        constants.clear()
        with mock.patch.object(module, "_shared_arguments", record):
            emulated_ring(q, k, v, 4, layout, dout)
        assert len(constants) == 1, layout


# ----------------------------------------------------------------------------------------------------------------------
# shards

def shards(rank, world):
    x, problems = torch.randn(3, 24, 2, generator=torch.Generator().manual_seed(1)), []
    for layout in LAYOUTS:
        for y, dim in ((x, 1), (x.transpose(0, 1), 0), (x.transpose(1, 2), -1), (x[..., 0].long(), -1)):
            back = unshard_sequence(shard_sequence(y, dist.group.WORLD, layout, dim), dist.group.WORLD, layout, dim)
            problems += [] if torch.equal(back, y) else [(layout, dim)]
        positions = shard_positions(24 // world, dist.group.WORLD, layout)
        problems += [] if torch.equal(shard_sequence(torch.arange(24), dist.group.WORLD, layout, 0), positions) else [layout]
    messages = []
    shard = torch.zeros(1, 5, 1, 8)
    for function, args in ((shard_sequence, (x[:, :20], dist.group.WORLD, "zigzag")),
                           (shard_sequence, (x, dist.group.WORLD, "ring")),
                           (lambda **o: ring_attention(shard, shard, shard, dist.group.WORLD, **o), ()),
                           (lambda **o: ring_attention(shard, shard, shard, dist.group.WORLD, layout="striped", xpos=8), ()),
                           (lambda **o: ring_attention(shard, shard[:, :4], shard[:, :4], dist.group.WORLD), ()),
                           (gather_tokens, (shard, shard, 0, 100, dist.group.WORLD))):
        with pytest.raises(ValueError) as error:
            function(*args)
        messages.append(str(error.value))
    return problems, messages


def test_shards_and_bad_input():
    for problems, messages in run_ranks(4, shards):
        assert not problems
        parts = ("20 tokens cannot be shared by 4 ranks in layout zigzag, which cuts them into 8 equal parts: use 16 or 24 "
                 "tokens", "'ring' is unknown", "zigzag with 5 tokens", "layout striped with xpos 8", "5 queries and 4 keys",
                 "tokens 0 to 100 of 4 shards of 5")
        for message, part in zip(messages, parts, strict=True):
            assert part in message


# ----------------------------------------------------------------------------------------------------------------------
# the model

LONGROPE = dict(rope_type="longrope", factor=4.0, original_max_position_embeddings=32, short_factor=[1.0] * 4,
                long_factor=[2.0] * 4)
MODELS = [dict(), dict(attention="window", window=10, sinks=3),
          dict(attention="window,full", window=10, sinks=3, recompute=True),
          dict(attention="window", window=60, sinks=4), dict(attention="blockwise", block_size=24),
          dict(position="alibi", attention="window,full", window=9, sinks=2), dict(position="xpos"),
          dict(sink_logit=True, recompute=True), dict(docs=True), dict(rope_scaling=LONGROPE),
          dict(rope_scaling=LONGROPE, docs=True),
          dict(rope_scaling=LONGROPE | dict(original_max_position_embeddings=64)),
          dict(rope_scaling=LONGROPE | dict(original_max_position_embeddings=70), skip=True),
          dict(parallel_residual=True, shared_norm=True, norm="layernorm", bias=True, recompute=True),
          dict(attention="infini", segment=8), dict(attention="infini", segment=1),
          dict(attention="infini,full", segment=4, recompute=True),
          dict(attention="infini,window", segment=8, memory_rule="linear", window=12, sinks=2),
          dict(attention="infini", segment=8, docs=True, memory_norm=2.0, recompute=True)]


def run_model(fields, group):
    """A model's loss, logits, gradients and memory-bounded generation, in a ring or by one process."""
    fields, n = dict(fields), 64
    docs, recompute, skip = (fields.pop(name, False) for name in ("docs", "recompute", "skip"))
    torch.manual_seed(5)
    model = randomised(GPT(GPTConfig(**dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, vocab_size=50, block_size=n) | fields)))
    model.sequence_parallel(group)
    model.activation_checkpointing = recompute and group is not None
    idx, targets = torch.randint(50, (2, 2, n))
    targets[0, 5] = -100
    docs = torch.arange(n).expand(2, n) // 23 if docs else None
    positions = torch.arange(n) - docs * 23 if docs is not None and model.config.by_length else None
    if skip:  # as by PoSE: beyond the trained length
        positions = torch.arange(n) + 40 * (torch.arange(n) > 20)
    shard = (lambda x: x) if group is None else lambda x: x if x is None else shard_sequence(x, *model.ring, -1)
    inputs = dict(docs=shard(docs), positions=shard(positions))
    loss = model(shard(idx), shard(targets), reduction="sum", **inputs)[1]
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        logits, loss = model(shard(idx), **inputs)[0], loss.detach()
    if group is not None:
        for x in (loss, *grads):
            dist.all_reduce(x)
        logits = unshard_sequence(logits, *model.ring)
    results = [loss, logits, *grads]
    for length in (57, 3, 5, 9) if docs is None else ():  # a prompt by the ring, then token by token
        state = model.new_state(2)
        results.append(torch.stack(list(model.generate(idx[:, :length], 6, state, seed=1)), 1))
        results += [x for layer in state.layers for x in (layer.saved(state.position)[0], *layer.memory.values())]
    return results


def compare_models(rank, world):
    torch.set_default_dtype(torch.float64)
    worst = []
    for fields in MODELS:
        ring, one = run_model(fields, dist.group.WORLD), run_model(fields, None) if rank == 0 else []
        worst.append((max((relative_error(a, b) for a, b in zip(ring, one)), default=0.0), str(fields)))
    return worst


@pytest.mark.parametrize("P", [2, 4])
def test_a_model_equals_one_process(P):
    worst = run_ranks(P, compare_models)[0]
    assert not [w for w in worst if not w[0] < 1e-11]


def compiled(rank, world):
    """Loss and gradients of a compiled model in a ring, and of the same not compiled; what the operators' checks find."""
    q, k, v, out = (torch.randn(1, 8, heads, 16) for heads in (2, 1, 1, 2))
    rest = None, None, None, dist.group.WORLD.group_name, "zigzag", 0.25, True, 5, None, 0, None
    sinks, lse = (q, k[:, :2], v[:, :2]), torch.randn(1, 2, 8)
    ops = torch.ops.nanolong
    torch.library.opcheck(ops.ring_attention_fwd.default, (q, k, v, *sinks, *rest, torch.float32))
    torch.library.opcheck(ops.ring_attention_bwd.default, (out, None, q, k, v, *sinks, out, lse, *rest))
    torch.library.opcheck(ops.gather_tokens.default, (k, v, 1, 3, dist.group.WORLD.group_name, "zigzag"))
    results = []
    for on in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=50, block_size=64, attention="window,full", window=9,
                              sinks=3))
        model.sequence_parallel(dist.group.WORLD)
        model.activation_checkpointing = True
        idx = shard_sequence(torch.randint(50, (1, 64)), *model.ring)
        run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False) if on else model
        loss = run(idx, idx, reduction="sum")[1]
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    return [relative_error(a, b) for a, b in zip(*results)]


def test_compiled():
    for errors in run_ranks(2, compiled):
        assert max(errors) < 1e-6


def count_exchanges(rank, world):
    """Messages of a training step without and with recomputation, and calls of attention, for two models."""
    functions = [(dist, name) for name in ("batch_isend_irecv", "all_reduce", "all_gather")] + [(kernels.ring, "attention")]
    counts = []
    for fields in (dict(attention="window,full", window=10, sinks=3), dict(attention="infini,full", segment=8, docs=True)):
        for recompute in (False, True):
            with contextlib.ExitStack() as stack:
                mocks = [stack.enter_context(mock.patch.object(where, name, side_effect=getattr(where, name)))
                         for where, name in functions]
                run_model(fields | dict(recompute=recompute), dist.group.WORLD)
                counts.append([m.call_count for m in mocks])
    return counts


def test_recomputation_sends_nothing_again():
    for window, window_again, infini, infini_again in run_ranks(2, count_exchanges):
        assert window == window_again and infini == infini_again
        assert min(window[0], window[1], window[3], infini[0], infini[2]) > 0


def model_errors(rank, world):
    messages = []
    for fields, T, state in ((dict(), 7, 0), (dict(attention="infini", segment=4), 6, 0), (dict(sink_tokens=2), 8, 0),
                             (dict(rope_scaling=dict(rope_type="dynamic", factor=1.0, original_max_position_embeddings=8)), 8, 0),
                             (dict(), 8, 3)):
        with pytest.raises(ValueError) as error:
            model = GPT(GPTConfig(**dict(n_layer=1, n_head=1, n_embd=8, vocab_size=9, block_size=64) | fields))
            model.sequence_parallel(dist.group.WORLD)
            state, position = model.new_state(1) if state else None, state
            if state is not None:
                state.position = position
            model(torch.zeros(1, T, dtype=torch.int64), state=state)
        messages.append(str(error.value))
    return messages


def test_a_model_says_what_its_ranks_cannot_share():
    for messages in run_ranks(2, model_errors):
        parts = ("14 tokens with 2 ranks per sequence: each takes two chunks", "12 tokens with 2 ranks per sequence: each takes "
                 "whole segments", "sink_tokens 2 with 2 ranks", "dynamic", "a state at position 3")
        for message, part in zip(messages, parts, strict=True):
            assert part in message
