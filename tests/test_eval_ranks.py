"""eval.py and sample.py under torchrun: ranks that share a text by ring attention give what one process gives."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import eval as evaluation
import sample
from helpers import randomised, run_ranks
from model import GPT, GPTConfig

ROOT = Path(sample.__file__).resolve().parent
TINY = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, vocab_size=320, block_size=64)
MODELS = dict(full={}, window=dict(attention="window", window=20, sinks=3), infini=dict(attention="infini", segment=16),
              mixed=dict(attention="window,full", window=20, sinks=0), tokens=dict(sink_tokens=2),
              dynamic=dict(rope_scaling=dict(rope_type="dynamic", factor=1.0, original_max_position_embeddings=64)))
PROMPT = "To be, or not to be: that is the question. " * 60  # 2580 tokens
GREEDY = ["--temperature", "0", "--seed", "1", "--max-new-tokens", "12", "--json", "--prompt", PROMPT]
SAMPLES = {"greedy-" + name: ["--model", name, *GREEDY] for name in ("full", "window", "infini", "mixed")} | {
    "seed": ["--model", "window", "--prompt", PROMPT, "--seed", "3", "--max-new-tokens", "40", "--save-state", "{}seed"],
    "signal": ["--model", "full", "--prompt", PROMPT, "--seed", "3", "--save-state", "{}signal"],
    "short": ["--model", "infini", "--prompt", "ab"], "none": [], "chat": ["--chat"], "load": ["--load-state", "x"],
    "sinks": ["--model", "tokens", *GREEDY], "dynamic": ["--model", "dynamic", *GREEDY],
    "empty": ["--model", "full", "--prompt", ""], "gone": ["--model", "gone", "--prompt", "a"],
    "device": ["--device", "mps"]}
EVALS = {f"perplexity-{name}": ["perplexity", "--model", name, "--tokens", "961", "--bins", "4", "--samples", "7"]
         for name in ("full", "window", "infini")} | {
    "lengths": ["lengths", "--model", "mixed", "--lengths", "64", "800", "--targets", "40", "--copy", "24", "--windows", "3",
                "--batch-size", "2", "--attention", "as-is", "blockwise", "2+30"],
    "passkey-full": ["passkey", "--model", "full", "--lengths", "300", "333", "--depths", "0.5", "--samples", "3"],
    "passkey-infini": ["passkey", "--model", "infini", "--lengths", "300", "--depths", "0", "--samples", "2", "--no-memory"],
    "tokens": ["perplexity", "--model", "infini", "--tokens", "100"], "recompute": ["perplexity", "--attention", "recompute+9"],
    "uneven": ["lengths", "--model", "full", "--lengths", "64", "100", "--targets", "9", "--copy", "0", "--windows", "2"],
    "chunk": ["perplexity", "--chunk", "77"], "stream": ["stream"], "diagnose": ["passkey", "--model", "infini", "--diagnose"],
    "brief": ["passkey", "--model", "long", "--lengths", "255", "300"], "sinks": ["perplexity", "--model", "tokens"],
    "text": ["perplexity", "--model", "full", "--text", "gone.txt"]}


def call(name, argv, where):
    """sample.py or eval.py -> the exit code or words, stdout and stderr."""
    out, err = (TextIOWrapper(BytesIO(), encoding="utf-8") for _ in range(2))
    text = str(ROOT / "data/sample/test/10146.txt")
    with redirect_stdout(out), redirect_stderr(err):
        try:
            if argv and argv[0] in ("perplexity", "lengths", "passkey", "stream"):
                text = ["--text", text] if argv[0] in ("perplexity", "lengths") and "--text" not in argv else []
                code = evaluation.main([*argv, *text, "--name", name])
            else:
                code = sample.main([x.replace("{}", f"{where}/") for x in argv])
        except SystemExit as e:
            code = e.code
    out.flush(), err.flush()
    return code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()


def worker(rank, world, folder, ports, jobs):
    """Each of jobs as torchrun would start it, in a process group of its own."""
    dist.destroy_process_group()
    os.chdir(folder)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    share, said, evaluation.RESULTS = sample.read_together, {}, Path("ranks")

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return share(*args)

    sys.stdin = open(os.devnull)
    for port, (name, argv) in zip(ports, jobs.items()):
        os.environ["MASTER_PORT"] = str(port)
        sample.read_together = interrupted if name == "signal" else share
        said[name] = call(name, argv, "ranks")
        assert not dist.is_initialized()
    os.environ["MASTER_PORT"] = str(ports[-1])
    dist.init_process_group("gloo")  # run_ranks wants one back
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for name, fields in (MODELS | dict(long=dict(attention="infini", segment=64))).items():
        torch.manual_seed(3)
        randomised(GPT(GPTConfig(**TINY | fields))).save_pretrained(str(folder / name), {"tokenizer": "byte"})
    (folder / "ranks").mkdir()
    (folder / "one").mkdir()
    return folder


@pytest.fixture(scope="module")
def said(folder):
    """What 4 ranks said and returned to each job: {name: (words of each rank, stdout, stderr of each)}."""
    jobs = SAMPLES | {f"eval-{name}": argv for name, argv in EVALS.items()}
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(len(jobs) + 1)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    ranks = run_ranks(4, worker, str(folder), ports, jobs, timeout=240)
    return {name: list(zip(*(each[name] for each in ranks))) for name in jobs}


@pytest.fixture
def one(folder, monkeypatch):
    """one(name, argv): the same by this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(evaluation, "RESULTS", Path("one"))
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield lambda name, argv: call(name, argv, "one")


