"""
Positions past the trained length, in the model: frequencies that depend on the length of the text, xPos and blockwise
attention against formulas written out one query and one key at a time; the switch in the middle of a stream.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import randomised

from kernels import rope_frequencies
from model import GPT, GPTConfig, read_rope_scaling

L = 16  # the trained length
TINY = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, vocab_size=61, block_size=L)
DYNAMIC = dict(rope_type="dynamic", factor=2.0, original_max_position_embeddings=L)
LONGROPE = dict(rope_type="longrope", factor=4.0, original_max_position_embeddings=L, short_factor=[1.0, 1.1, 1.2, 1.3],
                long_factor=[1.0, 1.7, 2.5, 4.0])
VARIANTS = {
    "dynamic": dict(rope_scaling=DYNAMIC),
    "longrope": dict(rope_scaling=LONGROPE),
    "longrope n_hat": dict(rope_scaling={**LONGROPE, "n_hat": 3}),
    "longrope window": dict(rope_scaling={**LONGROPE, "n_hat": 3}, attention="window", window=15, sinks=5, block_size=32),
    "longrope with many sinks": dict(rope_scaling={**LONGROPE, "n_hat": 18}, attention="window", window=6, sinks=19,
                                     block_size=32),
    "xpos": dict(position="xpos"),
    "partial xpos": dict(position="xpos", rope_fraction=0.5),
    "blockwise": dict(attention="blockwise", block_size=10),
    "blockwise xpos": dict(attention="blockwise", block_size=L, position="xpos"),
}


def tiny(variant, dtype=torch.float64, **overrides):
    torch.manual_seed(1)
    return randomised(GPT(GPTConfig(**{**TINY, **VARIANTS[variant], **overrides})).to(dtype))


def literally(model, idx, positions=None):
    """The logits (1, T, V) of idx (T,), one query and one key at a time: what the text says of each kind, no more."""
    positions = range(len(idx)) if positions is None else positions.tolist()
    c, w = model.config, dict(model.named_parameters())
    H, G, D, R = c.n_head, c.n_kv_head, c.head_dim, c.rotary_dim // 2
    scaling = c.rope_scaling or {}
    zeta = (2 * torch.arange(R).double() / (2 * R) + 0.4) / 1.4

    @functools.cache
    def turn(position, length):
        if length > L and scaling.get("rope_type") == "dynamic":
            length = L + math.ceil((length - L) / (L // 8)) * (L // 8)
        near = length > L and position < scaling.get("n_hat", 0)
        theta, _ = rope_frequencies(2 * R, c.rope_base, None if near else scaling, length)
        return (position * theta).cos(), (position * theta).sin()

    def rotate(x, position, length):  # (heads, D), in a text of `length` tokens
        cos, sin = turn(position, length)
        a, b = x[:, :R], x[:, R:2 * R]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[:, 2 * R:]], 1)

    def sees(n, m):
        half = c.block_size // 2
        return m <= n and (c.attention != "window" or m < c.sinks or n - m < c.window) and \
            (c.attention != "blockwise" or n // half - m // half <= 1)

    def place(n, m):
        """Where query n finds token m: in the cache, which drops what lies between its sinks and its window."""
        gone = n + 1 - c.sinks - c.window if c.attention == "window" else 0
        return m if m < c.sinks or gone <= 0 else m - gone

    def norm(x, name):
        return x / (x.pow(2).mean() + c.norm_eps).sqrt() * w[name + ".weight"]

    _, factor = rope_frequencies(2 * R, c.rope_base, scaling)
    past, outputs = [[] for _ in range(c.n_layer)], []
    for n, token in enumerate(idx):
        x = w["wte.weight"][token]
        for i in range(c.n_layer):
            p = f"blocks.{i}."
            q, k, v = (w[p + "attn.wqkv.weight"] @ norm(x, p + "norm_attn")).view(-1, D).split([H, G, G])
            past[i].append((k, v))
            seen = [(m, *kv) for m, kv in enumerate(past[i]) if sees(n, m)]
            at = [positions[m] if c.attention != "window" else place(n, m) for m, *_ in seen]
            length = at[-1] + 1
            q, group = rotate(q, at[-1], length), torch.arange(H) // (H // G)
            scores, values = [], torch.stack([v[group] for *_, v in seen])  # (keys, H, D)
            for j, (m, k, _) in zip(at, seen):
                product = q * rotate(k, j, length)[group]
                if c.position == "xpos":
                    product = product * torch.cat([zeta, zeta, torch.ones(D - 2 * R)]) ** ((n - m) / 512)
                scores.append(product.sum(-1) * factor**2 / D**0.5)
            heads = (torch.stack(scores).softmax(0)[..., None] * values).sum(0)
            x = x + w[p + "attn.wo.weight"] @ heads.flatten()
            y = norm(x, p + "norm_mlp")
            x = x + w[p + "mlp.w_down.weight"] @ (F.silu(w[p + "mlp.w_gate.weight"] @ y) * (w[p + "mlp.w_up.weight"] @ y))
        outputs.append(w["wte.weight"] @ norm(x, "norm_f"))
    return torch.stack(outputs)[None]


def fed_in(model, idx, sizes):
    state, parts = model.new_state(1), []
    for n in sizes:
        parts.append(model(idx[None, state.position:state.position + n], state=state)[0])
    return torch.cat(parts, 1)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_formulas(variant):
    """One pass, a stream token by token, and chunks across the switch at L and the borders of blocks."""
    model, idx = tiny(variant), torch.randint(0, 61, (37,))
    expected = literally(model, idx)
    for logits in (model(idx[None])[0], *(fed_in(model, idx, sizes) for sizes in ([1] * 37, [7] * 5 + [2], [15, 1, 1, 20]))):
        assert (logits - expected).norm() < 1e-10 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("variant", ["dynamic", "longrope n_hat", "blockwise xpos"])
def test_formulas_on_the_kernels(variant, triton_kernels, monkeypatch):
    model, idx = tiny(variant, n_layer=1), torch.randint(0, 61, (22,))
    streams = [fed_in(model, idx, sizes) for sizes in ([14, *[1] * 8], [15, 1, 1, 5])]
    monkeypatch.setenv("NANOLONG_KERNELS", "reference")
    expected = model(idx[None])[0]
    for logits in streams:
        assert (logits - expected).norm() < 1e-10 * expected.norm()


@pytest.mark.parametrize("variant", ["longrope", "longrope n_hat"])
def test_positions_of_their_own(variant):
    """Positions with a skip: each query by its own length, and a gradient for every weight."""
    model, idx = tiny(variant), torch.randint(0, 61, (1, 24))
    torch.testing.assert_close(model(idx, positions=torch.arange(24))[0], model(idx)[0], rtol=1e-9, atol=1e-9)
    positions = torch.cat([torch.arange(6), torch.arange(13, 31)])
    with torch.no_grad():
        expected = literally(model, idx[0], positions)
        torch.testing.assert_close(model(idx, positions=positions.expand(1, -1))[0], expected, rtol=1e-9, atol=1e-9)
    loss = model(idx, idx, positions=positions)[1]
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(model.parameters())))
    with pytest.raises(ValueError, match="positions with dynamic"):
        tiny("dynamic")(idx, positions=positions)


def test_setting_the_scaling():
    """In place, as if the model had been made so; YaRN's factor in the scale included."""
    model, idx = tiny("dynamic"), torch.randint(0, 61, (1, 30))
    for scaling in (LONGROPE, {**LONGROPE, "n_hat": 2}, dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=L),
                    None, DYNAMIC):
        model.set_rope_scaling(scaling)
        assert torch.equal(model(idx)[0], tiny("dynamic", rope_scaling=scaling)(idx)[0]) and model.config.rope_scaling == scaling
    with pytest.raises(ValueError, match="long_factor has 3 numbers, dim=8 needs 4"):
        model.set_rope_scaling({**LONGROPE, "long_factor": [1, 2, 3]})


