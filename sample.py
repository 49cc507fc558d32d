"""
Streaming generation without end, and chat, from a run that train.py wrote or from any pretrained model.

    python sample.py                                       the latest run, or without one a small model of stories
    python sample.py quickstart --prompt "It was a dark"   a name under runs/, a run folder or a step folder
    python sample.py --model EleutherAI/pythia-160m --window 1020 --sinks 4   a folder or hub id, at constant memory
    python sample.py --model Qwen/Qwen2-0.5B-Instruct --chat --window 1020    each line of stdin is a turn
    python sample.py --prompt FILE:book.txt --top-k 50 --max-new-tokens 500
    cat book.txt | python sample.py --temperature 0        stdin is the prompt when it is a pipe or a file
    python sample.py --max-new-tokens 100 --json | jq -r .text
    python sample.py --save-state s                        until Ctrl-C; then --load-state s goes on as if never ended
    torchrun --nproc-per-node 4 sample.py --prompt FILE:book.txt      4 GPUs read the prompt together, by ring attention

Text goes to stdout as it comes: the prompt (but for --no-echo), then the continuation; all else goes to stderr. stdout
is always valid UTF-8: a character waits for its last byte, and bytes that cannot become one show as U+FFFD. Where a
document ends or begins (the tokenizer's eot, its prefix) there is a blank line, and the stream goes on. Ctrl-C and
SIGTERM end it with a speed report and exit code 0, or 130 when they cut short what --max-new-tokens asked for; in a
chat Ctrl-C ends the reply, and at the prompt the chat. They wait for the step at hand; sent again, they do not, and no
state is saved. A user's mistake is one line and exit code 1 (2 for an unknown option).

Under torchrun every rank reads its part of a new prompt, as much of it as they can share; then all have what the model
remembers of it, rank 0 goes on alone, as one process does, and the others end.
"""

import codecs
import hashlib
import json
import logging
import math
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

from data.chat import Chat, converse, read_prompt
from data.pretrained import find_folder, load_fields
from data.tokenizer import Tokenizer, load_tokenizer
from kernels.backend import use_triton
from kernels.ring import shard_sequence
from model import GPT, GPTConfig, State, read_rope_scaling
from train import Place, TrainConfig, choose_place, connect, from_rank0, fsync, is_lost, total

SHIPPED = Path(__file__).parent / "data/stories260k"


@dataclass
class Options:
    """Streams text from a trained model: the prompt and its continuation on stdout, everything else on stderr."""

    # a run folder, a step folder, or a name under runs/
    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(
        metavar="[RUN]", constructor=str, help_behavior_hint="(default: the run saved last)")] = None
    model: str | None = None  # a pretrained model instead of a run: its folder or hub id
    window: int | None = None  # every layer sees the last so many tokens, and the sinks: no end, constant memory
    sinks: int | None = None  # the first tokens, never dropped; None: 4 with --window, else the model's own
    blockwise: bool = False  # every layer sees half of block_size, and the half before it: the same, for xPos models
    rope_scaling: str | None = None  # a longer context: a family as JSON with its factor, or a file that search.py wrote
    # text (--prompt=-x if it begins with a dash), FILE:path, or - for stdin; one newline at a file's end is dropped
    prompt: Annotated[str | None, tyro.conf.arg(
        metavar="TEXT", constructor=str, help_behavior_hint="(default: stdin if piped, or a document's start)")] = None
    chat: bool = False  # a conversation by the model's chat template: --prompt, then each line of stdin, is a turn
    system: str | None = None  # the chat's system message
    temperature: float = 1.0  # 0 takes the likeliest token each time
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float | None = None  # only the likeliest tokens that together reach this probability
    min_p: float | None = None  # only tokens with this fraction of the likeliest one's probability
    seed: int | None = None  # the same seed gives the same text; None draws one and prints it
    max_new_tokens: int | None = None  # None: until Ctrl-C; in a chat, of each reply
    save_state: str | None = None  # a file to write at the end, whatever ends the stream
    load_state: str | None = None  # such a file: the stream goes on as if it had never ended, after --prompt if given
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of cuda, mps, cpu that is there
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on capable CUDA, else float32
    cuda_graphs: bool = True  # each step is one CUDA graph, where that works: on CUDA, no full attention
    echo: bool = True  # print the prompt before its continuation
    json: bool = False  # one JSON object on stdout at the end instead of a stream; needs --max-new-tokens


