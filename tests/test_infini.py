"""
Infini-attention in the model: one pass is the paper's formulas written out token by token, at every layer; the state's
size; recomputation by segments; memory carried between training sequences; pretrained models that get a memory. That a
stream equals one pass, saved states, graphs and leaks are in test_stream.py, the kernels in test_memory.py.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import LiveBytes, randomised

from model import GPT, GPTConfig

TINY = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, vocab_size=61, block_size=64, attention="infini", segment=8)


def tiny(dtype=torch.float64, **overrides):
    torch.manual_seed(1)
    return randomised(GPT(GPTConfig(**TINY | overrides)).to(dtype))


def written_out(model, idx):
    """
    Infini-attention as its paper says it (arXiv 2404.07143), one token and one head at a time, the segment in lists, the
    memory a matrix that is written when the segment is full. idx (T,) -> the hidden states after each block (T, C).
    """
    c, w = model.config, dict(model.named_parameters())
    H, G, D, N = c.n_head, c.n_kv_head, c.head_dim, c.segment
    theta = c.rope_base ** (-torch.arange(D // 2).double() / (D // 2))

    def rotate(x, position):  # (D,)
        a, b, angle = x[:D // 2], x[D // 2:], position * theta
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])

    def norm(x, name):
        return x / (x.pow(2).mean() + c.norm_eps).sqrt() * w[name + ".weight"]

    def sigma(x, weight):
        if c.memory_norm is not None:
            x = x / (x.pow(2).mean() + c.norm_eps).sqrt() * w[weight]
        return F.elu(x) + 1

    def read(s, M, z):
        return s @ M / (s @ z) if z.any() else torch.zeros_like(s)

    state = [[dict(keys=[], values=[], M=torch.zeros(D, D).double(), z=torch.zeros(D).double()) for _ in range(G)]
             for _ in range(c.n_layer)]
    outputs = [[] for _ in range(c.n_layer)]
    for t, token in enumerate(idx):
        x = w["wte.weight"][token]
        for i in range(c.n_layer):
            p = f"blocks.{i}."
            q, k, v = (w[p + "attn.wqkv.weight"] @ norm(x, p + "norm_attn")).view(-1, D).split([H, G, G])
            heads, gate = [], w[p + "attn.beta"].sigmoid()
            for g, s in enumerate(state[i]):
                s["keys"].append(k[g]), s["values"].append(v[g])
            for h in range(H):
                s = state[i][h // (H // G)]
                first = t - len(s["keys"]) + 1
                scores = torch.stack([rotate(q[h], t) @ rotate(key, first + j) / D**0.5 for j, key in enumerate(s["keys"])])
                local = scores.softmax(0) @ torch.stack(s["values"])
                heads.append(gate[h] * read(sigma(q[h], p + "attn.memory_q"), s["M"], s["z"]) + (1 - gate[h]) * local)
            x = x + w[p + "attn.wo.weight"] @ torch.cat(heads)
            y = norm(x, p + "norm_mlp")
            x = x + w[p + "mlp.w_down.weight"] @ (F.silu(w[p + "mlp.w_gate.weight"] @ y) * (w[p + "mlp.w_up.weight"] @ y))
            outputs[i].append(x)
            for s in state[i]:
                if len(s["keys"]) == N:
                    keys = [sigma(key, p + "attn.memory_k") for key in s["keys"]]
                    old = [read(key, s["M"], s["z"]) for key in keys]
                    for key, value, known in zip(keys, s["values"], old):
                        s["M"] = s["M"] + torch.outer(key, value - known if c.memory_rule == "delta" else value)
                        s["z"] = s["z"] + key
                    s["keys"], s["values"] = [], []
    return [torch.stack(x) for x in outputs]


@torch.no_grad()
@pytest.mark.parametrize("rule, norm", [("delta", None), ("linear", None), ("delta", 3.0)])
def test_one_pass_is_the_paper(rule, norm):
    model, idx = tiny(memory_rule=rule, memory_norm=norm, segment=7), torch.randint(0, 61, (1, 31))
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, y: seen.append(y[0]))
    model(idx)
    for layer, (actual, expected) in enumerate(zip(seen, written_out(model, idx[0]), strict=True)):
        assert (actual - expected).norm() < 1e-12 * expected.norm(), layer


@torch.no_grad()
def test_without_its_memory_it_is_attention_inside_segments():
    model, idx = tiny(), torch.randint(0, 61, (2, 30))
    gated = model(idx)[0]
    for block in model.blocks:
        block.attn.beta.fill_(-torch.inf)
    local = tiny(attention="full")
    local.load_state_dict(model.state_dict(), strict=False)
    alone = torch.cat([local(part)[0] for part in idx.split(8, 1)], 1)
    torch.testing.assert_close(model(idx)[0], alone, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(gated[:, 8:], alone[:, 8:]) and torch.equal(model.gates(), torch.zeros(3, 4))


@torch.no_grad()
def test_the_state_has_the_papers_size_at_any_length():
    """n_layer G D (D + 1) floats and the segment's keys and values; for the paper's 12 layers, 8 heads of 128: 1.6M."""
    model, idx = tiny(torch.float32), torch.randint(0, 61, (3, 300))
    state = model.new_state(3)
    size = state.nbytes
    for n in (1, 7, 64, 228):
        model(idx[:, :n], state=state)
        tensors = [x for layer in state.layers for x in (layer.M, layer.z)]
        assert sum(x.numel() for x in tensors) == 3 * 3 * 2 * 8 * 9 and all(x.dtype == torch.float32 for x in tensors)
        assert state.nbytes == size == 4 * (3 * 3 * 2 * 8 * 9 + 2 * 3 * 3 * 8 * 2 * 8)
    paper = GPT(GPTConfig(n_layer=12, n_head=8, n_embd=1024, vocab_size=64, attention="infini", segment=1)).new_state(1)
    assert sum(x.numel() for layer in paper.layers for x in layer.memory.values()) == 1_585_152
    assert tiny().to(torch.bfloat16).new_state(1).layers[0].M.dtype == torch.float32


@torch.no_grad()
def test_far_into_a_text():
    """Rotated or not in the cache, chunked or not: a segment at position 2^40 is the one near the start."""
    model, idx, far = tiny(), torch.randint(0, 61, (1, 60)), 2**40
    expected = model(idx)[0]
    for sizes in ([1] * 60, [13, 20, 1, 26]):
        state = model.new_state(1)
        state.position = far
        parts = [model(part, state=state)[0] for part in idx.split(sizes, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_docs", [False, True])
def test_recomputing_segments_changes_nothing(reduction, with_docs):
    model, (idx, targets) = tiny(), torch.randint(0, 61, (2, 2, 45))
    targets[:, :9] = -100
    docs = torch.tensor([[0] * 11 + [1] * 13 + [2] * 21, [0] * 24 + [3] * 21]) if with_docs else None
    results = []
    for model.activation_checkpointing in (False, True):
        loss = model(idx, targets, docs=docs, reduction=reduction)[1]
        grads = torch.autograd.grad((loss * torch.linspace(1, 2, loss.numel()).view(loss.shape)).sum(), list(model.parameters()))
        results.append([loss, *grads])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_recomputing_segments_takes_the_memory_of_one():
    """Per segment more, no more than its memories, ids and loss are kept: not its activations."""
    model = tiny(torch.float32, n_layer=2, segment=32)
    model.activation_checkpointing, peaks = True, {}
    for n in (4, 16):
        idx = torch.randint(0, 61, (2, 2, n * 32))
        with LiveBytes() as live:
            model(*idx)[1].backward()
        peaks[n] = live.peak
        model.zero_grad()
    states = 4 * 2 * 2 * 2 * 8 * 9  # M and z, of layers, batch, kv heads
    activations = 4 * 2 * 32 * 2 * (32 + 64 + 32 + 2 * 128)  # of the blocks alone, and not all of these
    per_segment = (peaks[16] - peaks[4]) / 12
    assert per_segment < 3 * states < activations


def test_memory_carried_between_sequences():
    """The second of two training sequences sees the first, as one pass does, and sends no gradient into it."""
    model, idx, targets = tiny(), *torch.randint(0, 61, (2, 2, 48))
    whole = model(idx, targets, reduction="none")[1]
    for model.activation_checkpointing in (False, True):
        state = model.new_state(2)
        first = model(idx[:, :24], targets[:, :24], state=state, reduction="none")[1]
        state.position = 0
        second = model(idx[:, 24:], targets[:, 24:], state=state, reduction="none")[1]
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-9, atol=1e-9)
        second.sum().backward()
        first.sum().backward()  # nothing that it needs has been overwritten
        state.layers[0].clear(torch.tensor([True, False]))
        assert state.position == 24
        assert not state.layers[0].M[0].any() and state.layers[0].M[1].any() and not state.layers[0].z[0].any()
    with pytest.raises(ValueError, match="pass state, or positions and docs, not both"):
        model(idx, targets, state=model.new_state(2), docs=torch.zeros_like(idx))
    with pytest.raises(ValueError, match="state at position 0 and 20 tokens: both must be multiples of segment 8"):
        model(idx[:, :20], targets[:, :20], state=model.new_state(2))


@torch.no_grad()
def test_a_fold_cut_short_can_be_made_again():
    """Whichever layer's fold fails, no memory has changed: the call made again gives what one pass gives."""
    model, idx = tiny(), torch.randint(0, 61, (1, 20))
    for layer in range(3):
        state = model.new_state(1)
        parts = [model(idx[:, :7], state=state)[0]]
        model.blocks[layer].attn.fold = lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            model(idx[:, 7:8], state=state)
        del model.blocks[layer].attn.fold
        parts += [model(part, state=state)[0] for part in idx[:, 7:].split(1, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(idx)[0], rtol=1e-10, atol=1e-10)


def test_a_segment_compiles_whole():
    torch.compiler.reset()
    model, (idx, targets) = tiny(torch.float32, memory_norm=2.0), torch.randint(0, 61, (2, 2, 40))
    model.activation_checkpointing, results = True, []
    for step in (model._segment_loss, torch.compile(model._segment_loss, fullgraph=True, backend="aot_eager")):
        model._segment_loss = step
        loss = model(idx, targets)[1]
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.compiler.reset()
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_its_gradient():
    model = tiny(memory_norm=2.0)
    idx, targets = torch.randint(0, 61, (2, 2, 40))
    grads = torch.autograd.grad(model(idx, targets)[1], list(model.parameters()))
    for (name, p), grad in zip(model.named_parameters(), grads):
        direction, losses = torch.randn_like(p), []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * 1e-6 * direction
                losses.append(model(idx, targets, reduction="none")[1].double().mean())
                p -= sign * 1e-6 * direction
        torch.testing.assert_close((grad * direction).sum(), (losses[0] - losses[1]) / 2e-6, rtol=1e-4, atol=1e-8, msg=name)


@torch.no_grad()
def test_documents():
    """Whole segments of one document and of the next: each is as if alone. Inside a segment, a document sees none other."""
    model, idx = tiny(), torch.randint(0, 61, (1, 56))
    docs = torch.tensor([[5] * 24 + [2] * 32])
    alone = torch.cat([model(part)[0] for part in idx.split([24, 32], 1)], 1)
    torch.testing.assert_close(model(idx, docs=docs)[0], alone, rtol=1e-10, atol=1e-10)
    docs[:, 24:28] = 5
    first, idx[:, :28] = model(idx, docs=docs)[0], 7
    assert torch.equal(model(idx, docs=docs)[0][:, 28:], first[:, 28:])


def test_the_gates_have_a_group_of_their_own():
    model = tiny(attention="infini,full", memory_norm=8.0)
    groups = {group["name"]: group for group in model.param_groups(0.1, 2e-3, gate_lr=30.0)}
    assert [p.shape for p in groups["gates"]["params"]] == 2 * [(4,), (8,), (8,)] and groups["gates"]["weight_decay"] == 0
    assert groups["gates"]["lr"] == pytest.approx(0.06) and groups["matrices"]["lr"] == 2e-3
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))
    assert "gates" not in {group["name"] for group in tiny(attention="full").param_groups(0.1, 2e-3)}
    assert GPT(GPTConfig(**TINY, memory_beta=-4.0)).gates().flatten().tolist() == pytest.approx([0.0180] * 12, rel=1e-2)


