"""
Streaming generation without end, from a run that train.py wrote.

    python sample.py                                       the latest run, from a document's start, until Ctrl-C
    python sample.py quickstart --prompt "It was a dark"   a name under runs/, a run folder or a step folder
    python sample.py --prompt FILE:book.txt --top-k 50 --max-new-tokens 500
    cat book.txt | python sample.py --temperature 0        stdin is the prompt when it is a pipe or a file
    python sample.py --max-new-tokens 100 --json | jq -r .text

Text goes to stdout as it comes: the prompt (but for --no-echo), then the continuation; all else goes to stderr. stdout
is always valid UTF-8: a character waits for its last byte, and bytes that cannot become one show as U+FFFD. The end of
a document (the tokenizer's eot) shows as a blank line, and the stream goes on. Ctrl-C and SIGTERM end it with a speed
report and exit code 0, or 130 when they cut short what --max-new-tokens asked for; a user's mistake is one line and
exit code 1 (2 for an unknown option).
"""

import codecs
import json
import logging
import math
import os
import random
import re
import signal
import stat
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from data.tokenizer import Tokenizer, load_tokenizer
from kernels.backend import use_triton
from model import GPT
from train import TrainConfig, choose_place


@dataclass
class Options:
    """Streams text from a trained model: the prompt and its continuation on stdout, everything else on stderr."""

    # a run folder, a step folder, or a name under runs/
    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(
        metavar="[RUN]", constructor=str, help_behavior_hint="(default: the run saved last)")] = None
    # text (--prompt=-x if it begins with a dash), FILE:path, or - for stdin; one newline at a file's end is dropped
    prompt: Annotated[str | None, tyro.conf.arg(
        metavar="TEXT", constructor=str, help_behavior_hint="(default: stdin if piped, or a document's start)")] = None
    temperature: float = 1.0  # 0 takes the likeliest token each time
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float | None = None  # only the likeliest tokens that together reach this probability
    min_p: float | None = None  # only tokens with this fraction of the likeliest one's probability
    seed: int | None = None  # the same seed gives the same text; None draws one and prints it
    max_new_tokens: int | None = None  # None: until Ctrl-C
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of cuda, mps, cpu that is there
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on capable CUDA, else float32
    echo: bool = True  # print the prompt before its continuation
    json: bool = False  # one JSON object on stdout at the end instead of a stream; needs --max-new-tokens


def check(opt: Options):
    """SystemExit with one line for the first option that is out of its range."""
    for name, fine, range_ in (("temperature", 0 <= opt.temperature < math.inf, "at least 0"),
                               ("top_k", opt.top_k is None or opt.top_k >= 1, "at least 1"),
                               ("top_p", opt.top_p is None or 0 < opt.top_p <= 1, "in (0, 1]"),
                               ("min_p", opt.min_p is None or 0 <= opt.min_p < 1, "in [0, 1)"),
                               ("seed", opt.seed is None or 0 <= opt.seed < 2**63, "in [0, 2^63)"),
                               ("max_new_tokens", opt.max_new_tokens is None or opt.max_new_tokens >= 1, "at least 1")):
        if not fine:
            raise SystemExit(f"--{name.replace('_', '-')} is {getattr(opt, name)}: it must be {range_}")
    if opt.json and opt.max_new_tokens is None:
        raise SystemExit("--json prints one object at the end, an endless stream has none: add --max-new-tokens 100")