def equal(ours, theirs, path=""):
    """Two results are the same but for times and memory, numbers to 1e-6."""
    if isinstance(theirs, dict):
        keys = theirs.keys() - {"tok_per_s", "prompt_tok_per_s", "memory", "state", "state_bytes"}
        assert ours.keys() - theirs.keys() <= {"ranks"}
        for key in keys:
            equal(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), path
        for i, pair in enumerate(zip(ours, theirs)):
            equal(*pair, f"{path}[{i}]")
    else:
        assert ours == (pytest.approx(theirs, rel=1e-6, abs=2e-6) if isinstance(theirs, float) else theirs), path


@pytest.mark.parametrize("name", [name for name in EVALS if "-" in name or name == "lengths"])
def test_ranks_evaluate_as_one_process(said, one, folder, name):
    codes, out, err = said[f"eval-{name}"]
    assert codes == (None,) * 4 and out[1:] == err[1:] == ("",) * 3 and "wrote ranks/" in err[0]
    _, printed, _ = one(name, EVALS[name])
    assert out[0].splitlines()[0].split("  tok_per_s")[0] == printed.splitlines()[0].split("  tok_per_s")[0]
    ours, theirs = (json.loads((folder / path).read_text()) for path in (f"ranks/eval-{name}.json", f"one/{name}.json"))
    theirs["options"]["name"] = f"eval-{name}"
    assert ours["ranks"] == 4 and "ranks" not in theirs
    equal(ours, theirs)


@pytest.mark.parametrize("name", ["greedy-full", "greedy-window", "greedy-infini", "greedy-mixed"])
def test_ranks_read_a_prompt_as_one_process(said, one, name):
    codes, out, err = said[name]
    assert codes == (0,) * 4 and out[1:] == err[1:] == ("",) * 3
    shared = 2560 if "infini" in name else 2576
    assert f"prompt: 4 ranks read the first {shared} of 2580 tokens together" in err[0] and "prompt: 2580 tokens" in err[0]
    ours, theirs = json.loads(out[0]), json.loads(one(name, SAMPLES[name])[1])
    assert len(set(ours["tokens"])) > 3
    equal(ours, theirs)


