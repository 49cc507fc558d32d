"""
The model: a GPT in one file. Every attention variant is one of our own kernels (see kernels/); this file only arranges
them.

Shapes: B batch, T tokens, C = n_embd, H query heads, G key/value heads (H a multiple of G), D = head_dim, V vocabulary.
"""

import functools
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels import (apply_sink_logit, attention, decode_attention, infini_attention, linear_cross_entropy, memory_read,
                     rms_norm, rope, rope_frequencies, rope_turns, swiglu)
from kernels.backend import use_triton
from kernels.ring import (Ring, from_last_rank, gather_tokens, ring_attention, shard_positions, shard_sequence,
                          unshard_sequence)
from kernels.rope import SCALING_KEYS


@dataclass
class GPTConfig:
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None     # key/value heads; fewer than n_head is GQA, 1 is MQA; default n_head
    n_embd: int = 768
    head_dim: int | None = None      # default n_embd / n_head
    n_inner: int | None = None       # width of the MLP; default 4 n_embd, or 8/3 n_embd in multiples of 64 for swiglu
    vocab_size: int = 50304          # GPT-2's 50257 rounded up to a multiple of 64
    block_size: int = 1024           # tokens per training sequence; nothing is tabulated to it
    attention: str = "full"          # full | window | infini | blockwise, or a pattern cycled over the layers: "window,full"
    window: int = 1020               # keys that a window layer's query sees, its own included
    sinks: int = 4                   # the first tokens, which window layers see always (StreamingLLM); 0: none
    segment: int = 2048              # tokens that an infini layer's query sees exactly at most; earlier ones by its memory
    memory_rule: str = "delta"       # how a segment is written into the memory: delta | linear
    memory_beta: float = 0.0         # of a new infini layer's gates: sigmoid(beta) is the memory's share
    memory_norm: float | None = None # RMSNorm of the memory's queries and keys, its learned weights start here; None: none
    sink_logit: bool = False         # a learned logit per head in the softmax's denominator
    sink_tokens: int = 0             # learned vectors in front of every sequence: sinks by construction
    position: str = "rope"           # rope | xpos | alibi | none
    rope_base: float = 10000.0
    rope_fraction: float = 1.0       # of the head dim that is rotated
    rope_scaling: dict | None = None # Hugging Face's, for example {"rope_type": "yarn", "factor": 4, ...}
    alibi_scale: float = 1.0         # factor on ALiBi's slopes
    norm: str = "rmsnorm"            # rmsnorm | layernorm
    norm_eps: float = 1e-5
    mlp: str = "swiglu"              # swiglu | gelu
    bias: bool = False               # in the linear layers, and in layernorm; the next three default to it
    qkv_bias: bool | None = None
    wo_bias: bool | None = None
    norm_bias: bool | None = None
    parallel_residual: bool = False  # x + attn(norm(x)) + mlp(norm(x)), each with its own norm
    shared_norm: bool = False        # parallel_residual with one norm for both
    tie_embeddings: bool = True      # the output layer is the token embedding

    def __post_init__(self):
        self.n_kv_head = self.n_head if self.n_kv_head is None else self.n_kv_head
        for name, least in dict(n_layer=1, n_head=1, n_kv_head=1, n_embd=1, vocab_size=1, block_size=1, window=1, sinks=0,
                                sink_tokens=0, segment=1).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: change one, or set head_dim")
            self.head_dim = self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        if not 1 <= self.head_dim <= 256:
            raise ValueError(f"head_dim is {self.head_dim}: the attention kernel takes 1 to 256")
        for name, known in (("attention", ("full", "window", "infini", "blockwise")),
                            ("position", ("rope", "xpos", "alibi", "none")),
                            ("norm", ("rmsnorm", "layernorm")), ("mlp", ("swiglu", "gelu")),
                            ("memory_rule", ("delta", "linear"))):
            for value in getattr(self, name).split(",") if name == "attention" else [getattr(self, name)]:
                if value not in known:
                    pattern = " or a comma-separated pattern of them" if name == "attention" else ""
                    raise ValueError(f"{name} is {getattr(self, name)!r}: it must be one of {', '.join(known)}{pattern}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps is {self.norm_eps}: it must be more than 0")
        if "window" in self.attention and self.sinks and self.sinks + self.window > self.block_size:
            raise ValueError(f"sinks {self.sinks} + window {self.window} is more than block_size {self.block_size}: no such "
                             f"distance to a sink was ever trained; set window to {max(1, self.block_size - self.sinks)}")
        if self.sinks < self.sink_tokens and "window" in self.attention:
            raise ValueError(f"sinks is {self.sinks}, sink_tokens {self.sink_tokens}: window layers would drop the learned "
                             f"ones; set sinks to {self.sink_tokens} or more")
        if self.memory_norm is not None and not 0 < self.memory_norm < math.inf:
            raise ValueError(f"memory_norm is {self.memory_norm}: it must be more than 0 and finite, or None")
        if not math.isfinite(self.memory_beta):
            raise ValueError(f"memory_beta is {self.memory_beta}: it must be finite; -1000 shuts the gates for good")
        if "blockwise" in self.attention and (self.block_size < 2 or self.sink_tokens):
            raise ValueError(f"attention {self.attention!r} with block_size {self.block_size} and sink_tokens "
                             f"{self.sink_tokens}: blockwise layers see two halves of block_size, and no token in front for long")
        if "infini" in self.attention and (self.sink_logit or self.sink_tokens):
            name = "sink_logit" if self.sink_logit else "sink_tokens"
            raise ValueError(f"{name} {getattr(self, name)} with attention {self.attention!r}: infini layers have a memory "
                             f"for what is far, and no sinks; leave {name} away")
        if self.rope_scaling is not None:  # None is absent, "type" an older name, and one base is enough
            if not isinstance(self.rope_scaling, dict):
                raise ValueError(f"rope_scaling is {self.rope_scaling!r}: it must be a dict, which read_rope_scaling makes")
            scaling = {key: value for key, value in self.rope_scaling.items() if value is not None}
            older = scaling.pop("type", "default")
            self.rope_base = scaling.pop("rope_theta", self.rope_base)
            kind = scaling.pop("rope_type", older)
            self.rope_scaling = {"rope_type": kind, **scaling} if scaling or kind != "default" else None
        if self.rope_scaling is not None and self.position != "rope":
            raise ValueError(f"rope_scaling {self.rope_scaling} needs position 'rope', it is {self.position!r}")
        if self.alibi_scale != 1 and self.position != "alibi":
            raise ValueError(f"alibi_scale {self.alibi_scale} needs position 'alibi', it is {self.position!r}")
        if self.shared_norm and not self.parallel_residual:
            raise ValueError("shared_norm is True, parallel_residual False: one norm serves two branches side by side only")
        if self.rotary and (not 0 < self.rope_fraction <= 1 or self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ValueError(f"rope_fraction {self.rope_fraction} of head_dim {self.head_dim} rotates {self.rotary_dim} dims: "
                             "it must be an even number from 2 to head_dim")
        if self.n_inner is not None and self.n_inner < 1:
            raise ValueError(f"n_inner is {self.n_inner}: it must be at least 1")
        if self.rotary:
            self.frequencies()
            if "infini" in self.attention and self.by_length and self.segment > self.trained_length:
                raise ValueError(f"segment {self.segment} with rope_scaling {self.rope_scaling}: inside a segment of more than "
                                 f"{self.trained_length} tokens the frequencies would change; set segment to "
                                 f"{self.trained_length} at most, or take linear, ntk, yarn or llama3")
            n_hat = (self.rope_scaling or {}).get("n_hat", 0)
            if "window" in self.attention and self.span("window") > self.trained_length and n_hat > self.sinks:
                raise ValueError(f"n_hat {n_hat} with sinks {self.sinks}: window layers drop the other tokens that it is for; "
                                 f"set sinks to {n_hat}")
        for name in ("qkv_bias", "wo_bias", "norm_bias"):
            setattr(self, name, self.bias if getattr(self, name) is None else getattr(self, name))
        if self.n_inner is None:
            self.n_inner = 4 * self.n_embd if self.mlp == "gelu" else -(-8 * self.n_embd // (3 * 64)) * 64

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rope_fraction)

    @property
    def layer_kinds(self) -> list[str]:
        """The attention of each layer: the pattern, cycled."""
        pattern = self.attention.split(",")
        return [pattern[i % len(pattern)] for i in range(self.n_layer)]

    @property
    def rotary(self) -> bool:
        return self.position in ("rope", "xpos")

    @property
    def rope_type(self) -> str:
        return (self.rope_scaling or {}).get("rope_type", "default")

    @property
    def by_length(self) -> bool:
        """Whether the rotary frequencies depend on the length of the text."""
        return self.rope_type in ("dynamic", "longrope")

    @property
    def trained_length(self) -> int:
        """Of the text: what rope_scaling starts from, where it says so."""
        return (self.rope_scaling or {}).get("original_max_position_embeddings", self.block_size)

    @property
    def reach(self) -> float:
        """The longest text that rope_scaling is for; without one, or with dynamic's or Llama 3's, no end is said."""
        scaling = self.rope_scaling or {}
        known = self.rope_type in ("linear", "ntk", "ntk_by_parts", "yarn", "longrope") and \
            {"factor", "original_max_position_embeddings"} <= scaling.keys()
        return round(scaling["factor"] * scaling["original_max_position_embeddings"]) if known else math.inf

    def span(self, kind: str) -> float:
        """The tokens that a query of such a layer can see by their distance, itself included."""
        return dict(full=math.inf, window=self.sinks + self.window, infini=self.segment,
                    blockwise=2 * (self.block_size // 2))[kind]

    @property
    def layout(self) -> str:
        """How the ranks of a sequence-parallel group share a sequence: zigzag, the same work for each, for full attention."""
        return "zigzag" if "full" in self.layer_kinds and "infini" not in self.layer_kinds else "contiguous"

    def shard_multiple(self, ranks: int) -> int:
        """Sequences that `ranks` ranks can share are multiples of so many tokens. ValueError if this model's cannot be."""
        if self.sink_tokens:
            raise ValueError(f"sink_tokens {self.sink_tokens} with {ranks} ranks per sequence: no shard has room for tokens in "
                             "front of the sequence; use sinks alone, or one rank")
        return ranks * (2 if self.layout == "zigzag" else self.segment if "infini" in self.layer_kinds else 1)

    def check_shards(self, T: int, ranks: int):
        """ValueError, one line, where `ranks` ranks cannot share a sequence of T tokens."""
        n = self.shard_multiple(ranks)
        if T % n:
            what = dict(zigzag="two chunks", contiguous="whole segments")[self.layout] if n > ranks else "a shard"
            raise ValueError(f"{T} tokens with {ranks} ranks per sequence: each takes {what} of equal size, so they must be a "
                             f"multiple of {n}: use {f'{T // n * n} or ' if T >= n else ''}{(T // n + 1) * n}")
        if self.rope_type == "dynamic" and T > self.trained_length:
            raise ValueError(f"{T} tokens with {ranks} ranks per sequence and dynamic rope_scaling: beyond "
                             f"{self.trained_length} it goes by each query's length, which a shard does not count up; take ntk, "
                             "the same for one length")

    def frequencies(self, length: int | None = None):
        """rope_frequencies of this model, for a text of `length` tokens. ValueError for a rope_scaling that is wrong."""
        return rope_frequencies(self.rotary_dim, self.rope_base, self.rope_scaling, length)


def read_rope_scaling(value: str | dict, block_size: int, own: dict | None = None, target: int | None = None) -> dict:
    """
    A rope_scaling as people write it: a dict; the name of a family ("yarn"); JSON text; or the path of a JSON file, of
    which the entry "rope_scaling" is taken if it has one. What is left out is filled in. original_max_position_embeddings
    is the trained length: that of `own`, the model's scaling so far, or block_size. factor is target / that, and 1 for
    dynamic, which stretches as far as a text is long. ValueError for what cannot be read, for a family that is unknown,
    for what is left out and nothing says, and for a target that is no extension.
    """
    given, own = value, own or {}
    if not isinstance(value, dict):
        if value in SCALING_KEYS:
            value = {"rope_type": value}
        else:
            try:
                value = json.loads(Path(value).read_text(encoding="utf-8") if os.path.isfile(value) else value)
            except ValueError:
                raise ValueError(f"rope_scaling {given}: it must be one of {', '.join(SCALING_KEYS)}, a JSON object, or the path "
                                 "of a file that holds one") from None
        value = value.get("rope_scaling", value) if isinstance(value, dict) else value
        if not isinstance(value, dict):
            raise ValueError(f"rope_scaling {given}: it holds {type(value).__name__} {value}, it must be a JSON object like "
                             '{"rope_type": "yarn", "factor": 4}')
    value = {key: x for key, x in value.items() if x is not None}
    kind = value.get("rope_type", value.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALING_KEYS:
        raise ValueError(f"rope_scaling {given}: rope_type {kind!r} is unknown: use one of {', '.join(SCALING_KEYS)}")
    (needed, optional), length = SCALING_KEYS[kind], "original_max_position_embeddings"
    if own.get("rope_type", "default") != "default" and length not in own:  # scaled, nobody knows from what length
        if length in needed and length not in value:
            raise ValueError(f"rope_scaling {given} lacks {length}, the length before any scaling, and the model's own "
                             f"rope_scaling {own} does not say it")
        target = None
    elif length in (*needed, *optional):
        value.setdefault(length, own.get(length, block_size))
    if kind == "dynamic":
        value.setdefault("factor", 1.0)
    if "factor" in (*needed, *optional) and "factor" not in value and not (kind == "longrope" and "attention_factor" in value):
        trained = value.get(length)
        if target is None or not isinstance(trained, (int, float)):
            raise ValueError(f"rope_scaling {given} lacks its factor, the length wanted over the trained one: use "
                             f'{{"rope_type": "{kind}", "factor": 4}} for {4 * block_size} tokens')
        if target <= trained:
            raise ValueError(f"rope_scaling {given}: {target} tokens are wanted, the model was trained on {trained}: there is "
                             "nothing to extend; ask for more, or give its factor")
        value["factor"] = target / trained
    return value


def alibi_slopes(n_head: int) -> torch.Tensor:
    """
    ALiBi's slope of each head, (n_head,) float32: 2^(-8 (h + 1) / n_head) for a power of two; else those of the power
    of two below, then every other one of the power of two above. Press et al., arXiv 2108.12409.
    """
    p = 2 ** int(math.log2(n_head))
    slopes = [2 ** (-8 * (h + 1) / p) for h in range(p)] + [2 ** (-4 * (h + 1) / p) for h in range(0, 2 * (n_head - p), 2)]
    return torch.tensor(slopes, dtype=torch.float32)


class Linear(nn.Linear):
    """nn.Linear whose weights follow the activations' dtype: float32 for the optimizer while we compute in bfloat16."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Norm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.eps = config.norm_eps
        self.kind = config.norm
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.norm == "layernorm" and config.norm_bias else None

    def forward(self, x):
        if self.kind == "rmsnorm":
            return rms_norm(x, self.weight, self.eps)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps)


class Angles(NamedTuple):
    """What some rows of a call, and the keys that they see, rotate by."""

    rows: slice
    turns: torch.Tensor | None  # (R,) int64 (rope_turns); None: they do not rotate
    since: int | None = None  # of these rows, those at this position or later
    n_hat: int = 0  # tokens at positions below rotate by `near` (LongRoPE)
    near: torch.Tensor | None = None

    def rotate(self, x, positions, first=None):
        """x (B, T, heads, D) at positions (T,) or (B, T); first: where they begin, if they count up from there."""
        if self.turns is None:
            return x
        y = rope(x, positions, self.turns)
        n = x.shape[1] if first is None else max(0, min(x.shape[1], self.n_hat - first))  # beyond these none is near
        if self.near is None or not n:
            return y
        near = torch.where((positions[..., :n] < self.n_hat)[..., None, None], rope(x[:, :n], positions[..., :n], self.near),
                           y[:, :n])
        return torch.cat([near, y[:, n:]], 1)


class KVCache:
    """
    Full attention's cache: the keys and values of every token so far, in buffers (B, capacity, G, D) that double when
    full. What a cache keeps carries no gradient. `rotated` says whether the keys are stored rotated by their position in
    the text or un-rotated. decode_attention rotates as it loads, from un-rotated keys; the plain torch path would rotate
    the whole cache for each token, so it stores them rotated: the same numbers.
    """

    layout, sinks, memory = "full", 0, {}

    def __init__(self, batch_size, n_kv_head, head_dim, device, dtype, rotated):
        self.rotated = rotated
        self.k = torch.zeros(batch_size, 0, n_kv_head, head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)

    def past(self, start):
        """-> keys, values (B, n, G, D) of the tokens before position `start` that later ones see, the first's position."""
        return self.k[:, :start], self.v[:, :start], 0

    def write(self, k, v, start):
        """k, v (B, T, G, D) of the tokens from position `start` on."""
        end = start + k.shape[1]
        if end > self.k.shape[1]:
            self.k, self.v = (self._grown(x, start, max(64, 2 * start, end)) for x in (self.k, self.v))
        self.k[:, start:end], self.v[:, start:end] = k.detach(), v.detach()

    def write_shards(self, k, v, ring):
        """k, v (B, c, G, D), this rank's shards of a text that begins."""
        self.write(*(unshard_sequence(x, *ring) for x in (k, v)), 0)

    def commit(self):
        """Nothing to do: what lies past the state's position is not seen."""

    def write_one(self, k, v, slot):
        """k, v (B, 1, G, D) of one token -> the keys and values that it sees, itself included."""
        position = int(slot)
        self.write(k, v, position)
        return self.k[:, :position + 1].to(k.dtype), self.v[:, :position + 1].to(k.dtype)

    def saved(self, position):
        """What a file holds, (B, n, G, D) each, and the position of each of the n tokens in the text."""
        return self.k[:, :position], self.v[:, :position], torch.arange(position)

    def _grown(self, x, used, capacity):
        new = x.new_zeros(x.shape[0], capacity, *x.shape[2:])
        new[:, :used] = x[:, :used]
        return new


class WindowCache:
    """
    A window layer's cache: S sinks, then a ring of the last W tokens, in buffers (B, S + W, G, D) that never grow. Token
    p is in slot p if p < S, else in slot S + (p - S) % W. `rotated`: see KVCache. The rotated form has S slots more, at
    the end: copies of the sinks, turned to where the newest query must see them.
    """

    memory = {}

    def __init__(self, batch_size, n_kv_head, head_dim, device, dtype, rotated, sinks, window, kind="window"):
        self.rotated, self.sinks, self.window, self.layout = rotated, sinks, window, f"{kind} {window} + {sinks} sinks"
        self.held = None
        slots = sinks + window + (sinks if rotated else 0)
        self.k = torch.zeros(batch_size, slots, n_kv_head, head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)

    def past(self, start):
        first = max(min(self.sinks, start), start - self.window + 1)
        slots = self.sinks + (torch.arange(first, start, device=self.k.device) - self.sinks) % self.window
        return self.k[:, slots], self.v[:, slots], first

    def write(self, k, v, start):
        """Takes effect at `commit`: what it overwrites is the past of this call, should it be cut short and made again."""
        tokens = torch.arange(start, start + k.shape[1], device=k.device)
        n_sink = min(max(0, self.sinks - start), len(tokens))
        tokens = torch.cat([tokens[:n_sink], tokens[n_sink:][-self.window:]])
        self._hold(tokens, *(x[:, tokens - start] for x in (k, v)))

    def write_shards(self, k, v, ring):
        """As KVCache.write_shards. Only what stays is gathered."""
        T = ring.group.size() * k.shape[1]
        S = min(self.sinks, T)
        first = max(S, T - self.window)
        kept = zip(gather_tokens(k, v, 0, S, *ring), gather_tokens(k, v, first, T, *ring))
        self._hold(torch.cat([torch.arange(S), torch.arange(first, T)]).to(k.device), *(torch.cat(x, 1) for x in kept))

    def _hold(self, tokens, k, v):
        slots = torch.where(tokens < self.sinks, tokens, self.sinks + (tokens - self.sinks) % self.window)
        self.held = slots, *(x.detach().to(self.k.dtype) for x in (k, v))

    def commit(self):
        if self.held is not None:
            slots, k, v = self.held
            self.k[:, slots], self.v[:, slots] = k, v
            self.held = None

    def write_one(self, k, v, slot):
        """slot (1,) int64, a tensor so that a CUDA graph can hold it -> the ring."""
        self.held = None
        self.k.index_copy_(1, slot, k.to(self.k.dtype))
        self.v.index_copy_(1, slot, v.to(self.v.dtype))
        return self.k.to(k.dtype), self.v.to(k.dtype)

    def saved(self, position):
        S, W = self.sinks, self.window
        slots = torch.arange(S + W)
        last = position - 1 - (position - 1 - slots) % W  # the last token at or before position - 1 in each ring slot
        return self.k[:, :S + W], self.v[:, :S + W], torch.where(slots < S, slots, last.clamp(min=0))


class InfiniCache:
    """
    An infini layer's cache: the tokens of the segment at hand, token p in slot p % N of buffers (B, N, G, D), and the
    memory of all segments before it, M (B, G, D, D) and z (B, G, D) in float32. A segment that is full is folded into the
    memory, by `attn`'s rule, and its slots are free. `rotated`: see KVCache.
    """

    sinks = 0

    def __init__(self, batch_size, n_kv_head, head_dim, device, dtype, rotated, segment, attn, turns):
        self.rotated, self.segment, self.layout = rotated, segment, f"segment {segment} + memory"
        self.attn, self.turns, self.held = attn, turns, None
        self.k = torch.zeros(batch_size, segment, n_kv_head, head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.M = torch.zeros(batch_size, n_kv_head, head_dim, head_dim, device=device,
                             dtype=torch.promote_types(dtype, torch.float32))
        self.z = self.M.new_zeros(batch_size, n_kv_head, head_dim)

    @property
    def memory(self) -> dict[str, torch.Tensor]:
        return dict(M=self.M, z=self.z)

    def past(self, start):
        """-> the segment's tokens before position `start`: keys un-rotated and rotated, values, (B, start % N, G, D)."""
        n = start % self.segment
        k, stored = self.unrotated(start - n, start), self.k[:, :n]
        if self.turns is not None and not self.rotated:
            stored = rope(stored, torch.arange(start - n, start, device=k.device), self.turns)
        return k, stored, self.v[:, :n]

    def unrotated(self, start, end):
        """The keys of the segment's tokens from position `start`, its first, to `end`."""
        k = self.k[:, :end - start]
        return rope(k, -torch.arange(start, end, device=k.device), self.turns) if self.rotated else k

    def write(self, k, v, start, memory):
        """
        k, v (B, T, G, D) of the tokens from position `start` on, and the memory after them. Takes effect at `commit`,
        as WindowCache.write does.
        """
        n = min(k.shape[1], (start + k.shape[1]) % self.segment)
        slots = torch.arange(start + k.shape[1] - n, start + k.shape[1], device=k.device) % self.segment
        k, v = (x.detach()[:, x.shape[1] - n:].to(self.k.dtype) for x in (k, v))
        self.held = slots, k, v, *(x.detach() for x in memory)

    write_one = WindowCache.write_one

    def prepare(self, end):
        """Before `commit`, and seen by nobody yet: the fold of a segment that write_one filled, if `end` is a border."""
        if self.held is None and end % self.segment == 0:
            none = torch.arange(0, device=self.k.device)
            memory = self.attn.fold(self.unrotated(end - self.segment, end), self.v, (self.M, self.z))
            self.held = none, self.k[:, :0], self.v[:, :0], *memory

    def commit(self):
        if self.held is not None:
            slots, k, v, M, z = self.held
            self.k[:, slots], self.v[:, slots] = k, v
            self.M.copy_(M)
            self.z.copy_(z)
            self.held = None

    def clear(self, rows):
        """The memory of the rows where `rows` (B,) bool holds is empty again: their next token begins a text."""
        self.M[rows], self.z[rows] = 0, 0

    def saved(self, position):
        slots = torch.arange(self.segment)
        return self.k, self.v, position - position % self.segment + slots


class CarriedMemory:
    """An infini layer's memory between two segments of a training sequence: a cache's part for Attention, with gradients."""

    rotated = False

    def __init__(self, M, z):
        self.M, self.z = M, z

    def write(self, k, v, start, memory):
        self.M, self.z = memory


class CarriedMemories:
    """The CarriedMemory of each layer: a State's part for the blocks. memory: M, z of the first layer, of the next, ..."""

    def __init__(self, memory):
        self.layers = [CarriedMemory(*memory[i:i + 2]) for i in range(0, len(memory), 2)]


class State:
    """
    All that generation carries from one call to the next: `position`, the tokens seen (the model's own sink_tokens
    included), and each layer's cache. Feeding a text in chunks of any size gives what one pass gives. `nbytes` is the
    memory it holds: constant from the start with windows and segments, growing with the text with full attention.
    """

    def __init__(self, batch_size: int, layers: list, turns, about: str):
        self.batch_size = batch_size
        self.position = 0
        self.layers = layers
        self.turns, self.about = turns, about
        self.graphed = None  # a decoding step as a CUDA graph, once generate has made one
        device = layers[0].k.device
        self.at = torch.zeros(1, dtype=torch.int64, device=device)    # the position of the token being decoded
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)  # its slot in the rings of window layers
        self.in_ring = torch.zeros(1, dtype=torch.int64, device=device)  # its slot in blockwise layers
        self.in_segment = torch.zeros(1, dtype=torch.int64, device=device)  # its slot in infini layers

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for layer in self.layers for x in (layer.k, layer.v, *layer.memory.values()))

    def advance(self, n: int):
        """The next n tokens have been through every layer. What can fail comes first: a call cut short can be made again."""
        for layer in self.layers:
            if layer.memory:
                layer.prepare(self.position + n)
        for layer in self.layers:
            layer.commit()
        self.position += n

    def save(self, path: str, extra: dict[str, torch.Tensor] | None = None):
        """Writes the state, and the tensors of `extra` beside it, to a safetensors file, which `load` reads."""
        from safetensors.torch import save_file
        tensors = {f"extra.{name}": x for name, x in (extra or {}).items()}
        for i, layer in enumerate(self.layers):
            k, v, _ = layer.saved(self.position)
            tensors |= {f"{i}.k": k.contiguous(), f"{i}.v": v.contiguous()}
            tensors |= {f"{i}.{name}": x for name, x in layer.memory.items()}
        save_file(tensors, path, metadata={"position": str(self.position), "rotated": str(self.layers[0].rotated),
                                           "model": self._model()})

    def _model(self) -> str:
        """What two models must share for one's state to be the other's."""
        layers = "; ".join(f"{layer.layout} {(self.batch_size, *layer.k.shape[2:])}" for layer in self.layers)
        return f"layers (batch, heads, dim) {layers}; {self.about}"

    def load(self, path: str) -> dict[str, torch.Tensor]:
        """Fills a new state with what `save` wrote -> `extra`. ValueError when it is of another model or batch size."""
        from safetensors import SafetensorError, safe_open
        try:
            with safe_open(path, "pt") as file:
                tensors, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{path} cannot be read as a saved state ({e})") from None
        if not {"position", "rotated", "model"} <= meta.keys():
            raise ValueError(f"{path} is not a saved state")
        if meta["model"] != self._model():
            raise ValueError(f"{path} is a state of another model, window or batch size: {meta['model']} there, {self._model()} "
                             "here; load it with those it comes from")
        position = int(meta["position"])
        saved = [[tensors[f"{i}.{name}"].to(layer.k) for name in "kv"] for i, layer in enumerate(self.layers)]
        for layer, (k, v) in zip(self.layers, saved):
            if (meta["rotated"] == "True") != layer.rotated:  # from the other backend
                at = layer.saved(position)[2].to(k.device)
                k = rope(k, at if layer.rotated else -at, self.turns)
            if layer.layout == "full":
                layer.write(k, v, 0)
            else:
                layer.k[:, :k.shape[1]], layer.v[:, :v.shape[1]] = k, v
        for i, layer in enumerate(self.layers):
            for name, x in layer.memory.items():
                x.copy_(tensors[f"{i}.{name}"])
        self.position = position
        return {name.removeprefix("extra."): x for name, x in tensors.items() if name.startswith("extra.")}


class Attention(nn.Module):
    """
    Every variant of attention. Full. A window with sinks (StreamingLLM, arXiv 2309.17453), whose positions are those
    inside a cache of S sinks and W recent tokens: in parallel that is one softmax over the window's keys, by their
    ordinary distance, and the sinks' keys, with the query where it sits in the cache, at min(position, S + W - 1). Infini
    (arXiv 2404.07143): a query sees its own segment of N tokens, and by a memory of fixed size all before it; a learned
    gate per head mixes the two. Blockwise (LeX, arXiv 2212.10554), for texts beyond the trained length: a query sees the
    tokens before it in its own half-block of block_size / 2 and in the one before.
    """

    def __init__(self, config, layer, scale):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.layer, self.scale = layer, scale
        self.kind = config.layer_kinds[layer]
        infini = self.kind == "infini"
        self.window, self.sinks = (config.window, config.sinks) if self.kind == "window" else (None, 0)
        self.sink_tokens = config.sink_tokens
        self.xpos = dict(xpos=config.rotary_dim) if config.position == "xpos" else {}
        self.blocks = dict(segment=config.block_size // 2, lookback=1) if self.kind == "blockwise" else {}
        self.segment, self.rule = config.segment if infini else None, config.memory_rule
        self.wqkv = Linear(config.n_embd, (config.n_head + 2 * config.n_kv_head) * config.head_dim, bias=config.qkv_bias)
        self.wo = Linear(config.n_head * config.head_dim, config.n_embd, bias=config.wo_bias)
        self.sink_logit = nn.Parameter(torch.zeros(config.n_head)) if config.sink_logit else None
        self.beta = nn.Parameter(torch.full((config.n_head,), config.memory_beta)) if infini else None
        self.eps, normed = config.norm_eps, infini and config.memory_norm is not None
        self.memory_q, self.memory_k = (
            nn.Parameter(torch.full((self.head_dim,), float(config.memory_norm))) if normed else None for _ in range(2))

    def forward(self, x, angles, slopes, positions, explicit, docs, state, start, whole, ring):
        """
        x (B, T, C) at `start`, after what the state holds -> (B, T, H D), for `wo`. angles: what the rows rotate by, a list
        of Angles for each kind of layer; slopes: the ALiBi slopes, or None; positions, docs: see GPT.forward; explicit:
        positions do not count up from `start`; whole: the window holds every token; ring: see GPT.sequence_parallel.
        """
        B, T, _ = x.shape
        H, G, angles = self.n_head, self.n_kv_head, angles[self.kind]
        qkv = self.wqkv(x).view(B, T, H + 2 * G, self.head_dim)
        qk, v = qkv.split([H + G, G], dim=2)  # views
        cache = None if state is None else state.layers[self.layer]
        one = cache is not None and T == 1 and not torch.is_grad_enabled() and angles[0].near is None and ring is None
        if self.segment is not None:
            y = self.infini_decode(qk, v, angles[0].turns, slopes, positions, state, cache, start) if one else \
                self.infini(qk, v, angles[0].turns, slopes, positions, docs, cache, start, ring)
        elif one:
            y = self.decode(qk, v, angles[0].turns, slopes, positions, state, cache, start)
        else:
            y = self.parallel(qk, v, angles, slopes, positions, explicit, docs, cache, start, whole, ring)
        if self.sink_logit is not None:
            y = apply_sink_logit(*y, self.sink_logit).to(x.dtype)
        return y.reshape(B, T, H * self.head_dim)

    def parallel(self, qk, v, angles, slopes, positions, explicit, docs, cache, start, whole, ring):
        """Any number of tokens, after those of the cache if there is one; in a ring its shard, and the cache is empty."""
        window = None if whole else self.window
        S = 0 if window is None else self.sinks
        S = self.sink_tokens if docs is not None else S  # a learned token is of no document: a sink to all of them
        past = sinks = (qk[:, :0, self.n_head:], v[:, :0])
        first = start
        if cache is not None:
            *past, first = cache.past(start)
            sinks = cache.k[:, :min(S, start)], cache.v[:, :min(S, start)]
        parts = []
        for by in angles:
            y, k = self.attend(by, qk, v, slopes, positions, explicit, docs, past, sinks, start, first, window, S,
                               cache is not None and cache.rotated, ring)
            parts.append(y if self.sink_logit is not None else [y])
        if cache is not None:
            k = k if cache.rotated else qk[:, :, self.n_head:]
            cache.write(k, v, start) if ring is None else cache.write_shards(k, v, ring)
        y = parts[0]  # out (B, T, H, D), and with sink_logit lse (B, H, T)
        if len(parts) > 1 and angles[1].since is None:
            y = [torch.cat(x, dim) for x, dim in zip(zip(*parts), (1, 2))]
        elif len(parts) > 1:
            late = positions >= angles[1].since
            y = [torch.where(mask, x[1], x[0]) for x, mask in zip(zip(*parts), (late[..., None, None], late[..., None, :]))]
        return y if self.sink_logit is not None else y[0]

    def attend(self, by, qk, v, slopes, positions, explicit, docs, past, sinks, start, first, window, S, rotated, ring):
        """
        The rows of `by`, and the keys that they see, rotated by its angles -> what they attend to, and the call's keys.
        explicit: positions do not count up from `start`. past: keys and values of the cache, from position `first` on,
        sinks: those of its first tokens, S at most; rotated: the keys of both are.
        """
        H, rows, stop, at = self.n_head, by.rows, by.rows.stop, None if explicit else start
        (past_k, past_v), (k_sink, v_sink) = past, sinks
        if stop - rows.start == qk.shape[1]:  # in one launch
            q, k = by.rotate(qk, positions, at).split([H, self.n_kv_head], dim=2)
        else:
            q = by.rotate(qk[:, rows, :H], positions[..., rows], at if at is None else at + rows.start)
            k = by.rotate(qk[:, :stop, H:], positions[..., :stop], at)
        if past_k.shape[1] + k_sink.shape[1] and not rotated:
            past_k, k_sink = (by.rotate(x, torch.arange(at, at + x.shape[1], device=x.device), at)
                              for x, at in ((past_k, first), (k_sink, 0)))
        keys, values = (torch.cat([old.to(new.dtype), new], 1) if old.shape[1] else new
                        for old, new in ((past_k, k), (past_v, v[:, :stop])))
        sinks, places = None, dict(q_start=start + rows.start, k_start=first)
        if S:
            if ring is None:
                k_sink, v_sink = (torch.cat([old.to(new.dtype), new[:, :max(0, S - start)]], 1)
                                  for old, new in ((k_sink, k), (v_sink, v[:, :stop])))
            else:
                k_sink, v_sink = gather_tokens(k, v, 0, min(S, ring.group.size() * k.shape[1]), *ring)
            clip = by.turns is not None and window is not None
            sinks = by.rotate(qk[:, rows, :H], positions[..., rows].clamp(max=S + window - 1)) if clip else q, k_sink, v_sink
        q_docs, k_docs = (None, None) if docs is None else (docs[:, rows], docs[:, :stop])
        call, places = (attention, places) if ring is None else (ring_attention, ring._asdict())
        y = call(q, keys, values, scale=self.scale, window=window, sinks=sinks, alibi_slopes=slopes, q_docs=q_docs,
                 k_docs=k_docs, return_lse=self.sink_logit is not None, **places, **self.xpos, **self.blocks)
        return y, k

    def decode(self, qk, v, turns, slopes, positions, state, cache, start):
        """One token after those of the cache, without a gradient."""
        H, G, S = self.n_head, self.n_kv_head, self.sinks
        options = dict(scale=self.scale, return_lse=self.sink_logit is not None)
        slot = dict(full=start, window=state.slot, blockwise=state.in_ring)[self.kind]
        if not cache.rotated:
            q, k = qk.split([H, G], dim=2)
            keys, values = cache.write_one(k, v, slot)
            return decode_attention(q, keys, values, state.at, sinks=S, inv_freq=turns, alibi_slopes=slopes, **self.xpos,
                                    **self.blocks, **options)
        q, k = rope(qk, positions, turns).split([H, G], dim=2)
        keys, values = cache.write_one(k, v, slot)
        if self.window is not None:
            shift = start - (S + self.window - 1)  # how far the sinks must follow to keep their distance
            if shift > 0 and S:
                keys[:, -S:] = rope(keys[:, :S], positions.new_full((S,), shift), turns)
                values[:, -S:] = values[:, :S]
            keys, values = (x[:, S:] if shift > 0 else x[:, :start + 1] for x in (keys, values))
        return attention(q, keys, values, causal=False, **options)

    def memory_inputs(self, q, k):
        """The un-rotated queries and keys (B, T, heads, D) as the memory takes them."""
        return (x if w is None else rms_norm(x, w, self.eps) for x, w in ((q, self.memory_q), (k, self.memory_k)))

    def infini(self, qk, v, turns, slopes, positions, docs, cache, start, ring):
        """Any number of tokens, after those of the cache if there is one; in a ring its shard, of whole segments."""
        turned = qk if turns is None else rope(qk, positions, turns)
        (q, k), (q_rot, k_rot) = (x.split([self.n_head, self.n_kv_head], dim=2) for x in (qk, turned))
        keys, turned, values, memory = k, k_rot, v, None
        if cache is not None:
            memory = [x.clone() if torch.is_grad_enabled() else x for x in (cache.M, cache.z)]  # they change at commit
            if start % self.segment:
                keys, turned, values = (torch.cat([old.to(new.dtype), new], 1)
                                        for old, new in zip(cache.past(start), (k, k_rot, v)))
        q, keys = self.memory_inputs(q, keys)
        y, memory = infini_attention(q, keys, values, self.beta, q_rot=q_rot, k_rot=turned, segment=self.segment,
                                     rule=self.rule, state=memory, docs=docs, scale=self.scale, alibi_slopes=slopes,
                                     group=ring and ring.group, **self.xpos)
        if cache is not None:
            if ring is not None:
                memory = [from_last_rank(x.detach().clone(), ring.group) for x in memory]
            cache.write(k_rot if cache.rotated else k, v, start, memory)
        return y

    def infini_decode(self, qk, v, turns, slopes, positions, state, cache, start):
        """One token after those of the cache, without a gradient."""
        q, k = qk.split([self.n_head, self.n_kv_head], dim=2)
        if cache.rotated:
            q_rot, k = rope(qk, positions, turns).split([self.n_head, self.n_kv_head], dim=2)
            keys, values = (x[:, :start % self.segment + 1] for x in cache.write_one(k, v, state.in_segment))
            local = attention(q_rot, keys, values, causal=False, scale=self.scale)
        else:
            keys, values = cache.write_one(k, v, state.in_segment)
            local = decode_attention(q, keys, values, state.in_segment, inv_freq=turns, alibi_slopes=slopes, scale=self.scale,
                                     **self.xpos)
        return memory_read(next(self.memory_inputs(q, k)), local, self.beta, (cache.M, cache.z))

    def fold(self, k, v, memory):
        """Keys, un-rotated, and values (B, N, G, D) of a whole segment written into memory (M, z) -> the new memory."""
        none = k.new_zeros(k.shape[0], 0, self.n_head, self.head_dim)
        _, keys = self.memory_inputs(none, k)
        return infini_attention(none, keys, v, self.beta, q_rot=none, k_rot=k, segment=self.segment, rule=self.rule,
                                state=memory)[1]


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w_gate = Linear(config.n_embd, config.n_inner, bias=config.bias) if config.mlp == "swiglu" else None
        self.w_up = Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.w_down = Linear(config.n_inner, config.n_embd, bias=config.bias)

    def forward(self, x):
        up = self.w_up(x)
        return self.w_down(F.gelu(up) if self.w_gate is None else swiglu(self.w_gate(x), up))


class Block(nn.Module):
    def __init__(self, config, layer, scale):
        super().__init__()
        self.parallel = config.parallel_residual
        self.norm_attn = Norm(config)
        self.attn = Attention(config, layer, scale)
        self.norm_mlp = None if config.shared_norm else Norm(config)
        self.mlp = MLP(config)

    def attend(self, x, *args):
        return self.attn(self.norm_attn(x), *args)

    def rest(self, x, y):
        """What follows attention's y (B, T, H D), token by token."""
        y = x + self.attn.wo(y)
        return y + self.mlp(self.norm_attn(x) if self.norm_mlp is None else self.norm_mlp(x if self.parallel else y))

    def forward(self, x, recompute, *args):
        """
        recompute: for the backward pass only x and what attention puts out are kept; attention, quadratic and in a ring
        full of messages, never runs again, the rest does. Where nothing else is kept, the feed-forward runs over an eighth
        of the tokens at a time: its 4 C per token are never there for all of them (Liu and Abbeel, arXiv 2305.19370).
        """
        again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        y = again(self.attend, x, *args, context_fn=_keep_attention) if recompute else self.attend(x, *args)
        n = max(1024, -(-x.shape[1] // 8))
        if n >= x.shape[1] or not recompute and torch.is_grad_enabled():
            return again(self.rest, x, y) if recompute else self.rest(x, y)
        parts = zip(x.split(n, 1), y.split(n, 1))
        return torch.cat([again(self.rest, *part) if recompute else self.rest(*part) for part in parts], 1)


KEPT = {"aten._scaled_dot_product_flash_attention_for_cpu", *(f"nanolong.{name}" for name in (
    "attention_fwd", "ring_attention_fwd", "memory_fwd", "gather_tokens", "scan_ranks", "document_before"))}


def _keep_attention():
    """Contexts for checkpoint: what attention, the memory and messages gave is kept."""
    def policy(_, op, *args, **kwargs):
        kept = str(op).removesuffix(".default") in KEPT
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class GPT(nn.Module):
    """
    A decoder-only transformer. `compute_dtype` is the dtype of the activations (None: that of the weights), so that
    training holds float32 weights and computes in bfloat16; `activation_checkpointing` recomputes each block in the
    backward pass, all but attention, which allows one backward pass.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.activation_checkpointing = False
        self.ring: Ring | None = None
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        n = config.sink_tokens
        self.sink_embedding = nn.Parameter(torch.empty(n, config.n_embd)) if n else None
        slopes = None
        with torch.device("cpu"):  # real even when the weights are built on "meta"
            if config.position == "alibi":
                slopes = (alibi_slopes(config.n_head) * config.alibi_scale).view(torch.int32)
        # the slopes by their bits, the frequencies as turns: no .to(bfloat16) follows integers
        device = "cpu" if self.wte.weight.is_meta else self.wte.weight.device
        self.register_buffer("slopes", None if slopes is None else slopes.to(device), persistent=False)
        for name in ("turns", "long_turns", "near_turns"):
            self.register_buffer(name, None, persistent=False)
        scale = self._set_frequencies(device)
        self.blocks = nn.ModuleList(Block(config, i, scale) for i in range(config.n_layer))
        self.norm_f = Norm(config)
        self.lm_head = None if config.tie_embeddings else Linear(config.n_embd, config.vocab_size, bias=False)
        self._init_weights()

    def _set_frequencies(self, device) -> float:
        """
        The rotary frequencies as turns: those of a text up to the trained length, and longrope's past it. -> the factor on
        scores: YaRN's on q and k is in it; with partial rotary the cosines would miss the other dims.
        """
        c, factor = self.config, 1.0
        self.turns = self.long_turns = self.near_turns = None
        self._stretched = {}  # dynamic scaling's turns by length
        if c.rotary:
            with torch.device("cpu"):
                frequencies, factor = c.frequencies()
                self.turns = rope_turns(frequencies).to(device)
                if c.rope_type == "longrope":
                    self.long_turns = rope_turns(c.frequencies(c.trained_length + 1)[0]).to(device)
                    self.near_turns = rope_turns(rope_frequencies(c.rotary_dim, c.rope_base)[0]).to(device)
        return factor**2 * c.head_dim**-0.5

    def set_rope_scaling(self, scaling: dict | None):
        """Another rope_scaling (None: no scaling) in place; states made before are not of this model any more. ValueError."""
        self.config = replace(self.config, rope_scaling=scaling)
        scale = self._set_frequencies(self.wte.weight.device)
        for block in self.blocks:
            block.attn.scale = scale

    def sequence_parallel(self, group):
        """
        From now on the ranks of the process group `group` share every sequence (None: no more). idx, targets (shifted
        before), positions and docs are this rank's shards, kernels.ring.shard_sequence(x, *model.ring) of the whole; so are
        hidden's activations, logits and losses. A loss by "sum" is that of this rank's targets; the gradients of the
        parameters, summed over the ranks, are those of the sum. "mean" divides by this rank's targets alone.
        """
        if group is not None:
            self.config.shard_multiple(group.size())
        self.ring = None if group is None else Ring(group, self.config.layout)

    def angles(self, start: int | None, T: int, explicit: bool) -> dict[str, list[Angles]]:
        """
        For each kind of layer what the T rows from position `start` on rotate by, one after another. Where the frequencies
        depend on the length of the text, it is p + 1 for a query at position p, or the layer's span if that is less: every
        query and the keys that it sees are rotated as if the text ended there, in one pass as in a stream. Dynamic scaling
        past the trained length L counts in steps of L / 8, so that keys are not rotated anew for each query. explicit:
        positions are given, a query's length is its own; start None: a state that is full.
        """
        c, rows = self.config, slice(0, T)
        first = Angles(rows, self.turns)
        if not c.by_length:
            return {kind: [first] for kind in c.layer_kinds}
        L, made = c.trained_length, {}
        step = max(1, L // 8) if c.rope_type == "dynamic" else sys.maxsize
        for kind in c.layer_kinds:
            span = c.span(kind)
            if span <= L:
                made[kind] = [first]
            elif explicit:
                made[kind] = [first, self._angles(rows, L + 1)._replace(since=L)]
            else:
                at = span - 1 if start is None else start
                end = at + T
                later = L + max(0, (at - L) // step + 1) * step  # the first row after `at` where they change
                edges = [at, *range(later, min(end, span), step), end]
                made[kind] = [self._angles(slice(a - at, b - at), min(b, span)) for a, b in zip(edges, edges[1:])]
        return made

    def _angles(self, rows: slice, length: int) -> Angles:
        """What `rows`, the last of which ends a text of `length` tokens, rotate by."""
        c, L = self.config, self.config.trained_length
        if length <= L:
            return Angles(rows, self.turns)
        if c.rope_type == "longrope":
            n_hat = c.rope_scaling.get("n_hat", 0)
            return Angles(rows, self.long_turns, n_hat=n_hat, near=self.near_turns if n_hat else None)
        step = max(1, L // 8)
        length = L + -(-(length - L) // step) * step
        if len(self._stretched) > 8:  # a text passes each length once
            self._stretched.clear()
        if length not in self._stretched or self._stretched[length].device != self.turns.device:
            self._stretched[length] = rope_turns(c.frequencies(length)[0]).to(self.turns.device)
        return Angles(rows, self._stretched[length])

    def _init_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        if self.sink_embedding is not None:
            nn.init.normal_(self.sink_embedding, std=0.02)
        for block in self.blocks:  # each block adds twice to the residual stream: keep its variance at one (GPT-2)
            nn.init.normal_(block.attn.wo.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))
            nn.init.normal_(block.mlp.w_down.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    @property
    def output_weight(self) -> nn.Parameter:
        """(V, C), the embedding itself when tied."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def hidden(self, idx, *, positions=None, docs=None, state=None, alone=False):
        """idx (B, T) int64 -> the final normed activations (B, T, C). See forward. alone: without the ring."""
        ring, c = None if alone else self.ring, self.config
        ranks = 1 if ring is None else ring.group.size()
        self._check(idx, positions, docs, state, ring)
        start = 0 if state is None else state.position
        x = self.wte(idx)
        n = c.sink_tokens if start == 0 else 0
        # a window that holds every token, where it counts them itself, is full attention
        whole = positions is None and start == 0 and n + ranks * idx.shape[1] <= c.sinks + c.window
        explicit = positions is not None or ring is not None and ranks * idx.shape[1] > c.trained_length
        if positions is None and ring is not None:
            positions = shard_positions(idx.shape[1], *ring, idx.device)
        elif positions is None:
            positions = torch.arange(start, start + idx.shape[1], device=idx.device)
            if docs is not None and (n or c.by_length):  # each document begins right after the learned tokens
                if c.position in ("alibi", "xpos"):
                    raise ValueError(f"docs with sink_tokens {n} and position {c.position!r}: its distances run through all "
                                     "documents")
                begins = F.pad(docs[:, 1:] != docs[:, :-1], (1, 0)) * positions
                positions, explicit = positions - begins.cummax(1).values, True
        if n:  # the learned tokens come first; the others move up
            x = torch.cat([self.sink_embedding.to(x.dtype).expand(x.shape[0], n, -1), x], 1)
            positions = torch.cat([torch.arange(n, device=idx.device).expand(*positions.shape[:-1], n), positions + n], -1)
            docs = docs if docs is None else F.pad(docs, (n, 0))
        x = self._blocks(x.to(self.compute_dtype or x.dtype), positions, docs, state, start, whole, explicit, ring)
        if state is not None:  # not before every layer is done: a call that was cut short can be made again
            state.advance(ranks * x.shape[1])
        return x[:, n:]

    def _check(self, idx, positions, docs, state, ring=None):
        if ring is not None:
            self.config.check_shards(ring.group.size() * idx.shape[1], ring.group.size())
            if state is not None and state.position:
                raise ValueError(f"a state at position {state.position} with {ring.group.size()} ranks per sequence: they can "
                                 "share the beginning of a text only; to go on, alone=True, or sequence_parallel(None)")
            if docs is not None and positions is None and self.config.by_length:
                raise ValueError(f"docs with {ring.group.size()} ranks per sequence and rope_scaling "
                                 f"{self.config.rope_scaling}: a shard does not know where its documents begin; pass "
                                 "positions too")
        if state is not None and (positions is not None or docs is not None):
            raise ValueError("a state keeps its own positions and holds one document: pass state, or positions and docs, "
                             "not both")
        if state is not None and state.batch_size != idx.shape[0]:
            raise ValueError(f"the state is for {state.batch_size} sequences, idx has {idx.shape[0]}: make one by "
                             f"new_state({idx.shape[0]})")
        if docs is not None and "window" in self.config.attention and self.config.sinks > self.config.sink_tokens:
            raise ValueError(f"docs with sinks {self.config.sinks} and sink_tokens {self.config.sink_tokens}: the sinks would be "
                             f"the first document's tokens; set sinks to {self.config.sink_tokens}")
        if positions is not None and self.config.position != "rope":
            raise ValueError(f"positions are for position 'rope', it is {self.config.position!r}: leave them away")
        if (positions is not None or docs is not None) and self.config.rope_type == "dynamic":
            what = "docs" if positions is None else "positions"
            raise ValueError(f"{what} with dynamic rope_scaling, which goes by the length of one text: leave them away, or take "
                             "ntk, the same for one length")
        if state is not None and state.turns is not self.turns:
            raise ValueError("the state was made with other rotary frequencies, before set_rope_scaling or a move of the model: "
                             f"make one by new_state({idx.shape[0]})")

    def _blocks(self, x, positions, docs, state, start, whole=False, explicit=False, ring=None):
        """The blocks and the last norm. start may be None when one token is decoded from un-rotated rings."""
        slopes = None if self.slopes is None else self.slopes.view(torch.float32)
        if state is not None and x.shape[1] == 1 and not torch.is_grad_enabled() and ring is None:
            c = self.config
            state.at.copy_(positions)
            state.slot.copy_(torch.where(positions < c.sinks, positions, c.sinks + (positions - c.sinks) % c.window))
            state.in_segment.copy_(positions % c.segment)
            if "blockwise" in c.attention:
                state.in_ring.copy_(positions % c.span("blockwise"))
        angles = self.angles(start, x.shape[1], explicit)
        recompute = self.activation_checkpointing and state is None and torch.is_grad_enabled()
        for block in self.blocks:
            x = block(x, recompute, angles, slopes, positions, explicit, docs, state, start, whole, ring)
        return self.norm_f(x)

    def forward(self, idx, targets=None, *, positions=None, docs=None, state=None, reduction="mean"):
        """
        idx (B, T) int64 -> (logits, loss). Without targets: logits (B, T, V), None. With targets (B, T) int64, the
        token after each one, -100 ignored: None and the cross entropy, in nats, float32, reduced by "mean" (over the
        targets not ignored), "sum" or "none" (B, T); logits are then never held. positions (T,) or (B, T) int: where
        rotary models rotate to, default 0..T-1; the causal order and windows are those of the sequence. docs (B, T)
        int: attention stays inside a document. state: a State from new_state, which idx continues and which is
        advanced.
        """
        if targets is not None and self.by_segments and torch.is_grad_enabled():
            return None, self._loss_by_segments(idx, targets, positions, docs, state, reduction)
        x = self.hidden(idx, positions=positions, docs=docs, state=state)
        if targets is None:
            return F.linear(x, self.output_weight.to(x.dtype)), None
        return None, linear_cross_entropy(x, self.output_weight, targets, reduction=reduction)

    @property
    def by_segments(self) -> bool:
        """
        Whether activation_checkpointing recomputes segments: where every layer is an infini layer; else blocks. Ranks that
        share a sequence would wait for each other's segments, and by FSDP each segment would gather all weights again.
        """
        alone = self.ring is None and not isinstance(self, FSDPModule)
        return self.activation_checkpointing and alone and set(self.config.layer_kinds) == {"infini"}

    def _loss_by_segments(self, idx, targets, positions, docs, state, reduction):
        """
        forward's loss, one segment after another, each recomputed in the backward pass: between two of them only the
        memories live, so that activations take the memory of one segment, however many there are.
        """
        self._check(idx, positions, docs, state)
        N, start = self.config.segment, 0 if state is None else state.position
        if start % N or state is not None and idx.shape[1] % N:
            raise ValueError(f"activation_checkpointing with a state at position {start} and {idx.shape[1]} tokens: both must be "
                             f"multiples of segment {N}")
        state = self.new_state(idx.shape[0]) if state is None else state
        memory = [x.clone() for cache in state.layers for x in (cache.M, cache.z)]
        if positions is None:
            positions = torch.arange(idx.shape[1], device=idx.device)
        losses = []
        for at in range(0, idx.shape[1], N):
            part = [x if x is None else x[..., at:at + N] for x in (idx, targets, positions, docs)]
            if docs is not None and at:  # a document that begins here finds an empty memory
                goes_on = docs[:, at] == docs[:, at - 1]
                memory = [torch.where(goes_on.view(-1, *(x.dim() - 1) * [1]), x, 0.0) for x in memory]
            loss, *memory = checkpoint(self._segment_loss, *part, reduction, *memory, use_reentrant=False)
            losses.append(loss)
        for cache, M, z in zip(state.layers, memory[::2], memory[1::2]):
            cache.M.copy_(M.detach()), cache.z.copy_(z.detach())
        state.position += idx.shape[1]
        if reduction == "none":
            return torch.cat(losses, 1)
        return sum(losses) / ((targets != -100).sum() if reduction == "mean" else 1)

    def _segment_loss(self, idx, targets, positions, docs, reduction, *memory):
        """One segment's loss, summed unless reduction is "none", and the memories after it; memory: M, z of each layer."""
        state, x = CarriedMemories(memory), self.wte(idx)
        x = self._blocks(x.to(self.compute_dtype or x.dtype), positions, docs, state, 0)
        loss = linear_cross_entropy(x, self.output_weight, targets, reduction="none" if reduction == "none" else "sum")
        return loss, *(x for layer in state.layers for x in (layer.M, layer.z))

    def new_state(self, batch_size: int) -> State:
        """An empty state for `batch_size` sequences, on the model's device, in the dtype it computes in."""
        c, w = self.config, self.wte.weight
        dtype = self.compute_dtype or w.dtype
        rotated = c.position == "rope" and not c.by_length and "blockwise" not in c.attention and not use_triton(w)
        args = batch_size, c.n_kv_head, c.head_dim, w.device, dtype, rotated
        about = (f"position {c.position} {c.rope_base:g} {c.rope_fraction:g} {c.rope_scaling} {c.alibi_scale:g}, "
                 f"{c.sink_tokens} sink_tokens")
        with torch.inference_mode(False):  # a state may outlive the mode it was made in
            new = dict(full=lambda attn: KVCache(*args), window=lambda attn: WindowCache(*args, c.sinks, c.window),
                       blockwise=lambda attn: WindowCache(*args, 0, c.span("blockwise"), "blocks in"),
                       infini=lambda attn: InfiniCache(*args, c.segment, attn, self.turns))
            return State(batch_size, [new[kind](block.attn) for kind, block in zip(c.layer_kinds, self.blocks)], self.turns,
                         about)

    @torch.no_grad()
    def generate(self, prompt, max_new_tokens=None, state=None, *, temperature=1.0, top_k=None, top_p=None, min_p=None,
                 vocab_size=None, seed=None, generator=None, cuda_graphs=True) -> Iterator[torch.Tensor]:
        """
        Continues prompt (B, T) int64, T >= 1, and yields the next token of each sequence, (B,) int64, without end
        unless max_new_tokens is given. `state` is what came before the prompt (None: nothing) and is carried along: it
        has seen every token but the last one yielded. temperature 0 takes the likeliest token; top_k, top_p and min_p
        (a fraction of the largest probability) cut the distribution in that order; tokens from vocab_size on (padding
        of the vocabulary) are never drawn. Draws come from `generator`, or a new one with `seed`. cuda_graphs: on a GPU,
        when no layer grows, each step but its output layer and draw is one replay of a captured graph.
        """
        if prompt.dim() != 2 or prompt.shape[1] == 0:
            raise ValueError(f"generate: the prompt has shape {tuple(prompt.shape)}, it must be (B, T) with T at least 1")
        for name, value, fine, range_ in (("temperature", temperature, temperature >= 0, "at least 0"),
                                          ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
                                          ("top_p", top_p, top_p is None or 0 < top_p <= 1, "in (0, 1]"),
                                          ("min_p", min_p, min_p is None or 0 <= min_p <= 1, "in [0, 1]"),
                                          ("vocab_size", vocab_size, vocab_size is None or vocab_size >= 1, "at least 1")):
            if not fine:
                raise ValueError(f"generate: {name} is {value}, it must be {range_}")
        state = self.new_state(prompt.shape[0]) if state is None else state
        if generator is None:
            generator = torch.Generator(prompt.device)
            generator.manual_seed(seed) if seed is not None else generator.seed()
            if self.ring is not None:  # every rank draws the same
                drawn = torch.tensor([generator.initial_seed() % 2**62], device=prompt.device)
                generator.manual_seed(from_last_rank(drawn, self.ring.group).item())
        if self.ring is not None and state.position == 0:  # the ranks share all that they can share but the last token
            n = self.config.shard_multiple(self.ring.group.size())
            n = (prompt.shape[1] - 1) // n * n
            if n:
                self.hidden(shard_sequence(prompt[:, :n], *self.ring), state=state)
                prompt = prompt[:, n:]
        for chunk in prompt.split(1024, dim=1):  # bounds the activations of a long prompt
            x = self.hidden(chunk, state=state, alone=True)
        made = 0
        while max_new_tokens is None or made < max_new_tokens:
            logits = F.linear(x[:, -1], self.output_weight.to(x.dtype))[:, :vocab_size].float()
            token = sample_token(logits, generator, temperature, top_k, top_p, min_p)
            yield token
            made += 1
            if made == max_new_tokens:
                break
            if cuda_graphs and self.can_graph(state):
                state.graphed = state.graphed or self._graphed(state)
                x = state.graphed(token[:, None])
            else:
                x = self.hidden(token[:, None], state=state, alone=True)

    def can_graph(self, state: State) -> bool:
        """Whether a decoding step can be a CUDA graph: on a GPU, by the Triton kernels, with a state that never grows."""
        w, c = self.wte.weight, self.config
        fixed = not c.by_length or state.position + 1 >= max(map(c.span, c.layer_kinds)) and not c.rope_scaling.get("n_hat")
        return w.is_cuda and use_triton(w) and fixed and all(not x.rotated and x.layout != "full" for x in state.layers)

    def _decode_step(self, token, position, state):
        """
        What a graph captures: token (B, 1), position (1,) int64 on the device -> (B, 1, C). Writes the slot of `position`
        and leaves state.position alone, so that running it in advance does no harm.
        """
        x = self.wte(token)
        return self._blocks(x.to(self.compute_dtype or x.dtype), position, None, state, None)

    def _graphed(self, state):
        """-> a function of token (B, 1) like hidden(token, state=state), which replays one captured step."""
        token = torch.zeros(state.batch_size, 1, dtype=torch.int64, device=self.wte.weight.device)
        position = torch.full((1,), state.position, device=token.device)

        with torch.cuda.device(token.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles the kernels and lets cuBLAS allocate
                for _ in range(2):
                    self._decode_step(token, position, state)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                x = self._decode_step(token, position, state)

        def step(new_token):
            for layer in state.layers:  # of a call that was cut short: the graph writes by itself
                layer.held = None
            token.copy_(new_token)
            position.fill_(state.position)
            with torch.cuda.device(token.device):
                graph.replay()
            state.advance(1)
            return x

        step.reads = dict(self._stretched)  # by address: they live as long as the graph
        return step

    # ------------------------------------------------------------------------------------------------------------------
    # accounting, the optimizer's groups, files

    def num_params(self, embeddings: bool = True) -> int:
        """Parameters, tied ones once; without the token embedding (but with an untied output layer) if not `embeddings`."""
        return sum(p.numel() for p in self.parameters()) - (0 if embeddings else self.wte.weight.numel())

    def flops_per_token(self, T: int) -> float:
        """
        Floating-point operations per token, forward and backward, at sequence length T: 6 per weight of a matrix (the
        embedding look-up is none, the output layer is one) and 12 H D per key that a query sees, (T + 1) / 2 of them on
        average, or fewer where a window or a segment hides some. An infini layer's memory takes 6 D^2 per query head (its
        read) and per key head (its write; twice that by the delta rule). Recomputation is not counted.
        """
        c = self.config
        keys = memory = 0.0
        for kind in c.layer_kinds:
            if kind == "infini":
                whole, rest = divmod(T, c.segment)
                keys += (whole * c.segment * (c.segment + 1) + rest * (rest + 1)) / (2 * T)
                memory += c.n_head + c.n_kv_head * (2 if c.memory_rule == "delta" else 1)
                continue
            if kind == "blockwise":  # its first half-block, then whole ones with the one before, then the rest
                half, seen = c.block_size // 2, min(T, c.block_size // 2)
                whole, rest = divmod(T - seen, half)
                keys += (seen * (seen + 1) + whole * half * (3 * half + 1) + rest * (2 * half + rest + 1)) / (2 * T)
                continue
            n = min(T, c.sinks + c.window) if kind == "window" else T  # the first n queries see all before them
            keys += n / T * (n + 1) / 2 + (T - n) / T * (c.sinks + c.window)
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2) + c.vocab_size * c.n_embd
        return 6 * matrices + 12 * c.n_head * c.head_dim * keys + 6 * c.head_dim**2 * memory

    def gates(self) -> torch.Tensor:
        """sigmoid(beta), the memory's share, of each head of the infini layers: (layers, H) float32, without a gradient."""
        betas = [block.attn.beta.detach().float() for block in self.blocks if block.attn.beta is not None]
        return torch.stack(betas).sigmoid() if betas else torch.empty(0, self.config.n_head)

    def param_groups(self, weight_decay: float, lr: float, gate_lr: float = 1.0) -> list[dict]:
        """
        AdamW's groups: matrices decay; norms, biases and embeddings do not; nor do the gates of infini layers and the
        weights of memory_norm, whose learning rate is lr * gate_lr.
        """
        decay = [p for name, p in self.named_parameters() if p.dim() == 2 and "embedding" not in name and "wte" not in name]
        decayed = {id(p) for p in decay}
        gates = [p for block in self.blocks for p in (block.attn.beta, block.attn.memory_q, block.attn.memory_k)
                 if p is not None]
        apart = decayed | {id(p) for p in gates}
        rest = [p for p in self.parameters() if id(p) not in apart]
        return [dict(name="matrices", params=decay, weight_decay=weight_decay, lr=lr),
                dict(name="norms, biases, embeddings", params=rest, weight_decay=0.0, lr=lr)] + (
               [dict(name="gates", params=gates, weight_decay=0.0, lr=lr * gate_lr)] if gates else [])

    def save_pretrained(self, folder: str, extra: dict | None = None):
        """Writes folder/config.json (the GPTConfig, `extra` beside it) and folder/model.safetensors."""
        from safetensors.torch import save_file
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump({"model_type": "nanolong", **asdict(self.config), **(extra or {})}, f, indent=2)
        tensors = {name: x.detach().contiguous() for name, x in self.state_dict().items()}
        save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, name: str, **overrides) -> "GPT":
        """
        A model from a folder that save_pretrained wrote, or from a Hugging Face folder or hub id: Llama, Mistral, Qwen2,
        GPT-NeoX (Pythia), Falcon, MPT. `overrides` replace fields of its GPTConfig; attention="window", window=1020,
        sinks=4 makes any of them stream. ValueError when there is no such model, a field of its config is not
        supported, a file is cut short, or a tensor is missing, unexpected or of another shape.
        """
        from data.pretrained import load_pretrained
        known = {f.name for f in fields(GPTConfig)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise ValueError(f"GPTConfig has no field {', '.join(unknown)}: its fields are {', '.join(sorted(known))}")
        config, tensors, folder = load_pretrained(name)
        try:
            c = GPTConfig(**{name: config[name] for name in known & config.keys()} | overrides)
        except TypeError as e:
            raise ValueError(f"{folder}/config.json holds a value of the wrong type ({e}): it is damaged") from None
        with torch.device("meta"):  # no memory for weights that are about to be replaced
            model = cls(c)
        if c.sink_tokens and not config.get("sink_tokens"):  # learned parts that an override adds
            tensors["sink_embedding"] = torch.randn(c.sink_tokens, c.n_embd) * 0.02
        if c.sink_logit and not config.get("sink_logit"):  # far below any lse: nothing changes at first
            tensors |= {f"blocks.{i}.attn.sink_logit": torch.full((c.n_head,), -10.0) for i in range(c.n_layer)}
        for i, kind in enumerate(c.layer_kinds):
            parts = {} if kind != "infini" else {"beta": torch.full((c.n_head,), c.memory_beta)}
            if parts and c.memory_norm is not None:
                parts |= {f"memory_{x}": torch.full((c.head_dim,), float(c.memory_norm)) for x in "qk"}
            for part in ("beta", "memory_q", "memory_k"):  # a layer that is no longer infini, or no longer normed, has none
                learned = tensors.pop(f"blocks.{i}.attn.{part}", None)
                if part in parts:
                    tensors[f"blocks.{i}.attn.{part}"] = parts[part] if learned is None else learned
        have, want = ({name: tuple(x.shape) for name, x in d.items()} for d in (tensors, model.state_dict()))
        wrong = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
        if wrong:
            name = wrong[0]
            options = ", ".join(f"{key}={value}" for key, value in overrides.items() if config.get(key) != value)
            raise ValueError(f"the weights in {folder} do not fit {f'with {options}' if options else 'its config.json'}: {name} "
                             f"is {have.get(name, 'missing')} there, the model has {want.get(name, 'no such tensor')} "
                             f"({len(wrong)} tensors differ)")
        model.load_state_dict(tensors, assign=True)
        return model.requires_grad_()


def sample_token(logits, generator, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """One draw from each row of logits (B, V) float32 -> (B,) int64. See GPT.generate."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0: no temperature overflows
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p  # those before it already hold top_p: the first always stays
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    if min_p is not None:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
