"""
Every kernel against its peers, one table, checked before it is timed.

    python -m kernels.bench [attention infini_attention decode_attention merge_attention apply_sink_logit rope rms_norm
                             swiglu linear_cross_entropy model]                                       # default: all

A kernel's output and gradients are compared with those of plain torch or SDPA, at a small shape and at each that is
timed: what is wrong is marked WRONG, not timed, and the exit status is 1.
On a GPU: device events, L2 flushed before every repetition, medians; peers and ceilings (a large copy, a large bfloat16
matmul) are measured in the same run. Writes kernels/results/<gpu>.json.
Without a GPU: the check runs in Triton's interpreter, then every kernel and tile is compiled for the GPUs of --arch:
the table shows registers, spills, matrix and asynchronous-copy instructions, shared memory, programs per
multiprocessor.
`model` times training steps of model.py against the same model in plain torch, on any device.

Only useful FLOPs count: causal attention 2 B H T^2 D forward, 2.5 times that backward (Infini-attention: in segments, and 2
B T D^2 (H + 2 G) for the memory, twice that backward); the loss 6 N C V.
"""

import copy
import dataclasses
import datetime
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from kernels import aot, backend
from kernels.attention import TILES, attention
from kernels.decode import TILES as DECODE_TILES
from kernels.decode import decode_attention, decode_attention_ref
from kernels.loss import linear_cross_entropy
from kernels.memory import infini_attention
from kernels.merge import apply_sink_logit, merge_attention
from kernels.norm import rms_norm
from kernels.rope import rope, rope_frequencies, rope_ref, rope_turns
from kernels.swiglu import swiglu

KernelName = Literal["attention", "infini_attention", "decode_attention", "merge_attention", "apply_sink_logit", "rope",
                     "rms_norm", "swiglu", "linear_cross_entropy", "model"]