def test_ranks_draw_and_save_as_one_process(said, one, folder):
    codes, out, err = said["seed"]
    code, text, words = one("seed", SAMPLES["seed"])
    assert codes == (0,) * 4 and out == (text, "", "", "") and len(text) > len(PROMPT) + 20
    assert "saved: ranks/seed" in err[0] and err[0].count("generated: 40 tokens") == 1
    ours, theirs = (load_file(folder / where / "seed") for where in ("ranks", "one"))
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)
    more = [one("more", ["--model", "window", "--load-state", f"{where}/seed", "--max-new-tokens", "30"])[1]
            for where in ("ranks", "one")]
    assert more[0] == more[1] != ""


def test_ctrl_c_while_ranks_read_ends_with_the_report_and_the_state(said, one):
    codes, out, err = said["signal"]
    assert codes == (0,) * 4 and out == (PROMPT, "", "", "") and err[1:] == ("",) * 3
    assert "generated: 0 tokens" in err[0] and "saved: ranks/signal" in err[0] and "after 2576 tokens" in err[0]
    whole = one("seed", ["--model", "full", "--prompt", PROMPT, "--seed", "3", "--max-new-tokens", "9"])[1]
    rest = one("rest", ["--model", "full", "--load-state", "ranks/signal", "--max-new-tokens", "9"])[1]
    assert PROMPT + rest == whole


@pytest.mark.parametrize("name, words", [
    ("short", "a prompt of 2 tokens with 4 ranks: too short to share, which takes 65 at least with attention infini"),
    ("none", "a prompt of 1 tokens with 4 ranks: too short to share, which takes "), ("chat", "--chat with 4 ranks: "),
    ("load", "--load-state with 4 ranks: they share the beginning of one text only"),
    ("sinks", "sink_tokens 2 with 4 ranks per sequence"), ("dynamic", "with 4 ranks per sequence and dynamic rope_scaling"),
    ("empty", "the prompt from --prompt is empty"), ("gone", "cannot load gone: gone: no such folder"),
    ("device", "--device mps, but torch"),
    ("eval-tokens", "--tokens 100 with 4 ranks and attention infini: all but the last are read, and must be a "
                    "multiple of 64: use --tokens 65 or 129"),
    ("eval-uneven", "100 tokens with 4 ranks per sequence: each takes two chunks of equal size, so they must be a multiple of 8: "
                    "use 96 or 104"),
    ("eval-recompute", "--attention recompute+9 with 4 ranks: its passes are short and stand alone"),
    ("eval-chunk", "--chunk 77 with 4 ranks: a text is read in one pass"),
    ("eval-stream", "eval.py stream with 4 ranks: a stream is one token after another"),
    ("eval-diagnose", "--diagnose with 4 ranks"), ("eval-sinks", "sink_tokens 2 with 4 ranks per sequence"),
    ("eval-brief", "too short to share, which takes 257: use --lengths 263 or more"), ("eval-text", "cannot read gone.txt")])
def test_mistakes_are_one_line(said, name, words):
    codes, out, _ = said[name]
    assert out[1:] == ("",) * 3
    for code in codes:
        assert words in code and "\n" not in code


def test_torchrun(folder):
    """Text of rank 0 alone on stdout; and a rank that dies as the others read ends them, each with one line."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    argv = ["--model", "window", "--seed", "3", "--max-new-tokens", "40"]
    done = subprocess.run([*command, str(ROOT / "sample.py"), *argv], input=PROMPT.encode(), cwd=folder, env=env,
                          capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.decode().startswith(PROMPT), done.stderr.decode()
    assert done.stderr.count(b"generated: 40 tokens") == 1
    (folder / "dies.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import sample
inner = sample.GPT.hidden
def hidden(*args, **options):
    if os.environ["RANK"] == "1":
        os._exit(7)
    return inner(*args, **options)
sample.GPT.hidden = hidden
sample.main(sys.argv[1:])
""")
    done = subprocess.run([*command, "dies.py", *argv, "--prompt", PROMPT], cwd=folder, env=env, capture_output=True, timeout=120)
    assert done.returncode == 1 and done.stdout == b""
    assert len(re.findall(b"error on rank 0: another rank died or does not answer", done.stderr)) == 1
