"""model.py: future leak, stream equals parallel, compilation, accounting, files; on the references and the kernels."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from helpers import randomised

from model import GPT, GPTConfig, sample_token

TINY = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, vocab_size=61, block_size=64)
VARIANTS = {
    "llama": {},
    "gpt2": dict(norm="layernorm", mlp="gelu", bias=True, n_kv_head=4, position="none"),
    "neox": dict(norm="layernorm", mlp="gelu", bias=True, parallel_residual=True, rope_fraction=0.5,
                 tie_embeddings=False),
    "mqa": dict(n_kv_head=1, head_dim=12, rope_base=5e5),
}


def tiny(variant="llama", dtype=torch.float32, **overrides):
    torch.manual_seed(1)
    return randomised(GPT(GPTConfig(**{**TINY, **VARIANTS[variant], **overrides})).to(dtype))


def plain_logits(model, idx):
    """The Llama-style model written out in plain torch: independent of the kernels and of the module's forward."""
    c, w = model.config, dict(model.named_parameters())
    T, H, G, D = idx.shape[1], c.n_head, c.n_kv_head, c.head_dim
    angle = torch.arange(T)[:, None].double() * c.rope_base ** (-torch.arange(0, D, 2).double() / D)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def rotate(x):
        z = torch.view_as_real(torch.complex(x[..., :D // 2].double(), x[..., D // 2:].double()) * turn)
        return torch.cat([z[..., 0], z[..., 1]], -1)

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    x = w["wte.weight"][idx]
    for i in range(c.n_layer):
        p = {name.removeprefix(f"blocks.{i}."): value for name, value in w.items()}
        q, k, v = (norm(x, p["norm_attn.weight"]) @ p["attn.wqkv.weight"].T).view(*idx.shape, -1, D).split([H, G, G], 2)
        q, k, v = (y.repeat_interleave(H // y.shape[2], 2).transpose(1, 2) for y in (rotate(q), rotate(k), v))
        s = (q @ k.mT / D**0.5).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
        x = x + (s.softmax(-1) @ v).transpose(1, 2).flatten(2) @ p["attn.wo.weight"].T
        y = norm(x, p["norm_mlp.weight"])
        x = x + (F.silu(y @ p["mlp.w_gate.weight"].T) * (y @ p["mlp.w_up.weight"].T)) @ p["mlp.w_down.weight"].T
    return norm(x, w["norm_f.weight"]) @ w["wte.weight"].T


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_equals_the_model_written_out(backend, monkeypatch):
    """Logits, loss and every parameter's gradient against plain torch in float64."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    model = tiny(dtype=torch.float64)
    idx, targets = torch.randint(0, 61, (2, 2, 21))
    targets[0, :5] = -100
    logits = plain_logits(model, idx)
    torch.testing.assert_close(model(idx)[0], logits, rtol=1e-9, atol=1e-9)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = model(idx, targets)[1]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    grads = (torch.autograd.grad(x, list(model.parameters())) for x in (loss, expected))
    for (name, _), a, b in zip(model.named_parameters(), *grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_of_targets_is_that_of_logits(variant):
    model = tiny(variant)
    idx, targets = torch.randint(0, 61, (2, 3, 30))
    targets[1, 7:] = -100
    logits = model(idx)[0]
    for reduction in ("mean", "sum", "none"):
        logits_are_none, loss = model(idx, targets, reduction=reduction)
        assert logits_are_none is None
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        torch.testing.assert_close(loss.flatten(), expected.flatten())


@pytest.mark.parametrize("backend, variant", [("triton", "llama"), *(("reference", variant) for variant in VARIANTS)])
def test_future_leak(backend, variant, monkeypatch):
    """Tokens from t on are replaced: logits before t do not change by a bit."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    model = tiny(variant)
    idx = torch.randint(0, 61, (2, 50))
    first = model(idx)[0]
    for t in (49, 20, 1):
        idx[:, t:] = torch.randint(0, 61, idx[:, t:].shape)
        assert torch.equal(model(idx)[0][:, :t], first[:, :t])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_stream_equals_parallel(variant, dtype, tolerance):
    """Fed in chunks of any size through a state, far past block_size, the logits are those of one pass."""
    model = tiny(variant, dtype)
    idx = torch.randint(0, 61, (2, 150))
    with torch.no_grad():
        whole = model(idx)[0]
        for sizes in ([1], [2], [7], [64], [150], [1, 64, 7, 2, 30]):
            state, parts, sizes = model.new_state(2), [], itertools.cycle(sizes)
            while state.position < 150:
                parts.append(model(idx[:, state.position:state.position + next(sizes)], state=state)[0])
            difference = (torch.cat(parts, 1) - whole).norm() / whole.norm()
            assert difference < tolerance


def test_stream_on_the_kernels(triton_kernels):
    model = tiny(dtype=torch.float64)
    idx = torch.randint(0, 61, (1, 40))
    with torch.no_grad():
        whole, state = model(idx)[0], model.new_state(1)
        parts = [model(chunk, state=state)[0] for chunk in idx.split([17, 1, 22], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)


def test_state_size_and_gradient():
    """nbytes is what the buffers hold; a chunk's own gradient is right although what came before carries none."""
    model = tiny(dtype=torch.float64)
    state = model.new_state(3)
    assert state.nbytes == 0 and state.position == 0
    idx = torch.randint(0, 61, (3, 30))
    model(idx[:, :10], state=state)
    assert state.position == 10
    assert state.nbytes == 2 * 2 * 3 * 64 * 2 * 8 * 8  # layers, k and v, B, capacity, G, D, bytes
    loss = model(idx[:, 10:], idx[:, 10:], state=state)[1]
    grad = torch.autograd.grad(loss, model.blocks[1].attn.wqkv.weight)[0]

    assert grad.abs().sum() > 0
    with torch.no_grad():
        reference = model.new_state(3)  # the past as it was, whatever the weights become
        model(idx[:, :10], state=reference)
    eps, direction = 1e-6, torch.randn_like(grad)
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            model.blocks[1].attn.wqkv.weight += sign * eps * direction
            again = model.new_state(3)
            for new, old in zip(again.layers, reference.layers):
                new.write(old.k[:, :10], old.v[:, :10], 0)
            again.position = 10
            losses.append(model(idx[:, 10:], idx[:, 10:], state=again, reduction="none")[1].double().mean())
            model.blocks[1].attn.wqkv.weight -= sign * eps * direction
    torch.testing.assert_close((grad * direction).sum(), (losses[0] - losses[1]) / (2 * eps), rtol=1e-3, atol=1e-6)


def test_state_survives(tmp_path):
    """A step that fails leaves the state as it was; a saved state goes on in another model; mistakes are one line."""
    model = tiny()
    idx = torch.randint(0, 61, (2, 40))
    state = model.new_state(2)
    with torch.no_grad():
        whole = model(idx)[0]
        model(idx[:, :30], state=state)
        hook = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(idx[:, 5:12], state=state)
        hook.remove()
        state.save(str(tmp_path / "state"))
        again = model.new_state(2)
        again.load(str(tmp_path / "state"))
        for s in (state, again):
            assert s.position == 30
            torch.testing.assert_close(model(idx[:, 30:], state=s)[0], whole[:, 30:])
        with torch.autocast("cpu", torch.bfloat16):
            model(idx[:, :1], state=again)
    message = r"full \(2, 2, 8\); full \(2, 2, 8\).* there, .*full \(1, 2, 8\).* here"
    with pytest.raises(ValueError, match=message):
        model.new_state(1).load(str(tmp_path / "state"))
    with pytest.raises(ValueError, match="the state is for 2 sequences, idx has 1"):
        model(idx[:1], state=state)


def test_documents_are_separate():
    """With docs, each document's logits are those of the document alone (positions differ only by a shift)."""
    model = tiny(dtype=torch.float64)
    idx = torch.randint(0, 61, (1, 45))
    docs = torch.tensor([[0] * 13 + [1] * 20 + [2] * 12])
    together = model(idx, docs=docs)[0]
    alone = torch.cat([model(part)[0] for part in idx.split([13, 20, 12], 1)], 1)
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(idx)[0][:, 13:], alone[:, 13:])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiles_whole(backend, monkeypatch):
    """torch.compile(model, fullgraph=True), forward and backward, equal to eager."""
    monkeypatch.setenv("NANOLONG_KERNELS", backend)
    torch.compiler.reset()
    model = tiny()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    idx, targets = torch.randint(0, 61, (2, 2, 20))
    results = []
    for f in (model, compiled):
        loss = f(idx, targets)[1]
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(compiled(idx)[0], model(idx)[0], rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_activation_checkpointing_changes_nothing():
    model = tiny()
    idx, targets = torch.randint(0, 61, (2, 2, 20))
    grads = []
    for on in (False, True):
        model.activation_checkpointing = on
        grads.append(torch.autograd.grad(model(idx, targets)[1], list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_low_precision_keeps_frequencies_and_weights():
    model = tiny()
    turns = model.turns.clone()
    model.compute_dtype = torch.bfloat16
    assert model(torch.randint(0, 61, (1, 9)))[0].dtype == torch.bfloat16
    assert model.wte.weight.dtype == torch.float32
    assert torch.equal(model.to(torch.bfloat16).turns, turns)


def test_generate():
    """Greedy generation is the parallel logits' argmax; a state carries on; a seed repeats; no token of the padding."""
    model = tiny()
    prompt = torch.randint(0, 61, (2, 11))
    tokens = torch.stack(list(model.generate(prompt, max_new_tokens=20, temperature=0.0)), 1)
    with torch.no_grad():
        assert torch.equal(model(torch.cat([prompt, tokens], 1))[0][:, 10:-1].argmax(-1), tokens)
    state = model.new_state(2)
    first = list(model.generate(prompt, max_new_tokens=8, state=state, temperature=0.0))
    rest = list(model.generate(first[-1][:, None], max_new_tokens=12, state=state, temperature=0.0))
    assert torch.equal(torch.stack(first + rest, 1), tokens)
    draws = [torch.stack(list(model.generate(prompt, max_new_tokens=9, seed=s)), 1) for s in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert max(int(t.max()) for t in model.generate(prompt, max_new_tokens=50, temperature=5.0, vocab_size=7)) < 7
    assert len(list(itertools.islice(model.generate(prompt), 100))) == 100  # no end of its own, past block_size
    assert len(list(model.generate(prompt, max_new_tokens=2, temperature=1e-40, min_p=1.0))) == 2
    for wrong, message in ((dict(temperature=-1), "temperature is -1"), (dict(top_k=0), "top_k is 0"),
                           (dict(top_p=0), "top_p is 0"),
                           (dict(min_p=1.5), "min_p is 1.5"), (dict(vocab_size=0), "vocab_size is 0")):
        with pytest.raises(ValueError, match=message):
            next(model.generate(prompt, **wrong))
    with pytest.raises(ValueError, match="T at least 1"):
        next(model.generate(prompt[:, :0]))


def test_sampling_cuts():
    """top_k, top_p and min_p leave exactly the tokens that they name, in the right proportions."""
    probs = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    logits = probs.log().expand(20000, 5)
    generator = torch.Generator().manual_seed(0)
    for cut, kept in ((dict(), 5), (dict(top_k=2), 2), (dict(top_k=99), 5), (dict(top_p=0.69), 2),
                      (dict(top_p=0.71), 3), (dict(top_p=0.01), 1), (dict(min_p=0.25), 3), (dict(min_p=0.0), 5),
                      (dict(top_k=3, min_p=0.35), 2)):
        freq = torch.bincount(sample_token(logits, generator, **cut), minlength=5) / 20000
        expected = probs * (torch.arange(5) < kept)
        assert (freq[kept:] == 0).all() and (freq - expected / expected.sum()).abs().max() < 0.015, cut
    assert (sample_token(logits[:10], generator, temperature=0) == 0).all()


def test_accounting():
    """Parameters by hand, FLOPs against torch's own counter (plain matrices) plus the attention by its formula."""
    config = GPTConfig(**{**TINY, "tie_embeddings": False})
    model = GPT(config)
    per_layer = 32 * (4 + 2 * 2) * 8 + 32 * 32 + 3 * 32 * config.n_inner + 2 * 32
    assert model.num_params() == 2 * per_layer + 32 + 2 * 61 * 32
    assert model.num_params(embeddings=False) == model.num_params() - 61 * 32
    from torch.utils.flop_counter import FlopCounterMode
    T = 64
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 61, (1, T)))
    counts = counter.get_flop_counts()["Global"]
    matrices = sum(n for op, n in counts.items() if "mm" in str(op))
    attention = 4 * 2 * 4 * 8 * (T + 1) / 2
    assert model.flops_per_token(T) == 3 * (matrices / T + attention)
    groups = model.param_groups(0.1, 1e-3)
    assert sum(p.numel() for g in groups for p in g["params"]) == model.num_params()
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    matrices = ("wqkv", "wo", "w_gate", "w_up", "w_down", "lm_head")
    assert decayed == {n for n in names.values() if any(part in n for part in matrices)}


def test_files(tmp_path):
    """What save_pretrained writes, from_pretrained reads; everything wrong with a folder is one line."""
    model = tiny("neox")
    folder = str(tmp_path / "m")
    model.save_pretrained(folder, extra={"tokenizer": "byte"})
    again = GPT.from_pretrained(folder)
    assert again.config == model.config
    idx = torch.randint(0, 61, (1, 9))
    assert torch.equal(again(idx)[0], model(idx)[0])
    assert GPT.from_pretrained(folder, block_size=999).config.block_size == 999
    assert json.loads((tmp_path / "m/config.json").read_text())["tokenizer"] == "byte"
    for override, message in ((dict(n_embed=3), "no field n_embed"), (dict(bias=False), "no such tensor"),
                              (dict(n_inner=64), r"\(32, 128\) there, the model has \(32, 64\)")):
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(folder, **override)
    right = (tmp_path / "m/config.json").read_text()
    for text, message in (("[]", "has model_type None"), (right.replace('"n_layer": 2', '"n_layer": "x"'), "wrong type"),
                          (right.replace('"rope_base"', '"rope_bas"'), "rope_bas"),
                          ("{", "not valid JSON")):
        (tmp_path / "m/config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(folder)
    (tmp_path / "m/config.json").write_text(right)
    data = (tmp_path / "m/model.safetensors").read_bytes()
    (tmp_path / "m/model.safetensors").write_bytes(data[:len(data) // 2])
    with pytest.raises(ValueError, match="cut short or damaged"):
        GPT.from_pretrained(folder)
    (tmp_path / "m/model.safetensors").unlink()
    with pytest.raises(ValueError, match="is missing"):
        GPT.from_pretrained(folder)
    with pytest.raises(ValueError, match="no config.json"):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("change, message", [
    (dict(n_head=5), "n_embd 32 is not divisible by n_head 5"),
    (dict(n_kv_head=3), "n_head 4 is not divisible by n_kv_head 3"),
    (dict(n_layer=0), "n_layer is 0"), (dict(n_inner=0), "n_inner is 0"), (dict(head_dim=300), "head_dim is 300"),
    (dict(attention="flash"), "one of full, window, infini, blockwise or a"),
    (dict(norm="batch"), "one of rmsnorm, layernorm"), (dict(head_dim=9), "rotates 9 dims"),
    (dict(rope_fraction=0.1), "rotates 0 dims"), (dict(position="sin"), "one of rope, xpos, alibi, none")])
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**TINY, **change})
