"""
Streaming: a stream, any chunking of it, one parallel pass and, for windows with sinks, StreamingLLM written out literally
are the same numbers at every layer, past many evictions and folded segments; states, files and configurations.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import randomised

from kernels import rope
from model import GPT, GPTConfig, alibi_slopes

TINY = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, vocab_size=61, block_size=64, attention="window", window=9, sinks=3)
VARIANTS = {
    "rope": {},
    "partial rope": dict(rope_fraction=0.5, n_kv_head=1),
    "alibi": dict(position="alibi", n_head=6, n_kv_head=3, head_dim=8, norm="layernorm", mlp="gelu"),
    "scaled rope": dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)),
    "no position": dict(position="none"),
    "no sinks": dict(sinks=0),
    "window of one": dict(window=1),
    "sink logit": dict(sink_logit=True),
    "sink tokens": dict(sink_tokens=2),
    "hybrid": dict(attention="window,full", sink_logit=True, sink_tokens=1),
    "dynamic": dict(attention="full,window", window=41, rope_scaling=dict(
        rope_type="dynamic", factor=2.0, original_max_position_embeddings=24)),
    "longrope": dict(attention="full,window", window=41, sink_logit=True, rope_scaling=dict(
        rope_type="longrope", factor=4.0, original_max_position_embeddings=24, short_factor=[1.0] * 4,
        long_factor=[1.0, 2.0, 3.0, 4.0], n_hat=2)),
    "dynamic window": dict(rope_scaling=dict(rope_type="dynamic", factor=2.0, original_max_position_embeddings=6)),
    "xpos": dict(position="xpos"),
    "blockwise": dict(attention="blockwise", block_size=14),
    "blockwise xpos": dict(attention="blockwise,full", position="xpos", block_size=22),
    "infini xpos": dict(attention="infini", segment=9, position="xpos"),
    "infini": dict(attention="infini", segment=9),
    "infini linear": dict(attention="infini", segment=8, memory_rule="linear", n_kv_head=1, rope_fraction=0.5, memory_norm=3.0),
    "infini alibi": dict(attention="infini", segment=12, position="alibi"),
    "infini hybrid": dict(attention="infini,window,full", segment=5, sinks=0),
}


def tiny(variant, dtype=torch.float64, **overrides):
    torch.manual_seed(1)
    return randomised(GPT(GPTConfig(**{**TINY, **VARIANTS[variant], **overrides})).to(dtype))


def layers_of(model, feed):
    """What each block and the model put out while `feed` calls the model: (n_layer + 1) tensors, calls joined."""
    seen = [[] for _ in range(model.config.n_layer)]
    hooks = [block.register_forward_hook(lambda _, __, y, outputs=outputs: outputs.append(y))
             for block, outputs in zip(model.blocks, seen)]
    logits = feed()
    for hook in hooks:
        hook.remove()
    return [torch.cat(outputs, 1) for outputs in seen] + [logits]


def fed_on(model, idx, state, at, sizes):
    parts, sizes = [], itertools.cycle(sizes)
    while at < idx.shape[1]:
        n = next(sizes)
        parts.append(model(idx[:, at:at + n], state=state)[0])
        at += n
    return torch.cat(parts, 1)


def fed_in(model, idx, sizes):
    state = model.new_state(idx.shape[0])
    size = state.nbytes
    logits = fed_on(model, idx, state, 0, sizes)
    assert "full" in model.config.attention or state.nbytes == size > 0
    return logits


def assert_same(actual, expected, tolerance):
    for layer, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert (a - b).norm() < tolerance * b.norm(), f"layer {layer}: {(a - b).norm() / b.norm():.1e}"


def streaming_llm(model, idx):
    """
    StreamingLLM as its paper says it (arXiv 2309.17453), one token at a time in lists: the cache drops the oldest token
    that is no sink, positions are counted inside the cache, and every key is rotated there anew. -> what layers_of gives.
    """
    c, w = model.config, dict(model.named_parameters())
    H, G, D, R = c.n_head, c.n_kv_head, c.head_dim, c.rotary_dim // 2
    theta = c.rope_base ** (-torch.arange(R).double() / R)

    def rotate(x, position):  # (heads, D)
        if c.position != "rope":
            return x
        cos, sin = (position * theta).cos(), (position * theta).sin()
        a, b = x[:, :R], x[:, R:2 * R]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[:, 2 * R:]], 1)

    def norm(x, name):
        if c.norm == "layernorm":
            return F.layer_norm(x, x.shape, w[name + ".weight"], None, c.norm_eps)
        return x / (x.pow(2).mean() + c.norm_eps).sqrt() * w[name + ".weight"]

    caches, outputs = [[] for _ in range(c.n_layer)], [[] for _ in range(c.n_layer + 1)]
    for token in idx:
        x = w["wte.weight"][token]
        for i, cache in enumerate(caches):
            p = f"blocks.{i}."
            q, k, v = (w[p + "attn.wqkv.weight"] @ norm(x, p + "norm_attn")).view(-1, D).split([H, G, G])
            cache.append((k, v))
            if len(cache) > c.sinks + c.window:
                del cache[c.sinks]
            last, heads = len(cache) - 1, []
            q = rotate(q, last)
            for h in range(H):
                s = torch.stack([q[h] @ rotate(k, j)[h // (H // G)] / D**0.5 for j, (k, _) in enumerate(cache)])
                if c.position == "alibi":
                    s = s - alibi_slopes(H)[h].double() * (last - torch.arange(len(cache)))
                heads.append(s.softmax(0) @ torch.stack([v[h // (H // G)] for _, v in cache]))
            x = x + w[p + "attn.wo.weight"] @ torch.cat(heads)
            y = norm(x, p + "norm_mlp")
            up = w[p + "mlp.w_up.weight"] @ y
            x = x + w[p + "mlp.w_down.weight"] @ (
                F.gelu(up) if c.mlp == "gelu" else F.silu(w[p + "mlp.w_gate.weight"] @ y) * up)
            outputs[i].append(x)
        outputs[-1].append(w["wte.weight"] @ norm(x, "norm_f"))
    return [torch.stack(x)[None] for x in outputs]


@torch.no_grad()
@pytest.mark.parametrize("variant", ["rope", "partial rope", "alibi", "no position", "no sinks", "window of one"])
def test_one_pass_is_streaming_llm(variant):
    model, idx = tiny(variant), torch.randint(0, 61, (1, 60))
    assert_same(layers_of(model, lambda: model(idx)[0]), streaming_llm(model, idx[0]), 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_stream_equals_parallel(variant, dtype, tolerance):
    model, idx = tiny(variant, dtype), torch.randint(0, 61, (2, 130))
    whole = layers_of(model, lambda: model(idx)[0])
    for sizes in ([1], [2], [7], [64], [1, 64, 7, 2, 1, 1, 30]):
        assert_same(layers_of(model, lambda: fed_in(model, idx, sizes)), whole, tolerance)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["rope", "partial rope", "alibi", "infini"])
def test_long_stream_in_chunks_of_1000(variant):
    model, idx = tiny(variant), torch.randint(0, 61, (1, 1600))
    whole = layers_of(model, lambda: model(idx)[0])
    for sizes in ([1000], [1]):
        assert_same(layers_of(model, lambda: fed_in(model, idx, sizes)), whole, 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["rope", "alibi", "hybrid", "infini", "infini alibi"])
def test_stream_on_the_kernels(variant, triton_kernels, monkeypatch):
    """Un-rotated keys in the ring, rotated as the decode kernel loads them: the numbers of the plain torch path."""
    model, idx = tiny(variant, n_layer=2), torch.randint(0, 61, (2, 40))
    streams = [layers_of(model, lambda: fed_in(model, idx, sizes)) for sizes in ([1], [17, 1, 1, 1])]
    monkeypatch.setenv("NANOLONG_KERNELS", "reference")
    whole = layers_of(model, lambda: model(idx)[0])
    for stream in streams:
        assert_same(stream, whole, 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["rope", "alibi", "sink tokens", "infini", "xpos", "blockwise", "dynamic window"])
def test_the_step_that_a_cuda_graph_captures(variant, triton_kernels):
    """It depends on the position on the device alone, may run in advance, and is what a call with the state gives."""
    model, idx = tiny(variant, n_layer=2), torch.randint(0, 61, (2, 20))
    state, other = model.new_state(2), model.new_state(2)
    for s in (state, other):
        model(idx[:, :15], state=s)
    position = torch.empty(1, dtype=torch.int64)
    for t in range(15, 20):
        position.fill_(state.position)
        model._decode_step(torch.zeros_like(idx[:, :1]), position, state)
        x = model._decode_step(idx[:, t:t + 1], position, state)
        state.advance(1)
        assert torch.equal(x, model.hidden(idx[:, t:t + 1], state=other))


@torch.no_grad()
def test_at_ten_million_tokens():
    """Far into a text the stream is what it is near its start: only distances and the cache's positions count."""
    model, idx = tiny("rope", torch.float32), torch.randint(0, 61, (1, 80))
    state, late, shift = model.new_state(1), model.new_state(1), 9 * 10**7  # a multiple of the window: the same slots
    model(idx[:, :50], state=state)
    for near, far in zip(state.layers, late.layers):
        k, v, at = near.saved(50)
        far.k[:, :12], far.v[:, :12] = rope(k, torch.where(at < 3, 0, shift), model.turns), v
    near = torch.cat([model(idx[:, i:i + 1], state=state)[0] for i in range(50, 80)], 1)
    late.position = 50 + shift
    far = torch.cat([model(idx[:, i:i + 1], state=late)[0] for i in range(50, 80)], 1)
    assert (far - near).norm() < 1e-5 * near.norm()


