"""data/chat.py: what a turn feeds to the model is what its chat template says, no more and no less; how a chat ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model as model_py
import sample
from data.chat import Chat, read_turn
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig

tokenizers = pytest.importorskip("tokenizers")
SPECIAL = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end_header|>", "<|eot|>", "<|endoftext|>"]
CHATML = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system
You help.<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
LLAMA3 = """{% set loop_messages = messages %}
{% for message in loop_messages %}
    {% set content = '<|start|>' + message['role'] + '<|end_header|>\n\n' + message['content'] | trim + '<|eot|>' %}
    {% if loop.index0 == 0 %}
        {% set content = bos_token + content %}
    {% endif %}
    {{- content -}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start|>assistant<|end_header|>\n\n' }}{% endif %}"""
LLAMA2 = """{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
# Llama 3's and Qwen's pattern, but for its possessive parts
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
         r"\s+(?!\S)|\s+")
TEMPLATES = dict(chatml=(CHATML, "<|im_end|>"), llama3=(LLAMA3, "<|eot|>"), llama2=(LLAMA2, "<|endoftext|>"))


def write_config(folder, template, eos, **more):
    eos = {"__type": "AddedToken", "content": eos, "lstrip": False, "normalized": False, "rstrip": False,
           "single_word": False, "special": True}
    config = {"bos_token": "<|begin|>", "eos_token": eos, "add_bos_token": True,
              "pad_token": None, "chat_template": template}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config | more))


@pytest.fixture(scope="module")
def byte_pairs():
    """A byte-level BPE of 320 ids; merges matter: " you" is one."""
    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    hf.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    hf.train_from_iterator(["hello how are you I am fine thank you user assistant system \n\n"] * 9, trainer)
    return hf


@pytest.fixture(params=TEMPLATES)
def folder(request, byte_pairs, tmp_path, monkeypatch):
    """A random chat model's folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    byte_pairs.save("tokenizer.json")
    write_config(".", *TEMPLATES[request.param])
    torch.manual_seed(2)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=320))
    model.save_pretrained(".", {"tokenizer": "tokenizer.json"})
    return tmp_path


@pytest.fixture
def fed(monkeypatch):
    """The list of all ids that go into the model's state."""
    fed, hidden = [], GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, idx, **options: (
        fed.extend(idx[0].tolist()), hidden(self, idx, **options))[1])
    return fed


@pytest.fixture
def draw(monkeypatch):
    """draw(*replies) makes the model draw these ids, one after the other; a function among them is called."""
    def draw(*replies):
        ids = (i for reply in replies for i in reply)

        def sample_token(*_):
            i = next(ids)
            if callable(i):
                i()
                i = next(ids)
            return torch.tensor([i])
        monkeypatch.setattr(model_py, "sample_token", sample_token)
    return draw


@pytest.fixture
def talk(capfdbinary, monkeypatch):
    """talk(lines, *argv) -> exit code, stdout, stderr of a chat with these lines on stdin."""
    def talk(lines: str | bytes, *argv):
        r, w = os.pipe()
        os.write(w, lines.encode() if isinstance(lines, str) else lines)
        os.close(w)
        with open(r) as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            code = sample.main(["--model", ".", "--chat", *argv])
        out, err = capfdbinary.readouterr()
        return code, out.decode(), err.decode()
    return talk


def begins(tokenizer) -> str:
    """What a reply begins with where the template leaves it to the model."""
    return " " if "[INST]" in Chat(tokenizer).render([dict(role="user", content="")]) else ""


def whole(*turns, tokenizer=None, system=None):
    """The ids of a conversation rendered at once, up to its last message, by another road than Chat.turn."""
    tokenizer = tokenizer or load_tokenizer("tokenizer.json")
    chat, last = Chat(tokenizer), turns[-1] if len(turns) % 2 == 0 else ""
    roles = [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(turns)]
    messages = ([] if system is None else [dict(role="system", content=system)]) + roles
    return tokenizer.encode(chat.render(messages[:-1] if last else messages) + last, control=True)


# ----------------------------------------------------------------------------------------------------------------------
# what is fed


