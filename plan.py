"""
What a training run needs, before there is a GPU: memory and communication of each rank, by arithmetic.

    python train.py config/pg19_124m.py --plan                            an H100, and 1 to 1024 ranks per sequence
    WORLD_SIZE=32 python train.py config/x.py --sp 4 --fsdp --plan --plan-gpu A100      8 groups of 4 ranks
    python train.py config/x.py --block-size 131072 --batch-size 1 --plan --plan-bandwidth 12.5

Memory is counted tensor by tensor: what model.py and the Triton kernels of kernels/ keep from the forward pass to the
backward pass, plus what is alive beside it where the step is fullest, for eager training without torch.compile. It
leaves out what CUDA, NCCL and the allocator's fragments take; GPUs' sizes are the data sheets' decimal gigabytes.

Communication. A hop of the ring computes the pairs between c queries and c keys while the next c keys and values
arrive: 4 H D floating-point operations for each pair that is seen, against 2 c G D e bytes (e per number). At F
operations and W bytes per second, with MHA, 16 bits and every pair seen, 4 c^2 H D / F >= 4 c H D / W: c >= F / W, Ring
Attention's rule (arXiv 2310.01889): 1040 tokens for an A100's 312e12 over NVLink's 300e9, 24960 over InfiniBand's
12.5e9. Here:

    forward    zigzag sees half of the pairs, GQA sends G of H heads:       2 c^2 H D / F >= 2 c G D e / W
               c >= e (G / H) F / W                                         2 F / W for MHA in 16 bits
    backward   2.5 times the operations, and dk, dv in float32 besides:     5 c^2 H D / F >= (2 e + 8) c G D / W
               c >= (2 e + 8) / 5 (G / H) F / W                             2.4 F / W for MHA in 16 bits
    contiguous the last rank sees every pair, and all wait for it: half of these c

What the table calls hidden is summed over all hops of all layers, each with its own pairs: the lesser of computing and
sending, over sending. A window sends to as many neighbours as it reaches; an infini layer hands its memory along a
chain that all later ranks wait for; the last message of the backward pass has nothing to hide behind. F is the data
sheet's dense peak (half of it for float32, by TF32): real kernels are slower, and hide more.
"""

import math
import os
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from model import GPT, GPTConfig
from train import PEAK_FLOPS, TrainConfig, choose_model, count, resolve_batch


class Gpu(NamedTuple):
    memory: float          # bytes
    node: float            # bytes per second to a GPU of the same node, in one direction
    network: float | None  # to one of another node; None: no design of the maker's says


# The makers' data sheets: NVLink 5, 4 and 3 or PCIe 5 and 4 x16, halved where both directions are added up. Network:
# one InfiniBand adapter per GPU, of 400 Gb/s (DGX B200, H200, H100) or 200 Gb/s (DGX A100). 8 GPUs share a node.
GPUS = {"B200": Gpu(180e9, 900e9, 50e9), "H200": Gpu(141e9, 450e9, 50e9), "H100": Gpu(80e9, 450e9, 50e9),
        "H100 NVL": Gpu(94e9, 64e9, None), "H100 PCIe": Gpu(80e9, 64e9, None), "A100": Gpu(80e9, 300e9, 25e9),
        "A100 40GB": Gpu(40e9, 300e9, 25e9), "L40S": Gpu(48e9, 32e9, None), "L40": Gpu(48e9, 32e9, None),
        "L4": Gpu(24e9, 32e9, None), "RTX 4090": Gpu(24e9, 32e9, None), "RTX 3090": Gpu(24e9, 32e9, None)}
NODE = 8


# ----------------------------------------------------------------------------------------------------------------------
# memory

