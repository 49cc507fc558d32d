"""
LongRoPE's evolutionary search (Ding et al., arXiv 2402.13753, section 3): the factor by which each rotary frequency is
divided so that a model reads texts longer than it was trained on, found by what a change does to the perplexity.

    python search.py --model data/smollm2/model --target 32768        search/<name>.json, a rope_scaling in it
    python eval.py lengths --model data/smollm2/model --scaling yarn search/x.json --lengths 8192 16384 32768
    python train.py --init-from data/smollm2/model --rope-scaling search/x.json --pose-target 32768
    python search.py mine --target 131072                             extend the fine-tuned model further, as it is
    python search.py mine --short --rope-scaling search/x.json        win back what short texts lost
    torchrun --nproc-per-node 8 search.py ...                         each rank measures its share; the same result

What is searched: theta_i / lambda_i for the R frequencies, lambda_i in [1, 1.25 s] on a grid of 0.01 and none below
the one before, s = target / the length that the model reaches now; and n_hat, the number of first tokens that keep
theta_i. It starts with PI, NTK and YaRN as such factors and with mutants of them. In each generation the best live on,
and have mutants and crossovers. Both keep the order by construction, nothing is rejected but what was measured before:

    mutation   each lambda_i, in random order, is drawn anew with probability p, evenly between its two neighbours; so
               is n_hat, from its list
    crossover  each lambda_i is one of its two parents', by chance where both keep the order, going up or down the list

The fitness is the perplexity of the tokens that the long factors serve, those from the trained length L on, in windows
of `target` tokens. A model fine-tuned with a longrope scaling is extended further from there: the lambda_i found then
multiply its own long factors, and the scaling's factor is target / L as ever. --short searches the short factors of
such a model, which serve texts of up to L tokens, on windows of that length; the long ones stay.

After each generation search/<name>.state.json is written, and the same command given again goes on from there; with
more --generations too. The same seed gives the same result.
"""

import hashlib
import importlib.util
import json
import logging
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

from eval import last_nll, read_windows
from kernels import rope_frequencies
from model import GPT, GPTConfig
from sample import SHIPPED, find_model, fingerprint, load, scaling_fields
from train import Place, TrainConfig, choose_place, duration, from_rank0, total

RESULTS = Path("search")
N_HATS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)
Individual = tuple[int, ...]  # n_hat, then R factors in hundredths


@dataclass
class Options:
    """Searches the factors of a longrope scaling that suit a model best (LongRoPE, arXiv 2402.13753)."""

    # a run folder, a step folder, or a name under runs/
    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(
        metavar="[RUN]", constructor=str, help_behavior_hint="(default: the run saved last)")] = None
    model: str | None = None  # a pretrained model instead of a run: its folder or hub id
    target: int | None = None  # tokens to reach (default: 8 times what the model reaches; --short: the trained length)
    rope_scaling: str | None = None  # to begin with instead of the model's own: a file that a search wrote, or JSON
    short: bool = False  # search the short factors of a model with a longrope scaling instead
    name: str | None = None  # of the result's files in search/ (default: the model and the target)
    text: list[str] = field(default_factory=lambda: ["data/sample/validation"])  # files, or folders of .txt files
    windows: int = 5  # places of the texts, evenly spread, each inside one file
    batch_size: int = 1  # windows at a time: what fits in memory
    generations: int = 40  # after the first population
    population: int = 64  # the first one
    parents: int = 32  # live on from a generation to the next
    mutations: int = 16  # new ones of each generation, of a parent
    crossovers: int = 16  # and of two parents
    mutation_p: float = 0.3  # of each factor, in a mutation
    max_factor: float | None = None  # largest factor (default: 1.25 s; --short: the scaling's own factor)
    attention_factor: float | None = None  # on q and k (default: the model's scaling's, or sqrt(1 + ln s / ln L))
    seed: int = 1
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of cuda, mps, cpu that is there
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on capable CUDA, else float32


FREE_ON_RESUME = {"run", "model", "name", "generations", "batch_size", "device"}  # the weights are compared


# ----------------------------------------------------------------------------------------------------------------------
# what is searched


