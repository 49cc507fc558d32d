"""Rope's frequency families: values from transformers and from closed forms, the published constants, and mistakes."""

import json
import math
from pathlib import Path

import pytest
import torch

from kernels import rope_frequencies

# {dim, base, scaling, seq_len, attention_factor, at: indices, inv_freq: the frequencies there}, from transformers 5.23,
# and from base * s^(d / (d - 2)) for "ntk", which it does not have
GOLDENS = json.loads((Path(__file__).parent / "rope_goldens.json").read_text())
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048)
LLAMA3 = dict(rope_type="llama3", factor=8, original_max_position_embeddings=8192, low_freq_factor=1,
              high_freq_factor=4)
LONGROPE = dict(rope_type="longrope", factor=8, original_max_position_embeddings=4096, short_factor=[1, 1.1, 1.2, 1.3],
                long_factor=[1, 2, 4, 8])


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda g: f"{(g['scaling'] or {}).get('rope_type')}-{g['dim']}")
def test_goldens(golden):
    inv_freq, factor = rope_frequencies(golden["dim"], golden["base"], golden["scaling"], golden["seq_len"])
    assert inv_freq.dtype == torch.float64 and inv_freq.shape == (golden["dim"] // 2,) and isinstance(factor, float)
    expected = torch.tensor(golden["inv_freq"], dtype=torch.float64)
    torch.testing.assert_close(inv_freq[golden["at"]], expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(golden["attention_factor"], rel=1e-6)


def test_every_family_has_a_golden():
    from kernels.rope import SCALING_KEYS
    kinds = {(golden["scaling"] or {}).get("rope_type", "default") for golden in GOLDENS}
    assert kinds | {"ntk_by_parts"} == SCALING_KEYS.keys()  # which is yarn without its factor


def test_yarn_constants():
    """The dims between which YaRN blends, for base 1e4, and m and LongRoPE's factor for s = 2 .. 128."""
    for L, dim, low, high in ((4096, 128, 20, 46), (4096, 64, 10, 23), (2048, 64, 8, 21), (1024, 64, 5, 18),
                              (512, 64, 3, 16)):
        plain, _ = rope_frequencies(dim)
        ratio = rope_frequencies(dim, scaling={**YARN, "factor": 16, "original_max_position_embeddings": L})[0] / plain
        blend = (ratio - 1 / 16) / (1 - 1 / 16)  # 1 up to `low`, 0 from `high` on
        expected = [min(max(1 - (i - low) / (high - low), 0), 1) for i in range(dim // 2)]
        torch.testing.assert_close(blend, torch.tensor(expected, dtype=torch.float64))
    m = [rope_frequencies(64, scaling={**YARN, "factor": 2**k})[1] for k in range(1, 8)]
    assert m == pytest.approx([1.0693, 1.1386, 1.2079, 1.2773, 1.3466, 1.4159, 1.4852], abs=5e-5)
    longrope = [rope_frequencies(8, scaling={**LONGROPE, "factor": 2**k})[1] for k in range(1, 8)]
    assert longrope == pytest.approx([1.0408, 1.0801, 1.1180, 1.1547, 1.1902, 1.2247, 1.2583], abs=5e-5)


def same(a, b):
    return torch.equal(a[0], b[0]) and a[1] == b[1]


def test_precedence_and_defaults():
    yarn = rope_frequencies(64, scaling=YARN)
    assert yarn[1] == 0.1 * math.log(4) + 1
    assert same(yarn, rope_frequencies(64, scaling={**YARN, "beta_fast": 32, "beta_slow": 1, "truncate": True}))
    assert same(yarn, rope_frequencies(64, scaling={**YARN, "attention_factor": None, "mscale": None}))
    assert same(yarn, rope_frequencies(64, scaling={**YARN, "mscale": 2.0}))  # only together with mscale_all_dim
    both = {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}
    assert rope_frequencies(64, scaling=both)[1] == (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert rope_frequencies(64, scaling={**both, "attention_factor": 1.5})[1] == 1.5
    parts = {**YARN, "rope_type": "ntk_by_parts"}
    assert same(rope_frequencies(64, scaling=parts), (yarn[0], 1.0))
    older = {"type" if key == "rope_type" else key: value for key, value in YARN.items()}
    assert same(rope_frequencies(64, scaling=older), yarn)
    assert same(rope_frequencies(64, scaling={**YARN, "type": "linear"}), yarn)
    assert same(rope_frequencies(64, 1e4, {"rope_theta": 5e5, "rope_type": "default"}), rope_frequencies(64, 5e5))
    assert same(rope_frequencies(64, 1e4, {**YARN, "rope_theta": 5e5}), rope_frequencies(64, 5e5, YARN))
    assert same(rope_frequencies(64, scaling={}), rope_frequencies(64))


def test_ramp_by_turns():
    """YaRN as its paper writes it: blended evenly by the turns r in L, between 1 and 32 of them."""
    (plain, _), (theta, factor) = rope_frequencies(64), rope_frequencies(64, scaling={**YARN, "ramp": "turns"})
    g = ((2048 * plain / (2 * math.pi) - 1) / 31).clamp(0, 1)
    torch.testing.assert_close(theta, (1 - g) * plain / 4 + g * plain, rtol=1e-12, atol=0)
    assert factor == rope_frequencies(64, scaling=YARN)[1] and not same((theta, factor), rope_frequencies(64, scaling=YARN))
    assert same(rope_frequencies(64, scaling={**YARN, "ramp": "dims"}), rope_frequencies(64, scaling=YARN))
    with pytest.raises(ValueError, match="ramp is 'linear', it must be 'dims' or 'turns'"):
        rope_frequencies(64, scaling={**YARN, "ramp": "linear"})


def test_what_depends_on_the_length():
    dynamic = dict(rope_type="dynamic", factor=2.0, original_max_position_embeddings=1024)
    for length in (None, 1, 1024):
        assert same(rope_frequencies(64, scaling=dynamic, seq_len=length), rope_frequencies(64))
    stretched = rope_frequencies(64, scaling=dynamic, seq_len=3072)
    assert same(stretched, rope_frequencies(64, 1e4 * 5 ** (64 / 62)))
    plain, _ = rope_frequencies(8)
    for length, factors in ((None, "short_factor"), (4096, "short_factor"), (4097, "long_factor")):
        inv_freq, factor = rope_frequencies(8, scaling=LONGROPE, seq_len=length)
        assert torch.equal(inv_freq, plain / torch.tensor(LONGROPE[factors], dtype=torch.float64))
        assert factor == math.sqrt(1 + math.log(8) / math.log(4096))
    without = {key: value for key, value in LONGROPE.items() if key != "factor"}
    assert rope_frequencies(8, scaling={**without, "attention_factor": 1.25})[1] == 1.25
    for scaling in (YARN, LLAMA3, dict(rope_type="linear", factor=2), dict(rope_type="ntk", factor=2)):
        assert same(rope_frequencies(64, scaling=scaling, seq_len=10**6), rope_frequencies(64, scaling=scaling))


@pytest.mark.parametrize("scaling, parts", [
    (dict(rope_type="yarm", factor=2), ["'yarm'", "yarn", "llama3"]),
    (dict(type="su", factor=2), ["'su'", "longrope"]),
    (dict(rope_type=["yarn"]), ["['yarn']"]),
    (dict(rope_type="linear"), ["'linear'", "lacks factor"]),
    (dict(rope_type="yarn", factor=4), ["lacks original_max_position_embeddings"]),
    ({**LLAMA3, "low_freq_factor": None}, ["lacks low_freq_factor"]),
    (dict(rope_type="linear", factor=2, beta_fast=32), ["does not know beta_fast"]),
    (dict(factor=2), ["'default'", "does not know factor"]),
    (dict(rope_type="default", partial_rotary_factor=0.5), ["does not know partial_rotary_factor"]),
    (dict(rope_type="linear", factor="2"), ["factor is '2'"]),
    (dict(rope_type="linear", factor=0.5), ["factor is 0.5", "at least 1"]),
    (dict(rope_type="linear", factor=float("nan")), ["factor is nan"]),
    ({**YARN, "original_max_position_embeddings": 0}, ["original_max_position_embeddings is 0"]),
    ({**YARN, "beta_fast": 1, "beta_slow": 1}, ["beta_slow=1", "beta_fast=1"]),
    ({**YARN, "beta_slow": 64}, ["beta_slow=64", "beta_fast=32"]),
    ({**YARN, "attention_factor": -1.0}, ["attention_factor is -1.0"]),
    ({**YARN, "truncate": "no"}, ["truncate is 'no'"]),
    ({**LLAMA3, "high_freq_factor": 1}, ["low_freq_factor=1", "high_freq_factor=1"]),
    ({**LONGROPE, "long_factor": [1, 2, 4]}, ["long_factor has 3", "dim=8 needs 4"]),
    ({**LONGROPE, "short_factor": 2.0}, ["short_factor is 2.0", "list"]),
    ({**LONGROPE, "short_factor": [1, 0, 1, 1]}, ["short_factor is [1, 0, 1, 1]", "positive"]),
    ({**LONGROPE, "factor": None}, ["lacks factor (or attention_factor)"]),
    (dict(rope_type="default", rope_theta=1.0), ["base=1.0"]),
])
def test_mistakes(scaling, parts):
    with pytest.raises(ValueError) as error:
        rope_frequencies(8, 1e4, scaling)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"


def test_two_dims_cannot_stretch_the_base():
    for kind in (dict(rope_type="ntk"), dict(rope_type="dynamic", original_max_position_embeddings=8)):
        with pytest.raises(ValueError, match="dim=2"):
            rope_frequencies(2, scaling={**kind, "factor": 2})