def check(opt: Options):
    """SystemExit, one line, for an option that excludes another or has a range that the model does not check."""
    for wrong, why in ((opt.blockwise and (opt.window, opt.sinks) != (None, None), "--blockwise has no window and no sinks: "
                        "leave them or it away"),
                       (None not in (opt.run, opt.model), f"run {opt.run} and --model {opt.model}: give one of them"),
                       (not 0 <= (opt.seed or 0) < 2**63, f"--seed is {opt.seed}: it must be in [0, 2^63)"),
                       (opt.max_new_tokens is not None and opt.max_new_tokens < 1,
                        f"--max-new-tokens is {opt.max_new_tokens}: it must be at least 1"),
                       (opt.chat and opt.json, "--chat writes replies as they come, --json one object: choose one"),
                       (opt.chat and not opt.echo, "--no-echo: a chat echoes nothing, leave it or --chat away"),
                       (opt.chat and (opt.save_state or opt.load_state), "--save-state and --load-state hold a stream, "
                        "not a conversation: leave them or --chat away"),
                       (opt.system is not None and not opt.chat, "--system is the first message of a chat: add --chat"),
                       (opt.json and opt.max_new_tokens is None, "--json prints one object at the end, an endless "
                        "stream has none: add --max-new-tokens 100"),
                       (opt.save_state is not None and (Path(opt.save_state).is_dir() or not
                                                        Path(opt.save_state).absolute().parent.is_dir()),
                        f"--save-state {opt.save_state}: it must be a file, in a folder that is there")):
        if wrong:
            raise SystemExit(why)


def say(*lines: str):
    print(*lines, sep="\n", file=sys.stderr, flush=True)


@contextmanager
def all_ranks(device: str, dtype: str) -> Iterator[Place]:
    """
    Where to compute. Under torchrun, inside it, all ranks are one group, the Place's, to share a sequence, and only
    rank 0 is heard. A rank that dies or does not answer ends the others, each with one line. SystemExit for a device
    that is not there.
    """
    config = TrainConfig(device=device, dtype=dtype, sp=int(os.environ.get("WORLD_SIZE", 1)))
    try:
        place = choose_place(config)
    except ValueError as e:
        raise SystemExit(str(e)) from None
    try:
        with ExitStack() as stack:
            if place.rank:
                nothing = open(os.devnull, "w")
                stack.enter_context(redirect_stdout(nothing))
                stack.enter_context(redirect_stderr(nothing))
            connect(config, place)
            yield place
            if dist.is_initialized():
                total(place, 0)  # gloo's threads may abort a process that leaves while others still talk to it
    except RuntimeError as e:
        if not is_lost(e):
            raise
        print(f"error on rank {place.rank}: another rank died or does not answer ({' '.join(str(e).split())[:300]})",
              file=sys.stderr, flush=True)
        os._exit(1)  # to close the process group may take for ever
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# the model


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds what sampling needs; the optimizer's files may be gone."""
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors"))


def find_checkpoint(run: str | None, runs: Path = Path("runs")) -> Path | None:
    """
    The folder to load: `run` or `runs`/`run` if it is one, else its last complete step, or without `run` that of the
    run saved last, None if there is none. SystemExit naming the runs there are and the command that trains one.
    """
    def last_step(folder: Path) -> Path | None:  # one still being written is called .tmp_step_*
        steps = filter(is_checkpoint, folder.glob("step_*"))
        return max(steps, key=lambda step: (len(step.name), step.name), default=None)

    there = {folder.name: step for folder in sorted(runs.glob("*")) if (step := last_step(folder))}
    if run is None:
        return max(there.values(), key=lambda step: (step / "model.safetensors").stat().st_mtime, default=None)
    folders = [folder for folder in (Path(run), runs / run) if folder.is_dir()]
    for folder in folders:
        if found := folder if is_checkpoint(folder) else last_step(folder):
            return found
    wrong = f"{folders[0]} holds no complete checkpoint" if folders else f"no such run: {run}"
    known = " ".join(f"{name} ({step.name})" for name, step in there.items()) or "none"
    raise SystemExit(f"{wrong}; runs with checkpoints: {known}; to train one: python train.py")