def say(*lines: str):
    print(*lines, sep="\n", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# the prompt and the checkpoint


def read_prompt(prompt: str | None) -> str | None:
    """
    The prompt's text: `prompt` itself, the file behind FILE:path, or stdin for "-" and, without a prompt, for a stdin
    that is a pipe or a file (/dev/null is neither). None: no prompt at all. SystemExit when it is empty, unreadable or
    not UTF-8.
    """
    if prompt is None:
        mode = os.fstat(sys.stdin.fileno()).st_mode if sys.stdin else 0
        if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISREG(mode)):
            return None
        say("prompt: reading stdin to its end (--prompt TEXT or < /dev/null leaves it alone)")
        prompt = "-"
    if prompt == "-" or prompt.startswith("FILE:"):
        source = "stdin" if prompt == "-" else prompt.removeprefix("FILE:")
        if prompt == "-" and sys.stdin is None:
            raise SystemExit("cannot read the prompt from stdin: it is closed")
        try:
            raw = sys.stdin.buffer.read() if prompt == "-" else Path(source).read_bytes()
        except OSError as e:
            raise SystemExit(f"cannot read the prompt from {source}: {e.strerror}") from None
        try:
            text = raw.decode().removeprefix("\ufeff")  # Windows' editors put a byte-order mark first
        except UnicodeDecodeError as e:
            raise SystemExit(f"the prompt from {source} is not UTF-8: byte 0x{raw[e.start]:02x} at offset {e.start} of "
                             f"{len(raw)}; if it is Latin-1: iconv -f latin1 -t utf-8") from None
        text = re.sub(r"\r?\n\Z", "", text)
    else:
        source, text = "--prompt", prompt
        try:
            text.encode()
        except UnicodeEncodeError as e:  # Python carries the undecodable bytes of an argument as lone surrogates
            offset = len(text[:e.start].encode())
            raise SystemExit(f"the prompt from --prompt is not UTF-8: see the byte at offset {offset}") from None
    if not text:
        raise SystemExit(f"the prompt from {source} is empty: to begin at a document's start leave --prompt away "
                         "(and in a script add < /dev/null)")
    return text


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds what sampling needs; the optimizer's files may be gone."""
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors"))


def find_checkpoint(run: str | None, runs: Path = Path("runs")) -> Path:
    """
    The folder to load: `run` or `runs`/`run` if it is one, else its last complete step, or without `run` that of the
    run saved last. SystemExit naming the runs there are and the command that trains one.
    """
    def last_step(folder: Path) -> Path | None:  # one still being written is called .tmp_step_*
        steps = filter(is_checkpoint, folder.glob("step_*"))
        return max(steps, key=lambda step: (len(step.name), step.name), default=None)

    there = {folder.name: step for folder in sorted(runs.glob("*")) if (step := last_step(folder))}
    if run is None and there:
        return max(there.values(), key=lambda step: (step / "model.safetensors").stat().st_mtime)
    folders = [] if run is None else [folder for folder in (Path(run), runs / run) if folder.is_dir()]
    for folder in folders:
        if found := folder if is_checkpoint(folder) else last_step(folder):
            return found
    wrong = f"{folders[0]} holds no complete checkpoint" if folders else f"no such run: {run or f'none in {runs}/'}"
    known = " ".join(f"{name} ({step.name})" for name, step in there.items()) or "none"
    raise SystemExit(f"{wrong}; runs with checkpoints: {known}; to train one: python train.py")