@pytest.mark.parametrize("variant", ["rope", "alibi", "hybrid"])
def test_training(variant):
    """Every parameter gets a gradient, that of the dense formula; a window that holds all is full attention."""
    model = tiny(variant, sink_logit=True)
    idx, targets = torch.randint(0, 61, (2, 2, 40))
    loss = model(idx, targets)[1]
    grads = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()))))
    eps = 1e-6
    for name, p in model.named_parameters():
        direction, losses = torch.randn_like(p), []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * eps * direction
                losses.append(model(idx, targets, reduction="none")[1].double().mean())
                p -= sign * eps * direction
        torch.testing.assert_close((grads[name] * direction).sum(), (losses[0] - losses[1]) / (2 * eps), rtol=1e-3,
                                   atol=1e-6, msg=name)
    short = idx[:, :12 - model.config.sink_tokens]  # 3 sinks + window 9
    full = tiny(variant, sink_logit=True, attention="full")
    torch.testing.assert_close(model(short)[0], full(short)[0], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(model(idx)[0], full(idx)[0])


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 15, 30])
@pytest.mark.parametrize("seen", [0, 5, 20])
@pytest.mark.parametrize("variant", ["hybrid", "infini hybrid"])
def test_a_call_cut_short_can_be_made_again(variant, seen, n):
    model, idx = tiny(variant), torch.randint(0, 61, (1, 60))
    state, whole = model.new_state(1), model(idx)[0]
    if seen:
        model(idx[:, :seen], state=state)
    hook = model.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(idx[:, seen:seen + n], state=state)
    hook.remove()
    again = fed_on(model, idx, state, seen, [n, 1, 7])
    torch.testing.assert_close(again, whole[:, seen:], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_custom_positions():
    """Logits do not depend on how many tokens follow, whatever the positions; only rotary models take any."""
    model, idx = tiny("sink tokens"), torch.randint(0, 61, (1, 40))
    whole = model(idx, positions=torch.arange(40) * 7)[0]
    for n in (9, 10, 11, 12, 25):
        torch.testing.assert_close(model(idx[:, :n], positions=torch.arange(n) * 7)[0], whole[:, :n], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="positions are for position 'rope', it is 'alibi'"):
        tiny("alibi")(idx, positions=torch.arange(40))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("variant, docs", [("hybrid", None), ("sink tokens", torch.int32), ("sink tokens", torch.int64),
                                           ("infini", None), ("infini linear", torch.int32), ("longrope", None), ("xpos", None)])
def test_compiles_whole(variant, docs, backend, monkeypatch):
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    torch.compiler.reset()
    model, (idx, targets) = tiny(variant, torch.float32, sinks=2), torch.randint(0, 61, (2, 1, 30))
    docs = None if docs is None else (torch.arange(30)[None] // 13).to(docs)
    compiled, results = torch.compile(model, fullgraph=True, backend="aot_eager"), []
    for f in (model, compiled):
        loss = f(idx, targets, docs=docs)[1]
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.compiler.reset()
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["rope", "hybrid", "infini", "infini linear", "dynamic", "longrope", "xpos",
                                     "blockwise xpos"])
def test_future_leak(variant):
    """Tokens from t on are replaced: logits before t do not change by a bit."""
    model, idx = tiny(variant, torch.float32), torch.randint(0, 61, (2, 50))
    first = model(idx)[0]
    for t in (49, 20, 1):
        idx[:, t:] = torch.randint(0, 61, idx[:, t:].shape)
        assert torch.equal(model(idx)[0][:, :t], first[:, :t])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["window", "full"])