KERNELS = get_args(KernelName)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a kernel is measured with. A shape is a dict of sizes; the functions take what `make` gives."""

    kernel: str
    make: Callable  # (device, dtype, **shape) -> inputs; those that require grad are differentiated
    ours: Callable
    ref: Callable  # plain torch, run in float64, or float32 at the timed shapes
    plain: Callable  # plain torch, run in the inputs' dtype: twice its error is what ours may have
    peers: dict[str, Callable]
    work: Callable | None  # (pass, bytes per element, **shape) -> FLOPs or bytes
    unit: Literal["TFLOP/s", "GB/s"]
    tiny: dict  # the shape checked in the interpreter
    small: dict  # the shape checked on a GPU, where the blocks are not full
    timed: list[dict]  # the shapes checked and timed on a GPU
    compiled: Callable  # (architecture) -> list of (dtype, shape) compiled without a GPU
    variants: dict[str, Callable] = dataclasses.field(default_factory=dict)  # of ours, compiled too
    name: str = ""  # of another way of calling the kernel: shown with its shapes


def name_of(shape: dict) -> str:
    return " ".join(f"{key}{value}" for key, value in shape.items())


def label_of(case: Case, shape: dict) -> str:
    return f"{name_of(shape)} {case.name}".strip()


def randn(device, dtype, *shape):
    return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)


@functools.cache
def inductor(fn):
    return torch.compile(fn, dynamic=False)


# ----------------------------------------------------------------------------------------------------------------------
# the cases

def sdpa(*backends):
    def run(q, k, v):
        with sdpa_kernel(list(backends)):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            return out.transpose(1, 2)
    return run


@functools.cache
def causal_blocks(T, device):
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device)


def flex(q, k, v):
    mask = causal_blocks(q.shape[1], q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return inductor(flex_attention)(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


SINKS = 4


def window_attention(q, k, v, window):
    return attention(q, k, v, window=int(window), sinks=(q, k[:, :SINKS], v[:, :SINKS]))


def window_mask(i, j, window):
    return (i >= j) & ((i - j < window) | (j < SINKS))


def window_sdpa(q, k, v, window):
    """Without rotations the sinks are keys that everyone sees: a mask. In float32 on a GPU no scores are kept."""
    t = torch.arange(q.shape[1], device=q.device)
    with sdpa_kernel(SDPBackend.MATH if q.dtype == torch.float64 else [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)),
                                              attn_mask=window_mask(t[:, None], t, window)).transpose(1, 2)


def window_flex(q, k, v, window):
    window = int(window)
    mask = create_block_mask(lambda b, h, i, j: window_mask(i, j, window), None, None, q.shape[1], q.shape[1],
                             device=q.device)
    return inductor(flex_attention)(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)


def window_cases():
    """Window attention with sinks, against SDPA and FlexAttention with the same mask."""
    def make(device, dtype, B, T, H, D, W):
        return [*(randn(device, dtype, B, T, H, D) for _ in range(3)), torch.tensor(W)]

    def work(which, element, B, T, H, D, W):  # row i sees min(i + 1, SINKS + W) keys
        seen = T * (SINKS + W) - (SINKS + W) * (SINKS + W - 1) // 2
        return 4 * B * H * D * seen * (2.5 if which == "bwd" else 1)

    for H, D in ((32, 64), (16, 128)):
        yield Case("attention", make, window_attention, window_sdpa, window_sdpa, {"flex": window_flex}, work, "TFLOP/s",
                   tiny=dict(B=1, T=50, H=2, D=D, W=20), small=dict(B=1, T=1500, H=H, D=D, W=300),
                   timed=[dict(B=1, T=T, H=H, D=D, W=1020) for T in (16384, 32768)], compiled=lambda arch: [],
                   name="window, sinks")


def segment_cases():
    """Causal attention inside segments, against SDPA with segments for batch entries and FlexAttention with a mask."""
    def make(device, dtype, B, T, H, D, N):
        return [*(randn(device, dtype, B, T, H, D) for _ in range(3)), torch.tensor(N)]

    def by_segment(*backends):
        def run(q, k, v, N):
            return sdpa(*backends)(*(x.reshape(-1, int(N), *x.shape[2:]) for x in (q, k, v))).reshape(q.shape)
        return run

    def ref(q, *rest):  # in float32 on a GPU no scores are kept
        return by_segment(SDPBackend.MATH if q.dtype == torch.float64 else SDPBackend.EFFICIENT_ATTENTION)(q, *rest)

    def flex_segment(q, k, v, N):
        T, N = q.shape[1], int(N)
        mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i // N == j // N), None, None, T, T, device=q.device)
        return inductor(flex_attention)(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)

    for H, D in ((32, 64), (16, 128)):
        yield Case("attention", make, lambda q, k, v, N: attention(q, k, v, segment=int(N)), ref,
                   by_segment(SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
                   {"flash": by_segment(SDPBackend.FLASH_ATTENTION), "cudnn": by_segment(SDPBackend.CUDNN_ATTENTION),
                    "flex": flex_segment},
                   lambda which, element, B, T, H, D, N: 2 * B * H * T * N * D * (2.5 if which == "bwd" else 1), "TFLOP/s",
                   tiny=dict(B=1, T=51, H=2, D=D, N=17), small=dict(B=1, T=1500, H=H, D=D, N=300),
                   timed=[dict(B=1, T=T, H=H, D=D, N=2048) for T in (16384, 32768)], compiled=lambda arch: [],
                   name="segment")


def alibi_cases():
    """Causal attention with ALiBi, against every score written out and FlexAttention."""
    def make(device, dtype, B, T, H, D):
        slopes = 2.0 ** (-8 / H * torch.arange(1, H + 1, device=device))
        return [*(randn(device, dtype, B, T, H, D) for _ in range(3)), slopes]

    def plain(q, k, v, slopes):  # every score, in float32 at least: one batch entry of T = 4096 is all that fits
        t, (q, k, v) = torch.arange(q.shape[1], device=q.device), (x.transpose(1, 2) for x in (q, k, v))
        s = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[3] ** -0.5
        s = s - slopes[:, None, None] * (t[:, None] - t)
        return (s.masked_fill(t > t[:, None], -torch.inf).softmax(-1).to(v.dtype) @ v).transpose(1, 2)

    def flex_alibi(q, k, v, slopes):
        bias = lambda s, b, h, i, j: s - slopes[h] * (i - j)  # noqa: E731
        return inductor(flex_attention)(*(x.transpose(1, 2) for x in (q, k, v)), score_mod=bias,
                                        block_mask=causal_blocks(q.shape[1], q.device)).transpose(1, 2)

    yield Case("attention", make, lambda q, k, v, slopes: attention(q, k, v, alibi_slopes=slopes), plain, plain,
               {"flex": flex_alibi},
               lambda which, element, B, T, H, D: 2 * B * H * T * T * D * (2.5 if which == "bwd" else 1), "TFLOP/s",
               tiny=dict(B=1, T=50, H=2, D=64), small=dict(B=1, T=1500, H=32, D=64),
               timed=[dict(B=1, T=4096, H=32, D=64)], compiled=lambda arch: [], name="ALiBi")


def xpos_cases():
    """Causal attention with xPos, against every score written out."""
    def make(device, dtype, B, T, H, D):
        return [randn(device, dtype, B, T, H, D) for _ in range(3)]

    def plain(q, k, v):  # exponents relative to the middle: float32 and bfloat16 hold 36,260 tokens either way
        (T, _, D), exact = q.shape[1:], torch.promote_types(q.dtype, torch.float32)
        zeta = (torch.arange(D // 2, device=q.device, dtype=exact) * 2 / D + 0.4) / 1.4
        n = (torch.arange(T, device=q.device, dtype=exact) - T // 2) / 512
        factors = zeta.repeat(2) ** n[:, None, None]
        backends = [SDPBackend.MATH] if q.dtype == torch.float64 else [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        return sdpa(*backends)(*(x.to(q.dtype) for x in (q * factors, k / factors)), v)

    yield Case("attention", make, lambda q, k, v: attention(q, k, v, xpos=q.shape[3]), plain, plain,
               {"scaled, sdpa": plain},
               lambda which, element, B, T, H, D: 2 * B * H * T * T * D * (2.5 if which == "bwd" else 1), "TFLOP/s",
               tiny=dict(B=1, T=50, H=2, D=64), small=dict(B=1, T=1500, H=32, D=64),
               timed=[dict(B=1, T=8192, H=H, D=D) for H, D in ((32, 64), (16, 128))], compiled=lambda arch: [],
               name="xPos")


def attention_cases():
    """Attention: causal against every peer, and the variants that are compiled ahead of time."""
    yield from window_cases()
    yield from segment_cases()
    yield from alibi_cases()
    yield from xpos_cases()

    def make(device, dtype, B, T, H, G, D):
        return [randn(device, dtype, B, T, heads, D) for heads in (H, G, G)]

    def ref(q, k, v):  # in float32 on a GPU never T x T: the backend for it wants a key head for each query head
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        exact = SDPBackend.MATH if q.dtype == torch.float64 else SDPBackend.EFFICIENT_ATTENTION
        return sdpa(exact)(q, k, v)

    def variant(q, k, v, docs=False, alibi=False, xpos=False, window=None, **options):
        slopes = torch.ones(q.shape[2], device=q.device) if alibi else None
        sinks = None if window is None else (q, k[:, :SINKS], v[:, :SINKS])
        ids = torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device) if docs else None
        out, lse = attention(q, k, v, window=window, sinks=sinks, alibi_slopes=slopes, xpos=q.shape[3] if xpos else None,
                             q_docs=ids, k_docs=ids, return_lse=True, **options)
        return out.float().sum() + lse.sum() if docs else out

    def tiles(arch):  # every entry of the tile table
        return [({2: torch.bfloat16, 4: torch.float32}[element], dict(B=1, T=256, H=2, G=1, D=block_d))
                for key_arch, element, block_d in TILES if key_arch == arch]

    lengths = [(8, 2048), (4, 4096), (2, 8192), (1, 16384), (1, 32768)]
    for H, G, D, batches in ((32, 32, 64, lengths), (16, 16, 128, lengths), (16, 4, 128, [(2, 8192)])):
        yield Case(
            "attention", make, attention, ref, sdpa(SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
            {"flash": sdpa(SDPBackend.FLASH_ATTENTION), "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION), "flex": flex},
            lambda which, element, B, T, H, G, D: 2 * B * H * T * T * D * (2.5 if which == "bwd" else 1), "TFLOP/s",
            tiny=dict(B=1, T=50, H=2, G=2 if G == H else 1, D=D), small=dict(B=1, T=1500, H=H, G=G, D=D),
            timed=[dict(B=B, T=T, H=H, G=G, D=D) for B, T in batches], compiled=tiles,
            variants={"full": functools.partial(attention, causal=False),
                      "docs, lse": functools.partial(variant, docs=True),
                      "window, sinks": functools.partial(variant, window=100),
                      "window, sinks, alibi": functools.partial(variant, window=100, alibi=True),
                      "segment, lookback": functools.partial(variant, segment=100, lookback=1),
                      "xpos": functools.partial(variant, xpos=True),
                      "docs, lse, xpos": functools.partial(variant, docs=True, xpos=True),
                      "window, sinks, xpos": functools.partial(variant, window=100, xpos=True)})


def decode_cases():
    """One new token over a ring buffer, against SDPA over the same keys, rotated and in order."""
    def make(device, dtype, B, N, H, G, D):  # the ring has turned many times: its oldest key is in the middle
        q, k, v = (randn(device, dtype, B, n, heads, D).detach() for n, heads in ((1, H), (N, G), (N, G)))
        position = torch.tensor([5 * N + N // 3], device=device)
        turns = rope_turns(rope_frequencies(D)[0]).to(device)
        return [q, k, v, position, turns, *in_order(q, k, v, position, turns)]

    def in_order(q, k, v, position, turns):
        """What a cache that is concatenated holds: keys and values by in-cache position, rotated."""
        N = k.shape[1]
        slots = torch.arange(N, device=k.device)
        window = (slots - 4 + position - 4 + 1) % (N - 4) + 4
        slots = torch.where(slots < 4, slots, window)
        return (rope_ref(q, torch.full_like(position, N - 1), turns),
                rope_ref(k[:, slots], torch.arange(N, device=k.device), turns), v[:, slots])

    def ours(q, k, v, position, turns, *_):
        return decode_attention(q, k, v, position, sinks=4, inv_freq=turns)

    def without_positions(q, k, v, position, *_):
        out, lse = decode_attention(q, k, v, position, sinks=4, return_lse=True)
        return out.float().sum() + lse.sum()

    def xpos(q, k, v, position, turns, *_):
        return decode_attention(q, k, v, position, inv_freq=turns, xpos=q.shape[3], segment=128, lookback=1)

    def ref(q, k, v, position, turns, *_):
        return decode_attention_ref(q, k, v, position, sinks=4, scale=q.shape[3] ** -0.5, inv_freq=turns)[0]

    def plain(q, k, v):  # q, k rotated, no mask: the new token sees the whole cache
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    def tiles(arch):
        return [({2: torch.bfloat16, 4: torch.float32}[element], dict(B=1, N=512, H=8, G=2, D=block_d))
                for element, block_d in DECODE_TILES]

    sizes = [(1, 1024), (1, 32768), (16, 1024), (16, 32768)]
    for H, G, D in ((32, 8, 128), (32, 32, 128), (32, 32, 64)):
        yield Case(
            "decode_attention", make, ours, ref, lambda *inputs: plain(*inputs[5:]),
            {"sdpa": lambda *inputs: plain(*inputs[5:]),  # over keys in order, rotated before: the least it could do
             "concatenate, rotate, sdpa": lambda *inputs: plain(*in_order(*inputs[:5]))},
            lambda which, element, B, N, H, G, D: 2 * B * N * G * D * element, "GB/s",
            tiny=dict(B=2, N=70, H=2, G=2 if G == H else 1, D=D), small=dict(B=2, N=1000, H=H, G=G, D=D),
            timed=[dict(B=B, N=N, H=H, G=G, D=D) for B, N in sizes], compiled=tiles,
            variants={"no positions, lse": without_positions, "xpos, segment, lookback": xpos})


def merge_cases():
    """The merge of two partial results, against plain torch."""
    def make(device, dtype, B, T, H, D):  # partial results are float32
        return [randn(device, torch.float32, *size) for size in 2 * [(B, T, H, D), (B, H, T)]]

    def ours(*parts):
        out, lse = merge_attention(*parts)
        return out + lse.transpose(1, 2)[..., None]

    def plain(out_a, lse_a, out_b, lse_b):
        share = (lse_a - lse_b).sigmoid().transpose(1, 2)[..., None]
        return share * out_a + (1 - share) * out_b + torch.logaddexp(lse_a, lse_b).transpose(1, 2)[..., None]

    yield Case("merge_attention", make, ours, plain, plain, {}, None, "GB/s", tiny=dict(B=2, T=33, H=3, D=40),
               small=dict(B=2, T=1000, H=7, D=128), timed=[],
               compiled=lambda arch: [(torch.float32, dict(B=1, T=64, H=4, D=D)) for D in (64, 128, 256)])


def infini(q, k, v, q_rot, k_rot, beta, N, **options):
    return infini_attention(q, k, v, beta, q_rot=q_rot, k_rot=k_rot, segment=int(N), **options)[0]


def infini_torch(q, k, v, q_rot, k_rot, beta, N):
    """The delta rule, whole segments only: SDPA with segments for batch entries, and a loop over them; M, z in float32."""
    (B, T, H, D), G, N, acc = q.shape, k.shape[2], int(N), torch.promote_types(q.dtype, torch.float32)
    q, k, v, q_rot, k_rot = (x.view(B, T // N, N, -1, D).permute(1, 0, 3, 2, 4) for x in (q, k, v, q_rot, k_rot))
    local = F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q_rot, k_rot, v)), is_causal=True, enable_gqa=H != G)
    gate = beta.sigmoid()[:, None, None].to(q.dtype)
    M, z = (torch.zeros(B, G, D, n, dtype=acc, device=q.device) for n in (D, 1))
    outs = []
    for s_q, s_k, s_v, s_local in zip(F.elu(q) + 1, F.elu(k) + 1, v, local.view(q.shape)):
        rows, known = s_q.reshape(B, G, -1, D), 0
        read = torch.zeros_like(rows)
        if outs:  # the memory is not empty
            low_M, low_z = M.to(q.dtype), z.to(q.dtype)
            read, known = (x @ low_M / (x @ low_z) for x in (rows, s_k))
        outs.append(gate * read.view(s_q.shape) + (1 - gate) * s_local)
        M = M + (s_k.mT @ (s_v - known)).to(acc)
        z = z + s_k.sum(-2, dtype=acc)[..., None]
    return torch.cat(outs, 2).transpose(1, 2)


def infini_cases():
    """Infini-attention with the delta rule, against SDPA and a loop over segments."""
    def make(device, dtype, B, T, H, G, D, N):
        q, q_rot = (randn(device, dtype, B, T, H, D) for _ in range(2))
        k, v, k_rot = (randn(device, dtype, B, T, G, D) for _ in range(3))
        return [q, k, v, q_rot, k_rot, randn(device, torch.float32, H), torch.tensor(N)]

    def work(which, element, B, T, H, G, D, N):
        local, memory = 2 * B * H * T * N * D, 2 * B * T * D**2 * (H + 2 * G)
        return local + memory if which == "fwd" else 2.5 * local + 2 * memory

    def documents(q, *rest, rule="delta"):
        return infini(q, *rest, rule=rule, docs=torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device))

    yield Case("infini_attention", make, infini, infini_torch, infini_torch,
               {"torch": infini_torch, "compile": inductor(infini_torch)}, work, "TFLOP/s",
               tiny=dict(B=1, T=40, H=4, G=2, D=40, N=10), small=dict(B=2, T=1000, H=4, G=2, D=128, N=200),
               timed=[dict(B=1, T=32768, H=H, G=G, D=D, N=2048) for H, G, D in ((32, 8, 64), (16, 16, 128), (32, 8, 128))],
               compiled=lambda arch: [(dtype, dict(B=1, T=256, H=2, G=1, D=D, N=64))
                                      for dtype in (torch.bfloat16, torch.float32) for D in (64, 128, 256)],
               variants={"documents": documents, "linear, documents": functools.partial(documents, rule="linear")})


def sink_logit_cases():
    """The learned sink logit, against plain torch."""
    def make(device, dtype, B, T, H, D):
        return [randn(device, dtype, B, T, H, D), randn(device, torch.float32, B, H, T), randn(device, torch.float32, H)]

    def plain(out, lse, z):
        return out * (lse - z[:, None]).sigmoid().transpose(1, 2)[..., None].to(out.dtype)

    yield Case("apply_sink_logit", make, apply_sink_logit, plain, plain, {"torch": plain, "compile": inductor(plain)},
               lambda which, element, B, T, H, D: (2 if which == "fwd" else 3) * B * T * H * D * element, "GB/s",
               tiny=dict(B=2, T=33, H=3, D=40), small=dict(B=2, T=1000, H=7, D=128),
               timed=[dict(B=4, T=4096, H=H, D=D) for H, D in ((32, 64), (16, 128))],
               compiled=lambda arch: [(torch.bfloat16, dict(B=1, T=64, H=4, D=D)) for D in (64, 128, 256)])


def rotate(x, cos, sin):
    """x (B, T, H, D), cos and sin (T, 1, D/2): pairs (i, i + D/2), as in `rope`."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rope_cases():
    """Rotation from positions, against plain torch that is given cosines and sines."""
    def make(device, dtype, B, T, H, D):  # cos and sin are for the peers, who do not compute the angles
        positions, inv_freq = torch.arange(T, device=device), rope_frequencies(D)[0].to(device)
        angle = (positions[:, None] * inv_freq)[:, None]
        x, cos, sin = randn(device, dtype, B, T, H, D), angle.cos().to(dtype), angle.sin().to(dtype)
        return [x, positions, rope_turns(inv_freq), cos, sin]

    plain = lambda x, positions, turns, cos, sin: rotate(x, cos, sin)  # noqa: E731
    yield Case("rope", make, lambda x, positions, turns, *_: rope(x, positions, turns),
               lambda x, positions, turns, *_: rope_ref(x, positions, turns), plain,
               {"torch": plain, "compile": inductor(plain)},
               lambda which, element, B, T, H, D: 2 * B * T * H * D * element, "GB/s",
               tiny=dict(B=2, T=33, H=3, D=64), small=dict(B=2, T=1000, H=7, D=128),
               timed=[dict(B=4, T=4096, H=H, D=D) for H, D in ((32, 64), (16, 128), (4, 128))],
               compiled=lambda arch: [(torch.bfloat16, dict(B=1, T=64, H=4, D=D)) for D in (64, 128)])


