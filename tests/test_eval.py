"""eval.py: perplexity of a real pretrained model against published figures, both commands whole, mistakes in one line."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
from data.tokenizer import load_tokenizer
from eval import main, overrides, read_tokens, recompute_nll, stream_nll
from model import GPT

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


@pytest.mark.parametrize("argv, message", [
    (["--attention", "4-60"], "--attention 4-60: write as-is, full, SINKS.WINDOW as in 4.1020"),
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