def find_model(run: str | None, model: str | None) -> str | None:
    """The folder or hub id that the options RUN and --model mean; None: neither is given, and no run is there."""
    if model is not None and not any(Path(model).glob("step_*")):  # else a run of ours, by its folder
        return model
    found = find_checkpoint(model or run)
    return None if found is None else str(found)


def choose_model(opt: Options) -> tuple[str, dict]:
    """-> the folder or hub id to load, the fields of its GPTConfig to replace. Says so if it is the shipped model."""
    fields = {} if opt.window is None else {"attention": "window", "window": opt.window, "sinks": 4}
    fields |= {"attention": "blockwise"} if opt.blockwise else {}
    name = find_model(opt.run, opt.model)
    if name is None:
        say(f"no run in runs/: streaming from {SHIPPED}, 260K parameters that tell stories; to train one: "
            "python train.py config/quickstart.py")
        name, fields = SHIPPED, fields or {"attention": "window", "window": 508, "sinks": 4}
    if opt.rope_scaling is not None:
        try:
            fields |= scaling_fields(opt.rope_scaling, str(name))
            if opt.blockwise:  # its blocks are halves of the trained length
                del fields["block_size"]
        except (ValueError, OSError) as e:
            raise SystemExit(f"--rope-scaling: {e}") from None
    return str(name), fields | ({} if opt.sinks is None else {"sinks": opt.sinks})


def scaling_fields(scaling: str, name: str, target: int | None = None) -> dict:
    """
    The fields of GPTConfig by which the model `name` has another rope_scaling, as read_rope_scaling takes it, and the
    length that comes with it. ValueError, OSError.
    """
    own = load_fields(find_folder(name))[0]
    own.pop("tokenizer", None)
    c = GPTConfig(**own | dict(rope_scaling=read_rope_scaling(scaling, own["block_size"], own.get("rope_scaling"), target)))
    return dict(rope_scaling=c.rope_scaling, block_size=c.block_size if c.reach == math.inf else max(c.block_size, c.reach))


def load(name: str, fields: dict) -> tuple[GPT, Tokenizer]:
    """The model, with `fields` of its GPTConfig replaced, and its tokenizer. SystemExit, one line, if a file is wrong."""
    try:
        folder = find_folder(name)
        model = GPT.from_pretrained(str(folder), **fields)
        if "sinks" in fields and "window" not in model.config.attention:
            raise ValueError(f"--sinks {fields['sinks']} belong to a window, its attention is {model.config.attention}: add "
                             f"--window {max(1, model.config.block_size - fields['sinks'])}")
        broken = [name for name, p in model.named_parameters() if not p.detach().sum().isfinite()]
        if broken:
            raise ValueError(f"{broken[0]} is not finite: its training diverged, take an earlier step")
        config = json.loads((folder / "config.json").read_text())
        given = config.get("tokenizer")
        if given is None and not (folder / "tokenizer.json").is_file():
            old = "; convert its tokenizer.model: AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of " \
                  "transformers writes one" if (folder / "tokenizer.model").is_file() else ""
            raise ValueError("tokenizer.json is missing" + old if config["model_type"] != "nanolong" else
                             'config.json names no tokenizer: add "tokenizer": "byte", "gpt2" or a tokenizer.json')
        tokenizer = load_tokenizer(folder if given is None else given)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model's vocab_size is "
                             f"{model.config.vocab_size}: config.json must name the tokenizer it was trained with")
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as e:  # JSON of other types than it should be
        raise SystemExit(f"cannot load {name}: {' '.join(str(e).split())}") from None
    return model.eval(), tokenizer


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