def rms_norm_cases():
    """RMSNorm, against torch's own and its compiled form."""
    plain = lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-5)  # noqa: E731
    yield Case("rms_norm", lambda device, dtype, N, C: [randn(device, dtype, N, C), randn(device, dtype, C)],
               lambda x, weight: rms_norm(x, weight, 1e-5), plain, plain,
               {"torch": plain, "compile": inductor(plain)},
               lambda which, element, N, C: (2 if which == "fwd" else 3) * N * C * element, "GB/s",
               tiny=dict(N=33, C=100), small=dict(N=1001, C=1536),
               timed=[dict(N=16384, C=C) for C in (768, 2048, 4096, 8192)],
               compiled=lambda arch: [(torch.bfloat16, dict(N=64, C=C)) for C in (256, 1024, 4096)])


def swiglu_cases():
    """SwiGLU, against plain torch and its compiled form."""
    plain = lambda gate, up: F.silu(gate) * up  # noqa: E731
    yield Case("swiglu", lambda device, dtype, N, F: [randn(device, dtype, N, F), randn(device, dtype, N, F)],
               swiglu, plain, plain, {"torch": plain, "compile": inductor(plain)},
               lambda which, element, N, F: (3 if which == "fwd" else 5) * N * F * element, "GB/s",
               tiny=dict(N=33, F=100), small=dict(N=1001, F=1536),
               timed=[dict(N=16384, F=F) for F in (2048, 5632, 11008)],
               compiled=lambda arch: [(torch.bfloat16, dict(N=64, F=1024))])