class Sizes(NamedTuple):
    """Parameters, in numbers."""

    all: int
    block: int
    qkv: int       # a block's matrices, which are cast to the activations' dtype: the first, and the others
    others: int
    outside: int   # of the blocks

    @classmethod
    def of(cls, config: GPTConfig) -> "Sizes":
        with torch.device("meta"):
            model = GPT(config)
        every, blocks = model.num_params(), sum(p.numel() for p in model.blocks.parameters())
        qkv = model.blocks[0].attn.wqkv.weight.numel()
        others = sum(p.numel() for p in model.blocks[0].parameters() if p.dim() == 2) - qkv
        return cls(every, blocks // config.n_layer, qkv, others, every - blocks)


@dataclass(frozen=True)
class Case:
    """One training step's shape. B sequences of T tokens for each of dp groups of sp ranks."""

    config: GPTConfig
    sizes: Sizes
    B: int
    T: int
    sp: int
    dp: int
    e: int                   # bytes per activation
    checkpointing: bool
    fsdp: bool
    accumulate: bool         # gradients live from one micro-step to the next, or in DDP's buckets
    docs: bool = False
    explicit: bool = False   # positions are given (PoSE)

    @property
    def c(self) -> int:
        """Tokens of a sequence on a rank."""
        return self.T // self.sp

    def reach(self, kind: str) -> float:
        """How many keys back a query of such a layer sees, itself included, sinks apart."""
        if kind == "window" and not self.explicit and self.T + self.config.sink_tokens <= self.config.span("window"):
            return math.inf
        return self.config.window if kind == "window" else self.config.span(kind)

    def sinks(self, kind: str) -> int:
        """The tokens that are seen from everywhere."""
        if kind != "window" or self.reach(kind) == math.inf:
            return 0
        return self.config.sink_tokens if self.docs else self.config.sinks

    def passes(self, kind: str) -> tuple[float, float]:
        """How often a layer rotates its queries and its keys: again for each length, where rope_scaling goes by it."""
        c, L, span = self.config, self.config.trained_length, min(self.config.span(kind), self.T)
        if not c.by_length or (c.span(kind) if self.explicit else span) <= L:
            return 1, 1
        if self.explicit or self.sp > 1:  # all twice, and each row takes one
            return 2, 2
        step = max(1, L // 8) if c.rope_type == "dynamic" else self.T
        return 1, (sum(range(L, span, step)) + self.T) / self.T  # rows after rows, each with all keys before


def attention_bytes(case: Case, kind: str, N: int) -> dict[str, float]:
    """
    What the attention half of a block keeps for the backward pass, for N tokens of this rank, by name. v is a view of
    q, k and v: these stay, un-rotated, beside the rotated q and k.
    """
    c, e, H, G, D = case.config, case.e, case.config.n_head, case.config.n_kv_head, case.config.head_dim
    S, (rows, keys) = case.sinks(kind), case.passes(kind)
    kept = {"norm's input and statistics": N * (c.n_embd * e + (4 if c.norm == "rmsnorm" else 8)),
            "normed": N * c.n_embd * e,
            "q, k, v": N * (H + 2 * G) * D * e,
            "rotated q, k": N * (rows * H + keys * G) * D * e if c.rotary else 0,
            "sinks": case.B * 2 * S * G * D * e + (N * H * D * e if S and c.rotary else 0),
            "out and lse": rows * N * H * (D * e + 4) + (N * H * D * e if keys > 1 else 0),
            "document ids": 8 * N if case.docs else 0}
    if kind == "infini":
        slots = max(1, N // case.B // c.segment) + 1
        kept["memory's out"] = N * H * D * e
        kept["memories"] = case.B * slots * G * D * (D + 1) * 4
        kept["normed q, k"] = N * (H + G) * (D * e + 4) if c.memory_norm is not None else 0
    if c.sink_logit:
        kept["sink logit's out and lse"] = N * H * (D * e + 4)
    return kept


def mlp_bytes(case: Case, N: int) -> dict[str, float]:
    """What the other half of a block keeps."""
    c, e = case.config, case.e
    stats = N * (4 if c.norm == "rmsnorm" else 8)
    return {"MLP's norm's input": 0 if c.parallel_residual else N * c.n_embd * e,
            "MLP's normed": N * c.n_embd * e + stats,
            "MLP's inner": N * c.n_inner * e * (3 if c.mlp == "swiglu" else 2)}


def cast_bytes(case: Case, numbers: int) -> int:
    """Matrices in the activations' dtype, which the backward pass reads."""
    return numbers * case.e if case.e < 4 else 0


def mlp_backward(case: Case, N: int) -> float:
    """What is alive beside all that is kept where an MLP's backward pass is fullest: gradients."""
    c, e = case.config, case.e
    inner = 2 if c.mlp == "swiglu" else 1  # the activation's gradient takes the place of what w_down read
    return N * c.n_embd * e + inner * N * c.n_inner * e + c.n_embd * c.n_inner * (4 - e if e < 4 else 4)


def attention_backward(case: Case, kind: str, N: int) -> float:
    """The same for attention: the MLP is done, its weights have their gradients."""
    c, e, H, G, D = case.config, case.e, case.config.n_head, case.config.n_kv_head, case.config.head_dim
    beside = N * c.n_embd * e + N * H * (D * e + 4) + 4 * case.sizes.others  # of the stream, of out; delta
    if kind == "infini":
        S = max(1, N // case.B // c.segment)
        M = case.B * (S + 1) * G * D * D * 4
        scan = (3 if c.memory_rule == "delta" else 1) * M + N * (H + G) * 8  # of the memories, P, F, and per row
        return beside + max(2 * N * H * D * e + scan, N * (3 * H + 4 * G) * D * e)
    if case.sinks(kind):
        beside += N * H * D * e  # of the queries that the sinks are seen by
    if c.position == "xpos":
        beside += N * H * D * e  # queries relative to a place nearby
    if case.sp == 1:
        return beside + N * (H + 2 * G) * D * e
    # two shards of k and v; dk and dv that leave, arrive and are added; dq, and a block's dq, dk, dv
    return beside + 4 * N * G * D * e + 4 * (3 * 2 * N * G * D + 2 * N * H * D + 2 * N * G * D)


def ring_forward(case: Case, kind: str, N: int) -> float:
    """What is alive beside attention's inputs in a forward hop: two shards of k and v, out twice in float32."""
    c = case.config
    return N * c.n_head * (8 * c.head_dim + 12) + 4 * N * c.n_kv_head * c.head_dim * case.e


def loss_bytes(case: Case, N: int) -> tuple[float, float]:
    """The most beside its input, in the forward and in the backward pass."""
    c, e = case.config, case.e
    weight, x, wide = 4 * c.vocab_size * c.n_embd, N * c.n_embd * e, N * c.n_embd * 4
    rows = max(1, 4 * N // (14 * e), 2**21 // c.vocab_size)
    rows = math.ceil(N / math.ceil(N / rows))
    chunk = rows * math.ceil(c.vocab_size / 16) * 16 * e
    forward = x + weight + 16 * N + chunk + (weight + weight // 4 * e if e < 4 else 0)
    return forward, x + weight + wide + (max(wide, weight + x) if e < 4 else weight)


def kept_by_checkpointing(case: Case, kind: str, N: int) -> dict[str, float]:
    """What a block keeps where all but attention is computed again: its input, what attention and memory put out."""
    names = ("out and lse", "memory's out", "memories", "sink logit's out and lse")
    kept = {name: x for name, x in attention_bytes(case, kind, N).items() if name in names}
    return kept | {"block's input": N * case.config.n_embd * case.e}


def new_gradients(case: Case, blocks: float | None) -> float:
    """
    Gradients of this pass alone that are alive when it has been through so much of the blocks, or at its end (None):
    the output layer's, and the blocks' where they are not added to what is there, or sent away, block by block.
    """
    c, sizes = case.config, case.sizes
    weight = 4 * c.vocab_size * c.n_embd
    if case.fsdp:  # a block's, and what is being sent of it
        return weight + 8 * sizes.block if blocks is not None else 8 * sizes.outside
    if case.accumulate:
        return weight if c.tie_embeddings or blocks is None else 0
    return 4 * sizes.all if blocks is None else weight + 4 * blocks * (sizes.all - sizes.outside)


def step_bytes(case: Case, N: int, kinds: list[str], recompute: bool) -> list[tuple[float, float]]:
    """
    (activations, new gradients) where the forward and backward pass over N tokens of this rank can be fullest.
    recompute: in the backward pass blocks are computed again but for attention, their feed-forward in chunks; else all
    is kept.
    """
    c, e = case.config, case.e
    stream, weight = N * c.n_embd * e, 4 * c.vocab_size * c.n_embd
    first, others = cast_bytes(case, case.sizes.qkv), cast_bytes(case, case.sizes.others)
    attn = [sum(attention_bytes(case, kind, N).values()) for kind in kinds]
    if recompute:
        held = [sum(kept_by_checkpointing(case, kind, N).values()) for kind in kinds]
        m = case.B * min(case.c, max(1024, math.ceil(case.c / 8)))
        done = (N - m) * (c.n_embd + c.n_head * c.head_dim) * e  # gradients of the other chunks
        done += 4 * case.sizes.others if m < N else 0
        rest = stream + done + sum(mlp_bytes(case, m).values()) + others + mlp_backward(case, m) - m * c.n_embd * e
        again = [max(rest, a - h + first + attention_backward(case, kind, N))
                 for a, h, kind in zip(attn, held, kinds)]
    else:
        mlp = sum(mlp_bytes(case, N).values())
        held = [a + mlp + first + others for a in attn]
        again = [max(mlp_backward(case, N), attention_backward(case, kind, N) - mlp - others) for kind in kinds]
    ids, final, (forward, backward) = 24 * N, stream + 8 * N, loss_bytes(case, N)
    kept = ids + sum(held)
    tied = weight if c.tie_embeddings else 0  # the output layer's part of the gradient waits for the embedding's
    points = [(kept + final + stream + forward, 0), (kept + final + backward, 0),
              (ids + stream + 4 * N * c.n_embd + tied, new_gradients(case, None))]
    for i, x in enumerate(again, 1):
        points.append((ids + sum(held[:i]) + x, new_gradients(case, 1 - i / len(kinds))))
    if case.sp > 1:
        points.append((kept - held[-1] + attn[-1] + ring_forward(case, kinds[-1], N), 0))
    return points


class Memory(NamedTuple):
    """Bytes on a rank. peak is less than the sum where gradients are only made while activations are given back."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    peak: float


def memory(case: Case) -> Memory:
    """What a training step takes, from the second on, when the optimizer has its moments."""
    c, sizes, kinds, N = case.config, case.sizes, case.config.layer_kinds, case.B * case.c
    part, whole = 4 * sizes.all, 0
    if case.fsdp:  # beside its part a rank holds all that is outside the blocks, one block, and the next that arrives
        part, whole = part / (case.sp * case.dp), 4 * sizes.outside + 8 * sizes.block
    if case.checkpointing and set(kinds) == {"infini"} and case.sp == 1 and not case.fsdp:  # by_segments
        segments = math.ceil(case.T / c.segment)
        once = replace(case, T=min(case.T, c.segment), checkpointing=False, accumulate=case.accumulate or segments > 1)
        memories = case.B * c.n_kv_head * c.head_dim * (c.head_dim + 1) * 4 * (segments + 4)
        caches = case.B * c.segment * 2 * c.n_kv_head * c.head_dim * case.e
        points = [(a + c.n_layer * (memories + caches), g) for a, g in step_bytes(once, case.B * once.T, kinds, False)]
    else:
        once, points = case, step_bytes(case, N, kinds, case.checkpointing)
    held = part if once.accumulate or case.fsdp else 0
    peak = whole + 3 * part + max(held + max(a + g for a, g in points), part)
    return Memory(part + whole, part, 2 * part, max(a for a, _ in points), peak)


def longest(case: Case, limit: float) -> int | None:
    """The most tokens of one sequence (B = 1) with which a step takes at most `limit` bytes; None where none do."""
    unit = case.config.shard_multiple(case.sp) if case.sp > 1 else 1
    most = case.config.trained_length if case.sp > 1 and case.config.rope_type == "dynamic" else math.inf

    def fits(n: int) -> bool:
        return n * unit <= most and memory(replace(case, B=1, T=n * unit)).peak <= limit

    if not fits(1):
        return None
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low >> 10):  # to a thousandth
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit


# ----------------------------------------------------------------------------------------------------------------------
# communication

def pairs(distance: int, n: int, reach: float) -> int:
    """How many of n queries and n keys, the first query `distance` ahead of the first key, see one another."""
    def below(t):  # of all (i, j), those with i - j <= t
        triangle = [x * (x + 1) // 2 if x > 0 else 0 for x in (t + n, t, t - n)]
        return triangle[0] - 2 * triangle[1] + triangle[2]

    t = n if reach == math.inf else int(reach) - 1 - distance
    return below(t) - below(-1 - distance)


def hops(case: Case, kind: str) -> list[int]:
    """
    The pairs that a rank computes at each hop of the ring, for one sequence and head: of a contiguous layout the last
    rank, which has the most; of zigzag one in the middle, like nearly all others. The first hop is its own shard's.
    """
    P, c, zigzag = case.sp, case.c, case.config.layout == "zigzag"
    n, reach, rank = c // 2 if zigzag else c, case.reach(kind), P // 2 if zigzag else P - 1
    if kind == "infini":  # whole segments: nothing to fetch
        return [0]
    back = P - 1 if reach == math.inf else math.ceil((reach - 1) / n)  # so many chunks before its own are seen
    there = {*range(min(back, P - 1) + 1)}
    if zigzag:  # what comes before its second chunk is with the ranks after this one
        there |= {*range(max(0, P - back), P)}
    places = (lambda r: (r * n, (2 * P - 1 - r) * n)) if zigzag else (lambda r: (r * n,))
    return [sum(pairs(q - k, n, reach) for q in places(rank) for k in places((rank - hop) % P))
            for hop in sorted(there)]


class Traffic(NamedTuple):
    """Of one micro-step on one rank. hidden: bytes that are sent while as much time goes by in computing."""

    forward_hop: float
    backward_hop: float
    sent: float
    forward: float
    hidden_forward: float
    backward: float
    hidden_backward: float


def traffic(case: Case, flops: float, bandwidth: float) -> Traffic:
    """What a rank sends, by layer and hop, against what it computes meanwhile, at `flops` and bytes per second."""
    c, B, per_hop = case.config, case.B, [0, 0]
    chain, total = 4 * B * c.n_kv_head * c.head_dim * (c.head_dim + 1), [0.0] * 5
    for kind in set(c.layer_kinds) if case.sp > 1 else ():
        layers, computed = c.layer_kinds.count(kind), hops(case, kind)
        n = case.c if c.layout == "zigzag" else min(case.c, case.reach(kind) - 1)  # of a shard, what others see
        kv, dkv = B * n * (2 * c.n_kv_head * c.head_dim * case.e + 4 * case.docs), 8 * B * n * c.n_kv_head * c.head_dim
        free = [4 * c.n_head * c.head_dim * B * x / flops * bandwidth for x in computed]  # bytes that computing hides
        last = len(computed) - 1
        out = [kv] * last
        back = [(kv if i < last else 0) + (dkv if i > 1 else 0) for i in range(last + 1)] if last else []
        sinks = 2 * B * case.sinks(kind) * c.n_kv_head * c.head_dim * 2 * (case.sp - 1) / case.sp
        waited = sinks * (case.e + 4) if kind != "infini" else 2 * chain
        alone = (case.sp - 1) * chain if kind == "infini" else 0  # all wait for the whole chain
        for i, x in enumerate((sum(out) + sum(back) + (dkv if last else 0) + waited, sum(out) + alone,
                               sum(map(min, out, free)), sum(back) + (dkv if last else 0) + alone,
                               sum(min(x, 2.5 * y) for x, y in zip(back, free)))):
            total[i] += layers * x
        per_hop = [max(pair) for pair in zip(per_hop, (chain, chain) if kind == "infini" else (kv, kv + dkv))]
    return Traffic(*per_hop, *total)


def gradient_bytes(case: Case, n_micro: int) -> float:
    """
    What a rank sends of weights and gradients in a step: DDP's all-reduce, or for each micro-step FSDP's reduce-scatter
    and two all-gathers, one for what is outside the blocks.
    """
    n = case.sp * case.dp
    if not case.fsdp:
        return 8 * case.sizes.all * (n - 1) / n
    return 4 * (3 * case.sizes.all - case.sizes.outside) * (n - 1) / n * n_micro


# ----------------------------------------------------------------------------------------------------------------------
# the table

def find_gpu(name: str) -> tuple[str, Gpu, float]:
    """-> its name as in GPUS, its sizes, its dense bfloat16 FLOP/s. ValueError for one that is not there."""
    known = {key.lower(): key for key in GPUS}
    if name.lower() not in known:
        raise ValueError(f"plan_gpu is {name!r}: known are {', '.join(GPUS)}")
    name = known[name.lower()]
    return name, GPUS[name], next(peak for key, peak in PEAK_FLOPS.items() if key in name)


def bandwidth_of(gpu: Gpu, ranks: int, given: float | None) -> float | None:
    """Bytes per second from a rank to the next in a ring of so many, over its slowest link; None where nobody says."""
    return given * 1e9 if given is not None else gpu.node if ranks <= NODE else gpu.network


def size(n: float) -> str:
    """Bytes: 812 K, 79.5 M, 1.2 G, 12 T, 3.1 P"""
    units = ((2.0 ** (10 * power), unit) for power, unit in enumerate("KMGTP", 1))
    return next((f"{n / one:.3g} {unit}" for one, unit in units if n < 999.5 * one or unit == "P"), "") if n else "-"


def share(part: float, whole: float) -> str:
    return f"{math.floor(100 * part / whole)}%" if whole else "-"


def row(case: Case, mark: str, gpu: Gpu, flops: float, given: float | None, n_micro: int) -> list[str]:
    """A line of the table. What this length cannot be, shared by so many ranks, is a dash."""
    config, bandwidth = case.config, bandwidth_of(gpu, case.sp, given)
    try:
        most = longest(case, gpu.memory)
    except ValueError:  # sink_tokens
        most = None
    line = [mark, f"{case.dp} x {case.sp}"]
    try:
        if case.sp > 1:
            config.check_shards(case.T, case.sp)
    except ValueError:
        return line + 12 * ["-"] + [count(most) if most else "none"]
    m, t = memory(case), traffic(case, flops, bandwidth or 1.0)
    other = memory(replace(case, checkpointing=not case.checkpointing))
    kept, recomputed = (m, other)[::-1 if case.checkpointing else 1]
    sent = t.sent * n_micro + gradient_bytes(case, n_micro)
    per_hop = (t.forward_hop, t.backward_hop) if t.forward else (0, 0)
    hidden = [share(t.hidden_forward, t.forward), share(t.hidden_backward, t.backward)]
    hidden = hidden if bandwidth or not t.forward else ["?", "?"]
    line += [str(case.c), *map(size, (m.weights, m.gradients, m.optimizer, kept.activations, recomputed.activations))]
    line += [size(m.peak) + (" !" if m.peak > gpu.memory else "  "), *map(size, (*per_hop, sent))]
    return line + [*hidden, count(most) if most else "none"]


HEADER = ["", "ranks", "tokens", "weights", "grads", "AdamW", "kept", "again", "peak  ", "fwd/hop", "bwd/hop", "sent",
          "hid.fwd", "hid.bwd", "longest"]


def plan(config: TrainConfig) -> str:
    """The table of `train.py --plan`. ValueError, one line, for what train.py would not run either."""
    name, gpu, flops = find_gpu(config.plan_gpu)
    if config.plan_bandwidth is not None and not 0 < config.plan_bandwidth < math.inf:
        raise ValueError(f"plan_bandwidth is {config.plan_bandwidth}: it must be more than 0 and finite, in GB/s")
    config, c, _, _ = choose_model(config)
    world = max(int(os.environ.get("WORLD_SIZE", 1)), config.sp)  # without torchrun, one group
    if world % config.sp:
        raise ValueError(f"sp is {config.sp}, which does not divide {world} rank(s)")
    if config.fsdp and world == 1:
        raise ValueError("fsdp with 1 rank: there is nobody to share the weights with; for 8, set WORLD_SIZE=8 in front of the "
                         "command")
    dp, e = world // config.sp, 4 if config.dtype == "float32" else 2
    tokens, n_micro = resolve_batch(config, dp)
    flops = flops if e < 4 else flops / 2
    case = Case(c, Sizes.of(c), config.batch_size, config.block_size, config.sp, dp, e, config.activation_checkpointing,
                config.fsdp, n_micro > 1, config.mask_documents, config.pose_target is not None)
    lines = [HEADER]
    for sp in sorted({config.sp, *(2**i for i in range(11))}):
        one = replace(case, sp=sp, accumulate=n_micro > 1 or dp * sp > 1, fsdp=config.fsdp and dp * sp > 1)
        lines.append(row(one, "*" if sp == config.sp else "", gpu, flops, config.plan_bandwidth, n_micro))
    widths = [max(map(len, column)) for column in zip(*lines)]
    table = ["  ".join(x.rjust(n) for x, n in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([*summary(case, name, gpu, flops, config.plan_bandwidth, tokens, n_micro), "", *table, "", *NOTES])


NOTES = """\
ranks: dp x sp, * this command; tokens, of a sequence on a rank. Bytes are a rank's, in powers of 1024. weights, grads,
AdamW: float32. kept: the most that activations take at a time if all are kept for the backward pass; again: if blocks
are computed again (--activation-checkpointing). peak: at the fullest point of a step, ! more than the GPU has. fwd/hop,
bwd/hop: keys and values of a layer's shard, and with their gradients. sent: in a step, gradients of weights included.
hid.: how much of the ring's bytes travels while a rank computes at the data sheet's peak. longest: one sequence that
fits. There is no allowance for CUDA, NCCL and the allocator's fragments: leave a few percent.""".splitlines()


def summary(case: Case, name: str, gpu: Gpu, flops: float, given: float | None, tokens: int, n_micro: int) -> list[str]:
    """The lines above the table: model, step, GPU, and from how many tokens per rank on the ring hides."""
    c, kind = case.config, "bfloat16" if case.e < 4 else "float32 (TF32)"
    links = [("given", given * 1e9)] if given is not None else \
        [(what, x) for what, x in (("in a node of 8", gpu.node), ("between nodes", gpu.network)) if x is not None]
    lines = [f"model: {count(case.sizes.all)} parameters, {c.n_layer} layers ({c.attention}), {c.n_head} heads, "
             f"{c.n_kv_head} for keys and values, of {c.head_dim}",
             f"step: {tokens} tokens = {case.dp} group(s) of {case.sp} rank(s) x {n_micro} micro-step(s) x {case.B} "
             f"sequences x {case.T}",
             f"memory: weights {'spread over all ranks (fsdp)' if case.fsdp else 'whole on every rank'}; activations "
             f"{kind}, {'computed again' if case.checkpointing else 'kept'}{'; documents apart' if case.docs else ''}",
             f"gpu: {name}, {gpu.memory / 1e9:.0f} GB, {flops / 1e12:.0f} TFLOP/s; "
             + "; ".join(f"{x / 1e9:g} GB/s {what}" for what, x in links)]
    if "full" in c.layer_kinds or "blockwise" in c.layer_kinds:
        least = [[math.ceil(threshold(case, flops, x, backward)) for backward in (False, True)] for _, x in links]
        lines.append("ring: hidden where a rank has, forward and backward, "
                     + "; ".join(f"{a} and {b} tokens {what}" for (a, b), (what, _) in zip(least, links))
                     + f" (layout {c.layout})")
    return lines


def threshold(case: Case, flops: float, bandwidth: float, backward: bool) -> float:
    """The tokens per rank from which on a hop of full attention hides: see the docstring of this file."""
    c = case.config
    ratio = (2 * case.e + 8) / 5 if backward else case.e
    return ratio * c.n_kv_head / c.n_head * flops / bandwidth / (1 if c.layout == "zigzag" else 2)