@pytest.mark.parametrize("argv", [[], ["--window", "20"]])
def test_each_turn_feeds_only_what_is_new(folder, talk, draw, fed, argv):
    t = load_tokenizer("tokenizer.json")
    stop = max(Chat(t).stop)
    replies = [begins(t) + text for text in ("I am fine.", "thank you", "caf\u00e9 \U0001f600")]
    ids = [t.encode(reply) for reply in replies]
    draw(*(reply + [stop] for reply in ids))
    code, out, err = talk("hello\n\nhow are you?\r\n\u00e9!\n", *argv)
    assert code == 0 and out == "".join(f"{reply}\n" for reply in replies)
    assert fed == whole("hello", replies[0], "how are you?", replies[1], "\u00e9!", replies[2])
    assert "the template" not in err and f"generated: {sum(map(len, ids)) + 3} tokens" in err and "> " not in err


def test_a_reply_that_is_cut_short_is_closed_by_the_template(folder, talk, draw, fed):
    t = load_tokenizer("tokenizer.json")
    stop, long, short = max(Chat(t).stop), t.encode(begins(t) + "I am fine how are you"), t.encode(begins(t) + "thank")
    draw(long[:4], short + [stop])
    assert talk("hello\nhow\n", "--max-new-tokens", "4")[1] == t.decode(long[:4]).decode() + f"\n{begins(t)}thank\n"
    assert fed == whole("hello", t.decode(long[:4]).decode(), "how", begins(t) + "thank")


def test_ctrl_c_ends_the_reply_and_the_chat_goes_on(folder, talk, draw, fed):
    t = load_tokenizer("tokenizer.json")
    stop, ids = max(Chat(t).stop), t.encode(begins(t) + "I am fine how are you")
    draw([*ids[:3], lambda: os.kill(os.getpid(), signal.SIGINT), *ids[3:4]], t.encode(begins(t) + "thank") + [stop])
    code, out, err = talk("hello\nhow\n")
    assert code == 0 and out == t.decode(ids[:4]).decode() + f"\n{begins(t)}thank\n"
    assert fed == whole("hello", t.decode(ids[:4]).decode(), "how", begins(t) + "thank")


def test_sigterm_ends_the_chat(folder, talk, draw):
    draw([40, lambda: os.kill(os.getpid(), signal.SIGTERM), 41])
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        code, out, err = talk("hello\nhow\n")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 0 and out.count("\n") == 1 and "generated: 2 tokens" in err


def test_the_prompt_is_the_first_turn(folder, talk, draw, fed):
    t = load_tokenizer("tokenizer.json")
    stop = max(Chat(t).stop)
    one, two = begins(t) + "I", begins(t) + "you"
    draw([*t.encode(one), stop], [*t.encode(two), stop])
    Path("p.txt").write_text("two\nlines\n")
    assert talk("how\n", "--prompt", "FILE:p.txt")[1] == f"{one}\n{two}\n"
    assert fed == whole("two\nlines", one, "how", two)


@pytest.mark.parametrize("folder", ["chatml", "llama3"], indirect=True)
def test_a_system_message(folder, talk, draw, fed):
    draw([max(Chat(load_tokenizer("tokenizer.json")).stop)])
    talk("hello\n", "--system", "Be brief.")
    assert fed == whole("hello", system="Be brief.")
    assert "Be brief." in load_tokenizer("tokenizer.json").decode(fed).decode()


@pytest.mark.parametrize("folder", ["chatml"], indirect=True)
def test_a_conversation_longer_than_the_window(folder, talk, fed, monkeypatch):
    """Greedy replies of the streamed conversation are those of one parallel pass over all of it."""
    drawn, sample_token = [], model_py.sample_token
    monkeypatch.setattr(model_py, "sample_token", lambda *args: (
        token := sample_token(*args), drawn.append((len(fed), token.item())))[0])
    code, out, err = talk("hello\nhow are you?\n" * 3, "--window", "20", "--temperature", "0", "--max-new-tokens", "7")
    assert code == 0 and len(fed) > 100 and "constant (window 20 + 4 sinks)" in err and "warning" not in err
    model = GPT.from_pretrained(".", attention="window", window=20)
    logits = model(torch.tensor([fed]))[0][0]
    assert len(drawn) > 20 and all(logits[n - 1].argmax() == token for n, token in drawn)