def loss_cases():
    """Linear and cross entropy fused, against logits held whole and torch's chunked form."""
    def make(device, dtype, N, C, V):
        weight = (torch.randn(V, C, device=device) * C**-0.5).to(dtype).requires_grad_()
        return [randn(device, dtype, N, C), weight, torch.randint(V, (N,), device=device)]

    def chunked(x, weight, targets):  # torch 2.13 and newer
        return F.linear_cross_entropy(x, weight, targets, options=nn.LinearCrossEntropyOptions())

    def plain(x, weight, targets):
        logits = F.linear(x, weight)
        return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), targets)

    def blockwise(x, weight, targets):  # the logits of 4096 rows at a time
        return sum(checkpoint(plain, rows, weight, wanted, use_reentrant=False) * (len(rows) / len(x))
                   for rows, wanted in zip(x.split(4096), targets.split(4096)))

    sizes = [(16384, 768, 50257), (8192, 4096, 128256), (32768, 4096, 128256)]
    yield Case("linear_cross_entropy", make, linear_cross_entropy, blockwise, blockwise,
               {"torch": plain, "compile": inductor(plain), "F.linear_cross_entropy": chunked},
               lambda which, element, N, C, V: 6 * N * C * V, "TFLOP/s",
               tiny=dict(N=37, C=32, V=1001), small=dict(N=500, C=512, V=50257),
               timed=[dict(N=N, C=C, V=V) for N, C, V in sizes],
               compiled=lambda arch: [(torch.bfloat16, dict(N=32, C=64, V=V)) for V in (320, 50257)],
               variants={"none": functools.partial(linear_cross_entropy, reduction="none")})


