"""search.py: every individual keeps the order and the grid; the same seed gives the same result, however it is run."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import search
from helpers import randomised
from kernels import rope_frequencies
from model import GPT, GPTConfig, read_rope_scaling
from search import N_HATS, Options, choose_space, cross, main, mutate, offspring

TINY = ["--generations", "3", "--population", "8", "--parents", "4", "--mutations", "3", "--crossovers", "3",
        "--windows", "2", "--batch-size", "2", "--device", "cpu", "--name", "x"]
LONGROPE = dict(rope_type="longrope", factor=4.0, original_max_position_embeddings=32, n_hat=3,
                long_factor=[1, 1, 1.5, 2, 2.5, 3, 4, 4.5], short_factor=[1, 1, 1, 1, 1, 1.25, 1.5, 1.5])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a text; results go there. save(**fields) writes a tiny model and names it."""
    monkeypatch.setattr(search, "RESULTS", tmp_path / "out")
    rng = np.random.default_rng(1)
    (tmp_path / "text.txt").write_text("".join(chr(97 + int(26 * x ** 2)) for x in rng.random(3000)))

    def save(**fields):
        torch.manual_seed(0)
        sizes = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=257, block_size=32)
        model = randomised(GPT(GPTConfig(**sizes | fields)))
        model.save_pretrained(str(tmp_path / "model"), dict(tokenizer="byte"))
        return ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt")]

    save.folder = tmp_path
    return save


def read(folder, name="x"):
    result = json.loads((folder / "out" / f"{name}.json").read_text())
    return result | dict(options=None)


def test_individuals_keep_the_order_and_the_grid():
    """Mutants and crossovers of many generations, without a model: with a fitness that is random."""
    c = GPTConfig(n_layer=1, n_head=1, n_embd=32, vocab_size=8, block_size=64)
    space, opt, rng = choose_space(Options(target=512), c), Options(), np.random.default_rng(0)
    theta = rope_frequencies(32, 1e4)[0]
    assert space.top == 1000 and space.seeds["pi"] == (0, *[800] * 16)  # 1.25 x 8, in hundredths
    for name, kind in (("ntk", "ntk"), ("yarn", "yarn")):
        x = dict(rope_type=kind, factor=8) | (dict(original_max_position_embeddings=64) if kind == "yarn" else {})
        expected = 100 * theta / rope_frequencies(32, 1e4, x)[0]
        assert (torch.tensor(space.seeds[name][1:]) - expected).abs().max() <= 0.501
    population, known, values = [], set(), set()
    for generation in range(12):
        made = offspring(generation, population, known, space, opt)
        assert len(made) == (64 if generation == 0 else 32) and not known & {*made}
        assert generation > 0 or len({*made}) == 64 and {*space.seeds.values()} <= {*made}
        for n_hat, *factors in made:
            assert n_hat in N_HATS and len(factors) == 16 and all(type(f) is int for f in factors)
            assert 100 <= factors[0] and factors == sorted(factors) and factors[-1] <= 1000
            values |= {*factors}
        known |= {*made}
        population = [made[i] for i in rng.permutation(len(made))[:16]] + population[:16]
    assert len(values) > 300 and min(values) < 105 and max(values) > 990


def test_mutation_and_crossover():
    space = choose_space(Options(target=512), GPTConfig(n_layer=1, n_head=1, n_embd=32, vocab_size=8, block_size=64))
    rng = np.random.default_rng(0)
    a, b = (0, *range(110, 910, 50)), (64, *range(120, 920, 50))
    assert mutate(a, space, 0, rng) == a
    changed = np.mean([np.not_equal(mutate(a, space, 0.3, rng), a) for _ in range(300)], 0)
    assert np.all((0.2 < changed) & (changed < 0.4))
    children = np.array([cross(a, b, rng) for _ in range(300)])
    assert np.all((children == a) | (children == b))
    share = (children == a).mean(0)
    assert np.all((0.4 < share) & (share < 0.6))  # the parents' order never hinders: each gene is either's
    low, high = (0, *[100] * 16), (0, *[100] * 8, *[900] * 8)
    assert {cross(low, high, rng)[1:9] for _ in range(20)} == {(100,) * 8}