@torch.no_grad()
def test_a_pretrained_model_gets_a_memory(tmp_path):
    """With gates that start low it is nearly the model that it was, inside a segment exactly its shares apart."""
    plain, idx = tiny(torch.float32, attention="full"), torch.randint(0, 61, (1, 32))
    plain.save_pretrained(str(tmp_path))
    added = GPT.from_pretrained(str(tmp_path), attention="infini", segment=32, memory_beta=-4.0)
    assert added.blocks[2].attn.beta.tolist() == [-4.0] * 4
    near = GPT.from_pretrained(str(tmp_path), attention="infini", segment=32, memory_beta=-30.0)
    torch.testing.assert_close(near(idx)[0], plain(idx)[0], rtol=1e-4, atol=1e-4)
    some = GPT.from_pretrained(str(tmp_path), attention="full,infini", memory_norm=4.0)
    assert some.blocks[0].attn.beta is None and some.blocks[1].attn.beta.tolist() == [0.0] * 4
    assert some.blocks[1].attn.memory_k.tolist() == [4.0] * 8
    added.blocks[0].attn.beta.fill_(0.5)
    added.save_pretrained(str(tmp_path))
    other = GPT.from_pretrained(str(tmp_path), attention="infini,window", window=16, sinks=0, memory_norm=4.0)
    assert [block.attn.beta is None for block in other.blocks] == [False, True, False]
    assert other.blocks[0].attn.beta.tolist() == [0.5] * 4 and other.blocks[2].attn.memory_q.tolist() == [4.0] * 8
    torch.testing.assert_close(GPT.from_pretrained(str(tmp_path), attention="full")(idx)[0], plain(idx)[0])


@pytest.mark.parametrize("change, message", [
    (dict(segment=0), "segment is 0: it must be at least 1"),
    (dict(memory_rule="hebb"), "memory_rule is 'hebb': it must be one of delta, linear"),
    (dict(memory_norm=0.0), "memory_norm is 0.0: it must be more than 0"),
    (dict(sink_logit=True), "sink_logit True with attention 'infini'"),
    (dict(sink_tokens=2), "sink_tokens 2 with attention 'infini'")])
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**TINY | change)