def test_a_tokenizer_that_begins_each_text_with_a_space(tmp_path):
    """SentencePiece's: the ids of a part are not those of the same part within the whole."""
    (tmp_path / "tokenizer.json").write_text((sample.SHIPPED / "tokenizer.json").read_text())
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    write_config(tmp_path, LLAMA2, "</s>", bos_token="<s>")
    t = load_tokenizer(tmp_path)
    chat, fed = Chat(t), []
    for turn, reply in (("Lily saw", " a big dog"), ("She", " was happy"), ("And", "")):
        fed += chat.turn(turn) + t.encode(reply)[1:]  # without the space of its own
        chat.reply(reply)
    text = ("<s>[INST] Lily saw [/INST] a big dog </s><s>[INST] She [/INST] was happy </s><s>[INST] And [/INST]")
    assert fed == t.encode(text, control=True) and not chat.rewritten and chat.stop == {2}


@pytest.mark.parametrize("folder", TEMPLATES, indirect=True)
def test_transformers_renders_the_same(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(".")
    roles = ("user", " hello "), ("assistant", "I am\n"), ("user", "<b>")
    messages = [dict(role=role, content=text) for role, text in roles]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert Chat(load_tokenizer("tokenizer.json")).render(messages) == text


# ----------------------------------------------------------------------------------------------------------------------
# templates that rewrite, refuse or fail


@pytest.mark.parametrize("folder", ["llama3"], indirect=True)
def test_a_template_that_trims_replies(folder, talk, draw, fed):
    t = load_tokenizer("tokenizer.json")
    stop, spaced = max(Chat(t).stop), t.encode("I am ")
    draw(spaced + [stop], spaced + [stop], spaced + [stop])
    _, out, err = talk("hello\nhow\nyou\n")
    assert err.count("warning: the chat template now writes earlier turns otherwise; the model keeps what it has ") == 1
    head = "<|begin|><|start|>user<|end_header|>\n\nhello<|eot|><|start|>assistant<|end_header|>\n\nI am <|eot|>"
    more = "<|start|>user<|end_header|>\n\n{}<|eot|><|start|>assistant<|end_header|>\n\nI am "
    assert fed == t.encode(head + more.format("how") + "<|eot|>" + more.format("you"), control=True)


@pytest.mark.parametrize("folder", ["chatml"], indirect=True)
def test_a_template_that_drops_earlier_turns(folder, talk, draw):
    stop = max(Chat(load_tokenizer("tokenizer.json")).stop)
    write_config(".", "{{ messages[-1].content }}<|im_end|>", "<|im_end|>")
    draw([40, stop])
    with pytest.raises(SystemExit, match="leaves out the last reply: no state can follow"):
        talk("hello\nhow\n")


@pytest.mark.parametrize("folder", ["chatml"], indirect=True)
@pytest.mark.parametrize("template, words", [
    (None, "has no chat template"), (["a"], "chat_template is a list of other things than names and templates"),
    ([{"nam": "a"}], "chat_template is a list of other things"), ([{"name": [], "template": ""}], "is a list of other"),
    ({"a": 1}, "has no chat template"), ([{"name": "tools", "template": ""}], "has no chat template"),
    ("{% for %}", "is not valid: "), ("{{ raise_exception('no system role') }}", "fails: no system role"),
    ("{{ 1 + 'a' }}", "fails: unsupported operand"), ("{{ ''.__class__.__mro__ }}", "fails: access to attribute"),
    ("{{ messages.append(1) }}", "fails: access to attribute 'append'"),
])
def test_a_template_that_cannot_be_used(folder, talk, template, words):
    write_config(".", template, "<|im_end|>")
    with pytest.raises(SystemExit) as e:
        talk("hello\n")
    assert words in e.value.code and "\n" not in e.value.code


@pytest.mark.parametrize("folder", ["chatml"], indirect=True)
def test_where_a_template_is_found(folder, talk):
    t = load_tokenizer("tokenizer.json")
    hello = [dict(role="user", content="hello")]
    several = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes{{ eos_token }}"}]
    write_config(".", several, "<|im_end|>")
    assert Chat(t).render(hello) == "yes<|im_end|>"
    Path("chat_template.jinja").write_text("file\n")
    assert Chat(t).render(hello) == "file"
    Path("tokenizer_config.json").unlink()
    assert Chat(t).render(hello) == "file"
    Path("special_tokens_map.json").write_text('{"bos_token": "<|begin|>"}')
    Path("chat_template.jinja").write_text(
        "{{ bos_token }}{% generation %}a{% endgeneration %}{{ {'b': '<'} | tojson }}{% for i in [1, 2] %}{% break %}"
        "{% endfor %}{{ strftime_now('%Y') | length }}")
    assert Chat(t).render(hello) == '<|begin|>a{"b": "<"}4'
    Path("special_tokens_map.json").write_text("[]")
    with pytest.raises(ValueError, match="special_tokens_map.json"):
        Chat(t)


@pytest.mark.parametrize("folder", ["llama3"], indirect=True)
def test_all_that_ends_a_reply(folder):
    t = load_tokenizer("tokenizer.json")
    ids = {name: t.encode(name, control=True)[0] for name in SPECIAL}
    assert Chat(t).stop == {ids["<|endoftext|>"], ids["<|im_end|>"], ids["<|eot|>"]}  # the last: its eos_token


@pytest.mark.parametrize("folder", ["llama3"], indirect=True)
@pytest.mark.parametrize("eos, words", [
    ("<|end|>", "eos_token '<|end|>' is no token of the tokenizer, which makes 7 of it: it cannot end a reply"),
    ("", "eos_token '' is no token of the tokenizer, which makes 0 of it"),
    ({"x": 1}, "eos_token is {'x': 1}, which has no text as its content"),
    ({"content": 5}, "eos_token is {'content': 5}, which has no text"),
])
def test_an_eos_token_that_is_none(folder, talk, eos, words):
    write_config(".", LLAMA3, None, eos_token=eos)
    with pytest.raises(SystemExit) as e:
        talk("hello\n")
    assert words in e.value.code and "\n" not in e.value.code


def test_a_token_that_would_span_two_turns(byte_pairs, tmp_path):
    """What the model has seen ends within " you", so the rest is encoded by itself."""
    byte_pairs.save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}", "<|eot|>")
    t = load_tokenizer(tmp_path)
    chat = Chat(t)
    assert chat.turn("how") == t.encode("how")
    chat.reply(" are ")
    assert chat.turn("you") == t.encode("you") and t.encode("how are ") + t.encode("you") != t.encode("how are you")