CASES = dict(attention=attention_cases, infini_attention=infini_cases, decode_attention=decode_cases,
             merge_attention=merge_cases, apply_sink_logit=sink_logit_cases, rope=rope_cases, rms_norm=rms_norm_cases,
             swiglu=swiglu_cases, linear_cross_entropy=loss_cases)


def cases(kernels: tuple[str, ...]) -> list[Case]:
    return [case for kernel in kernels if kernel in CASES for case in CASES[kernel]()]


# ----------------------------------------------------------------------------------------------------------------------
# the check

def output_and_gradients(out, leaves, dout=None):
    return [out.detach(), *(torch.autograd.grad(out, leaves, dout) if leaves else ())]


def disagreement(ours, plain, truth) -> str:
    """Empty if no tensor of `ours` is off by more than twice `plain`'s error plus its dtype's eps; or what is wrong."""
    def error(x, y):
        return ((x.double() - y).norm() / (y.norm() or 1.0)).item()

    wrong = []
    for i, (a, b, y) in enumerate(zip(ours, plain, truth, strict=True)):
        found, bound = error(a, y), 2 * error(b, y) + torch.finfo(a.dtype).eps
        if not found <= bound:  # NaN is wrong, too
            wrong.append(f"{f'gradient {i}' if i else 'output'} is off by {found:.2e}, more than {bound:.2e}")
    return "; ".join(wrong)