def test_documents_share_the_learned_sink(attention):
    """Packed with others, a document's logits are those of the document alone, the learned tokens right before it."""
    model, idx = tiny("sink tokens", sinks=2, attention=attention), torch.randint(0, 61, (1, 45))
    docs = torch.tensor([[0] * 13 + [1] * 20 + [2] * 12])
    alone = torch.cat([model(part)[0] for part in idx.split([13, 20, 12], 1)], 1)
    torch.testing.assert_close(model(idx, docs=docs)[0], alone, rtol=1e-9, atol=1e-9)
    model.sink_embedding += 1
    assert not torch.allclose(model(idx, docs=docs)[0][:, 13:], alone[:, 13:])
    with pytest.raises(ValueError, match="docs with sink_tokens 2 and position 'alibi'"):
        tiny("sink tokens", sinks=2, position="alibi")(idx, docs=docs)
    with pytest.raises(ValueError, match="docs with sinks 3 and sink_tokens 0.*set sinks to 0"):
        tiny("rope")(idx, docs=torch.zeros(1, 45, dtype=torch.int64))


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_state_goes_on_bit_by_bit(variant, tmp_path, monkeypatch):
    """Greedy generation from a saved and loaded state is that without the interruption; also from the other backend's."""
    model, path = tiny(variant, torch.float32), str(tmp_path / "state")
    prompt, state = torch.randint(0, 61, (2, 30)), model.new_state(2)
    tokens = list(model.generate(prompt, 20, state, temperature=0))
    size = state.nbytes
    state.save(path, {"last": tokens[-1]})
    expected = list(model.generate(tokens[-1][:, None], 30, state, temperature=0))
    again = model.new_state(2)
    last = again.load(path)["last"]
    assert again.position == 49 + model.config.sink_tokens and again.nbytes <= size
    assert torch.equal(torch.stack(list(model.generate(last[:, None], 30, again, temperature=0))), torch.stack(expected))
    monkeypatch.setattr("model.use_triton", lambda x: True)
    other = model.new_state(2)
    other.load(path)
    one, two = model.new_state(2), tokens[-1][:, None]
    assert one.layers[0].rotated is False
    monkeypatch.undo()
    again = model.new_state(2)
    again.load(path)
    torch.testing.assert_close(model(two, state=other)[0], model(two, state=again)[0], rtol=1e-4, atol=1e-4)
    other.save(path)
    back = model.new_state(2)
    back.load(path)
    torch.testing.assert_close(model(two, state=back)[0], model(two, state=again)[0], rtol=1e-4, atol=1e-4)


