"""
Chat templates: a conversation as the ids its model was trained on, fed turn by turn.

A Hugging Face folder ships its template, a Jinja program from messages to text, in chat_template.jinja or
tokenizer_config.json. A Chat renders the whole conversation at each turn and hands out only what is new in it: what the
template puts after the last reply, the user's message, and the opening of the next reply. The model has seen the rest,
so its state is carried on and a turn costs it what is new. Rendering and tokenizing all of it is cheap, but does grow.
"""

import datetime
import json
import os
import re
import stat
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

from data.tokenizer import Tokenizer


class Chat:
    """
    tokenizer  of the model; the template is looked for beside its tokenizer.json
    system     an optional first message
    stop       set of int, the ids that end a reply
    seen       str, all that the model has been fed and has written so far
    rewritten  bool, whether the template writes the conversation otherwise by now: some trim replies or drop parts of
               earlier ones, and a state cannot take back what it has seen

    ValueError, one line, where there is no template, it does not compile, or it refuses the messages.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None = None):
        if not tokenizer.name.endswith(".json"):
            raise ValueError(f"tokenizer {tokenizer.name} has no chat template: leave --chat away")
        self.tokenizer, self._folder = tokenizer, Path(tokenizer.name).parent
        self._template, self._names = _load_template(self._folder)
        self.stop = set(tokenizer.stop)
        if "eos_token" in self._names:
            ids = tokenizer.encode(self._names["eos_token"], control=True)
            if len(ids) != 1:
                raise ValueError(f"{self._folder}: eos_token {self._names['eos_token']!r} is no token of the "
                                 f"tokenizer, which makes {len(ids)} of it: it cannot end a reply")
            self.stop |= {*ids}
        self.messages = [] if system is None else [self._message("system", system)]
        self.seen, self.rewritten = "", False

    def render(self, messages: list[dict]) -> str:
        """The text of a conversation, up to where the next reply begins."""
        try:  # the template is somebody's program: it can fail in any way
            return self._template.render(messages=messages, add_generation_prompt=True, tools=None, documents=None,
                                         **self._names)
        except Exception as e:
            raise ValueError(f"the chat template of {self._folder} fails: {' '.join(str(e).split())}") from None

    def turn(self, text: str) -> list[int]:
        """
        The user's next message -> the ids to feed after the last reply. All ids, fed and replied, are those of the
        whole conversation rendered, as long as each reply is the ids that the tokenizer makes of its text; where
        `rewritten`, those of `seen`. ValueError leaves everything as it was.
        """
        messages = [*self.messages, self._message("user", text)]
        whole = new = self.render(messages)
        if self.seen:
            mark = uuid.uuid4().hex  # stands for the last reply, to find what comes after it
            marked = self.render([*messages[:-2], dict(messages[-2], content=mark), messages[-1]])
            _, found, new = marked.rpartition(mark)
            if not found:
                raise ValueError(f"the chat template of {self._folder} leaves out the last reply: no state can follow")
        before, both = (self.tokenizer.encode(x, control=True) for x in (self.seen, self.seen + new))
        self.messages, self.seen = messages, self.seen + new
        self.rewritten = self.seen != whole
        return both[len(before):] if both[:len(before)] == before else self.tokenizer.encode(new, control=True)

    def reply(self, text: str):
        """What the model wrote, without the id that ended it."""
        self.messages.append(dict(role="assistant", content=text))
        self.seen += text

    def _message(self, role: str, text: str) -> dict:
        if self.tokenizer.encode(text, control=True) != self.tokenizer.encode(text):
            raise ValueError(f"the {role} message spells out a control token of the model, as "
                             f"{self._names.get('eos_token', '</s>')} is: only the chat template may write one")
        return dict(role=role, content=text)


def _load_template(folder: Path):
    """-> the compiled template, the names of control tokens (bos_token, ...) that it may use."""
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                config |= {**json.loads((folder / name).read_text(encoding="utf-8"))}
            except (ValueError, TypeError) as e:
                raise ValueError(f"{folder / name} is not a JSON object: {e}") from None
    source = config.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(source, list):  # several, by name
        try:
            source = {each["name"]: each["template"] for each in source}.get("default")
        except (KeyError, TypeError):
            raise ValueError(f"{folder}: chat_template is a list of other things than names and templates") from None
    if not isinstance(source, str):
        raise ValueError(f"{folder} has no chat template (chat_template.jinja, or chat_template in "
                         "tokenizer_config.json): it is no chat model, leave --chat away")
    names = {name: token.get("content") if isinstance(token, dict) else token for name, token in config.items()
             if name.endswith("_token") and isinstance(token, (str, dict))}
    for name, token in names.items():
        if not isinstance(token, str):
            raise ValueError(f"{folder}: {name} is {config[name]!r}, which has no text as its content")
    return _compile(source, folder), names


def _compile(source: str, folder: Path):
    """A template in the environment that transformers gives it. It is a stranger's program, hence the sandbox."""
    try:
        import jinja2
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ValueError('--chat needs a package that is not installed: pip install "jinja2>=3.1.6"') from None
    if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < (3, 1, 6):
        raise ValueError(f"--chat runs the model's template in jinja2's sandbox, which leaks in {jinja2.__version__}: "
                         'pip install "jinja2>=3.1.6"')

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks replies for training: here it is what it encloses."""
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = lambda x, **options: json.dumps(x, **{"ensure_ascii": False, **options})
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda f: datetime.datetime.now().strftime(f)}
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as e:
        raise ValueError(f"the chat template of {folder} is not valid: {e}") from None


def converse(chat: Chat, turn: str | None, answer: Callable[[list[int]], tuple[str, bool]]):
    """
    A reply to `turn`, if given, then to each line of stdin, to its end or Ctrl-C: answer(ids) feeds the ids of a turn,
    shows the reply and returns its text and whether to go on. SystemExit for a turn that the template refuses, unless
    stdin is a terminal: there it may be written anew.
    """
    more = True
    while more and (turn is not None or (turn := read_turn()) is not None):
        try:
            warned, ids = chat.rewritten, chat.turn(turn)
        except ValueError as e:
            if not sys.stdin.isatty():
                raise SystemExit(str(e)) from None
            print(e, file=sys.stderr)
        else:
            if chat.rewritten and not warned:
                print("warning: the chat template now writes earlier turns otherwise; the model keeps what it has seen",
                      file=sys.stderr)
            text, more = answer(ids)
            chat.reply(text)
        turn = None


def read_turn() -> str | None:
    """The next line of stdin that is not blank, asked for by "> " on a terminal. None at the end and for Ctrl-C, which
    SIGTERM is too here (sample.signals)."""
    try:
        while True:
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.buffer.readline()
            if line.strip() or not line:
                return line.decode().rstrip("\r\n") if line else None
    except KeyboardInterrupt:
        return None
    except UnicodeDecodeError as e:
        raise SystemExit(f"a line of stdin is not UTF-8: byte 0x{line[e.start]:02x} at offset {e.start}") from None


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
        print("prompt: reading stdin to its end (--prompt TEXT or < /dev/null leaves it alone)", file=sys.stderr)
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