def check(case: Case, device: str, shape: dict, exact: torch.dtype = torch.float64) -> str:
    """What is wrong with the kernel, in bfloat16 on a GPU, float16 elsewhere, against `ref` in `exact`; or empty."""
    torch.manual_seed(0)
    inputs = case.make(device, torch.bfloat16 if device == "cuda" else torch.float16, **shape)
    exactly = [x.detach().to(exact).requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    dout, results = None, []
    for fn, given in ((case.ref, exactly), (case.plain, inputs), (case.ours, inputs)):
        out = fn(*given)
        dout = torch.randn_like(out).to(inputs[0].dtype) if dout is None else dout
        results.append(output_and_gradients(out, [x for x in given if x.requires_grad], dout.to(out.dtype)))
        del out  # its graph is large
    wrong = disagreement(*reversed(results))
    report(f"{case.kernel}  {label_of(case, shape)}  {str(inputs[0].dtype)[6:]}", wrong)
    return wrong


def report(what: str, wrong: str):
    print(f"WRONG  {what}: {wrong}" if wrong else f"right  {what}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# the clock

def median_ms(run: Callable, device: str) -> float:
    """Median time of `run` with a cold L2, over about 0.3 s: 10 repetitions at least, 100 at most."""
    if device == "cpu":
        times = []
        for _ in range(6):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times[1:])
    flush = torch.empty(2**28, dtype=torch.int32, device=device)  # 1 GiB: clearing it takes longer than launching `run`

    def repeat(n):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
        for start, end in events:
            flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)

    repeat(3)  # compiles, warms up
    return repeat(min(100, max(10, int(300 / repeat(3)))))