@dataclass
class Space:
    """What is searched: rope_scaling without it, and what turns an individual into it."""

    base: dict  # the rope_scaling, but for what an individual says
    key: str  # "long_factor" or "short_factor"
    start: list[float]  # (R,), which an individual's factors multiply
    top: int  # its largest factor, in hundredths
    n_hats: tuple[int, ...]
    seeds: dict[str, Individual]
    references: dict[str, dict | None]  # rope_scalings to compare with
    length: int  # tokens of a text to measure on
    targets: int  # of these, the last, are predicted

    def factors(self, x: Individual) -> list[float]:
        return [round(a * f / 100, 6) for a, f in zip(self.start, x[1:])]

    def scaling(self, x: Individual) -> dict:
        return self.base | {self.key: self.factors(x), "n_hat": x[0]}


def on_grid(factors, top: int) -> list[int]:
    """Factors as an individual has them: in hundredths, from 100 to `top`, none below the one before."""
    return np.maximum.accumulate(np.clip(np.round(100 * np.asarray(factors)), 100, top).astype(int)).tolist()


def choose_space(opt: Options, c: GPTConfig) -> Space:
    """What to search for a model of this configuration. ValueError, one line, if there is nothing to."""
    if c.position != "rope":
        raise ValueError(f"position is {c.position!r}: there are factors to search for 'rope' only")
    if c.rope_type not in ("default", "longrope"):
        raise ValueError(f"rope_scaling is {c.rope_type!r}: the search begins with a model without one, or longrope's")
    own, L, R = dict(c.rope_scaling or {}), c.trained_length, c.rotary_dim // 2
    reach = max(map(c.span, c.layer_kinds))
    if reach <= L:
        raise ValueError(f"attention {c.attention!r} sees {reach:g} tokens at most, the model was trained on {L}: "
                         "there is nothing to extend")
    ones = [1.0] * R
    extended = c.rope_type == "longrope"
    if extended and "factor" not in own:
        raise ValueError("rope_scaling has no factor: add it to the model's config.json, the length that it reaches "
                         f"over {L}, the trained one")
    if opt.attention_factor is not None:
        own["attention_factor"] = opt.attention_factor
    if opt.short:
        if not extended:
            raise ValueError(f"--short with rope_scaling {c.rope_scaling}: only a longrope scaling has short factors; "
                             "search long ones first, without --short")
        length = opt.target or L
        if length > L:
            raise ValueError(f"--target {length} with --short: the short factors serve texts of up to {L} tokens, the "
                             "trained length")
        top = math.floor(100 * (opt.max_factor or own["factor"]) + 1e-6)
        n_hat = own.get("n_hat", 0)
        seeds = {"as-is": own["short_factor"], "unscaled": ones, "long": own["long_factor"]}
        return Space(own, "short_factor", ones, top, (n_hat,), {
            name: (n_hat, *on_grid(x, top)) for name, x in seeds.items()}, {"as-is": c.rope_scaling}, length, length)
    reach = round(L * own["factor"]) if extended else L
    target = opt.target or 8 * reach
    if target <= reach:
        raise ValueError(f"--target {target}: it must be more than {reach} tokens, which the model reaches already")
    s = target / reach
    top, n_hat = math.floor(100 * (opt.max_factor or 1.25 * s) + 1e-6), own.get("n_hat", 0)
    common = dict(factor=s, original_max_position_embeddings=L)
    families = dict(pi=dict(rope_type="linear", factor=s), ntk=dict(rope_type="ntk", factor=s),
                    yarn=dict(rope_type="yarn", **common))
    theta = rope_frequencies(2 * R, c.rope_base)[0]
    seeds = {name: (theta / rope_frequencies(2 * R, c.rope_base, x)[0]).tolist() for name, x in families.items()}
    base = {"rope_type": "longrope", "short_factor": ones, "original_max_position_embeddings": L} | own
    base |= {"rope_type": "longrope", "factor": target / L}
    base.pop("type", None)
    return Space(base, "long_factor", own.get("long_factor", ones), top, tuple(sorted({*N_HATS, n_hat})), {
        name: (n_hat, *on_grid(x, top)) for name, x in seeds.items()},
        {"as-is": c.rope_scaling} | ({} if extended else families), target, target - L)


