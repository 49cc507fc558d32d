"""sample.py: what goes to stdout and stderr, how a stream ends, which checkpoint is loaded, what a mistake prints."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig

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
    assert code == 0 and written == ["", *pieces] and out == "".join(pieces)


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
    assert memory.startswith("memory: peak ") and memory.endswith(" MiB, state 32.0 KiB after 12 tokens")


@pytest.mark.parametrize("n_prompt, n_new, warnings", [(4, 60, 0), (4, 61, 1), (4, 90, 1), (70, 3, 1)])
def test_one_warning_past_the_block_size(call, n_prompt, n_new, warnings):
    code, _, err = call("--prompt", "x" * n_prompt, "--max-new-tokens", str(n_new))
    assert code == 0 and err.count("warning:") == warnings
    assert warnings == 0 or f"{max(65, n_prompt + 1)} tokens, trained on block_size 64" in err


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
    (["--temperature", "-0.1"], "--temperature is -0.1: it must be at least 0"),
    (["--temperature", "nan"], "--temperature is nan"), (["--temperature", "inf"], "--temperature is inf"),
    (["--top-k", "0"], "--top-k is 0: it must be at least 1"),
    (["--top-p", "0"], "--top-p is 0.0: it must be in (0, 1]"), (["--top-p", "1.01"], "--top-p is 1.01"),
    (["--min-p", "1"], "--min-p is 1.0: it must be in [0, 1)"), (["--min-p", "-0.1"], "--min-p is -0.1"),
    (["--seed", "-1"], "--seed is -1"), (["--seed", str(2**63)], f"--seed is {2**63}"),
    (["--max-new-tokens", "0"], "--max-new-tokens is 0: it must be at least 1"),
    (["--json"], "add --max-new-tokens 100"),
])
def test_an_option_out_of_range(argv, words):
    assert words in mistake(*argv)


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
    shutil.rmtree("runs")
    assert mistake() == "no such run: none in runs/; runs with checkpoints: none; to train one: python train.py"


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
    ({"n_layer": 3}, "does not fit its config.json"),
    ({"vocab_size": 257}, "does not fit its config.json"),
    ({"attention": "half"}, "attention is 'half'"),
])
def test_a_wrong_config(run, change, words):
    path = run / "step_0000010/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert words in mistake()
