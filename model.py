"""
The model: a GPT in one file. Every attention variant is one of our own kernels (see kernels/); this file only arranges
them.

Shapes: B batch, T tokens, C = n_embd, H query heads, G key/value heads (H a multiple of G), D = head_dim, V vocabulary.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import attention, linear_cross_entropy, rms_norm, rope, rope_frequencies, rope_turns, swiglu


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
    attention: str = "full"
    position: str = "rope"           # rope | none
    rope_base: float = 10000.0
    rope_fraction: float = 1.0       # of the head dim that is rotated
    norm: str = "rmsnorm"            # rmsnorm | layernorm
    norm_eps: float = 1e-5
    mlp: str = "swiglu"              # swiglu | gelu
    bias: bool = False               # in the linear layers, and in layernorm
    parallel_residual: bool = False  # x + attn(norm(x)) + mlp(norm(x)), each with its own norm
    tie_embeddings: bool = True      # the output layer is the token embedding

    def __post_init__(self):
        self.n_kv_head = self.n_head if self.n_kv_head is None else self.n_kv_head
        for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "vocab_size", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: change one, or set head_dim")
            self.head_dim = self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        if not 1 <= self.head_dim <= 256:
            raise ValueError(f"head_dim is {self.head_dim}: the attention kernel takes 1 to 256")
        for name, known in (("attention", ("full",)), ("position", ("rope", "none")), ("norm", ("rmsnorm", "layernorm")),
                            ("mlp", ("swiglu", "gelu"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be one of {', '.join(known)}")
        if self.position == "rope" and (not 0 < self.rope_fraction <= 1 or self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ValueError(f"rope_fraction {self.rope_fraction} of head_dim {self.head_dim} rotates {self.rotary_dim} dims: "
                             "it must be an even number from 2 to head_dim")
        if self.n_inner is not None and self.n_inner < 1:
            raise ValueError(f"n_inner is {self.n_inner}: it must be at least 1")
        if self.n_inner is None:
            self.n_inner = 4 * self.n_embd if self.mlp == "gelu" else -(-8 * self.n_embd // (3 * 64)) * 64

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rope_fraction)


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
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.norm == "layernorm" and config.bias else None

    def forward(self, x):
        if self.kind == "rmsnorm":
            return rms_norm(x, self.weight, self.eps)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps)


class KVCache:
    """
    One layer's keys and values of every token so far, keys un-rotated, in buffers (B, capacity, G, D) that double when
    full. What it keeps carries no gradient; the tokens of the current call do.
    """

    def __init__(self, batch_size, n_kv_head, head_dim, device, dtype):
        self.k = torch.empty(batch_size, 0, n_kv_head, head_dim, device=device, dtype=dtype)
        self.v = torch.empty_like(self.k)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def append(self, k, v, start):
        """k, v (B, T, G, D) of the tokens from position `start` -> those of all tokens up to them, (B, start + T, G, D)."""
        end = start + k.shape[1]
        if end > self.k.shape[1]:
            self.k, self.v = (self._grown(x, start, max(64, 2 * start, end)) for x in (self.k, self.v))
        self.k[:, start:end] = k.detach()
        self.v[:, start:end] = v.detach()
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            return torch.cat([self.k[:, :start].to(k.dtype), k], 1), torch.cat([self.v[:, :start].to(v.dtype), v], 1)
        return self.k[:, :end].to(k.dtype), self.v[:, :end].to(v.dtype)

    def _grown(self, x, used, capacity):
        new = x.new_empty(x.shape[0], capacity, *x.shape[2:])
        new[:, :used] = x[:, :used]
        return new


class State:
    """
    All that generation carries from one call to the next: the number of tokens seen and each layer's cache. Feeding a
    text in chunks of any size gives what one pass gives. `nbytes` is the memory it holds. With full attention it grows
    with the text.
    """

    def __init__(self, batch_size: int, layers: list[KVCache]):
        self.batch_size = batch_size
        self.position = 0
        self.layers = layers

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def save(self, path: str):
        """Writes the state to a safetensors file, which `load` reads."""
        from safetensors.torch import save_file
        tensors = {f"{i}.{name}": getattr(layer, name)[:, :self.position].contiguous()
                   for i, layer in enumerate(self.layers) for name in ("k", "v")}
        save_file({"position": torch.tensor(self.position), **tensors}, path)

    def load(self, path: str):
        """Fills a state from model.new_state with what `save` wrote. ValueError when it is of another model or batch size."""
        from safetensors.torch import load_file
        tensors = load_file(path)
        have = {name: (x.shape[0], *x.shape[2:]) for name, x in tensors.items() if x.dim() == 4}
        want = {f"{i}.{name}": (x.shape[0], *x.shape[2:]) for i, layer in enumerate(self.layers)
                for name, x in (("k", layer.k), ("v", layer.v))}
        if have != want:
            raise ValueError(f"{path} is a state of {len(have) // 2} layers of (batch, heads, dim) {have.get('0.k')}, this "
                             f"one has {len(want) // 2} of {want['0.k']}: load it with the model that it comes from")
        for i, layer in enumerate(self.layers):
            layer.append(tensors[f"{i}.k"].to(layer.k), tensors[f"{i}.v"].to(layer.v), 0)
        self.position = int(tensors["position"])


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.wqkv = Linear(config.n_embd, (config.n_head + 2 * config.n_kv_head) * config.head_dim, bias=config.bias)
        self.wo = Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)

    def forward(self, x, turns, positions, docs, cache, start):
        B, T, _ = x.shape
        H, G = self.n_head, self.n_kv_head
        qkv = self.wqkv(x).view(B, T, H + 2 * G, self.head_dim)
        if cache is None:
            qk, v = qkv.split([H + G, G], dim=2)  # views
            q, k = (qk if turns is None else rope(qk, positions, turns)).split([H, G], dim=2)
        else:
            q, k, v = qkv.split([H, G, G], dim=2)
            k, v = cache.append(k, v, start)
            if turns is not None:
                q, k = rope(q, positions, turns), rope(k, torch.arange(start + T, device=x.device), turns)
        y = attention(q, k, v, q_docs=docs, k_docs=docs, q_start=start)
        return self.wo(y.reshape(B, T, H * self.head_dim))


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
    def __init__(self, config):
        super().__init__()
        self.parallel = config.parallel_residual
        self.norm_attn = Norm(config)
        self.attn = Attention(config)
        self.norm_mlp = Norm(config)
        self.mlp = MLP(config)

    def forward(self, x, turns, positions, docs, cache, start):
        y = x + self.attn(self.norm_attn(x), turns, positions, docs, cache, start)
        return y + self.mlp(self.norm_mlp(x if self.parallel else y))


class GPT(nn.Module):
    """
    A decoder-only transformer. `compute_dtype` is the dtype of the activations (None: that of the weights), so that
    training holds float32 weights and computes in bfloat16; `activation_checkpointing` recomputes each block in the
    backward pass.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.activation_checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = Norm(config)
        self.lm_head = None if config.tie_embeddings else Linear(config.n_embd, config.vocab_size, bias=False)
        turns = rope_turns(rope_frequencies(config.rotary_dim, config.rope_base)[0]) if config.position == "rope" else None
        self.register_buffer("turns", turns, persistent=False)  # int64: the frequencies never follow a .to(bfloat16)
        self._init_weights()

    def _init_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:  # each block adds twice to the residual stream: keep its variance at one (GPT-2)
            nn.init.normal_(block.attn.wo.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))
            nn.init.normal_(block.mlp.w_down.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    @property
    def output_weight(self) -> nn.Parameter:
        """(V, C), the embedding itself when tied."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def hidden(self, idx, *, positions=None, docs=None, state=None):
        """idx (B, T) int64 -> the final normed activations (B, T, C). See forward."""
        if state is not None and (positions is not None or docs is not None):
            raise ValueError("a state keeps its own positions and holds one document: pass state, or positions and docs, "
                             "not both")
        if state is not None and state.batch_size != idx.shape[0]:
            raise ValueError(f"the state is for {state.batch_size} sequences, idx has {idx.shape[0]}: make one by "
                             f"new_state({idx.shape[0]})")
        x = self.wte(idx)
        x = x.to(self.compute_dtype or x.dtype)
        start = 0 if state is None else state.position
        if positions is None:
            positions = torch.arange(start, start + idx.shape[1], device=idx.device)
        for i, block in enumerate(self.blocks):
            args = (x, self.turns, positions, docs, None if state is None else state.layers[i], start)
            if self.activation_checkpointing and state is None and torch.is_grad_enabled():
                x = checkpoint(block, *args, use_reentrant=False)
            else:
                x = block(*args)
        if state is not None:  # not before every layer is done: a call that was cut short can be made again
            state.position += idx.shape[1]
        return self.norm_f(x)

    def forward(self, idx, targets=None, *, positions=None, docs=None, state=None, reduction="mean"):
        """
        idx (B, T) int64 -> (logits, loss). Without targets: logits (B, T, V), None. With targets (B, T) int64, the
        token after each one, -100 ignored: None and the cross entropy, in nats, float32, reduced by "mean" (over the
        targets not ignored), "sum" or "none" (B, T); logits are then never held. positions (T,) or (B, T) int: default
        0..T-1; the causal order is that of the sequence. docs (B, T) int: attention stays inside a document. state: a
        State from new_state, which idx continues and which is advanced.
        """
        x = self.hidden(idx, positions=positions, docs=docs, state=state)
        if targets is None:
            return F.linear(x, self.output_weight.to(x.dtype)), None
        return None, linear_cross_entropy(x, self.output_weight, targets, reduction=reduction)

    def new_state(self, batch_size: int) -> State:
        """An empty state for `batch_size` sequences, on the model's device, in the dtype it computes in."""
        c, w = self.config, self.wte.weight
        dtype = self.compute_dtype or w.dtype
        return State(batch_size, [KVCache(batch_size, c.n_kv_head, c.head_dim, w.device, dtype) for _ in range(c.n_layer)])

    @torch.no_grad()
    def generate(self, prompt, max_new_tokens=None, state=None, *, temperature=1.0, top_k=None, top_p=None, min_p=None,
                 vocab_size=None, seed=None) -> Iterator[torch.Tensor]:
        """
        Continues prompt (B, T) int64, T >= 1, and yields the next token of each sequence, (B,) int64, without end
        unless max_new_tokens is given. `state` is what came before the prompt (None: nothing) and is carried along: it
        has seen every token but the last one yielded. temperature 0 takes the likeliest token; top_k, top_p and min_p
        (a fraction of the largest probability) cut the distribution in that order; tokens from vocab_size on (padding
        of the vocabulary) are never drawn.
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
        generator = torch.Generator(prompt.device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
        for chunk in prompt.split(1024, dim=1):  # bounds the activations of a long prompt
            x = self.hidden(chunk, state=state)
        made = 0
        while max_new_tokens is None or made < max_new_tokens:
            logits = F.linear(x[:, -1], self.output_weight.to(x.dtype))[:, :vocab_size].float()
            token = sample_token(logits, generator, temperature, top_k, top_p, min_p)
            yield token
            made += 1
            if made != max_new_tokens:
                x = self.hidden(token[:, None], state=state)

    # ------------------------------------------------------------------------------------------------------------------
    # accounting, the optimizer's groups, files

    def num_params(self, embeddings: bool = True) -> int:
        """Parameters, tied ones once; without the token embedding (but with an untied output layer) if not `embeddings`."""
        return sum(p.numel() for p in self.parameters()) - (0 if embeddings else self.wte.weight.numel())

    def flops_per_token(self, T: int) -> float:
        """
        Floating-point operations per token, forward and backward, at sequence length T: 6 per weight of a matrix (the
        embedding look-up is none, the output layer is one) and 12 H D per key that a query sees, (T + 1) / 2 of them on
        average. Recomputation is not counted.
        """
        c = self.config
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2) + c.vocab_size * c.n_embd
        return 6 * matrices + 12 * c.n_layer * c.n_head * c.head_dim * (T + 1) / 2

    def param_groups(self, weight_decay: float, lr: float) -> list[dict]:
        """AdamW's groups: matrices decay; norms, biases and embeddings do not."""
        decay = [p for name, p in self.named_parameters() if p.dim() == 2 and not name.startswith("wte")]
        decayed = {id(p) for p in decay}
        rest = [p for p in self.parameters() if id(p) not in decayed]
        return [dict(name="matrices", params=decay, weight_decay=weight_decay, lr=lr),
                dict(name="norms, biases, embeddings", params=rest, weight_decay=0.0, lr=lr)]

    def save_pretrained(self, folder: str, extra: dict | None = None):
        """Writes folder/config.json (the GPTConfig, `extra` beside it) and folder/model.safetensors."""
        from safetensors.torch import save_file
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump({"model_type": "nanolong", **asdict(self.config), **(extra or {})}, f, indent=2)
        tensors = {name: x.detach().contiguous() for name, x in self.state_dict().items()}
        save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str, **overrides) -> "GPT":
        """A model from a folder that save_pretrained wrote; `overrides` replace fields of its GPTConfig. ValueError, when the
        folder holds no such model, the file is cut short, or a tensor is missing, unexpected or of another shape."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        try:
            with open(os.path.join(folder, "config.json")) as f:
                config = json.load(f)
        except FileNotFoundError:
            raise ValueError(f"{folder} holds no config.json: it is not a model's folder") from None
        except json.JSONDecodeError as e:
            raise ValueError(f"{folder}/config.json is not valid JSON ({e}): the checkpoint is damaged") from None
        kind = config.get("model_type") if isinstance(config, dict) else None
        if kind != "nanolong":
            raise ValueError(f"{folder}/config.json has model_type {kind!r}: only 'nanolong' can be loaded")
        known = {f.name for f in fields(GPTConfig)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise ValueError(f"GPTConfig has no field {', '.join(unknown)}: its fields are {', '.join(sorted(known))}")
        try:
            model = cls(GPTConfig(**({name: config[name] for name in known & set(config)} | overrides)))
        except TypeError as e:
            raise ValueError(f"{folder}/config.json holds a value of the wrong type ({e}): it is damaged") from None
        path = os.path.join(folder, "model.safetensors")
        try:
            tensors = load_file(path)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: the checkpoint is incomplete") from None
        except SafetensorError as e:
            raise ValueError(f"{path} is cut short or damaged ({e})") from None
        have, want = ({name: tuple(x.shape) for name, x in d.items()} for d in (tensors, model.state_dict()))
        wrong = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
        if wrong:
            name = wrong[0]
            raise ValueError(f"{path} does not fit its config.json: {name} is {have.get(name, 'missing')} there, the model "
                             f"has {want.get(name, 'no such tensor')} ({len(wrong)} tensors differ)")
        model.load_state_dict(tensors)
        return model


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