def test_reading_a_scaling(tmp_path):
    path = tmp_path / "found.json"
    path.write_text('{"rope_scaling": {"rope_type": "linear", "factor": 3}, "perplexity": 5}')
    assert read_rope_scaling(str(path), 256) == dict(rope_type="linear", factor=3, original_max_position_embeddings=256)
    assert read_rope_scaling("yarn", 256, target=1024) == dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=256)
    assert read_rope_scaling("ntk", 256, target=1024) == dict(rope_type="ntk", factor=4.0, original_max_position_embeddings=256)
    assert read_rope_scaling("dynamic", 256, target=1024)["factor"] == 1  # at length l it stretches l / L times
    own = dict(rope_type="linear", factor=4.0, original_max_position_embeddings=64)
    assert read_rope_scaling("yarn", 256, own, 512) == dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=64)
    assert read_rope_scaling('{"rope_type": "dynamic", "factor": 2}', 256)["original_max_position_embeddings"] == 256
    path.write_text("[1]")
    for wrong, message in (("yam", "must be one of default, linear"), (str(path), "it holds list"),
                           ("linear", "lacks its factor"), ('{"rope_type": "rope"}', "rope_type 'rope' is unknown"),
                           ('{"rope_type": ["yarn"]}', "is unknown"),
                           ('{"rope_type": "yarn", "original_max_position_embeddings": "256"}', "lacks its factor")):
        with pytest.raises(ValueError, match=message) as error:
            read_rope_scaling(wrong, 256)
        assert "\n" not in str(error.value)