def test_a_wrong_state_is_one_line(tmp_path):
    path = str(tmp_path / "state")
    tiny("rope").new_state(1).save(path)
    for state, message in ((tiny("rope").new_state(2), r"\(1, 2, 8\).* there, .*\(2, 2, 8\).* here; load it with"),
                           (tiny("rope", window=10).new_state(1), r"window 9 \+ 3 sinks.*window 10 \+ 3 sinks"),
                           (tiny("rope", rope_base=5e5).new_state(1), r"rope 10000 .*rope 500000 "),
                           (tiny("rope", position="alibi").new_state(1), "rope 10000 .*alibi")):
        with pytest.raises(ValueError, match=message):
            state.load(path)
        assert state.position == 0
    (tmp_path / "cut").write_bytes((tmp_path / "state").read_bytes()[:100])
    for name in ("cut", "absent"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as a saved state"):
            tiny("rope").new_state(1).load(str(tmp_path / name))


def test_alibi_slopes():
    powers = [2.0 ** -k for k in range(1, 9)]
    assert alibi_slopes(8).tolist() == powers
    expected = powers + [0.707107, 0.353553, 0.176777, 0.088388]
    torch.testing.assert_close(alibi_slopes(12), torch.tensor(expected), rtol=1e-5, atol=0)
    model = tiny("alibi")
    assert torch.equal(model.to(torch.bfloat16).slopes.view(torch.float32), alibi_slopes(6))


def test_flops_count_the_keys_that_are_seen():
    T, full, window = 64, tiny("rope", attention="full"), tiny("rope")
    seen = sum(min(t + 1, 12) for t in range(T)) / T
    assert full.flops_per_token(T) - window.flops_per_token(T) == pytest.approx(12 * 3 * 32 * ((T + 1) / 2 - seen))


@pytest.mark.parametrize("change, message", [
    (dict(window=62), "sinks 3 \\+ window 62 is more than block_size 64.*set window to 61"),
    (dict(window=0), "window is 0"), (dict(sinks=-1), "sinks is -1"), (dict(sink_tokens=4), "sinks is 3, sink_tokens 4"),
    (dict(attention="window,flash"), "comma-separated pattern"), (dict(alibi_scale=2.0), "alibi_scale 2.0 needs position"),
    (dict(shared_norm=True), "shared_norm is True"),
    (dict(position="none", rope_scaling={"rope_type": "linear", "factor": 2.0}), "needs position 'rope'"),
    (dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "lacks original_max_position_embeddings"),
    (dict(rope_scaling={"rope_type": "nkt", "factor": 2.0}), "nkt")])
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**TINY, **change})