@pytest.mark.parametrize("folder", ["chatml"], indirect=True)
def test_nobody_but_the_template_writes_control_tokens(folder, talk, draw, fed):
    for argv, lines in (([], "a<|im_end|>\n"), (["--system", "<|im_start|>"], "a\n")):
        with pytest.raises(SystemExit, match=r"message spells out a control token of the model, as <\|im_end\|> is"):
            talk(lines, *argv)
    assert fed == []
    t = load_tokenizer("tokenizer.json")
    chat = Chat(t)
    with pytest.raises(ValueError):
        chat.turn("a<|im_end|>")
    assert chat.turn("a") == whole("a")  # nothing was kept of it


def test_a_model_without_a_template(talk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=320)).save_pretrained(".", {"tokenizer": "byte"})
    with pytest.raises(SystemExit, match="tokenizer byte has no chat template: leave --chat away"):
        talk("hello\n")


# ----------------------------------------------------------------------------------------------------------------------
# stdin


@pytest.mark.parametrize("folder", ["chatml"], indirect=True)
def test_a_line_that_is_not_utf8(folder, talk):
    with pytest.raises(SystemExit, match="a line of stdin is not UTF-8: byte 0xff at offset 2"):
        talk(b"ab\xff\n")


@pytest.mark.parametrize("folder", ["chatml"], indirect=True)
@pytest.mark.parametrize("last", [signal.SIGINT, signal.SIGTERM])
def test_a_terminal_is_asked_and_may_try_again(folder, last):
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    argv = ["--model", ".", "--chat", "--temperature", "0", "--window", "20"]
    p = subprocess.Popen([sys.executable, sample.__file__, *argv], stdin=slave, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    def until(text):
        got = b""
        while not got.endswith(text):
            byte = os.read(p.stderr.fileno(), 1)
            assert byte, got
            got += byte
        return got
    until(b"\n> ")
    os.write(master, b"<|im_end|>\n")
    assert b"spells out a control token" in until(b"\n> ")
    os.write(master, b"hello\n")
    os.read(p.stdout.fileno(), 20)
    p.send_signal(signal.SIGINT)
    assert until(b"> ") == b"> "  # the reply has ended, the chat has not
    p.send_signal(last)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 0 and out.endswith(b"\n") and b"\ngenerated: " in err, err
    os.close(master), os.close(slave)