def mutate(x: Individual, space: Space, p: float, rng: np.random.Generator) -> Individual:
    """Each factor, in random order, with probability p drawn anew between its neighbours; so n_hat, from its list."""
    n_hat, f = x[0], [100, *x[1:], space.top]
    for i in rng.permutation(len(x) - 1) + 1:
        if rng.random() < p:
            f[i] = int(rng.integers(f[i - 1], f[i + 1] + 1))
    if rng.random() < p:
        n_hat = int(rng.choice(space.n_hats))
    return n_hat, *f[1:-1]


def cross(a: Individual, b: Individual, rng: np.random.Generator) -> Individual:
    """
    Each factor is a's or b's: by chance, but the one's that keeps the order where the other's does not. It exists: the
    one after a parent's factor in the same parent is not below it. The list is gone through from either end.
    """
    down = bool(rng.integers(2))
    made, last = [], -math.inf
    for pair in list(zip(a[1:], b[1:]))[::-1 if down else 1]:
        pair = [-f if down else f for f in pair]
        f = pair[rng.integers(2)]
        last = f if f >= last else max(pair)
        made.append(-last if down else last)
    return (a, b)[rng.integers(2)][0], *made[::-1 if down else 1]


def new_one(make, known: set) -> Individual:
    """make() until it is not in `known`, to which it is added; in a space as good as used up, what there is."""
    for _ in range(100):
        if (x := make()) not in known:
            break
    known.add(x)
    return x


def offspring(generation: int, population: list[Individual], known: set, space: Space,
              opt: Options) -> list[Individual]:
    """The new ones of a generation, a function of the seed, its number and what there is; 0: the seeds and theirs."""
    rng, known = np.random.default_rng([opt.seed, generation]), set(known)

    def mutant(parents):
        return new_one(lambda: mutate(parents[rng.integers(len(parents))], space, opt.mutation_p, rng), known)

    def crossed():
        return cross(*(population[i] for i in rng.choice(len(population), 2, replace=False)), rng)

    if generation == 0:
        seeds = list(dict.fromkeys(space.seeds.values()))
        known.update(seeds)
        return seeds + [mutant(seeds) for _ in range(opt.population - len(seeds))]
    return [mutant(population) for _ in range(opt.mutations)] + [
        new_one(crossed, known) for _ in range(opt.crossovers if len(population) > 1 else 0)]


# ----------------------------------------------------------------------------------------------------------------------
# the search


def measure(model: GPT, scalings: list[dict | None], windows: torch.Tensor, targets: int, prefix: list[int],
            opt: Options, place: Place, title: str) -> list[float]:
    """The mean nll in nats, at most 700, with each rope_scaling, on every rank; each rank measures its share."""
    nll = [0.0] * len(scalings)
    for i in tqdm(range(place.rank, len(nll), place.world), title, leave=False, disable=place.rank > 0 or None):
        model.set_rope_scaling(scalings[i])
        x = float(last_nll(model, windows, targets, prefix, opt.batch_size).double().mean())
        nll[i] = min(x, 700.0) if math.isfinite(x) else 700.0
    return total(place, *nll) if nll else []


def read_state(path: Path, identity: dict) -> dict:
    """What `path` holds of this search, or its empty beginning. ValueError if it is another search's."""
    if not path.is_file():
        return dict(identity=identity, generation=-1, population=[], measured=[], references={}, history=[])
    try:
        state = json.loads(path.read_text())
        changed = [f"{key} {state['identity'].get(key)} -> {value}" for key, value in identity.items()
                   if state["identity"].get(key) != value]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: delete it, or give another --name") from None
    if changed:
        raise ValueError(f"{path} is of another search, {', '.join(changed)}: give another --name, or delete it")
    return state