@torch.no_grad()
def test_result(place, capsys):
    """Its perplexities are those of a model loaded with it, on the tokens past the trained length."""
    argv = [*place(), *TINY, "--target", "128"]
    main(argv)
    result = read(place.folder)
    ids = torch.tensor(list((place.folder / "text.txt").read_bytes()))
    n = len(ids) - 128
    windows = torch.stack([ids[at:at + 129] for at in (n // 4, 3 * n // 4)])
    scaling = read_rope_scaling(str(place.folder / "out/x.json"), 32)
    assert scaling == result["rope_scaling"] and scaling["factor"] == 4 and scaling["short_factor"] == [1] * 8
    factors = {name: scaling | dict(long_factor=seed["factors"], n_hat=0) for name, seed in result["seeds"].items()}
    yarn = dict(rope_type="yarn", factor=4, original_max_position_embeddings=32)
    for given, ppl in ((scaling, result["perplexity"]), (None, result["references"]["as-is"]),
                       (yarn, result["references"]["yarn"]),
                       *((factors[name], result["seeds"][name]["perplexity"]) for name in factors)):
        model = GPT.from_pretrained(str(place.folder / "model"), rope_scaling=given)
        nll = F.cross_entropy(model(windows[:, :-1])[0][:, -96:].mT, windows[:, -96:], reduction="none").double()
        assert ppl == pytest.approx(float(nll.mean().exp()), rel=1e-4)
    best = [x["best"] for x in result["history"]]
    assert best[0] <= min(seed["perplexity"] for seed in result["seeds"].values())
    assert best == sorted(best, reverse=True) and best[-1] == result["perplexity"] < best[0]
    assert [x["generation"] for x in result["history"]] == [0, 1, 2, 3] and result["history"][0]["new"] == 8
    out = capsys.readouterr().out
    assert "generation 3/3 | best" in out and "measured on 2 x 96 tokens" in out
    pytest.importorskip("matplotlib")
    assert (place.folder / "out/x.png").stat().st_size > 10_000


def test_the_same_however_it_is_run(place, capsys):
    """Again by the same seed, cut short and gone on with, and more generations later; another seed finds another."""
    argv = [*place(), *TINY, "--target", "128"]
    main(argv)
    whole = read(place.folder)
    state = (place.folder / "out/x.state.json").read_text()
    main([*argv, "--name", "again"])
    assert read(place.folder, "again") == whole
    main([*argv, "--name", "cut", "--generations", "1"])
    main([*argv, "--name", "cut", "--batch-size", "1"])
    assert "going on after generation 1" in capsys.readouterr().out
    cut = read(place.folder, "cut")
    assert cut.pop("history")[:2] == whole["history"][:2] and cut["measured"] == whole["measured"]
    assert cut["rope_scaling"] == whole["rope_scaling"] and cut["perplexity"] == pytest.approx(whole["perplexity"])
    main(argv)  # nothing left to do
    assert read(place.folder) == whole and (place.folder / "out/x.state.json").read_text() == state
    main([*argv, "--name", "other", "--seed", "2"])
    assert read(place.folder, "other")["rope_scaling"] != whole["rope_scaling"]
    with pytest.raises(SystemExit, match="x.state.json is of another search, seed 1 -> 2: give another --name"):
        main([*argv, "--seed", "2"])
    place(rope_base=5000.0)
    with pytest.raises(SystemExit, match="is of another search, model_weights"):
        main(argv)


def test_ranks_share_the_work(place):
    """Two processes by torchrun find what one does: each measures half."""
    argv = [*place(), *TINY, "--target", "64", "--generations", "1"]
    script = place.folder / "run.py"
    script.write_text("import pathlib, search, sys; search.RESULTS = pathlib.Path(sys.argv.pop(1)); search.main()")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([*command, str(place.folder / "two"), *argv], capture_output=True, text=True, timeout=300,
                          env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=os.getcwd()))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("generation 1/1") == 1  # rank 0 alone speaks
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    main(argv)
    torch.set_num_threads(threads)
    one, two = (json.loads((place.folder / out / "x.json").read_text()) for out in ("out", "two"))
    assert one == two and one["measured"] > 10


@torch.no_grad()
def test_second_extension(place):
    """A fine-tuned model: what is found multiplies its long factors; its short ones, and what it says else, stay."""
    main([*place(rope_scaling=LONGROPE), *TINY, "--target", "256"])
    result = read(place.folder)
    scaling = result["rope_scaling"]
    assert scaling["factor"] == 8 and scaling["short_factor"] == LONGROPE["short_factor"] and result["targets"] == 224
    assert result["seeds"]["pi"]["factors"] == [2 * f for f in LONGROPE["long_factor"]]  # from 128 to 256 tokens
    ratio = [a / b for a, b in zip(scaling["long_factor"], LONGROPE["long_factor"])]
    assert all(1 <= x <= 2.5 and abs(100 * x - round(100 * x)) < 1e-3 for x in ratio) and ratio == sorted(ratio)
    assert set(result["references"]) == {"as-is"} and "attention_factor" not in scaling
    GPT.from_pretrained(str(place.folder / "model"), rope_scaling=scaling)


@torch.no_grad()
def test_short_factors(place):
    """They are searched at the trained length, or a shorter one; the long ones, and n_hat, stay."""
    argv = [*place(rope_scaling=LONGROPE), *TINY, "--short"]
    main([*argv, "--attention-factor", "1.25"])
    result = read(place.folder)
    scaling = result["rope_scaling"]
    assert {key: scaling[key] for key in scaling if key not in ("short_factor", "attention_factor")} == {
        key: LONGROPE[key] for key in LONGROPE if key != "short_factor"}
    assert scaling["attention_factor"] == 1.25 and result["length"] == result["targets"] == 32
    assert 1 <= scaling["short_factor"][0] and scaling["short_factor"] == sorted(scaling["short_factor"])
    assert scaling["short_factor"][-1] <= 4 and scaling["short_factor"] != LONGROPE["short_factor"]
    assert result["history"][0]["best"] <= min(x["perplexity"] for x in result["seeds"].values())
    assert result["seeds"]["long"]["factors"] == [min(4, f) for f in LONGROPE["long_factor"]]
    main([*argv, "--target", "24", "--name", "y", "--max-factor", "1.3"])
    result = read(place.folder, "y")
    assert result["length"] == 24 and result["rope_scaling"]["short_factor"][-1] <= 1.3
    assert result["seeds"]["as-is"]["perplexity"] != pytest.approx(result["seeds"]["unscaled"]["perplexity"], rel=1e-6)


@pytest.mark.parametrize("fields, argv, message", [
    ({}, ["--target", "32"], "--target 32: it must be more than 32 tokens, which the model reaches"),
    (dict(rope_scaling=LONGROPE), ["--target", "128"], "--target 128: it must be more than 128 tokens"),
    ({}, ["--target", "5000"], "0 place.s. for 2 windows of 5001 tokens inside one text, the longest has 3000"),
    (dict(position="xpos"), [], "position is 'xpos'"),
    (dict(position="alibi"), [], "position is 'alibi': there are factors to search for 'rope' only"),
    (dict(rope_scaling=dict(rope_type="linear", factor=2)), [], "rope_scaling is 'linear': the search begins with"),
    (dict(attention="window", window=28, sinks=4), [], "attention 'window' sees 32 tokens at most"),
    ({}, ["--short"], "--short with rope_scaling None: only a longrope scaling has short factors"),
    (dict(rope_scaling=LONGROPE), ["--short", "--target", "33"], "--target 33 with --short: the short factors serve"),
    ({}, ["--parents", "9"], "parents is 9, the first population 8"), ({}, ["--name", "a/b"], "--name a/b is the stem"),
    ({}, ["--mutation-p", "1.5"], "mutation_p is 1.5"), ({}, ["--windows", "0"], "windows is 0: it must be at least 1"),
    ({}, ["--max-factor", "inf"], "max_factor is inf: it must be"), ({}, ["--model", "nowhere"], "nowhere: no such folder"),
    ({}, ["--text", "nowhere.txt"], "cannot read nowhere.txt"), ({}, ["--text"], "--text without a value")])
def test_mistakes(place, fields, argv, message):
    with pytest.raises(SystemExit, match=message):
        main([*place(**fields), *TINY, *argv])
    assert not list((place.folder / "out").glob("*"))  # it is found before any work


def test_damaged_state(place):
    argv = [*place(), *TINY, "--target", "64", "--generations", "0"]
    main(argv)
    (place.folder / "out/x.state.json").write_text("{")
    with pytest.raises(SystemExit, match="x.state.json is damaged: delete it"):
        main(argv)
    assert math.isfinite(read(place.folder)["perplexity"])
