"""eval.py: a real pretrained model against what is known of it, every command whole, mistakes in one line."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
from data.passkey.task import passkey
from data.tokenizer import load_tokenizer
from eval import Passkey, answers, main, overrides, read_tokens, recompute_nll, score, stream_nll
from helpers import randomised
from model import GPT, GPTConfig

STORIES, BOOK = "data/stories260k", "data/sample/test/10146.txt"


def test_streaming_a_real_model(smollm2):
    """
    SmolLM2-135M on a test book of PG-19, the second half of 3,000 tokens. The figures come from another implementation.
    A window without the first token collapses; with one or four sinks it stays near full attention.
    """
    ids = read_tokens([BOOK], load_tokenizer(smollm2), 3001)[0]
    for attention, expected in (("full", 21.678), ("0+256", 48.874), ("1+255", 24.867), ("4+252", 24.876)):
        nll = stream_nll(GPT.from_pretrained(str(smollm2), **overrides(attention)), ids, 1000)[0]
        assert math.exp(nll[1500:].mean()) == pytest.approx(expected, rel=1e-3), attention


@torch.no_grad()
def test_nll_is_that_of_the_logits():
    ids = torch.arange(700) * 37 % 500
    model = GPT.from_pretrained(STORIES)
    expected = F.cross_entropy(model(ids[None, :-1])[0][0], ids[1:], reduction="none")
    nll, memory = stream_nll(model, ids, 100)
    torch.testing.assert_close(nll, expected, rtol=1e-4, atol=1e-4)
    assert [m["position"] for m in memory] == [100, 200, 300, 400, 500, 600, 699]
    alone = recompute_nll(model, ids, 50, [10, 400])
    torch.testing.assert_close(alone[0], expected[10], rtol=1e-4, atol=1e-4)
    fresh = model(ids[None, 351:401])[0][0, -1:]
    torch.testing.assert_close(alone[1], F.cross_entropy(fresh, ids[401:402]), rtol=1e-4, atol=1e-4)


def test_perplexity_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "RESULTS", tmp_path)
    main(["perplexity", "--model", STORIES, "--text", BOOK, "--tokens", "601", "--attention", "full", "4+60", "recompute+64",
          "--samples", "5", "--bins", "3", "--chunk", "128", "--name", "x"])
    result = json.loads((tmp_path / "x.json").read_text())
    full, window, fresh = result["variants"]
    ids, words, nbytes = read_tokens([BOOK], load_tokenizer(STORIES), 601)
    nll = stream_nll(GPT.from_pretrained(STORIES), ids, 600)[0].double()
    assert full["ppl"] == pytest.approx(float(nll.mean().exp()), rel=1e-4)
    assert full["word_ppl"] == pytest.approx(float((nll.sum() / words).exp()), rel=1e-3)
    assert full["bits_per_byte"] == pytest.approx(float(nll.sum()) / math.log(2) / nbytes, rel=1e-4)
    assert [b["end"] for b in full["by_position"]] == [200, 400, 600]
    assert len({m["state"] for m in window["memory"]}) == 1 < len({m["state"] for m in full["memory"]})
    assert len(fresh["sample_nll"]) == 5 and fresh["ppl_at_samples"] == pytest.approx(
        math.exp(sum(fresh["sample_nll"]) / 5), rel=1e-4)
    assert "200..400" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_stream_command(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "RESULTS", tmp_path)
    main(["stream", "--model", STORIES, "--text", BOOK, "--attention", "4+60", "--at", "50", "400", "--new-tokens", "20",
          "--chunk", "64", "--minutes", "0.02", "--name", "y"])
    variant = json.loads((tmp_path / "y.json").read_text())["variants"][0]
    assert set(variant["decode_tok_per_s"]) == {"50", "400"} and variant["watch"][-1]["position"] > 420
    assert variant["perplexity_tok_per_s"]["parallel"] > variant["perplexity_tok_per_s"]["token by token"]
    assert {p["state"] for p in variant["watch"]} == {variant["state"]}


def tiny(attention, **options):
    sizes = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, vocab_size=300, block_size=128, window=60, segment=64)
    return randomised(GPT(GPTConfig(attention=attention, tie_embeddings=False, **sizes | options)))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["full", "window", "infini"])
def test_passkey_answers_are_the_likeliest_tokens(attention):
    """After the whole prompt of each task, whatever the chunks; ids that the tokenizer has not are never said."""
    model = tiny(attention)
    tasks = [passkey(load_tokenizer("byte"), 300, 0.2, np.random.default_rng(seed)) for seed in range(5)]
    expected = [torch.from_numpy(task.prompt) for task in tasks]
    for _ in range(6):
        expected = [torch.cat([ids, model(ids[None])[0][0, -1:, :257].argmax(-1)]) for ids in expected]
    expected = [ids[-6:].tolist() for ids in expected]
    assert len(set(map(tuple, expected))) > 1
    for chunk in (1024, 50):
        made, nbytes, shares = answers(model, tasks, Passkey(chunk=chunk), 257)
        assert made == expected and shares is None
        if attention != "full":
            assert nbytes == model.new_state(1).nbytes


@torch.no_grad()
@pytest.mark.parametrize("depth, norm", [(0.1, None), (1, None), (0.5, 2.0)])
def test_needle_share(depth, norm):
    """Against its formula over all keys at once, for the whole segments before each query, on the first layer."""
    model = tiny("infini,full", n_layer=3, memory_rule="linear", memory_norm=norm)
    tasks = [passkey(load_tokenizer("byte"), 440, depth, np.random.default_rng(seed)) for seed in range(3)]
    made, _, shares = answers(model, tasks, Passkey(diagnose=True, chunk=77), 257)
    assert shares.shape == (3, 2, 4)  # the second layer has no memory
    block, begin, end = model.blocks[0], tasks[0].needle.start, tasks[0].needle.stop
    ids = torch.cat([torch.from_numpy(np.stack([task.prompt for task in tasks])), torch.tensor(made)], 1)[:, :-1]
    q, k, _ = block.attn.wqkv(block.norm_attn(model.wte(ids))).unflatten(-1, (8, 8)).split([4, 2, 2], dim=2)
    if norm is not None:
        q, k = (x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w
                for x, w in ((q, block.attn.memory_q), (k, block.attn.memory_k)))
    q, k = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k.repeat_interleave(2, dim=2)))  # (B, T, H, D)
    expected = []
    for p in range(433, 439):
        assert depth < 1 or begin < p // 64 * 64 < end  # a part of the needle is not in the memory yet
        weights = torch.einsum("bhd,bjhd->bhj", q[:, p], k[:, :p // 64 * 64])
        expected.append(weights[..., begin:end].sum(-1) / weights.sum(-1))
    torch.testing.assert_close(shares[:, 0], torch.stack(expected).mean(0), rtol=1e-4, atol=1e-6)
    assert 0.02 < float(shares.min()) and float(shares.max()) < 0.9 and not block.attn.wqkv._forward_hooks


def test_closed_gates_forget(tmp_path, monkeypatch, capsys):
    """--no-memory: what is said before the last segment changes no answer; with the memory it does."""
    monkeypatch.setattr(evaluation, "RESULTS", tmp_path)
    model, said = tiny("infini", memory_beta=0.0), []
    monkeypatch.setattr(evaluation, "load", lambda name, fields: (model, load_tokenizer("byte")))
    inner = GPT.hidden

    def hidden(self, idx, **options):
        x = inner(self, idx, **options)
        if idx.shape[1] == 1:
            said.append(x)
        return x

    monkeypatch.setattr(GPT, "hidden", hidden)
    command = ["passkey", "--lengths", "384", "--depths", "0", "--samples", "2", "--name", "g"]
    spread = []
    for flags in (["--diagnose"], ["--no-memory", "--diagnose"]):
        said.clear()
        main(command + flags)
        spread.append(float((said[0][0] - said[0][1]).abs().max()))  # two keys, then the same 300 tokens
    assert spread[0] > 1e-3 and spread[1] == 0
    out = capsys.readouterr().out
    assert "no memory: right keys" in out and out.count("needle share at depth 0, mean and best head") == 2
    result = json.loads((tmp_path / "g.json").read_text())
    assert result["options"]["memory"] is False and len(result["variants"][0]["cells"][0]["needle_share"]) == 2


def test_passkey_scores(monkeypatch):
    """Every third key is said right, with one digit wrong, all wrong. GPT-2 says keys in one to three tokens."""
    tokenizer, seen = load_tokenizer("gpt2"), []

    def said(model, tasks, opt, vocab_size, title):
        assert len({(len(t.prompt), len(t.answer), t.needle.start) for t in tasks}) == 1 and len(tasks) <= 2
        made = []
        for task in tasks:
            key = tokenizer.decode(task.answer).decode()
            made.append(tokenizer.encode((key, key[:-1] + str((int(key[-1]) + 1) % 10), " !!!!!")[len(seen) % 3]))
            seen.append((key, tokenizer.decode(task.prompt)))
        return made, 7, None

    monkeypatch.setattr(evaluation, "answers", said)
    cells = [score(None, tokenizer, Passkey(samples=6, batch_size=2), 400, depth, "") for depth in (0, 1)]
    assert [(c["length"], c["depth"], c["state"]) for c in cells] == [(400, 0, 7), (400, 1, 7)]
    assert cells[0]["exact"] == pytest.approx(2 / 6) and cells[0]["digits"] == pytest.approx((2 + 2 * 0.8) / 6)
    assert sorted(key for key, _ in seen[:6]) == sorted(key for key, _ in seen[6:]) and len(set(seen[:6])) == 6
    other = score(None, tokenizer, Passkey(samples=6, batch_size=2, seed=2), 400, 0, "")
    assert other["depth"] == 0 and {key for key, _ in seen[:6]}.isdisjoint(key for key, _ in seen[12:])


def test_passkey_of_a_real_model(smollm2):
    """SmolLM2-135M repeats the key; but a window of 80 has forgotten one from the start of 200 tokens."""
    model = GPT.from_pretrained(str(smollm2), **overrides("4+76"))
    for depth, exact in ((0, 0), (1, 1)):
        assert score(model, load_tokenizer(smollm2), Passkey(samples=2), 200, depth, "")["exact"] == exact


def test_passkey_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "RESULTS", tmp_path)
    main(["passkey", "--model", STORIES, "--lengths", "300", "200", "--depths", "0", "1", "--samples", "3",
          "--batch-size", "2", "--attention", "as-is", "4+60", "--name", "z"])
    result = json.loads((tmp_path / "z.json").read_text())
    assert [v["attention"] for v in result["variants"]] == ["as-is", "4+60"]
    for variant in result["variants"]:
        assert [(c["length"], c["depth"]) for c in variant["cells"]] == [(300, 0), (300, 1), (200, 0), (200, 1)]
        assert all(0 <= c["exact"] <= c["digits"] <= 1 for c in variant["cells"])
    states = [[c["state"] for c in v["cells"]] for v in result["variants"]]
    assert states[0][0] > states[0][2] and len(set(states[1])) == 1
    table = capsys.readouterr().out
    assert "depth 0" in table and "depth 1" in table and "percent of 3 keys" in table
    pytest.importorskip("matplotlib")
    assert (tmp_path / "z.png").stat().st_size > 10_000


@pytest.mark.parametrize("argv, message", [
    (["--lengths", "300", "100"], "length is 100: a passkey task takes 164 tokens at least"),
    (["--lengths"], "--lengths without a value"), (["--depths", "0", "2"], "depth is 2.0: it must be in"),
    (["--samples", "0"], "samples is 0: it must be at least 1"), (["--seed", "-1"], "seed is -1: it must be at least 0"),
    (["--batch-size", "0"], "batch_size is 0: it must be at least 1"), (["--seed", str(2**63)], "must be below 2.63"),
    (["--attention", "recompute+60"], "recompute.60 keeps no state"),
    (["--no-memory"], "--no-memory with attention full of data/stories260k: only infini layers have a memory"),
    (["--diagnose"], "--diagnose with attention full")])
def test_passkey_mistakes(argv, message, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(["passkey", "--model", STORIES, "--lengths", "200", *argv])
    assert not any(tmp_path.iterdir())  # it is found before any work


@torch.no_grad()
def test_lengths_command(tmp_path, monkeypatch, capsys):
    """The same targets at every length and scaling, by the logits of one pass over so many tokens."""
    monkeypatch.setattr(evaluation, "RESULTS", tmp_path)
    (tmp_path / "yarn8.json").write_text(json.dumps({"rope_scaling": {"rope_type": "yarn", "factor": 8}}))
    main(["lengths", "--model", STORIES, "--text", BOOK, "--lengths", "256", "64", "1024", "--scaling", "as-is", "default",
          "linear", str(tmp_path / "yarn8.json"), "--targets", "32", "--windows", "3", "--batch-size", "2", "--copy", "20",
          "--name", "l"])
    result = json.loads((tmp_path / "l.json").read_text())
    tokenizer = load_tokenizer(STORIES)
    ids = tokenizer.encode(open(BOOK, encoding="utf-8").read())
    n = len(ids) - 1024  # places
    windows = torch.stack([torch.tensor(ids[at:at + 1025]) for at in (n // 6, n // 2, 5 * n // 6)])
    linear = {"rope_type": "linear", "factor": 2, "original_max_position_embeddings": 512}  # 1024 over the trained 512
    yarn = {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 512}
    assert [v["rope_scaling"] for v in result["variants"]] == [None, None, linear, yarn]
    assert [v["label"] for v in result["variants"]] == ["as-is", "default", "linear", "yarn8"]
    for variant in result["variants"]:
        model = GPT.from_pretrained(STORIES, rope_scaling=variant["rope_scaling"])
        assert [c["length"] for c in variant["cells"]] == [64, 256, 1024]
        for cell in variant["cells"]:
            x = windows[:, -cell["length"] - 1:-1].clone()
            x[:, :len(tokenizer.prefix)] = torch.tensor(tokenizer.prefix, dtype=torch.int64)
            nll = F.cross_entropy(model(x)[0][:, -32:].mT, windows[:, -32:], reduction="none").double()
            assert cell["ppl"] == pytest.approx(float(nll.mean().exp()), rel=1e-4)
            assert cell["window_nll"] == pytest.approx(nll.mean(1).tolist(), rel=1e-4)
            nbytes = len(b"".join(tokenizer.decode(w[-32:]) for w in windows))
            assert cell["bits_per_byte"] == pytest.approx(float(nll.sum()) / math.log(2) / nbytes, rel=1e-4)
    assert result["variants"][0]["cells"] == result["variants"][1]["cells"]
    ppl = [[c["ppl"] for c in v["cells"]] for v in result["variants"]]
    assert ppl[0][2] != ppl[2][2] != ppl[3][2]
    out = capsys.readouterr().out
    assert "yarn8" in out and "1024" in out and out.count("copied (guessed), %") == 4
    pytest.importorskip("matplotlib")
    assert (tmp_path / "l.png").stat().st_size > 10_000


@torch.no_grad()
@pytest.mark.parametrize("prefix", [[], [7]])
def test_copied(prefix):
    """By the logits of the whole text, and what is guessed by those of the copy alone."""
    model, windows = tiny("full"), torch.randint(0, 300, (40, 65))
    expected = torch.zeros(2)
    for window in windows:
        window = [*prefix, *window[len(prefix):].tolist()]
        text = window[:-8] + window[len(prefix):len(prefix) + 8]
        for i, x in enumerate((text, prefix + text[-8:])):
            expected[i] += (model(torch.tensor([x]))[0][0, -5:-1].argmax(-1) == torch.tensor(x[-4:])).sum()
    assert evaluation.copied(model, windows, 8, prefix, 16) == pytest.approx((expected / 160).tolist())

    class Copier:  # predicts what stood 57 tokens, the copy's distance, before the next one
        wte, output_weight, ring = model.wte, torch.eye(300), None

        def hidden(self, x, alone):
            return F.one_hot(x.roll(56, 1), 300).float()

    assert evaluation.copied(Copier(), windows, 8, [], 16)[0] == 1


def test_lengths_of_an_alibi_model(tmp_path, monkeypatch):
    """Its slopes are scaled by --alibi-scale, its attention is what --attention says, at every length."""
    monkeypatch.setattr(evaluation, "RESULTS", tmp_path)
    tiny("full", position="alibi").save_pretrained(str(tmp_path / "m"), dict(tokenizer="byte"))
    command = ["lengths", "--model", str(tmp_path / "m"), "--text", BOOK, "--lengths", "64", "512", "--windows", "3",
               "--targets", "32", "--copy", "0"]
    ppl = []
    for name, flags in (("a", []), ("b", ["--alibi-scale", "0.25"])):
        main([*command, "--attention", "as-is", "blockwise", "0+64", "--name", name, *flags])
        variants = json.loads((tmp_path / f"{name}.json").read_text())["variants"]
        assert [v["label"] for v in variants] == ["as-is", "as-is, blockwise", "as-is, 0+64"]
        ppl.append([[c["ppl"] for c in v["cells"]] for v in variants])
    assert len({x[1] for scale in ppl for x in scale}) == 6  # beyond the trained 128 all differ
    for scale in ppl:
        assert scale[0][0] == pytest.approx(scale[1][0]) == pytest.approx(scale[2][0])
    assert ppl[0][0][0] != ppl[1][0][0]


def test_copying_of_a_real_model(smollm2):
    """SmolLM2-135M copies nearly everything from 192 tokens back, and what it copies it would seldom guess."""
    windows = evaluation.read_windows([BOOK], load_tokenizer(smollm2), 4, 256)
    share, guessed = evaluation.copied(GPT.from_pretrained(str(smollm2)), windows, 64, [], 4)
    assert share > 0.9 and guessed < 0.6


@pytest.mark.parametrize("argv, message", [
    (["--lengths", "64", "10000000"], "0 place.s. for 2 windows of 10000001 tokens inside one text, the longest has"),
    (["--scaling", "default", "yarn"], "rope_scaling yarn: 64 tokens are wanted, the model was trained on 512"),
    (["--scaling", "yran"], "rope_scaling yran: it must be one of default, linear"),
    (["--scaling", '{"rope_type": "yarn", "factor": 4, "fakter": 2}'], "does not know fakter"),
    (["--lengths", "64", "128", "--targets", "65"], "--lengths 64 with --targets 65: the shortest must be at least 65"),
    (["--copy", "33"], "--lengths 64 with --copy 33: the shortest must be at least 66, or --copy at most 32"),
    (["--copy", "1"], "--copy 1: it must be 0"), (["--windows", "0"], "windows is 0: it must be at least 1"),
    (["--alibi-scale", "0.5"], "alibi_scale 0.5 needs position 'alibi'"), (["--scaling"], "--scaling without a value"),
    (["--attention", "recompute+60"], "recompute.60 keeps no state"), (["--text", "nowhere.txt"], "cannot read")])
def test_lengths_mistakes(argv, message, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(["lengths", "--model", STORIES, "--lengths", "64", "--targets", "16", "--copy", "8", "--windows", "2", *argv])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("argv, message", [
    (["--attention", "4-60"], "--attention 4-60: write as-is, full, blockwise, SINKS.WINDOW as in 4.1020"),
    (["--text", "nowhere.txt"], "cannot read nowhere.txt"), (["--text", "config"], "no .txt files in config"),
    (["--tokens", "10000000"], "tokens, --tokens is 10000000: use more text or --tokens"),
    (["a", "--model", "b"], "run a and --model b: give one of them"), (["--attention", "4+600"], "set window to 508"),
    (["--attention", "recompute+x"], "--attention recompute.x: write"), (["--name", "a/b"], "--name a/b is the stem"),
    (["--tokens", "1"], "tokens is 1: it must be at least 2"), (["--chunk", "0"], "chunk is 0: it must be at least 1")])
def test_mistakes(argv, message, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "RESULTS", tmp_path)
    model = [] if "--model" in argv else ["--model", STORIES]
    with pytest.raises(SystemExit, match=message):
        main(["perplexity", *model, *argv])