def write_json(path: Path, content: dict):
    """Aside, then renamed: the file is the old one or the new one, whatever happens."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(json.dumps(content, indent=1))
    os.replace(aside, path)


def result_of(state: dict, space: Space, opt: Options, name: str) -> dict:
    """What search/<name>.json holds."""
    nll = {tuple(x): value for x, value in state["measured"]}
    best = tuple(state["population"][0])
    return dict(
        rope_scaling=space.scaling(best), perplexity=math.exp(nll[best]), searched=space.key, length=space.length,
        targets=space.targets, references={key: math.exp(x) for key, x in state["references"].items()},
        seeds={key: dict(perplexity=math.exp(nll[x]), factors=space.factors(x)) for key, x in space.seeds.items()},
        generations=state["generation"], measured=len(nll), history=state["history"], model=name, options=asdict(opt))


def evolve(model: GPT, windows: torch.Tensor, prefix: list[int], space: Space, state: dict, stem: Path,
           opt: Options, place: Place, name: str) -> dict:
    """Goes on with `state` to opt.generations, writing it and the result after each, on rank 0 -> the result."""
    measured = {tuple(x): nll for x, nll in state["measured"]}
    population = [tuple(x) for x in state["population"]]
    began, first = time.perf_counter(), state["generation"] + 1
    for generation in range(first, opt.generations + 1):
        if generation == 0:
            references = list(space.references.values())
            nll = measure(model, references, windows, space.targets, prefix, opt, place, "references")
            state["references"] = dict(zip(space.references, nll))
        made = offspring(generation, population, set(measured), space, opt)
        new = [x for x in dict.fromkeys(made) if x not in measured]
        nll = measure(model, [space.scaling(x) for x in new], windows, space.targets, prefix, opt, place,
                      f"generation {generation}")
        measured |= dict(zip(new, nll))
        population = sorted({*population, *made}, key=lambda x: (measured[x], x))[:opt.parents]
        state["history"].append(dict(generation=generation, best=math.exp(measured[population[0]]),
                                     worst_parent=math.exp(measured[population[-1]]), new=len(new)))
        state |= dict(generation=generation, population=population, measured=list(measured.items()))
        result = result_of(state, space, opt, name)
        if place.rank == 0:
            write_json(stem.with_name(f"{stem.name}.state.json"), state)
            write_json(stem.with_name(f"{stem.name}.json"), result)
            # the first generation measures more than each of the others will
            per_one = (time.perf_counter() - began) / max(1, sum(x["new"] for x in state["history"][first:]))
            left = per_one * (opt.mutations + opt.crossovers) * (opt.generations - generation)
            print(f"generation {generation}/{opt.generations} | best {result['perplexity']:.4f}, "
                  f"n_hat {population[0][0]} | "
                  + " ".join(f"{key} {x['perplexity']:.4f}" for key, x in result["seeds"].items())
                  + f" | {len(measured)} measured | {duration(left)} left", flush=True)
    return result_of(state, space, opt, name)


def draw(result: dict, path: Path):
    """The factors found beside those it began with, and the perplexity by generation."""
    from matplotlib.figure import Figure
    axes = (figure := Figure(figsize=(11, 4), dpi=120)).subplots(1, 2)
    axes[0].plot(result["rope_scaling"][result["searched"]], "k.-", label="found")
    best = [x["best"] for x in result["history"]]
    axes[1].plot(range(len(best)), best, "k.-", label=f"best, {best[-1]:.4g}")
    for i, (name, seed) in enumerate(result["seeds"].items()):
        axes[0].plot(seed["factors"], color=f"C{i}", label=name)
        axes[1].axhline(seed["perplexity"], color=f"C{i}", label=f"{name}, {seed['perplexity']:.4g}")
    axes[0].set(xlabel="frequency, fastest first", ylabel=result["searched"].replace("_", " "))
    axes[1].set(xlabel="generation", ylabel=f"perplexity, the last {result['targets']} of {result['length']} tokens")
    seeds = sorted(x["perplexity"] for x in result["seeds"].values())
    axes[1].set_ylim(top=1.01 * max(best[0], seeds[len(seeds) // 2]))  # a poor one would flatten the curve
    for ax in axes:
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    figure.savefig(path, bbox_inches="tight")


def search(opt: Options, place: Place) -> Path:
    """The whole search -> the result's path without its ending. ValueError, OSError, SystemExit: a user's mistake."""
    if opt.run is not None and opt.model is not None:
        raise SystemExit(f"run {opt.run} and --model {opt.model}: give one of them")
    name = str(find_model(opt.run, opt.model) or SHIPPED)
    model, tokenizer = load(name, {} if opt.rope_scaling is None else scaling_fields(opt.rope_scaling, name))
    space = choose_space(opt, model.config)
    windows = read_windows(opt.text, tokenizer, opt.windows, space.length + 1)
    identity = {key: value for key, value in asdict(opt).items() if key not in FREE_ON_RESUME} | dict(
        target=space.length, dtype=str(place.dtype)[6:], model_weights=bytes(fingerprint(model).tolist()).hex(),
        text_tokens=hashlib.sha256(windows.numpy().tobytes()).hexdigest())
    identity.pop("text")  # by its tokens
    parts = [*Path(name).resolve().parts[-2:], *["short"] * opt.short, str(space.length)]
    stem = RESULTS / (opt.name or "-".join(parts))
    state = from_rank0(place, read_state, stem.with_name(f"{stem.name}.state.json"), identity)
    from_rank0(place, lambda: RESULTS.mkdir(exist_ok=True))
    if place.rank == 0:
        print(*place.reasons[:2],
              f"model: {name}, {space.key} for {space.length} tokens, factors 1 to {space.top / 100:g} times "
              f"{'1' if set(space.start) == {1.0} else 'its own'}; measured on {opt.windows} x {space.targets} tokens",
              *([f"going on after generation {state['generation']}"] if state["generation"] >= 0 else []), sep="\n",
              flush=True)
    model.to(place.device, place.dtype)
    result = evolve(model, windows, tokenizer.prefix, space, state, stem, opt, place, name)
    if place.rank == 0:
        print("perplexity: " + ", ".join(f"{key} {x:.4f}" for key, x in result["references"].items())
              + "; as factors " + ", ".join(f"{key} {x['perplexity']:.4f}" for key, x in result["seeds"].items())
              + f"; found {result['perplexity']:.4f}", flush=True)
        if importlib.util.find_spec("matplotlib") is None:
            print("no picture: pip install matplotlib draws it", file=sys.stderr)
        else:
            draw(result, stem.with_name(f"{stem.name}.png"))
        lengths = " ".join(map(str, sorted({model.config.trained_length, space.length})))
        print(f"wrote {stem}.json; next: python eval.py lengths --model {name} --scaling as-is {stem}.json "
              f"--lengths {lengths}", file=sys.stderr)
    return stem


def check(opt: Options):
    """SystemExit, one line, for an option out of its range."""
    for name, least in dict(target=2, windows=1, batch_size=1, generations=0, population=1, parents=1, mutations=0,
                            crossovers=0, mutation_p=0, max_factor=1, attention_factor=1e-9, seed=0).items():
        value = getattr(opt, name)
        if value is not None and not least <= value < math.inf:
            raise SystemExit(f"{name} is {value}: it must be at least {least}, and finite")
    if opt.mutation_p > 1:
        raise SystemExit(f"mutation_p is {opt.mutation_p}: it is a probability, at most 1")
    if opt.parents > opt.population:
        raise SystemExit(f"parents is {opt.parents}, the first population {opt.population}: it must have as many")
    if opt.name is not None and "/" in opt.name:
        raise SystemExit(f"--name {opt.name} is the stem of files in {RESULTS}/: leave the / away")
    if not opt.text:
        raise SystemExit("--text without a value: give one, or leave it away")


def main(argv: list[str] | None = None):
    """The command line (argv: without the program's name). SystemExit, one line, for a user's mistake."""
    opt = tyro.cli(Options, prog="search.py", args=argv, description=__doc__)
    check(opt)
    try:
        place = choose_place(TrainConfig(device=opt.device, dtype=opt.dtype))
        logging.basicConfig(format="%(message)s")  # to stderr
        logging.getLogger("nanolong").setLevel(logging.INFO if place.rank == 0 else logging.WARNING)
        if place.world > 1:
            dist.init_process_group("gloo")
        search(opt, place)
        total(place, 0)  # gloo's threads may abort a process that leaves while others still talk to it
    except (ValueError, OSError) as e:
        raise SystemExit(str(e)) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