@contextmanager
def signals(at_once: bool = False):
    """
    Yields a dict, to which SIGINT and SIGTERM are added: the stream ends between two steps. One over a second after
    the first, and with `at_once` the first, raises KeyboardInterrupt; earlier it is the same, sent twice by a wrapper.
    """
    asked = {}

    def ask(number, frame):
        raises = time.monotonic() - min(asked.values()) > 1 if asked else at_once
        asked.setdefault(number, time.monotonic())
        if raises:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)
              if signal.getsignal(number) != signal.SIG_IGN}  # as nohup has it
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Stream:
    """What a stream goes on from, all of which a file can hold, and what it did since the program began."""

    state: State
    generator: torch.Generator
    model: torch.Tensor  # its fingerprint
    pending: list[int] = field(default_factory=list)  # ids to feed next: the last one drawn
    at: int = 0  # the state's position before them
    decoder: codecs.IncrementalDecoder = field(default_factory=partial(codecs.getincrementaldecoder("utf-8"), "replace"))
    asked: dict = field(default_factory=dict)  # the signals that ended it
    warned: bool = False
    took: Counter = field(default_factory=Counter)  # tokens and seconds

    def wait(self, ids: list[int]):
        self.pending, self.at = ids, self.state.position

    def save(self, path: str):
        """Writes `path`, aside and then renamed: it is the older one or the new one, whatever happens. SystemExit."""
        if self.state.position != self.at:
            return say(f"not saved: {path}, as the draw of a token failed after its step")
        extra = dict(model=self.model, generator=self.generator.get_state(), pending=torch.tensor(self.pending),
                     utf8=torch.tensor(list(self.decoder.getstate()[0]), dtype=torch.uint8),
                     dtype=self.state.layers[0].k.new_empty(0))
        aside = Path(f"{path}.tmp")
        try:
            self.state.save(str(aside), extra)
            fsync(aside)
            os.replace(aside, path)
        except Exception as e:  # for a full disk safetensors has an exception of its own
            raise SystemExit(f"cannot write {path}: {e}") from None
        finally:
            aside.unlink(missing_ok=True)
        say(f"saved: {path} (--load-state {path} goes on from here)")

    def load(self, path: str, draws: bool):
        """Goes on from what `save` wrote, with its draws too if `draws`. SystemExit if it is of another model."""
        try:
            extra = self.state.load(path)
            if not torch.equal(extra["model"], self.model):
                raise ValueError(f"{path} is a state of another model: load it with the one that it comes from")
            there, here = (str(x.dtype)[6:] for x in (extra["dtype"], self.state.layers[0].k))
            if there != here:
                raise ValueError(f"{path} is a state in {there}, the model runs in {here}: add --dtype {there}")
            if draws:
                self.generator.set_state(extra["generator"])
            self.pending = extra["pending"].tolist()
            self.decoder.setstate((bytes(extra["utf8"].tolist()), 0))
        except (KeyError, RuntimeError, ValueError) as e:
            why = {KeyError: f"{path} was not written by --save-state",
                   RuntimeError: f"the draws of {path} come from another kind of device: add --seed for new ones"}
            raise SystemExit(why.get(type(e), str(e))) from None


