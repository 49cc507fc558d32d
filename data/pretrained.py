"""
Pretrained checkpoints, ours and Hugging Face's: what GPT.from_pretrained needs to be the same model.

    nanolong                     a folder that save_pretrained wrote
    llama, mistral, qwen2        Llama 1 to 3 and what is built like them (SmolLM2, TinyLlama), Mistral, Qwen 2 and 2.5
    gpt_neox, falcon, mpt        Pythia and GPT-NeoX; Falcon 7b, 40b, rw and Falcon 2; MPT

A field of config.json either changes the computation and is honoured, or is in IRRELEVANT, or is an error that names it
and its value: a checkpoint never loads as a slightly different model. The same holds for tensors: none missing, none
left over, each of the shape that the config implies. Where transformers' code and a config disagree, the code is right.

Shapes: C = hidden size, H query heads, G key/value heads, D head dim.
"""

import dataclasses
import json
import os
import pickle
import re
import textwrap
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from data.tokenizer import BESIDE
from kernels import rope_frequencies

# Fields that do not change what the model computes when it is evaluated: names and versions, how the weights were
# initialised and stored, special tokens (the tokenizer's business), dropout (off outside training, and here always),
# what to return besides logits, and the type of remote code that transformers would run and we do not.
IRRELEVANT = {
    "_name_or_path", "architectures", "attention_dropout", "attention_probs_dropout_prob", "attn_impl",
    "attn_pdrop", "auto_map", "bos_token_id", "chunk_size_feed_forward", "classifier_dropout", "dtype", "emb_pdrop",
    "embedding_fraction", "eos_token_id", "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob",
    "id2label", "init_config", "init_device", "initializer_range", "is_decoder", "is_encoder_decoder",
    "is_llama_config", "label2id", "max_sequence_length", "output_attentions", "output_hidden_states",
    "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop", "return_dict", "tokenizer_class",
    "tokenizer_name", "torch_dtype", "transformers.js_config", "transformers_version", "unsloth_fixed",
    "unsloth_version", "use_cache", "verbose",
}
# tensors that transformers once stored and computes today: rotary frequencies, NeoX's causal mask and its -1e9
BUFFERS = re.compile(r".*(rotary_emb|maybe_rotary)\.inv_freq|.*\.attention\.(masked_)?bias")
NONE = type(None)
REQUIRED = object()


def load_pretrained(name: str | os.PathLike) -> tuple[dict, dict[str, torch.Tensor], Path]:
    """
    name: a folder, or a Hugging Face hub id such as "HuggingFaceTB/SmolLM2-135M" (downloaded to the hub's own cache;
    needs the extra `hf`). -> the fields of a GPTConfig, the tensors by our parameters' names, all float32 on the CPU
    and independent of the files, and the folder they came from. For a nanolong folder the fields are all of its
    config.json but model_type.

    Weights come from model.safetensors, its shards, or else pytorch_model.bin (shards too), which is read as tensors
    only, never as code. They are converted one by one: the peak is the float32 model and a tensor or two.
    ValueError, one line: no such folder or id, a model of another kind, a field or tensor that is missing, unknown or
    does not fit, a damaged file.
    """
    folder = find_folder(os.fspath(name))
    fields, plan = load_fields(folder)
    if plan is None:
        return fields, {field: _float32(field, read()) for field, read in _open_weights(folder)[0].items()}, folder
    return fields, _load_tensors(folder, fields, plan), folder


# ---- config.json