def time_passes(fn: Callable, inputs: list) -> tuple[torch.Tensor, dict]:
    """The output, and per pass dict(ms, extra_mib): the peak of what it allocates, results included (0 on a CPU)."""
    leaves, device = [x for x in inputs if x.requires_grad], inputs[0].device.type
    out = fn(*inputs)
    dout = torch.randn_like(out)
    runs = {"fwd": lambda: torch.no_grad()(fn)(*inputs),
            "bwd": lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)}
    if not leaves:
        del runs["bwd"]
    elif not out.dim():  # a loss may compute its gradients in either pass
        runs = {"fwd+bwd": lambda: torch.autograd.grad(fn(*inputs), leaves, dout)}
    measured = {}
    for which in runs:
        measured[which] = dict(ms=median_ms(runs[which], device), extra_mib=0.0)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            runs[which]()
            measured[which]["extra_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return out.detach(), measured


def time_case(case: Case, shape: dict, device: str, ceilings: dict[str, float]) -> list[dict]:
    """A row per pass: our time, memory, rate, share of the ceiling; each peer's time and memory, or why it has none."""
    torch.manual_seed(0)
    torch.compiler.reset()  # so that each shape is compiled for itself
    inputs = case.make(device, torch.bfloat16, **shape)
    ours, measured = time_passes(case.ours, inputs)
    rows = []
    for which, numbers in measured.items():
        rate = case.work(which, inputs[0].element_size(), **shape) / numbers["ms"]
        rate /= 1e9 if case.unit == "TFLOP/s" else 1e6
        rows.append(dict(kernel=case.kernel, shape=label_of(case, shape), stage=which, **numbers, rate=rate, unit=case.unit,
                         of_ceiling=rate / ceilings[case.unit], peers={}))
    for name, peer in case.peers.items():
        reason = ""
        try:
            out, measured = time_passes(peer, inputs)
            error = ((out.float() - ours.float()).norm() / ours.float().norm()).item()
            if not error <= 4 * torch.finfo(out.dtype).eps:
                reason = f"its output differs from ours by {error:.1e}"
            del out
        except Exception as e:  # whatever a peer dies of is shown, and the run goes on
            reason = f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"
        for row in rows:
            row["peers"][name] = dict(reason=reason) if reason else measured[row["stage"]]
    return rows


def measure_ceilings(device: str) -> dict[str, float]:
    """What this GPU reaches: a 2 GiB copy (bytes read and written), an 8192^3 bfloat16 matmul of random numbers."""
    x, y = (torch.empty(2**31, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {"GB/s": 2 * x.numel() / median_ms(lambda: y.copy_(x), device) / 1e6,
            "TFLOP/s": 2 * 8192**3 / median_ms(lambda: a @ b, device) / 1e9}


# ----------------------------------------------------------------------------------------------------------------------
# without a GPU

def static_cases(arch: int | str, kernels: tuple[str, ...] = KERNELS) -> Iterator[tuple[str, str, Callable]]:
    """(kernel, label, thunk): in aot.compile_for(arch) the thunk compiles what a forward and a backward pass launch."""
    for case in {(case.kernel, case.name): case for case in cases(kernels)}.values():
        for dtype, shape in case.compiled(arch):
            for variant, fn in {"": case.ours, **case.variants}.items():
                def thunk(case=case, dtype=dtype, shape=shape, fn=fn):
                    inputs = case.make("cpu", dtype, **shape)
                    out = fn(*inputs)
                    output_and_gradients(out, [x for x in inputs if x.requires_grad], torch.ones_like(out))

                yield case.kernel, f"{name_of(shape)} {str(dtype)[6:]} {variant}".strip(), thunk


def static_rows(arch: int | str, kernels: tuple[str, ...]) -> Iterator[dict]:
    for _, label, thunk in static_cases(arch, kernels):
        with aot.compile_for(arch) as built:
            thunk()
        for k in built:
            yield {"gpu": arch, "kernel": k.name.strip("_"), "shape": label, "tile": k.tile, "registers": k.registers,
                   "spilled B": k.spill, "shared B": k.shared, "wgmma": k.wgmma, "mma": k.mma, "cp.async": k.cp_async,
                   "programs/SM": k.occupancy}


# ----------------------------------------------------------------------------------------------------------------------
# the model, against the same one in plain torch

class PlainGPT(nn.Module):
    """model.py's default architecture, with its parameters' names, in nothing but torch."""

    def __init__(self, config):
        super().__init__()
        C, self.config, self.compute_dtype = config.n_embd, config, None
        linear = functools.partial(nn.Linear, bias=False)
        self.wte = nn.Embedding(config.vocab_size, C)
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(
            norm_attn=nn.RMSNorm(C, config.norm_eps), attn=nn.ModuleDict(dict(wqkv=linear(C, 3 * C), wo=linear(C, C))),
            norm_mlp=nn.RMSNorm(C, config.norm_eps), mlp=nn.ModuleDict(dict(
                w_gate=linear(C, config.n_inner), w_up=linear(C, config.n_inner), w_down=linear(config.n_inner, C)))))
            for _ in range(config.n_layer))
        self.norm_f = nn.RMSNorm(C, config.norm_eps)
        angle = torch.arange(config.block_size)[:, None, None] * rope_frequencies(config.head_dim, config.rope_base)[0]
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, idx, targets):
        (B, T), config = idx.shape, self.config
        x = self.wte(idx)
        x = x.to(self.compute_dtype or x.dtype)
        for block in self.blocks:
            q, k, v = block.attn.wqkv(block.norm_attn(x)).view(B, T, 3, config.n_head, config.head_dim).unbind(2)
            cos, sin = self.cos[:T].to(q.dtype), self.sin[:T].to(q.dtype)
            q, k, v = (z.transpose(1, 2) for z in (rotate(q, cos, sin), rotate(k, cos, sin), v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block.attn.wo(y.transpose(1, 2).reshape(B, T, -1))
            y = block.norm_mlp(x)
            x = x + block.mlp.w_down(F.silu(block.mlp.w_gate(y)) * block.mlp.w_up(y))
        return F.cross_entropy(F.linear(self.norm_f(x), self.wte.weight).flatten(0, 1), targets.flatten())


def time_model(device: str) -> list[dict]:
    """The row for training steps of both models from the same weights, in alternating blocks; none if ours is wrong."""
    from config.quickstart import config as quickstart
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    config, B, steps = GPTConfig(), 16, 10
    if device == "cpu":  # the quickstart's: 320 is its byte vocabulary, rounded up
        sizes = {name: getattr(quickstart, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
        config, B, steps = GPTConfig(**sizes, vocab_size=320), quickstart.batch_size, 4
    ours, plain = GPT(config).to(device), PlainGPT(config).to(device)
    plain.load_state_dict(ours.state_dict())
    exact = copy.deepcopy(plain).double()
    if device == "cuda":
        ours.compute_dtype = plain.compute_dtype = torch.bfloat16
    batch = torch.randint(config.vocab_size, (2, B, config.block_size), device=device)  # tokens and targets

    def plain_loss(idx, targets):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return plain(idx, targets)

    runs = ((lambda idx, targets: ours(idx, targets)[1], ours), (plain_loss, plain), (exact, exact))
    wrong = disagreement(*(output_and_gradients(loss(*batch[:, :2]), list(model.parameters())) for loss, model in runs))
    shape = f"B{B} T{config.block_size} L{config.n_layer} C{config.n_embd} H{config.n_head} V{config.vocab_size}"
    report(f"model  {shape}", wrong)
    if wrong:
        return []
    contenders = [(loss, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), []) for loss, model in runs[:2]]
    for _ in range(10):  # the first warms up
        for loss, optimizer, times in contenders:
            start = time.perf_counter()
            for _ in range(steps):
                loss(*batch).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start) / steps)
    ms, plain_ms = (statistics.median(times[1:]) for *_, times in contenders)
    return [dict(kernel="model", shape=shape, stage="step", ms=ms, extra_mib=0.0, rate=B * config.block_size / ms,
                 unit="ktok/s", of_ceiling=None, peers={"plain torch": dict(ms=plain_ms, extra_mib=0.0)})]


# ----------------------------------------------------------------------------------------------------------------------
# the table, the file, the command

def print_table(rows: list[dict]):
    text = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    text = [list(rows[0]), *text] if rows else []
    widths = [max(map(len, column)) for column in zip(*text)]
    for line in text:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip(), flush=True)