def load(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[GPT, Tokenizer]:
    """The model, its weights in `dtype`, and its tokenizer. SystemExit, one line, if a file is wrong or cut short."""
    try:
        model = GPT.from_pretrained(str(folder))
        name = json.loads((folder / "config.json").read_text()).get("tokenizer")
        if name is None:
            raise ValueError('config.json names no tokenizer: add "tokenizer": "byte", "gpt2" or a tokenizer.json')
        tokenizer = load_tokenizer(name)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(f"tokenizer {name} has {tokenizer.vocab_size} ids, the model's vocab_size is "
                             f"{model.config.vocab_size}: config.json must name the tokenizer it was trained with")
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as e:  # JSON of other types than it should be
        raise SystemExit(f"cannot load {folder}: {' '.join(str(e).split())}") from None
    return model.to(device, dtype).eval(), tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# the stream


def write(text: str):
    """Text to stdout at once. A reader that has gone (`| head`) ends the program quietly, a full disk with one line."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python's last flush will go
        raise SystemExit(0 if isinstance(e, BrokenPipeError) else f"cannot write to stdout: {e.strerror}") from None


def stream(model: GPT, tokenizer: Tokenizer, ids: list[int], opt: Options, state, emit) -> dict:
    """
    Continues `ids`; emit(token, text) gets each new id at once with the text that is whole by then, at last (None, the
    rest).
    -> new_tokens, prompt_tok_per_s and tok_per_s (None: too few tokens to tell), stopped (a signal came before the
    end).
    """
    n, stopped, warned, begin = 0, False, "full" not in model.config.attention, time.perf_counter()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    prompt = torch.tensor([ids], device=model.wte.weight.device)
    try:
        for token in model.generate(prompt, opt.max_new_tokens, state, temperature=opt.temperature, top_k=opt.top_k,
                                    top_p=opt.top_p, min_p=opt.min_p, vocab_size=tokenizer.vocab_size, seed=opt.seed):
            token = token.item()  # waits for the GPU, so that the clock is right
            last = time.perf_counter()
            first = last if n == 0 else first
            n += 1
            ended = token == tokenizer.eot
            text = decoder.decode(b"" if ended else tokenizer.decode([token]), final=ended)
            emit(token, text + "\n\n" if ended else text)
            if not warned and len(ids) + n > model.config.block_size:
                warned = True
                say(f"\nwarning: {len(ids) + n} tokens, trained on block_size {model.config.block_size}: with full "
                    "attention the text gets worse from here on, and the state keeps growing")
    except KeyboardInterrupt:
        stopped = True
    emit(None, decoder.decode(b"", final=True))
    return {"new_tokens": n, "prompt_tok_per_s": len(ids) / (first - begin) if n else None,
            "tok_per_s": (n - 1) / (last - first) if n > 1 else None, "stopped": stopped}


def size(nbytes: int) -> str:
    """1536 -> 1.5 KiB"""
    power = min(4, max(0, nbytes.bit_length() - 1) // 10)
    return f"{nbytes / 1024**power:.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{size(torch.cuda.max_memory_allocated(device))} of GPU memory"
    try:
        import resource  # not on Windows
    except ImportError:
        return "unknown here"
    return size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def main(argv: list[str] | None = None) -> int:
    """The command line (argv: without the program's name) -> exit code. SystemExit, one line, for a user's mistake."""
    opt = tyro.cli(Options, prog="sample.py", args=argv)
    check(opt)
    folder = find_checkpoint(opt.run)
    prompt = read_prompt(opt.prompt)
    sys.stdout.reconfigure(encoding="utf-8")
    logging.basicConfig(format="%(message)s")  # to stderr
    logging.getLogger("nanolong").setLevel(logging.INFO)
    try:
        place = choose_place(TrainConfig(device=opt.device, dtype=opt.dtype))
        use_triton(torch.empty(0, dtype=place.dtype, device=place.device))  # logs the backend before the text begins
    except ValueError as e:
        raise SystemExit(str(e)) from None
    model, tokenizer = load(folder, place.device, place.dtype)
    ids = [tokenizer.eot] if prompt is None else tokenizer.encode(prompt)
    seed_why = "drawn: --seed repeats it" if opt.seed is None else "--seed"
    opt.seed = random.SystemRandom().getrandbits(32) if opt.seed is None else opt.seed
    dtype_why = "auto: bfloat16 if CUDA computes in it, else float32" if opt.dtype == "auto" else f"--dtype {opt.dtype}"
    state, c = model.new_state(1), model.config
    grows = 2 * c.n_layer * c.n_kv_head * c.head_dim * place.dtype.itemsize  # bytes: a key and a value per layer
    say(f"model: {folder}, {model.num_params() / 1e6:.2f}M parameters, block_size {c.block_size}, "
        f"tokenizer {tokenizer.name}",
        place.reasons[0], f"dtype: {str(place.dtype)[6:]} ({dtype_why})", f"seed: {opt.seed} ({seed_why})",
        f"state: {size(state.nbytes)} now, {size(grows)} per token: attention {c.attention} keeps every key and value")

    default_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, a KeyboardInterrupt
    if opt.json:
        tokens, texts = [], []
        stats = stream(model, tokenizer, ids, opt, state, lambda new, text: (tokens.append(new), texts.append(text)))
        step = re.fullmatch(r"step_(\d+)", folder.resolve().name)
        result = {"prompt": prompt or "", "text": "".join(texts), "tokens": tokens[:-1], "seed": opt.seed,
                  "prompt_tokens": len(ids), **stats, "state_bytes": state.nbytes, "model": str(folder),
                  "step": int(step[1]) if step else None}
        write(json.dumps(result, ensure_ascii=False) + "\n")
    else:
        write(prompt if prompt and opt.echo else "")
        stats = stream(model, tokenizer, ids, opt, state, lambda token, text: write(text))
        say("")  # the text may end in the middle of a line
    signal.signal(signal.SIGTERM, default_handler)
    rates = stats["prompt_tok_per_s"], stats["tok_per_s"]
    speeds = [f"{rate:.1f} tok/s" if rate else "too few to time" for rate in rates]
    say(f"prompt: {len(ids)} tokens, {speeds[0]}", f"generated: {stats['new_tokens']} tokens, {speeds[1]}",
        f"memory: peak {peak_memory(place.device)}, state {size(state.nbytes)} after {state.position} tokens")
    return 130 if stats["stopped"] and opt.max_new_tokens else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the stream: reading stdin, loading
        sys.exit(130)