def load_fields(folder: Path) -> tuple[dict, dict | None]:
    """config.json alone -> load_pretrained's fields, and the plan of the tensors (None: they are ours already)."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no config.json: it is not a model's folder") from None
    except ValueError as e:  # bad JSON or bad UTF-8
        raise ValueError(f"{path} is not valid JSON ({e}): the checkpoint is damaged") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind == "nanolong":
        from model import GPTConfig  # not above: model.py imports this module
        del config["model_type"]
        known = {field.name for field in dataclasses.fields(GPTConfig)}
        for names, what in ((known - config.keys(), "lacks"), (config.keys() - known - {"tokenizer"}, "has unknown")):
            if names:
                raise ValueError(f"{path} {what} {', '.join(sorted(names))}: it is damaged, or of another version")
        try:
            GPTConfig(**{field: config[field] for field in known})
        except (TypeError, AttributeError) as e:
            raise ValueError(f"{path} holds a value of the wrong type ({e}): it is damaged") from None
        return config, None
    families = {"llama": _llama, "mistral": _llama, "qwen2": _llama, "gpt_neox": _gpt_neox, "falcon": _falcon,
                "mpt": _mpt}
    if not isinstance(kind, str) or kind not in families:
        raise ValueError(f"{path} has model_type {kind!r}: only nanolong, {', '.join(families)} can be loaded")
    c = Config(path, config)
    c.take("model_type", (str,))
    fields, plan = families[kind](c, kind)
    c.done()
    return fields, plan


class Config:
    """The fields of a config.json, each taken once, by name and type; done() raises for those nobody took."""

    def __init__(self, path: Path, fields: dict):
        self.path, self.left = path, dict(fields)

    def wrong(self, name, value, why):
        text = repr(value)
        raise ValueError(f"{self.path}: {name} is {text if len(text) < 80 else text[:77] + '...'}, {why}")

    def take(self, name, kinds=(int,), default=REQUIRED, least=1):
        value = self.left.pop(name, default)
        if value is REQUIRED:
            raise ValueError(f"{self.path} lacks {name}: it is not a whole config.json")
        if type(value) not in kinds:
            self.wrong(name, value, f"not of type {' or '.join(k.__name__ for k in kinds)}")
        if type(value) is int and value < least:
            self.wrong(name, value, f"it must be at least {least}")
        return value

    def must_be(self, name, *allowed):
        """Takes a field of which only some values can be loaded; absent is the first of them."""
        value = self.left.pop(name, allowed[0])
        if not any(value == x and (type(value) is bool) == (type(x) is bool) for x in allowed):
            self.wrong(name, value, f"only {' or '.join(map(repr, allowed))} can be loaded")

    def done(self):
        unknown = {name: value for name, value in self.left.items() if name not in IRRELEVANT}
        for name, value in unknown.items():
            self.wrong(name, value, "a field that this loader does not know, so the model might compute something else")


def _heads(c, name_H="num_attention_heads", name_C="hidden_size", n_kv_head=None, head_dim=None):
    """-> H, G, D, C, checked."""
    H, C = c.take(name_H), c.take(name_C)
    if head_dim is None and C % H:
        c.wrong(name_H, H, f"and {name_C} is {C}: not divisible")
    G = n_kv_head or H
    if H % G:
        c.wrong(name_H, H, f"not a multiple of the {G} key/value heads")
    return H, G, head_dim or C // H, C


def _rope(c, D, block_size, base, fraction=None):
    """
    The rope fields, from `rope_parameters` (transformers 5) or `rope_scaling` and what stands beside it (before).
    `base` and `fraction` (None: the family rotates whole heads) count where the dictionary says nothing. Defaults are
    filled in as transformers does.
    """
    new, old = c.take("rope_parameters", (dict, NONE), None), c.take("rope_scaling", (dict, NONE), None)
    scaling = {key: value for key, value in (old or new or {}).items() if value is not None}
    kind = scaling.setdefault("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    scaling.pop("finetuned", None)  # YaRN's own checkpoints say how they were made
    base, part = scaling.pop("rope_theta", base), scaling.pop("partial_rotary_factor", fraction or 1.0)
    if kind in ("llama3", "yarn", "longrope"):
        scaling.setdefault("original_max_position_embeddings", block_size)
        if "original_max_position_embeddings" in c.left:  # Phi-3's way of writing it, which counts more
            scaling["original_max_position_embeddings"] = c.take("original_max_position_embeddings")
        L = scaling["original_max_position_embeddings"]
        if kind != "llama3" and type(L) is int and 0 < L <= block_size:
            scaling.setdefault("factor", block_size / L)
    if kind == "dynamic" and scaling.setdefault("original_max_position_embeddings", block_size) != block_size:
        c.wrong("rope_scaling", scaling, f"and max_position_embeddings is {block_size}: transformers scales past the "
                "latter, so the two must be equal")
    if type(part) not in (int, float) or not 0 < part <= 1 or (fraction is None and part != 1):
        c.wrong("partial_rotary_factor", part, "it must be " + ("1" if fraction is None else "a number in (0, 1]"))
    try:
        _, factor = rope_frequencies(int(D * part), base, scaling)
    except ValueError as e:
        raise ValueError(f"{c.path}: {e}") from None
    if factor != 1 and int(D * part) != D:
        c.wrong("rope_scaling", scaling, f"whose factor {factor:.4f} transformers applies to the {int(D * part)} "
                f"rotated dims of {D} only, and our model to all of them")
    return dict(position="rope", rope_base=float(base), rope_fraction=float(part),
                rope_scaling=None if kind == "default" else scaling)


def _windows(c, kind, n_layer):
    """The attention fields: which layers slide over the last N keys."""
    if kind == "llama":
        return dict(attention="full")
    N = c.take("sliding_window", (int, NONE), 4096)
    sliding = [N is not None] * n_layer
    if kind == "qwen2":
        N = N if c.take("use_sliding_window", (bool,), False) else None
        first = c.take("max_window_layers", (int,), 28, least=0)
        sliding = [N is not None and i >= first for i in range(n_layer)]
        types = c.take("layer_types", (list, NONE), None)
        if types is not None:
            if set(map(str, types)) - {"full_attention", "sliding_attention"} or len(types) != n_layer:
                c.wrong("layer_types", types, f"not full_attention or sliding_attention for each of {n_layer} layers")
            sliding = [x == "sliding_attention" for x in types]
    if not any(sliding):
        return dict(attention="full")
    if N is None:
        c.wrong("layer_types", types, "but use_sliding_window is false or sliding_window none")
    pattern = "window" if all(sliding) else ",".join("window" if x else "full" for x in sliding)
    return dict(attention=pattern, window=N, sinks=0)


# ---- the families: config -> GPTConfig's fields and {our tensor: ({their tensors: shapes}, what orders the rows)}

def _llama(c, kind):
    H, G, D, C = _heads(c, n_kv_head=c.take("num_key_value_heads", (int, NONE), 8 if kind == "mistral" else None),
                        head_dim=c.take("head_dim", (int, NONE), None))
    n_layer, I, V = c.take("num_hidden_layers"), c.take("intermediate_size"), c.take("vocab_size")
    block_size = c.take("max_position_embeddings")
    c.must_be("hidden_act", "silu", "swish")
    c.must_be("rope_interleaved", False)  # SmolLM
    c.must_be("use_mrope", False)         # Qwen2.5
    biases = dict(bias=False, qkv_bias=kind == "qwen2", wo_bias=False)
    if kind == "llama":
        attn_bias, mlp_bias = c.take("attention_bias", (bool,), False), c.take("mlp_bias", (bool,), False)
        biases = dict(bias=mlp_bias, qkv_bias=attn_bias, wo_bias=attn_bias)
    fields = dict(n_layer=n_layer, n_head=H, n_kv_head=G, n_embd=C, head_dim=D, n_inner=I, vocab_size=V,
                  block_size=block_size, norm="rmsnorm", norm_eps=c.take("rms_norm_eps", (float,), 1e-6), mlp="swiglu",
                  parallel_residual=False, tie_embeddings=c.take("tie_word_embeddings", (bool,), False), **biases,
                  **_rope(c, D, block_size, c.take("rope_theta", (int, float, NONE), None) or 10000.0),
                  **_windows(c, kind, n_layer))
    q, k, v = ({f"self_attn.{x}_proj": (n * D, C)} for x, n in zip("qkv", (H, G, G)))
    linears = {"attn.wqkv": (q | k | v, biases["qkv_bias"], None),
               "attn.wo": ({"self_attn.o_proj": (C, H * D)}, biases["wo_bias"], None),
               "mlp.w_gate": ({"mlp.gate_proj": (I, C)}, biases["bias"], None),
               "mlp.w_up": ({"mlp.up_proj": (I, C)}, biases["bias"], None),
               "mlp.w_down": ({"mlp.down_proj": (C, I)}, biases["bias"], None)}
    norms = {"norm_attn": "input_layernorm", "norm_mlp": "post_attention_layernorm"}
    return fields, _plan(fields, "model", ("embed_tokens", "layers", "norm"), linears, norms, norm_bias=False)


def _gpt_neox(c, kind):
    H, G, D, C = _heads(c)
    n_layer, I, V = c.take("num_hidden_layers"), c.take("intermediate_size"), c.take("vocab_size")
    block_size = c.take("max_position_embeddings")
    c.must_be("hidden_act", "gelu")
    attn_bias = c.take("attention_bias", (bool,), True)
    base = c.take("rotary_emb_base", (int, float), 10000)
    fraction = c.take("rotary_pct", (int, float), 0.25)
    c.must_be("rope_theta", base)  # some versions of transformers write both names
    c.must_be("partial_rotary_factor", fraction)
    fields = dict(n_layer=n_layer, n_head=H, n_kv_head=G, n_embd=C, head_dim=D, n_inner=I, vocab_size=V,
                  block_size=block_size, attention="full", norm="layernorm",
                  norm_eps=c.take("layer_norm_eps", (float,), 1e-5), mlp="gelu", bias=True, qkv_bias=attn_bias,
                  wo_bias=attn_bias, parallel_residual=c.take("use_parallel_residual", (bool,), True),
                  tie_embeddings=c.take("tie_word_embeddings", (bool,), False),
                  **_rope(c, D, block_size, base, fraction))
    linears = {"attn.wqkv": ({"attention.query_key_value": (3 * C, C)}, attn_bias, partial(_ungroup, G=G, D=D)),
               "attn.wo": ({"attention.dense": (C, C)}, attn_bias, None),
               "mlp.w_up": ({"mlp.dense_h_to_4h": (I, C)}, True, None),
               "mlp.w_down": ({"mlp.dense_4h_to_h": (C, I)}, True, None)}
    norms = {"norm_attn": "input_layernorm", "norm_mlp": "post_attention_layernorm"}
    return fields, _plan(fields, "gpt_neox", ("embed_in", "layers", "final_layer_norm"), linears, norms, norm_bias=True)


def _falcon(c, kind):
    new, bias = c.take("new_decoder_architecture", (bool,), False), c.take("bias", (bool,), False)
    multi_query, alibi = c.take("multi_query", (bool,), True), c.take("alibi", (bool,), False)
    parallel = c.take("parallel_attn", (bool,), True)
    n_norms = c.take("num_ln_in_parallel_attn", (int, NONE), None) or (2 if new else 1)
    n_kv_head = c.take("num_kv_heads", (int, NONE), None)
    if n_norms > (2 if new else 1):
        c.wrong("num_ln_in_parallel_attn", n_norms, f"with new_decoder_architecture {new}")
    if new and not parallel:
        c.wrong("parallel_attn", parallel, "with new_decoder_architecture True")
    # one key/value head in 7b's layout, where num_kv_heads is written but does not count
    H, G, D, C = _heads(c, n_kv_head=1 if multi_query and not new else n_kv_head)
    if not new and not multi_query and G != H:
        c.wrong("num_kv_heads", n_kv_head, f"with multi_query False it must be num_attention_heads, {H}")
    n_layer, V = c.take("num_hidden_layers"), c.take("vocab_size")
    I = c.take("ffn_hidden_size", (int, NONE), None) or 4 * C
    block_size = c.take("max_position_embeddings", (int,), 2048)
    c.must_be("activation", "gelu")
    c.must_be("apply_residual_connection_post_layernorm", False)
    if "ff_factor" in c.left:  # Falcon 2 says both
        c.must_be("ff_factor", I // C)
    rope = _rope(c, D, block_size, c.take("rope_theta", (int, float, NONE), None) or 10000.0)
    # Falcon's ALiBi is added before the scores are divided by sqrt(D). transformers rounds slopes and biases to
    # bfloat16 even in a float32 model; we do not.
    position = dict(position="alibi", alibi_scale=D**-0.5) if alibi else rope
    fields = dict(n_layer=n_layer, n_head=H, n_kv_head=G, n_embd=C, head_dim=D, n_inner=I, vocab_size=V,
                  block_size=block_size, attention="full", norm="layernorm",
                  norm_eps=c.take("layer_norm_epsilon", (float,), 1e-5), mlp="gelu", bias=bias, norm_bias=True,
                  parallel_residual=parallel, shared_norm=parallel and n_norms == 1,
                  tie_embeddings=c.take("tie_word_embeddings", (bool,), True), **position)
    qkv = {"self_attention.query_key_value": ((H + 2 * G) * D, C)}
    linears = {"attn.wqkv": (qkv, bias, partial(_ungroup, G=G, D=D)),
               "attn.wo": ({"self_attention.dense": (C, C)}, bias, None),
               "mlp.w_up": ({"mlp.dense_h_to_4h": (I, C)}, bias, None),
               "mlp.w_down": ({"mlp.dense_4h_to_h": (C, I)}, bias, None)}
    norms = {"norm_attn": "input_layernorm"}
    if n_norms == 2:
        norms = {"norm_attn": "ln_attn", "norm_mlp": "ln_mlp"}
    elif not parallel:
        norms["norm_mlp"] = "post_attention_layernorm"
    return fields, _plan(fields, "transformer", ("word_embeddings", "h", "ln_f"), linears, norms, norm_bias=True)


def _mpt(c, kind):
    H, G, D, C = _heads(c, "n_heads", "d_model")
    n_layer, V, I = c.take("n_layers"), c.take("vocab_size"), C * c.take("expansion_ratio", (int,), 4)
    attn = Config(f"{c.path} attn_config", c.take("attn_config", (dict, NONE), None) or {})
    attn.must_be("alibi", True)
    attn.must_be("alibi_bias_max", 8)
    attn.must_be("attn_type", "multihead_attention")
    for name, value in (("clip_qkv", None), ("softmax_scale", None), ("qk_ln", False), ("prefix_lm", False),
                        ("attn_uses_sequence_id", False), ("model_type", "")):
        attn.must_be(name, value)
    attn.done()
    c.left.pop("learned_pos_emb", None)  # there are none where ALiBi is on, whatever this says
    c.must_be("no_bias", True)
    c.must_be("logit_scale", None)
    c.must_be("norm_type", "low_precision_layernorm", "layernorm")  # both the layernorm of the activations' dtype
    fields = dict(n_layer=n_layer, n_head=H, n_kv_head=G, n_embd=C, head_dim=D, n_inner=I, vocab_size=V,
                  block_size=c.take("max_seq_len"), attention="full", position="alibi", norm="layernorm",
                  norm_eps=c.take("layer_norm_epsilon", (float,), 1e-5), mlp="gelu", bias=False,
                  parallel_residual=False, tie_embeddings=c.take("tie_word_embeddings", (bool,), True))
    linears = {"attn.wqkv": ({"attn.Wqkv": (3 * C, C)}, False, None),
               "attn.wo": ({"attn.out_proj": (C, C)}, False, None),
               "mlp.w_up": ({"ffn.up_proj": (I, C)}, False, None),
               "mlp.w_down": ({"ffn.down_proj": (C, I)}, False, None)}
    norms = {"norm_attn": "norm_1", "norm_mlp": "norm_2"}
    return fields, _plan(fields, "transformer", ("wte", "blocks", "norm_f"), linears, norms, norm_bias=False)


def _plan(fields, prefix, names, linears, norms, norm_bias):
    """
    names: theirs of the embedding, the list of layers and the last norm. linears: {ours: ({theirs: shape}, whether
    they have biases, what reorders their rows)}, norms: {ours: theirs}, both of one layer.
    """
    V, C = fields["vocab_size"], fields["n_embd"]
    plan = {"wte.weight": ({f"{prefix}.{names[0]}.weight": (V, C)}, None),
            "lm_head.weight": ({"lm_head.weight": (V, C)}, None)}
    norms = {f"blocks.{i}.{ours}": f"{names[1]}.{i}.{x}" for i in range(fields["n_layer"]) for ours, x in norms.items()}
    for ours, theirs in (norms | {"norm_f": names[2]}).items():
        for part in ("weight", "bias") if norm_bias else ("weight",):
            plan[f"{ours}.{part}"] = ({f"{prefix}.{theirs}.{part}": (C,)}, None)
    for i in range(fields["n_layer"]):
        for ours, (theirs, bias, order) in linears.items():
            layer = f"{prefix}.{names[1]}.{i}."
            plan[f"blocks.{i}.{ours}.weight"] = ({f"{layer}{x}.weight": shape for x, shape in theirs.items()}, order)
            if bias:
                biases = {f"{layer}{x}.bias": shape[:1] for x, shape in theirs.items()}
                plan[f"blocks.{i}.{ours}.bias"] = (biases, order)
    return plan


def _ungroup(x, G, D):
    """
    Rows in G groups of (the group's queries, one key, one value), D each -> all queries, all keys, all values. NeoX's
    q, k, v per head and Falcon's three layouts are all of this kind: G = H, G = 1 or in between.
    """
    x = x.view(G, -1, D, *x.shape[1:])
    return torch.cat([x[:, :-2].flatten(0, 2), x[:, -2].flatten(0, 1), x[:, -1].flatten(0, 1)])


# ---- tensors

def _load_tensors(folder, fields, plan):
    """Our tensors, as `plan` says, float32. ValueError naming what is missing, unexpected or of another shape."""
    stored, file = _open_weights(folder)
    if "embed_out.weight" in stored:  # NeoX's name for it before transformers 5
        stored["lm_head.weight"] = stored.pop("embed_out.weight")
    (embedding, shape), = plan["wte.weight"][0].items()
    if fields["tie_embeddings"]:
        del plan["lm_head.weight"]
        head = stored.pop("lm_head.weight", None)
        if head is not None and embedding not in stored:  # a tied pair may be stored under either name
            stored[embedding] = head
        elif head is not None and not torch.equal(head(), stored[embedding]()):
            raise ValueError(f"{file} holds an lm_head.weight that differs from {embedding}, but the two are tied: set "
                             f'"tie_word_embeddings": false in {folder / "config.json"} if the model has both')
    wanted = {name: shape for sources, _ in plan.values() for name, shape in sources.items()}
    missing = [name for name in wanted if name not in stored]
    unexpected = [name for name in stored if name not in wanted and not BUFFERS.fullmatch(name)]
    for names, what in ((missing, "lacks"), (unexpected, "holds what the config has no place for:")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{file} {what} {', '.join(names[:3])}{more}: it does not fit {folder / 'config.json'}")
    tensors = {}
    for ours, (sources, order) in plan.items():
        parts = []
        for name, shape in sources.items():
            x = stored.pop(name)()
            if tuple(x.shape) != shape:
                raise ValueError(f"{file}: {name} has shape {tuple(x.shape)}, {folder / 'config.json'} implies {shape}")
            parts.append(_float32(name, x) if order is None else order(_float32(name, x)))
        tensors[ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return tensors


def _float32(name, x):
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ValueError(f"tensor {name} is {x.dtype}: only float32, float16, bfloat16 and float64 can be loaded")
    return x.to(torch.float32, copy=True)  # a copy: the file may change or go while the model lives


def _open_weights(folder: Path) -> tuple[dict[str, Callable[[], torch.Tensor]], Path]:
    """{tensor's name: a function that reads it}, and the file, or the index of the files, that they are in."""
    for weights, opener in (("model.safetensors", _open_safetensors), ("pytorch_model.bin", _open_bin)):
        path, index = folder / weights, folder / f"{weights}.index.json"
        if path.is_file():
            return opener(path), path
        if index.is_file():
            try:
                shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = sorted(set(map(str, shards.values())))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{index} is damaged: it holds no weight_map") from None
            stored = {}
            for file in files:
                if Path(file).name != file:
                    raise ValueError(f"{index} names {file}, which is not in its folder")
                stored |= opener(folder / file)
            return stored, index
        if any(folder.glob(weights.replace(".", "-*-of-*."))):
            raise ValueError(f"{index} is missing, which names the shards beside it: the checkpoint is incomplete")
    raise ValueError(f"{folder / 'model.safetensors'} is missing, and so are its shards and pytorch_model.bin: the "
                     "checkpoint is incomplete")


def _open_safetensors(path: Path):
    from safetensors import SafetensorError, safe_open
    try:
        file = safe_open(path, "pt")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the checkpoint is incomplete") from None
    except SafetensorError as e:
        raise ValueError(f"{path} is cut short or damaged ({e})") from None
    return {name: partial(file.get_tensor, name) for name in file.keys()}


def _open_bin(path: Path):
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the checkpoint is incomplete") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds code besides tensors, or is damaged: it is not loaded; use a checkpoint in "
                         "safetensors") from None
    except (RuntimeError, EOFError, OSError) as e:
        raise ValueError(f"{path} is cut short or damaged ({str(e).splitlines()[0]})") from None
    if not isinstance(tensors, dict) or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
        raise ValueError(f"{path} holds no dictionary of tensors")
    return {name: partial(torch.Tensor.detach, x) for name, x in tensors.items()}


# ---- folders and the hub

def find_folder(name: str) -> Path:
    """A folder as it is, or that of a hub id, downloaded if it is not in the hub's cache. ValueError, one line."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{name} is a file: name the folder that holds it and its config.json")
    namespace = path.parent
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ValueError(f"{name}: no such folder (a model of the Hugging Face hub has the form namespace/name)")
    if namespace.is_dir():
        raise ValueError(f"{name}: no such folder in {namespace}, and that local folder hides what the Hugging Face "
                         "hub may have by this name: to load it, run from another folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{name} is no folder here, and the Hugging Face hub needs a package that is not installed: "
                         'pip install ".[hf]"') from None
    texts = ["config.json", "generation_config.json", "tokenizer.json", *BESIDE]
    new = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
    old = ["pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*texts, *new]))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*texts, *old]))
    except Exception as e:  # the hub's, the HTTP library's and the file system's errors have nothing in common
        why = textwrap.shorten(str(e), 200, placeholder=" ...") or type(e).__name__
        raise ValueError(f"{name} is no folder here and cannot be had from the Hugging Face hub: {why}") from None
    return folder