def print_measured(rows: list[dict]):
    """Groups of timed rows as a table, times beside those of each peer."""
    def against(peer, ms):
        return f"{peer['ms'] / ms:.2f}x ({peer['extra_mib']:.0f})" if "ms" in peer else "n/a"

    def cells(row):
        if "wrong" in row:
            return "WRONG", "", "", "", ""
        return (row["ms"], f"{row['rate']:.4g} {row['unit']}", f"{row['of_ceiling']:.0%}" if row["of_ceiling"] else "",
                f"{row['extra_mib']:.0f}", ", ".join(f"{name} {against(peer, row['ms'])}"
                                                     for name, peer in row["peers"].items()))

    header = "kernel", "shape", "pass", "ms", "rate", "of ceiling", "extra MiB", "our speed / a peer's (its extra MiB)"
    print_table([dict(zip(header, (row["kernel"], row["shape"], row["stage"], *cells(row)))) for row in rows])
    for line in dict.fromkeys(f"n/a  {name}, {row['kernel']} {row['shape']}: {peer['reason']}"
                              for row in rows for name, peer in row.get("peers", {}).items() if "reason" in peer):
        print(line)


def save(rows: list[dict], ceilings: dict[str, float]) -> Path:
    """Puts the rows in kernels/results/<gpu>.json, in place of each kernel's previous ones."""
    gpu = torch.cuda.get_device_name()
    path = Path(__file__).parent / "results" / f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"
    path.parent.mkdir(exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {"gpu": gpu, "kernels": {}}
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, triton=backend.triton.__version__,
                    cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        results["kernels"][kernel] = dict(date=date, versions=versions, ceilings=ceilings,
                                          rows=[row for row in rows if row["kernel"] == kernel])
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def bench_gpu(kernels: tuple[str, ...]) -> list[str]:
    """Checks, times, prints, saves; returns the names of the kernels that are wrong."""
    from torch._functorch import config
    config.donated_buffer = False  # lets a compiled backward pass run more than once
    ceilings, wrong, rows = measure_ceilings("cuda"), [], []
    print(f"{torch.cuda.get_device_name()}: copy {ceilings['GB/s']:.0f} GB/s, matmul {ceilings['TFLOP/s']:.0f} TFLOP/s")
    for case in cases(kernels):
        if check(case, "cuda", case.small):
            wrong.append(case.kernel)
            continue
        for shape in case.timed:
            message = check(case, "cuda", shape, torch.float32)
            if message:
                wrong.append(case.kernel)
                rows.append(dict(kernel=case.kernel, shape=label_of(case, shape), stage="all", wrong=message))
            else:
                rows += time_case(case, shape, "cuda", ceilings)
            torch.cuda.empty_cache()
    if "model" in kernels:
        row = time_model("cuda")
        wrong, rows = wrong + ["model"] * (not row), rows + row
    print_measured(rows)
    print(f"saved {save(rows, ceilings)}")
    return wrong


def bench_no_gpu(kernels: tuple[str, ...], arch: tuple[int | str, ...]) -> list[str]:
    """Checks in the interpreter, compiles, prints; returns what is wrong. Under TRITON_INTERPRET=1 only checks."""
    if backend.INTERPRET:
        return [case.kernel for case in cases(kernels) if check(case, "cpu", case.tiny)]
    wrong, own = [], tuple(kernel for kernel in kernels if kernel in CASES)
    if own:
        environment = os.environ | dict(TRITON_INTERPRET="1", NANOLONG_KERNELS="triton")
        if subprocess.run([sys.executable, "-m", "kernels.bench", *own], env=environment).returncode:
            wrong.append("in the interpreter, see above")
        print_table([row for one in arch for row in static_rows(one, own)])
    if "model" in kernels:
        row = time_model("cpu")
        wrong += ["model"] * (not row)
        print_measured(row)
    return wrong


def main(kernels: tuple[KernelName, ...], arch: tuple[Literal[80, 89, 90, 100, "gfx"], ...] = (80, 90, 100)):
    """
    Measures every kernel against its peers on a GPU; without one, checks and compiles it.

    Args:
        kernels: which kernels; all when none is named
        arch: the GPUs to compile for where there is none: NVIDIA compute capability x 10, or gfx (AMD gfx942)
    """
    kernels = kernels or KERNELS
    if not backend.HAVE_TRITON:
        message = "kernels.bench: Triton is not installed, so no kernel is checked: pip install triton"
        if "model" not in kernels or torch.cuda.is_available():
            sys.exit(message)
        print(message)
        kernels = ("model",)
    wrong = bench_gpu(kernels) if torch.cuda.is_available() else bench_no_gpu(kernels, arch)
    if wrong:
        sys.exit(f"kernels.bench: wrong, so not timed: {', '.join(dict.fromkeys(wrong))}")


if __name__ == "__main__":
    import tyro

    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