def fingerprint(model: GPT) -> torch.Tensor:
    """(32,) uint8: SHA-256 of the GPTConfig and of 64 to 127 elements, evenly spread, of each weight."""
    digest = hashlib.sha256(json.dumps(asdict(model.config)).encode())
    for p in model.parameters():
        digest.update(p.detach().flatten()[::max(1, p.numel() // 64)].float().numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


@torch.no_grad()
def stream(model: GPT, tokenizer: Tokenizer, ids: list[int], opt: Options, s: Stream, emit, stop=frozenset()):
    """
    Goes on with `ids`; emit(token, text) gets each new id at once with the text that is whole by then, at last (None,
    the rest). Ends at a signal, --max-new-tokens or an id of `stop`, which is not emitted.
    """
    n, begin, start, c = 0, time.perf_counter(), s.state.position, model.config
    ends = () if stop else {*tokenizer.stop, *tokenizer.prefix}
    s.wait(ids)
    *chunks, chunk = torch.tensor([ids], device=model.wte.weight.device).split(1024, dim=1)
    for early in tqdm(chunks, "prompt", unit="Ki", leave=False, disable=None if len(chunks) > 3 else True):
        if not s.asked:
            model.hidden(early, state=s.state)
            s.wait(s.pending[1024:])
    for token in () if s.asked else model.generate(
            chunk, opt.max_new_tokens, s.state, temperature=opt.temperature, top_k=opt.top_k, top_p=opt.top_p,
            min_p=opt.min_p, vocab_size=tokenizer.vocab_size, generator=s.generator, cuda_graphs=opt.cuda_graphs):
        token = token.item()  # waits for the GPU, so that the clock is right
        last = time.perf_counter()
        first = last if n == 0 else first
        n += 1
        s.wait([] if token in stop else [token])
        if token in stop:
            break
        ended = token in ends
        text = s.decoder.decode(b"" if ended else tokenizer.decode([token]), final=ended)
        emit(token, text + "\n\n" if ended else text)
        if "full" in c.attention and start + len(ids) + n > c.block_size and not s.warned:
            s.warned = True
            say(f"\nwarning: {start + len(ids) + n} tokens, trained on block_size {c.block_size}: with full attention "
                "the text gets worse from here on, and the state keeps growing; without end and at constant memory: "
                f"--window {max(1, c.block_size - 4)} --sinks 4")
        if s.asked:
            break
    s.took.update(prompt_tokens=len(ids), new_tokens=n)
    if n:
        s.took.update(prompt_seconds=first - begin, timed_tokens=n - 1, timed_seconds=last - first)
    emit(None, "" if opt.save_state else s.decoder.decode(b"", final=True))  # a saved stream may complete the character


@torch.no_grad()
def read_together(model: GPT, ids: list[int], s: Stream, place: Place) -> list[int]:
    """
    All ranks feed the beginning of `ids`, as much as they can share, to their new states, which are the same after it;
    then there is no group any more -> the ids that are left for rank 0. ValueError for a prompt that they cannot share.
    """
    begin, n = time.perf_counter(), model.config.shard_multiple(place.world)
    shared = (len(ids) - 1) // n * n
    if not shared:
        raise ValueError(f"a prompt of {len(ids)} tokens with {place.world} ranks: too short to share, which takes {n + 1} "
                         f"at least with attention {model.config.attention}: use a longer one, or leave torchrun away")
    model.sequence_parallel(place.group)
    say(f"prompt: {place.world} ranks read the first {shared} of {len(ids)} tokens together, {model.ring.layout}")
    model.hidden(shard_sequence(torch.tensor([ids[:shared]], device=place.device), *model.ring), state=s.state)
    total(place, 0)
    model.sequence_parallel(None)
    dist.destroy_process_group()
    s.took.update(prompt_tokens=shared, prompt_seconds=time.perf_counter() - begin)
    return ids[shared:]


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


def about_state(model: GPT, state: State) -> str:
    """The state's size, and what of it grows with the text."""
    c, full = model.config, model.config.layer_kinds.count("full")
    kinds = dict(window=f"window {c.window} + {c.sinks} sinks", blockwise=f"blocks of {c.block_size // 2}",
                 infini=f"segment {c.segment} + memory")
    constant = f"constant ({', '.join(words for kind, words in kinds.items() if kind in c.attention)})"
    grows = 2 * full * c.n_kv_head * c.head_dim * state.layers[0].k.itemsize  # bytes: a key and a value per layer
    rest = "" if full == c.n_layer else f" in {full} of {c.n_layer} layers, the others are {constant}"
    return f"{size(state.nbytes)}, {constant}" if not full else (
        f"{size(state.nbytes)} now, {size(grows)} per token: attention {c.attention} keeps every key and value{rest}")


def run(model, tokenizer, chat: Chat | None, prompt: str | None, ids: list[int], opt: Options, s: Stream):
    """The chat, or the stream going on with `ids`, and its state saved -> for --json (id, text) of each emit."""
    made = []
    echo = s.decoder.decode(b"", final=True) if prompt else ""  # a character that --load-state was amid
    echo += prompt if prompt and opt.echo and not opt.json else ""

    def emit(token, text):
        nonlocal echo
        text, echo = echo + text, ""
        made.append((token, text)) if opt.json else write(text)

    def answer(ids):
        reply = []
        with signals() as s.asked:
            stream(model, tokenizer, s.pending + ids, opt, s, lambda _, text: (reply.append(text), write(text)),
                   chat.stop)
            write("\n")
        return "".join(reply), signal.SIGTERM not in s.asked

    try:
        if chat:
            converse(chat, prompt, answer)
        else:
            stream(model, tokenizer, ids, opt, s, emit)
        if not opt.json:
            say("")  # the text may end in the middle of a line
    except KeyboardInterrupt:  # it did not wait for the step
        opt.save_state = None
        raise
    except ValueError as e:
        if not str(e).startswith("generate: "):
            raise
        opt.save_state = None
        raise SystemExit(str(e)) from None
    finally:
        if opt.save_state:
            s.save(opt.save_state)
    return made


def main(argv: list[str] | None = None) -> int:
    """The command line (argv: without the program's name) -> exit code. SystemExit, one line, for a user's mistake."""
    opt = tyro.cli(Options, prog="sample.py", args=argv)
    check(opt)
    with all_ranks(opt.device, opt.dtype) as place:
        return sample(opt, place)


def sample(opt: Options, place: Place) -> int:
    """All that main does, once it is known where."""
    for used, what in ((opt.chat, "--chat"), (opt.load_state, "--load-state")):
        if used and place.world > 1:
            raise SystemExit(f"{what} with {place.world} ranks: they share the beginning of one text only: leave {what} "
                             "or torchrun away")

    def read() -> str | None:
        try:
            return read_prompt(opt.prompt) if opt.prompt is not None or not opt.chat else None
        except SystemExit as e:
            raise ValueError(e.code) from None  # rank 0's, and so every rank's

    name, fields = choose_model(opt)
    sys.stdout.reconfigure(encoding="utf-8")
    logging.basicConfig(format="%(message)s")  # to stderr
    logging.getLogger("nanolong").setLevel(logging.INFO)
    try:
        prompt = from_rank0(place, read)
        use_triton(torch.empty(0, dtype=place.dtype, device=place.device))  # logs the backend before the text begins
        model, tokenizer = load(name, fields)
        chat = Chat(tokenizer, opt.system) if opt.chat else None
    except ValueError as e:
        raise SystemExit(str(e)) from None
    mark = fingerprint(model)  # of the weights as the file has them
    model.to(place.device, place.dtype)
    seed = random.SystemRandom().getrandbits(32) if opt.seed is None else opt.seed
    seed_why = "drawn: --seed repeats it" if opt.seed is None else "--seed"
    s = Stream(model.new_state(1), torch.Generator(place.device).manual_seed(seed), mark)
    if opt.load_state:
        s.load(opt.load_state, draws=opt.seed is None)
        seed, seed_why = (None, "the saved draws go on") if opt.seed is None else (seed, seed_why)
    ids = (s.pending or tokenizer.prefix) + ([] if prompt is None else tokenizer.encode(prompt)) or [tokenizer.eot]
    graphs = ("off (--no-cuda-graphs)" if not opt.cuda_graphs else "on" if model.can_graph(s.state) else
              "off (they need CUDA and no full attention)")
    say(f"model: {name}, {model.num_params() / 1e6:.2f}M parameters, block_size {model.config.block_size}, "
        f"tokenizer {tokenizer.name}",
        place.reasons[0], f"dtype: {str(place.dtype)[6:]} (--dtype {opt.dtype})", f"cuda graphs: {graphs}",
        f"seed: {seed} ({seed_why})", f"state: {about_state(model, s.state)}")
    c = model.config
    if "window" in c.attention and c.window > c.block_size:
        say(f"warning: window {c.window}, trained on block_size {c.block_size}: distances beyond it were never trained")
    with signals(at_once=opt.chat) as s.asked:
        try:
            rest = ids if place.world == 1 else read_together(model, ids, s, place)
        except ValueError as e:
            raise SystemExit(str(e)) from None
        if place.rank:
            return 0
        made = run(model, tokenizer, chat, prompt, rest, opt, s)
        rates = [s.took[name + "_tokens"] / s.took[name + "_seconds"] if s.took[name + "_seconds"] else None
                 for name in ("prompt", "timed")]
        if opt.json:
            step = re.fullmatch(r"step_(\d+)", Path(name).resolve().name)
            result = {"prompt": prompt or "", "text": "".join(text for _, text in made), "seed": seed,
                      "tokens": [token for token, _ in made[:-1]],
                      "prompt_tokens": len(ids), "new_tokens": s.took["new_tokens"], "prompt_tok_per_s": rates[0],
                      "tok_per_s": rates[1], "stopped": bool(s.asked), "state_bytes": s.state.nbytes, "model": name,
                      "step": int(step[1]) if step else None}
            write(json.dumps(result, ensure_ascii=False) + "\n")
        speeds = [f"{rate:.1f} tok/s" if rate else "too few to time" for rate in rates]
        say(f"prompt: {s.took['prompt_tokens']} tokens, {speeds[0]}",
            f"generated: {s.took['new_tokens']} tokens, {speeds[1]}",
            f"memory: peak {peak_memory(place.device)}, state {size(s.state.nbytes)} after {s.state.position} tokens")
    return 130 if s.asked and opt.max_new_tokens and not chat else 0


if __name__ == "__main__":
    try:
        code = main()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # sent twice, as Python ends
        sys.exit(code)
    except KeyboardInterrupt:  # before the stream: reading stdin, loading
        sys.exit(130)
