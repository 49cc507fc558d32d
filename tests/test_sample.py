"""sample.py: what goes to stdout and stderr, how a stream ends and goes on, the model it loads, what mistakes print."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model as model_py
import sample
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig, State

EOT = 256
TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=64)
SCRIPT = Path(sample.__file__).resolve()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random byte-level model; 63 of its 320 ids are padding, drawn every fifth time if nothing forbids it."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("sample") / "step_0000010"
    GPT(GPTConfig(**TINY, vocab_size=320)).save_pretrained(str(folder), {"tokenizer": "byte"})
    return folder


@pytest.fixture(autouse=True)
def run(checkpoint, tmp_path, monkeypatch):
    """Each test starts in a folder with runs/tiny/step_0000010, and with nothing on stdin."""
    shutil.copytree(checkpoint, tmp_path / "runs/tiny/step_0000010")
    monkeypatch.chdir(tmp_path)
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield tmp_path / "runs/tiny"


@pytest.fixture
def call(capfdbinary):
    """call(*argv) -> exit code, stdout as text (which must be UTF-8), stderr as text."""
    def call(*argv):
        code = sample.main(list(argv))
        out, err = capfdbinary.readouterr()
        return code, out.decode("utf-8"), err.decode()
    return call


@pytest.fixture
def script(monkeypatch):
    """script(ids, then) makes GPT.generate yield these ids, calling then() after the last one has been written."""
    def script(ids, then=lambda: None):
        def generate(self, prompt, max_new_tokens=None, state=None, **options):
            yield from (torch.tensor([i]) for i in ids)
            then()
        monkeypatch.setattr(GPT, "generate", generate)
    return script


@pytest.fixture
def draw(monkeypatch):
    """draw(ids) makes the model draw these ids, one after the other, whatever it computes."""
    def draw(ids):
        ids = iter(ids)
        monkeypatch.setattr(model_py, "sample_token", lambda logits, *rest: torch.tensor([next(ids)]))
    return draw


def mistake(*argv) -> str:
    """The one line that sample.py with these arguments exits with."""
    with pytest.raises(SystemExit) as e:
        sample.main(list(argv))
    assert isinstance(e.value.code, str) and e.value.code and "\n" not in e.value.code
    return e.value.code


def result(call, *argv) -> dict:
    code, out, _ = call("--json", *argv)
    assert code == 0 and out.count("\n") == 1 and out.endswith("\n")
    return json.loads(out)


# ----------------------------------------------------------------------------------------------------------------------
# the text


def test_stream_is_prompt_and_continuation_in_utf8(call):
    argv = ["--prompt", "Caf\u00e9 ", "--seed", "3", "--max-new-tokens", "300"]
    r = result(call, *argv)
    code, out, err = call(*argv)
    assert code == 0 and out == "Caf\u00e9 " + r["text"] and "Caf" not in err
    assert call(*argv, "--no-echo")[1] == r["text"]
    documents = "".join(chr(i) for i in r["tokens"]).split(chr(EOT))
    assert r["text"] == "\n\n".join(d.encode("latin-1").decode("utf-8", "replace") for d in documents)
    assert "\ufffd" in r["text"] and len(r["tokens"]) == 300


def test_padding_of_the_vocabulary_is_never_drawn(call):
    assert max(result(call, "--seed", "1", "--max-new-tokens", "400")["tokens"]) < load_tokenizer("byte").vocab_size


@pytest.mark.parametrize("ids, pieces", [
    ([0x61, 0xC3, 0xA9, 0x62], ["a", "", "\u00e9", "b", ""]),  # held back until it is whole
    ([0xF0, 0x9F, 0x98, 0x80], ["", "", "", "\U0001f600", ""]),
    ([0xE2, 0x82, 0x61, 0x80], ["", "", "\ufffda", "\ufffd", ""]),  # can never become a character
    ([0xFF, 0xC0], ["\ufffd", "\ufffd", ""]),
    ([0x61, 0xE2, 0x82], ["a", "", "", "\ufffd"]),  # cut short at the end
    ([0x61, EOT, 0x62], ["a", "\n\n", "b", ""]),  # a document's end is a blank line
    ([0xC3, EOT, 0xA9], ["", "\ufffd\n\n", "\ufffd", ""]),  # and no character spans it
])
def test_each_token_is_written_at_once_and_whole(call, script, monkeypatch, ids, pieces):
    written, write = [], sample.write
    monkeypatch.setattr(sample, "write", lambda text: (written.append(text), write(text)))
    script(ids)
    code, out, _ = call()
    assert code == 0 and written == pieces and out == "".join(pieces)


def test_stdout_is_flushed_after_each_token(script, monkeypatch):
    seen = []
    script(b"abc", then=lambda: seen.append(Path("out").read_text()))
    with open("out", "w") as out:  # buffered, as stdout is when it is no terminal
        monkeypatch.setattr(sys, "stdout", out)
        assert sample.main([]) == 0 and seen == ["abc"]


def test_same_seed_same_text(call):
    first, again, other = (result(call, "--seed", s, "--max-new-tokens", "40")["tokens"] for s in ("7", "7", "8"))
    assert first == again != other


def test_a_drawn_seed_is_printed_and_repeats_the_text(call):
    _, out, err = call("--max-new-tokens", "40")
    seed = err.split("seed: ")[1].split()[0]
    assert call("--max-new-tokens", "40", "--seed", seed)[1] == out
    assert call("--max-new-tokens", "40")[1] != out


@pytest.mark.parametrize("greedy", [["--temperature", "0"], ["--top-k", "1"], ["--top_k=1"], ["--top-p", "1e-6"],
                                    ["--min-p", "0.9999999"]])
def test_greedy_is_the_argmax_of_the_whole_pass(call, checkpoint, greedy):
    model, ids = GPT.from_pretrained(str(checkpoint)), list(b"To be")
    for _ in range(20):
        ids.append(model(torch.tensor([ids]))[0][0, -1, :257].argmax().item())
    assert result(call, "--prompt", "To be", "--max-new-tokens", "20", *greedy)["tokens"] == ids[5:]


def test_no_prompt_begins_at_a_documents_start(call, checkpoint):
    first = GPT.from_pretrained(str(checkpoint))(torch.tensor([[EOT]]))[0][0, -1, :257].argmax().item()
    r = result(call, "--max-new-tokens", "1", "--temperature", "0")
    assert r["tokens"] == [first] and r["prompt"] == "" and r["prompt_tokens"] == 1


def test_json_object(call):
    r = result(call, "tiny", "--prompt", "\u00e9", "--max-new-tokens", "5", "--seed", "2")
    assert set(r) == {"prompt", "text", "tokens", "seed", "prompt_tokens", "new_tokens", "prompt_tok_per_s",
                      "tok_per_s", "stopped", "state_bytes", "model", "step"}
    assert (r["prompt"], r["prompt_tokens"], r["new_tokens"], len(r["tokens"])) == ("\u00e9", 2, 5, 5)
    assert (r["seed"], r["stopped"], r["step"], Path(r["model"])) == (2, False, 10, Path("runs/tiny/step_0000010"))
    assert r["prompt_tok_per_s"] > 0 and r["tok_per_s"] > 0
    assert r["state_bytes"] == 2 * 2 * 64 * 32 * 4  # keys and values, 2 layers, a buffer of 64 tokens of 32 floats


# ----------------------------------------------------------------------------------------------------------------------
# stderr: what is said before, amid and after the text


def test_stderr_announces_and_reports(call):
    _, _, err = call("--prompt", "abc", "--max-new-tokens", "10", "--seed", "5")
    before, after = err.split("\n\n")
    for line in ("model: runs/tiny/step_0000010, 0.04M parameters, block_size 64, tokenizer byte", "device: ",
                 "dtype: ", "seed: 5 (--seed)", "state: 0 B now, 512 B per token"):
        assert f"\n{line}" in f"\n{before}", line
    prompt, generated, memory = after.splitlines()
    assert prompt.startswith("prompt: 3 tokens, ") and prompt.endswith(" tok/s")
    assert generated.startswith("generated: 10 tokens, ") and generated.endswith(" tok/s")
    assert re.fullmatch(r"memory: peak [\d.]+ [MG]iB, state 32.0 KiB after 12 tokens", memory)


@pytest.mark.parametrize("n_prompt, n_new, warnings", [(4, 60, 0), (4, 61, 1), (4, 90, 1), (70, 3, 1)])
def test_one_warning_past_the_block_size(call, n_prompt, n_new, warnings):
    code, _, err = call("--prompt", "x" * n_prompt, "--max-new-tokens", str(n_new))
    assert code == 0 and err.count("warning:") == warnings
    assert warnings == 0 or f"{max(65, n_prompt + 1)} tokens, trained on block_size 64" in err
    assert warnings == 0 or "--window 60 --sinks 4\n" in err


def test_dtype_is_what_was_asked_for(call, monkeypatch):
    kinds, stream = [], sample.stream
    monkeypatch.setattr(sample, "stream", lambda model, *rest: (
        kinds.append((model.wte.weight.dtype, model.new_state(1).layers[0].k.dtype)), stream(model, *rest))[1])
    for dtype in ("float32", "bfloat16"):
        err = call("--max-new-tokens", "3", "--device", "cpu", "--dtype", dtype)[2]
        assert f"dtype: {dtype} (--dtype {dtype})" in err
    assert kinds == [(torch.float32,) * 2, (torch.bfloat16,) * 2]


@pytest.mark.parametrize("nbytes, text", [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 29, "1.5 GiB"),
                                          (5000 << 40, "5000.0 TiB")])
def test_size(nbytes, text):
    assert sample.size(nbytes) == text


# ----------------------------------------------------------------------------------------------------------------------
# how a stream ends


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("argv, code", [([], 0), (["--max-new-tokens", "9"], 130)])
def test_a_signal_ends_the_stream_with_the_report(call, script, sig, argv, code):
    before = {s: signal.signal(s, handler) for s, handler in
              ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL))}
    script(b"ab\xe2", then=lambda: os.kill(os.getpid(), sig))
    try:
        got, out, err = call("--prompt", "> ", *argv)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    assert got == code and out == "> ab\ufffd" and "\ngenerated: 3 tokens, " in err


def test_a_signal_leaves_a_json_object_of_what_there_is(call, script):
    script(b"ab", then=lambda: os.kill(os.getpid(), signal.SIGTERM))
    code, out, _ = call("--json", "--max-new-tokens", "9")
    r = json.loads(out)
    assert code == 130 and (r["text"], r["tokens"], r["new_tokens"], r["stopped"]) == ("ab", [97, 98], 2, True)


def test_a_signal_during_the_prompt(call, script):
    script([], then=lambda: os.kill(os.getpid(), signal.SIGTERM))
    code, out, err = call("--prompt", "ab")
    assert code == 0 and out == "ab" and "prompt: 2 tokens, too few to time\ngenerated: 0 tokens" in err


def start(*argv, **kwargs):
    """sample.py as a process; SIGINT is reset because a shell's background jobs ignore it."""
    return subprocess.Popen([sys.executable, SCRIPT, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **kwargs)


def test_ctrl_c_ends_an_endless_process():
    p = start("--prompt", "caf\u00e9", stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONIOENCODING": "latin-1"})
    begin = os.read(p.stdout.fileno(), 5)
    while len(begin) < 50 and (more := os.read(p.stdout.fileno(), 50)):
        begin += more
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    err = err.decode()
    assert p.returncode == 0, err
    assert (begin + out).decode("utf-8").startswith("caf\u00e9")
    assert [line.split(":")[0] for line in err.splitlines()[-3:]] == ["prompt", "generated", "memory"]
    assert "Traceback" not in err and "kernels: " in err


def test_a_closed_pipe_ends_the_process_quietly():
    p = start(stdin=subprocess.DEVNULL)
    p.stdout.read(20)
    p.stdout.close()
    err = p.stderr.read().decode()
    assert p.wait(timeout=60) == 0
    assert err.splitlines()[-1].startswith(("state: ", "warning: ")), err


def test_a_mistake_is_one_line_and_exit_code_1():
    p = start("--prompt", b"caf\xe9", stdin=subprocess.DEVNULL)
    out, err = p.communicate(timeout=60)
    assert (p.returncode, out) == (1, b"")
    assert err.decode().splitlines() == ["the prompt from --prompt is not UTF-8: see the byte at offset 3"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert "No space left on device" in mistake("--prompt", "x")


# ----------------------------------------------------------------------------------------------------------------------
# the prompt


def pipe(data: bytes):
    """A stdin that is a pipe holding `data`."""
    r, w = os.pipe()
    os.write(w, data)
    os.close(w)
    return open(r)


@pytest.mark.parametrize("data, text", [
    (b"one\n\ntwo\n", "one\n\ntwo"), (b"one\r\n", "one"), (b"one\n\n", "one\n"), (b"one", "one"),
    (b"\xef\xbb\xbfone", "one"), ("\u00e9\u4e2d".encode(), "\u00e9\u4e2d"), (b" ", " ")])
def test_prompt_from_file_pipe_and_redirection(monkeypatch, data, text):
    Path("p.txt").write_bytes(data)
    assert sample.read_prompt("FILE:p.txt") == text
    for argument in (None, "-"):
        with pipe(data) as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            assert sample.read_prompt(argument) == text
        with open("p.txt") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            assert sample.read_prompt(argument) == text


def test_prompt_leaves_stdin_alone(monkeypatch):
    with pipe(b"unread") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert sample.read_prompt("given") == "given"
        assert stdin.read() == "unread"
    monkeypatch.setattr(sys, "stdin", None)  # closed
    assert sample.read_prompt(None) is None
    assert "stdin: it is closed" in mistake("--prompt", "-")


def test_prompt_is_taken_literally(call):
    for prompt in ("None", "-x", "--json", "a\n"):
        assert result(call, f"--prompt={prompt}", "--max-new-tokens", "1")["prompt"] == prompt


@pytest.mark.parametrize("data", [b"", b"\n"])
def test_an_empty_prompt_is_a_mistake(monkeypatch, data):
    Path("empty.txt").write_bytes(data)
    assert "from --prompt is empty" in mistake("--prompt", "")
    assert "from empty.txt is empty" in mistake("--prompt", "FILE:empty.txt")
    with pipe(data) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert "from stdin is empty" in mistake()


def test_a_prompt_that_is_not_utf8_names_the_byte(monkeypatch):
    Path("latin.txt").write_bytes("\u00e9 ".encode() + b"caf\xe9!")
    assert "from latin.txt is not UTF-8: byte 0xe9 at offset 6 of 8" in mistake("--prompt", "FILE:latin.txt")
    assert "not UTF-8: see the byte at offset 6" in mistake("--prompt", "\u00e9 caf\udce9!")
    with pipe(b"\xff") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert "from stdin is not UTF-8: byte 0xff at offset 0 of 1" in mistake()


def test_a_prompt_file_that_cannot_be_read():
    assert "prompt from none.txt: No such file" in mistake("--prompt", "FILE:none.txt")
    assert "prompt from runs: Is a directory" in mistake("--prompt", "FILE:runs")


# ----------------------------------------------------------------------------------------------------------------------
# options and checkpoints


@pytest.mark.parametrize("argv, words", [
    (["--temperature", "-0.1"], "temperature is -0.1, it must be at least 0"),
    (["--temperature", "nan"], "temperature is nan"), (["--top-k", "0"], "top_k is 0, it must be at least 1"),
    (["--top-p", "0"], "top_p is 0.0, it must be in (0, 1]"), (["--top-p", "1.01"], "top_p is 1.01"),
    (["--min-p", "1.01"], "min_p is 1.01, it must be in [0, 1]"), (["--min-p", "-0.1"], "min_p is -0.1"),
    (["--seed", "-1"], "--seed is -1"), (["--seed", str(2**63)], f"--seed is {2**63}"),
    (["--max-new-tokens", "0"], "--max-new-tokens is 0: it must be at least 1"),
    (["--json"], "add --max-new-tokens 100"),
    (["--window", "0"], "window is 0: it must be at least 1"),
    (["--sinks", "-1"], "sinks is -1: it must be at least 0"),
    (["--blockwise", "--window", "9"], "--blockwise has no window and no sinks"),
    (["--rope-scaling", "yarn"], "rope_scaling yarn lacks its factor"),
    (["--rope-scaling", '{"rope_type": "longrope", "factor": 2}'], "lacks short_factor, long_factor"),
    (["tiny", "--model", "x"], "run tiny and --model x: give one of them"),
    (["--chat", "--json", "--max-new-tokens", "3"], "--chat writes replies as they come, --json one object"),
    (["--chat", "--no-echo"], "--no-echo: a chat echoes nothing, leave it or --chat away"),
    (["--chat", "--save-state", "s"], "leave them or --chat away"),
    (["--chat", "--load-state", "s"], "not a conversation"),
    (["--system", "x"], "--system is the first message of a chat: add --chat"),
    (["--save-state", "none/s"], "--save-state none/s: it must be a file, in a folder that is there"),
    (["--save-state", "runs"], "--save-state runs: it must be a file"),
    (["--model", "none/of/these"], "cannot load none/of/these: "),
    (["--model", "gone"], "cannot load gone: gone: no such folder"),
    (["--window", "61"], "sinks 4 + window 61 is more than block_size 64"),
    (["--window", "60", "--sinks", "5"], "sinks 5 + window 60 is more than block_size 64"),
    (["--sinks", "2"], "--sinks 2 belong to a window, its attention is full: add --window 62"),
    (["--chat"], "tokenizer byte has no chat template: leave --chat away"),
    (["--load-state", "none"], "none cannot be read as a saved state"),
])
def test_an_option_out_of_range(argv, words, capfd):
    assert words in mistake(*argv) and capfd.readouterr().out == ""


def test_an_option_out_of_range_writes_no_state():
    assert "top_k is 0" in mistake("--top-k", "0", "--save-state", "s", "--prompt", "x") and not Path("s").exists()


@pytest.mark.parametrize("argv", [["--top-p", "1"], ["--min-p", "0"], ["--top-k", "1000"], ["--seed", str(2**63 - 1)]])
def test_an_option_at_the_end_of_its_range(call, argv):
    assert result(call, "--max-new-tokens", "3", *argv)["new_tokens"] == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_such_device():
    assert "--device cuda" in mistake("--device", "cuda")


def test_kernels_that_cannot_run(monkeypatch):
    monkeypatch.setenv("NANOLONG_KERNELS", "cuda")
    assert "NANOLONG_KERNELS='cuda' is unknown" in mistake()


def copy(run: Path, step: str, age: float = 0) -> Path:
    """A copy of the tiny run's checkpoint, saved `age` seconds ago."""
    folder = shutil.copytree("runs/tiny/step_0000010", run / step)
    then = (folder / "model.safetensors").stat().st_mtime - age
    os.utime(folder / "model.safetensors", (then, then))
    return folder


def test_the_last_complete_checkpoint_is_found(run):
    assert sample.find_checkpoint("tiny") == sample.find_checkpoint("runs/tiny") == Path("runs/tiny/step_0000010")
    assert sample.find_checkpoint(str(run)) == run / "step_0000010"
    copy(run, "step_0000009")
    copy(run, ".tmp_step_0000011")
    (copy(run, "step_0000012") / "model.safetensors").unlink()
    assert sample.find_checkpoint("tiny").name == "step_0000010"
    copy(run, "step_9999999")
    copy(run, "step_10000000")
    assert sample.find_checkpoint("tiny").name == "step_10000000"
    assert sample.find_checkpoint("tiny/step_0000009").name == "step_0000009"


def test_the_run_saved_last_is_the_default(run):
    copy(Path("runs/older"), "step_0000099", age=60)
    assert sample.find_checkpoint(None).parent.name == "tiny"
    copy(Path("runs/newer"), "step_0000001", age=-60)
    assert sample.find_checkpoint(None).parent.name == "newer"


def test_a_folder_of_another_name_is_a_checkpoint_too(call, run):
    shutil.move(run / "step_0000010", "mine")
    r = result(call, "mine", "--max-new-tokens", "2")
    assert (r["model"], r["step"]) == ("mine", None)


def test_no_such_run_names_what_there_is(run):
    copy(Path("runs/other"), "step_0000003")
    line = mistake("tinny")
    assert line == ("no such run: tinny; runs with checkpoints: other (step_0000003) tiny (step_0000010); "
                    "to train one: python train.py")
    (run / "step_0000010/config.json").unlink()
    assert mistake("tiny").startswith("runs/tiny holds no complete checkpoint; runs with checkpoints: other (")


@pytest.mark.parametrize("name, keep", [("model.safetensors", 0.5), ("model.safetensors", 0), ("config.json", 0.5),
                                        ("config.json", 0)])
def test_a_checkpoint_cut_short(run, name, keep):
    path = run / "step_0000010" / name
    data = path.read_bytes()
    path.write_bytes(data[:int(keep * len(data))])
    line = mistake("tiny")
    assert line.startswith("cannot load runs/tiny/step_0000010: ") and name in line


@pytest.mark.parametrize("change, words", [
    ({"tokenizer": "bite"}, "unknown tokenizer 'bite' (did you mean byte?)"),
    ({"tokenizer": "gone/tokenizer.json"}, "gone/tokenizer.json: no such file"),
    ({"tokenizer": None}, "config.json names no tokenizer"),
    ({"tokenizer": 3}, "not int"),
    ({"tokenizer": "gpt2"}, "tokenizer gpt2 has 50257 ids, the model's vocab_size is 320"),
    ({"n_layer": 3}, "fit its config.json: "),
    ({"vocab_size": 257}, "fit its config.json: wte.weight is (320, 32)"),
    ({"attention": "half"}, "attention is 'half'"),
])
def test_a_wrong_config(run, change, words):
    path = run / "step_0000010/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert words in mistake()


# ----------------------------------------------------------------------------------------------------------------------
# pretrained models, windows


def change(run: Path, **fields):
    path = run / "step_0000010/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_nothing_trained_streams_the_shipped_model(call):
    shutil.rmtree("runs")
    code, out, err = call("--max-new-tokens", "600", "--seed", "1")
    assert code == 0 and len(out) > 1000 and "warning" not in err
    assert "no run in runs/: streaming from" in err and "to train one: python train.py" in err
    assert "constant (window 508 + 4 sinks)" in err and err.count("no run in runs/") == 1
    assert "constant (window 100 + 4 sinks)" in call("--window", "100", "--max-new-tokens", "3")[2]
    assert "constant (window 508 + 2 sinks)" in call("--sinks", "2", "--max-new-tokens", "3")[2]


def test_any_models_folder(call, run):
    greedy = ["--temperature", "0", "--max-new-tokens", "9"]
    one, other = (result(call, *where, *greedy) for where in ([], ["--model", "runs/tiny/step_0000010"]))
    assert one["tokens"] == other["tokens"] and other["model"] == "runs/tiny/step_0000010"
    text = result(call, "--model", str(sample.SHIPPED), *greedy[:2], "--max-new-tokens", "20")["text"]
    assert text.startswith(" Once upon a time, there was a little girl")


def test_a_pretrained_model_without_a_tokenizer():
    shutil.copytree(sample.SHIPPED, "llama")
    os.remove("llama/tokenizer.json")
    assert mistake("--model", "llama") == "cannot load llama: tokenizer.json is missing"
    Path("llama/tokenizer.model").touch()
    assert mistake("--model", "llama").startswith("cannot load llama: tokenizer.json is missing; convert its tokenizer."
                                                  "model: AutoTokenizer.from_pretrained(folder).save_pretrained(fol")


def test_a_run_folder_is_a_model(call, run):
    copy(run, "step_0000020")
    (run / "config.json").write_text("{}")  # the run's own
    assert result(call, "--model", "runs/tiny", "--max-new-tokens", "2")["step"] == 20


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("argv", [[], ["--temperature", "0"]])
def test_weights_that_diverged(run, value, argv):
    path = run / "step_0000010/model.safetensors"
    tensors = load_file(path)
    tensors["blocks.1.mlp.w_up.weight"][3, 4] = value
    save_file(tensors, path)
    assert mistake(*argv) == ("cannot load runs/tiny/step_0000010: blocks.1.mlp.w_up.weight is not finite: its "
                              "training diverged, take an earlier step")


def test_a_window_beyond_the_block_size_is_told(call):
    told = "warning: window 65, trained on block_size 64: distances beyond it were never trained\n"
    argv = ["--sinks", "0", "--max-new-tokens", "70", "--window"]
    assert call(*argv, "65")[2].count(told) == 1 and "warning" not in call(*argv, "64")[2]


@pytest.mark.parametrize("argv, sinks", [([], 4), (["--sinks", "0"], 0), (["--sinks", "9"], 9)])
def test_a_window_streams_without_end_at_constant_memory(call, checkpoint, argv, sinks):
    model = GPT.from_pretrained(str(checkpoint), attention="window", window=20, sinks=sinks)
    r = result(call, "--window", "20", *argv, "--prompt", "ab", "--temperature", "0", "--max-new-tokens", "150")
    seen = torch.tensor([[*b"ab", *r["tokens"][:-1]]])
    assert r["tokens"] == model(seen)[0][0, 1:, :257].argmax(-1).tolist()
    _, _, err = call("--window", "20", *argv, "--max-new-tokens", "150")
    before, after = (line.split("state")[1].split("KiB")[0] for line in err.splitlines() if "state" in line)
    assert before.removeprefix(":") == after and f"KiB, constant (window 20 + {sinks} sinks)" in err
    assert "warning" not in err and r["state_bytes"] == model.new_state(1).nbytes


def test_sinks_alone_for_a_model_of_windows(call, run):
    change(run, attention="window", window=20, sinks=1)
    assert "constant (window 20 + 1 sinks)" in call("--max-new-tokens", "3")[2]
    assert "constant (window 20 + 7 sinks)" in call("--max-new-tokens", "3", "--sinks", "7")[2]
    assert "constant (window 30 + 4 sinks)" in call("--max-new-tokens", "3", "--window", "30")[2]


def test_a_hybrid_announces_both_parts(call, run):
    change(run, attention="window,full", window=20, sinks=1)
    err = call("--max-new-tokens", "3")[2]
    assert ("256 B per token: attention window,full keeps every key and value in 1 of 2 layers, the others are "
            "constant (window 20 + 1 sinks)") in err
    assert call("--max-new-tokens", "70")[2].count("warning:") == 1


def test_cuda_graphs_are_told_about(call):
    if not torch.cuda.is_available():
        assert "cuda graphs: off (they need CUDA and no full attention)" in call("--max-new-tokens", "3")[2]
    assert "cuda graphs: off (--no-cuda-graphs)" in call("--max-new-tokens", "3", "--no-cuda-graphs")[2]


def test_cuda_graphs_reach_the_model(call, monkeypatch):
    wanted = []
    monkeypatch.setattr(GPT, "generate", lambda self, *args, cuda_graphs, **options: wanted.append(cuda_graphs) or [])
    call(), call("--no-cuda-graphs")
    assert wanted == [True, False]


def test_a_long_prompt_is_fed_as_generate_feeds_it(call, checkpoint):
    ids = list(range(32, 126)) * 60  # 5640 tokens: 5 chunks of 1024 and a rest
    model = GPT.from_pretrained(str(checkpoint), attention="window", window=20, sinks=4)
    r = result(call, "--prompt", bytes(ids).decode(), "--window", "20", "--temperature", "0", "--max-new-tokens", "8")
    assert r["prompt_tokens"] == 5640
    assert r["tokens"] == [t.item() for t in model.generate(torch.tensor([ids]), 8, temperature=0, vocab_size=257)]


def test_the_prefix_begins_a_text_once(call, run, draw):
    tokenizers = pytest.importorskip("tokenizers")
    hf = tokenizers.Tokenizer(tokenizers.models.BPE({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, [], ignore_merges=True))
    hf.add_special_tokens(["<s>", "</s>"])
    hf.decoder = tokenizers.decoders.ByteLevel()
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    hf.save("tokenizer.json")
    change(run, tokenizer="tokenizer.json")
    model = GPT.from_pretrained("runs/tiny/step_0000010")
    for prompt, ids in (([], [0]), (["--prompt", "ab"], [0, 2, 3])):
        want = [t.item() for t in model.generate(torch.tensor([ids]), 6, temperature=0, vocab_size=4)]
        for new in range(1, 6):  # whatever the break: the prefix is not put in the middle
            first = result(call, *prompt, "--temperature", "0", "--max-new-tokens", str(new), "--save-state", "s")
            assert first["prompt_tokens"] == len(ids)
            rest = result(call, "--temperature", "0", "--max-new-tokens", str(6 - new), "--load-state", "s")
            assert first["tokens"] + rest["tokens"] == want
    draw([2, 1, 3, 0, 2, 0])
    assert call("--max-new-tokens", "5")[1] == "a\n\nb\n\na"  # another document


# ----------------------------------------------------------------------------------------------------------------------
# a saved state goes on as if there had been no break


@pytest.mark.parametrize("how", [["--temperature", "0"], ["--seed", "5"], ["--seed", "5", "--top-p", "0.8"]])
@pytest.mark.parametrize("attention", [[], ["--window", "20"], ["--window", "20", "--sinks", "0"]])
def test_a_broken_stream_is_the_unbroken_one(call, attention, how):
    argv, draws = [*attention, *how], [x for x in how if x not in ("--seed", "5")]
    whole = call(*argv, "--prompt", "ab", "--max-new-tokens", "120")[1]
    out, load = call(*argv, "--prompt", "ab", "--max-new-tokens", "7", "--save-state", "a")[1], "a"
    for new, save in (("1", "b"), ("60", "b"), ("52", "c")):  # b is written over itself
        code, more, err = call(*attention, *draws, "--max-new-tokens", new, "--load-state", load, "--save-state", save)
        assert code == 0 and f"saved: {save} (--load-state {save} goes on from here)" in err
        out, load = out + more, save
    whole_tokens = result(call, *argv, "--prompt", "ab", "--max-new-tokens", "120", "--save-state", "d")["text"]
    assert out == "ab" + whole_tokens and whole.startswith(out)
    assert "seed: None (the saved draws go on)" in err and not list(Path(".").glob("*.tmp"))
    broken, unbroken = load_file("c"), load_file("d")
    assert broken.keys() == unbroken.keys()
    for name in broken.keys() - ({"extra.generator"} if "--seed" not in how else set()):
        assert torch.equal(broken[name], unbroken[name]), name  # bit for bit


@pytest.mark.parametrize("sig, attention", [(signal.SIGTERM, ["--window", "20"]), (signal.SIGINT, [])])
def test_a_killed_process_goes_on(call, sig, attention):
    p = start(*attention, "--seed", "3", "--prompt", "ab", "--save-state", "s", stdin=subprocess.DEVNULL)
    begin = os.read(p.stdout.fileno(), 60)
    while len(begin) < 60 and (more := os.read(p.stdout.fileno(), 60)):
        begin += more
    p.send_signal(sig)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 0 and "saved: s" in err.decode(), err
    made = int(err.decode().split("generated: ")[1].split()[0])
    rest = call(*attention, "--max-new-tokens", "90", "--load-state", "s")[1]
    whole = call(*attention, "--seed", "3", "--prompt", "ab", "--max-new-tokens", str(made + 90))[1]
    assert (begin + out).decode() + rest == whole and made > 20


def test_a_character_that_the_break_cuts_is_written_whole(call, draw):
    draw([0x61, 0xE2, 0x82, 0xAC, 0x62, 0xE2, 0x63, 0x64])
    assert call("--max-new-tokens", "2", "--save-state", "s")[1] == "a"
    assert call("--max-new-tokens", "1", "--load-state", "s", "--save-state", "s")[1] == ""
    assert call("--max-new-tokens", "3", "--load-state", "s", "--save-state", "s")[1] == "\u20acb"
    shutil.copy("s", "t")
    assert call("--max-new-tokens", "1", "--load-state", "s", "--prompt", "x")[1] == "\ufffdxc"  # the prompt ends it
    assert call("--max-new-tokens", "1", "--load-state", "t")[1] == "\ufffdd"


def test_a_prompt_is_appended_to_a_state(call, checkpoint):
    ids = list(b"ab")
    for argv in (["--prompt", "ab"], ["--prompt", "cd", "--load-state", "s"], ["--prompt", "ef", "--load-state", "s"]):
        ids += b"" if argv[1] == "ab" else argv[1].encode()
        r = result(call, *argv, "--temperature", "0", "--max-new-tokens", "5", "--save-state", "s")
        model = GPT.from_pretrained(str(checkpoint))
        assert r["tokens"] == [t.item() for t in model.generate(torch.tensor([ids]), 5, temperature=0, vocab_size=257)]
        ids += r["tokens"]


def test_a_seed_starts_new_draws(call):
    call("--seed", "1", "--max-new-tokens", "9", "--save-state", "s")
    one, same, other = (result(call, "--load-state", "s", "--max-new-tokens", "20", *seed)
                        for seed in (["--seed", "8"], ["--seed", "8"], []))
    assert one["tokens"] == same["tokens"] != other["tokens"] and (one["seed"], other["seed"]) == (8, None)


def test_a_signal_during_a_long_prompt_loses_nothing(call, monkeypatch):
    argv, hidden = ["--temperature", "0", "--window", "20"], GPT.hidden
    whole = result(call, *argv, "--prompt", "0123456789" * 300, "--max-new-tokens", "20")["tokens"]

    def stopped(self, idx, **options):
        if options["state"].position == 1024:
            os.kill(os.getpid(), signal.SIGTERM)
        return hidden(self, idx, **options)
    monkeypatch.setattr(GPT, "hidden", stopped)
    code, out, err = call(*argv, "--prompt", "0123456789" * 300, "--no-echo", "--save-state", "s")
    assert code == 0 and out == "" and "after 2048 tokens" in err and "generated: 0 tokens" in err
    r = result(call, *argv, "--load-state", "s", "--max-new-tokens", "20")
    assert r["tokens"] == whole and r["prompt_tokens"] == 3000 - 2048


def test_a_reader_that_has_gone_loses_nothing():
    p = start("--seed", "3", "--save-state", "s", stdin=subprocess.DEVNULL)
    p.stdout.read(20)
    p.stdout.close()
    err = p.stderr.read().decode()
    assert p.wait(timeout=60) == 0 and err.splitlines()[-1].startswith("saved: s ("), err
    assert Path("s").stat().st_size > 1000


def test_no_state_of_half_a_step(call, monkeypatch):
    call("--max-new-tokens", "3", "--save-state", "s")
    before, hidden = Path("s").read_bytes(), GPT.hidden

    def cut(self, idx, **options):
        if options["state"].position > 5:
            raise KeyboardInterrupt  # a second Ctrl-C
        return hidden(self, idx, **options)
    monkeypatch.setattr(GPT, "hidden", cut)
    with pytest.raises(KeyboardInterrupt):
        call("--save-state", "s")
    assert Path("s").read_bytes() == before


@pytest.mark.parametrize("where", ["save", "replace"])
def test_a_write_that_fails_leaves_the_older_state(call, monkeypatch, where):
    call("--max-new-tokens", "3", "--save-state", "s")
    before, save = Path("s").read_bytes(), State.save

    def fail(*args):
        if where == "save":
            save(*args)
            Path(args[1]).write_bytes(Path(args[1]).read_bytes()[:100])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(*((State, "save") if where == "save" else (os, "replace")), fail)
    assert "cannot write s: " in mistake("--max-new-tokens", "5", "--save-state", "s")
    assert Path("s").read_bytes() == before and not Path("s.tmp").exists()


@pytest.mark.parametrize("at_once", [False, True])
def test_a_signal_sent_twice_is_one_and_one_sent_again_does_not_wait(monkeypatch, at_once):
    now = 0.0
    monkeypatch.setattr(sample.time, "monotonic", lambda: now)
    raised = []
    with sample.signals(at_once) as asked:
        for now, sig in ((0.0, signal.SIGINT), (0.5, signal.SIGINT), (1.5, signal.SIGTERM)):
            try:
                signal.raise_signal(sig)
            except KeyboardInterrupt:
                raised.append(now)
    assert asked == {signal.SIGINT: 0.0, signal.SIGTERM: 1.5} and raised == ([0.0, 1.5] if at_once else [1.5])


def test_a_signal_sent_twice_loses_nothing(call, monkeypatch):
    """The second comes when the state is being written, or the report."""
    for where in ("save", "nbytes"):
        inner = getattr(State, where)

        def again(*args):
            signal.raise_signal(signal.SIGINT)
            return inner.fget(*args) if where == "nbytes" else inner(*args)
        with monkeypatch.context() as m:
            m.setattr(State, where, property(again) if where == "nbytes" else again)
            m.setattr(sample, "about_state", lambda *_: "")
            m.setattr(sample, "write", lambda text: signal.raise_signal(signal.SIGINT))
            code, _, err = call("--save-state", where)
        assert code == 0 and "saved: " in err and "\nmemory: " in err
        assert call("--load-state", where, "--max-new-tokens", "2")[0] == 0 and not list(Path(".").glob("*.tmp"))


def test_a_signal_sent_twice_ends_a_process_once():
    p = start("--window", "20", "--save-state", "s", stdin=subprocess.DEVNULL)
    os.read(p.stdout.fileno(), 20)
    p.send_signal(signal.SIGINT)
    err = b""
    while b"\nmemory: " not in err and (more := os.read(p.stderr.fileno(), 1000)):  # the report: Python is about to end
        err += more
    time.sleep(0.05)
    p.send_signal(signal.SIGINT)
    err += p.communicate(timeout=60)[1]
    assert p.returncode == 0 and b"saved: s" in err and b"Traceback" not in err, err


def test_a_signal_sent_again_amid_the_write_leaves_the_older_state(call, monkeypatch):
    call("--max-new-tokens", "3", "--save-state", "s")
    before, save = Path("s").read_bytes(), State.save
    monkeypatch.setattr(sample, "fsync", lambda path: signal.default_int_handler(signal.SIGINT, None))
    with pytest.raises(KeyboardInterrupt):
        call("--max-new-tokens", "3", "--save-state", "s")
    assert Path("s").read_bytes() == before and not Path("s.tmp").exists()


@pytest.mark.parametrize("attention", [[], ["--window", "20"]])
@pytest.mark.parametrize("owner, name, nth, made", [(model_py.MLP, "forward", 1, 0), (model_py.MLP, "forward", 4, 0),
                                                    (model_py.MLP, "forward", 10, 2), (model_py, "sample_token", 5, 4)])
def test_an_error_amid_the_stream_loses_nothing(call, monkeypatch, attention, owner, name, nth, made):
    argv = [*attention, "--prompt", "0123456789" * 300, "--no-echo", "--seed", "2"]  # 3 chunks, 2 layers
    whole, inner, calls = result(call, *argv, "--max-new-tokens", "30")["text"], getattr(owner, name), []

    def cut(*args):
        calls.append(args)
        if len(calls) == nth:
            raise torch.OutOfMemoryError("none left")
        return inner(*args)
    with monkeypatch.context() as m:
        m.setattr(owner, name, cut)
        with pytest.raises(torch.OutOfMemoryError):
            call(*argv, "--save-state", "s")
    if name == "sample_token":  # its token would be fed twice
        assert not Path("s").exists()
    else:
        assert call(*attention, "--load-state", "s", "--max-new-tokens", str(30 - made))[1] == whole


def test_a_state_of_something_else(call, run, checkpoint):
    assert call("--max-new-tokens", "3", "--save-state", "full")[0] == 0
    assert call("--max-new-tokens", "3", "--save-state", "window", "--window", "20")[0] == 0
    assert "window 20 + 4 sinks" in mistake("--load-state", "window")
    assert "window 20 + 4 sinks" in mistake("--load-state", "window", "--window", "20", "--sinks", "3")
    assert "window 20 + 4 sinks" in mistake("--load-state", "full", "--window", "20")
    GPT.from_pretrained(str(checkpoint)).new_state(1).save("python")
    assert mistake("--load-state", "python") == "python was not written by --save-state"
    Path("cut").write_bytes(Path("full").read_bytes()[:1000])
    assert "cut cannot be read as a saved state" in mistake("--load-state", "cut")
    model = GPT.from_pretrained(str(checkpoint))
    with torch.no_grad():
        model.blocks[1].mlp.w_up.weight += 1e-3  # fine-tuned
    model.save_pretrained("runs/tiny/step_0000010", {"tokenizer": "byte"})
    assert mistake("--load-state", "full").startswith("full is a state of another model: load it with the one that it ")
    shutil.copytree(checkpoint, "runs/tiny/step_0000010", dirs_exist_ok=True)
    assert call("--load-state", "full", "--max-new-tokens", "3")[0] == 0
    assert (mistake("--load-state", "full", "--dtype", "bfloat16") ==
            "full is a state in float32, the model runs in bfloat16: add --dtype float32")
    assert call("--max-new-tokens", "3", "--save-state", "half", "--dtype", "bfloat16")[0] == 0
    assert (mistake("--load-state", "half") ==
            "half is a state in bfloat16, the model runs in float32: add --dtype bfloat16")
    assert call("--load-state", "half", "--max-new-tokens", "3", "--dtype", "bfloat16")[0] == 0
    change(run, rope_base=500.0)
    assert "full is a state of another model" in mistake("--load-state", "full")


def test_draws_of_another_device(call):
    call("--max-new-tokens", "3", "--save-state", "s")
    with safe_open("s", "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    save_file(tensors | {"extra.generator": torch.zeros(16, dtype=torch.uint8)}, "s", metadata)  # as CUDA's
    assert mistake("--load-state", "s") == "the draws of s come from another kind of device: add --seed for new ones"
    assert call("--load-state", "s", "--seed", "1", "--max-new-tokens", "3")[0] == 0