def test_a_scaling_of_unknown_origin():
    """A linear model of others' does not say from what length it was extended: then nothing is guessed."""
    for wrong, message in (("linear", "lacks its factor"), ("yarn", "lacks original_max_position_embeddings, the length before"),
                           ('{"rope_type": "yarn", "factor": 4}', "lacks original_max_position_embeddings")):
        with pytest.raises(ValueError, match=message):
            read_rope_scaling(wrong, 256, dict(rope_type="linear", factor=4.0), 1024)
    with pytest.raises(ValueError, match="256 tokens are wanted, the model was trained on 256: there is nothing to extend"):
        read_rope_scaling("ntk", 256, target=256)


def test_one_form_of_a_scaling():
    """None is absent, an older name and a second base are gone: the model and its frequencies mean the same."""
    given = {"type": "longrope", "rope_theta": 500.0, **LONGROPE, "rope_type": None}
    c = GPTConfig(**{**TINY, "rope_scaling": given})
    assert c.rope_scaling == LONGROPE and c.rope_base == 500 and c.by_length and c.reach == 4 * L


@pytest.mark.parametrize("variant", ["dynamic", "longrope n_hat", "xpos", "blockwise xpos"])
def test_gradients(variant):
    """Each weight's gradient along a random direction against differences, past the trained length."""
    model, idx = tiny(variant, n_layer=1), torch.randint(0, 61, (2, 30))
    upstream = torch.randn(2, 30, dtype=torch.float64)
    (model(idx, idx.roll(1, 1), reduction="none")[1].double() * upstream).sum().backward()
    for name, p in model.named_parameters():
        direction, losses = torch.randn_like(p), []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * 1e-6 * direction
                losses.append((F.cross_entropy(model(idx)[0].transpose(1, 2), idx.roll(1, 1), reduction="none") * upstream).sum())
                p -= sign * 1e-6 * direction
        torch.testing.assert_close((p.grad * direction).sum(), (losses[0] - losses[1]) / 2e-6, rtol=1e-3, atol=1e-5, msg=name)


@torch.no_grad()
def test_documents():
    """Each document is read by its own length, wherever it lies in the row."""
    model, (a, b) = tiny("longrope n_hat"), torch.randint(0, 61, (2, 1, 22))
    docs = torch.arange(2).repeat_interleave(22)[None]
    packed = model(torch.cat([a, b], 1), docs=docs)[0]
    torch.testing.assert_close(packed, torch.cat([model(a)[0], model(b)[0]], 1), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="docs with dynamic"):
        tiny("dynamic")(a, docs=docs[:, :22])
    with pytest.raises(ValueError, match="docs with sink_tokens 1 and position 'xpos'"):
        tiny("xpos", sink_tokens=1)(a, docs=docs[:, :22])


def test_a_state_of_before():
    model = tiny("dynamic")
    state = model.new_state(1)
    model.set_rope_scaling(None)
    with pytest.raises(ValueError, match="made with other rotary frequencies"):
        model(torch.randint(0, 61, (1, 3)), state=state)


@pytest.mark.parametrize("change, message", [
    (dict(rope_scaling={**LONGROPE, "n_hat": 5}, attention="window", window=30, sinks=2, block_size=32), "n_hat 5 with sinks 2"),
    (dict(rope_scaling="yarn"), "it must be a dict"),
    (dict(rope_scaling={**LONGROPE, "long_factor": None}), "lacks long_factor"),
    (dict(rope_scaling={**LONGROPE, "long_factor": [1.0] * 3}), "has 3 numbers, dim=8 needs 4"),
    (dict(rope_scaling={**LONGROPE, "n_hat": -1}), "n_hat is -1"),
    (dict(rope_scaling=dict(rope_type="dynamic")), "lacks factor"),
    (dict(rope_scaling=DYNAMIC, attention="infini", segment=L + 1), "segment 17 with rope_scaling"),
    (dict(rope_scaling=DYNAMIC, position="xpos"), "needs position 'rope'"),
    (dict(attention="blockwise", block_size=1), "two halves of block_size")])
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message) as error:
        GPTConfig(**{**TINY, **change})
    assert "\n" not in str(error.value)
