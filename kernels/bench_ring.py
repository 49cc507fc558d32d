"""
Ring attention measured: who computes how much, what is sent, what the merges cost, what a rank holds.

    python -m kernels.bench_ring                          all of it, on this machine
    python -m kernels.bench_ring --memory-ranks 1 2 4     fewer processes; none: leaves the memory out

Load: the scores that each rank computes at each hop, counted block by block. A hop takes as long as its slowest rank.
On a GPU besides, overhead: one process in the place of P ranks computes all their blocks and merges, without messages,
against the plain kernel over the whole sequence; and overlap: the bandwidth at which a hop's exchange takes as long as
its blocks.
Memory: training steps of a small model (--memory-ranks processes over gloo, CPU), the tokens per rank constant, and
one process alone with as many tokens: the peak of each process beyond what it held before its first step. Writes
config/ring_memory.json and .png.
"""

import contextlib
import dataclasses
import datetime
import json
import multiprocessing
import os
import platform
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from kernels.attention import attention
from kernels.bench import median_ms
from kernels.ring import (LAYOUTS, _backward_hop, _blocks, _call, _forward_hop, _hops, _Masks, _pieces, shard_sequence)

OUT = Path(__file__).resolve().parent.parent / "config" / "ring_memory.json"


@dataclasses.dataclass
class Options:
    ranks: tuple[int, ...] = (2, 4, 8)  # of which load and overhead are told
    tokens: int = 65536  # of the sequence, for the overhead
    head_dim: int = 128  # of 8 query heads and 8 kv heads, for the overhead
    memory_ranks: tuple[int, ...] = (1, 2, 4, 8)  # processes whose memory is measured
    memory_tokens: int = 2048  # tokens that each of them holds


def causal_load(P: int, c: int, layout: str) -> torch.Tensor:
    """How many scores each rank computes at each hop of causal attention over P c tokens: (P, hops) int64."""
    masks = _Masks(P, c, layout, True, None, None, 0, 0, False)
    load = torch.zeros(P, len(_hops(masks)), dtype=torch.int64)
    for rank in range(P):
        for i, hop in enumerate(_hops(masks)):
            for block in _blocks(masks, rank, (rank - hop) % P):
                ahead = block.options["q_start"] - block.options["k_start"]
                rows = torch.arange(block.rows.stop - block.rows.start)
                load[rank, i] += (rows + ahead + 1).clamp(0, block.keys.stop - block.keys.start).sum()
    return load


class Emulated:
    """P ranks of a causal ring in one process, without messages: q (B, T, H, D), k, v (B, T, G, D), and dout like q."""

    def __init__(self, q, k, v, dout, P, layout):
        self.P, c = P, q.shape[1] // P
        self.rows = [torch.cat([x.start + x.step * torch.arange(x.n, device=q.device) for x in _pieces(rank, P, c, layout)])
                     for rank in range(P)]
        self.calls = [_call(q[:, rows], *5 * [None], rank, P, layout, q.shape[3]**-0.5, True, None, None, 0, None)
                      for rank, rows in enumerate(self.rows)]
        self.kv = [torch.stack([k[:, rows], v[:, rows]]) for rows in self.rows]
        self.dout = [dout[:, rows] for rows in self.rows]
        self.acc = torch.promote_types(q.dtype, torch.float32)

    def forward(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each rank's out and lse."""
        results = []
        for call in self.calls:
            B, c, H, D = call.q.shape
            out = torch.zeros(B, c, H, D, dtype=self.acc, device=call.q.device)
            lse = torch.full((B, H, c), -torch.inf, dtype=self.acc, device=call.q.device)
            for hop in _hops(call.masks):
                _forward_hop(call, out, lse, self.kv[call.rank - hop], None, (call.rank - hop) % self.P)
            results.append((out.to(call.q.dtype), lse))
        return results

    def backward(self, results) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Each rank's dq, and dk, dv of its shard."""
        dqs = [torch.zeros(call.q.shape, dtype=self.acc, device=call.q.device) for call in self.calls]
        dkvs = [torch.zeros(kv.shape, dtype=self.acc, device=kv.device) for kv in self.kv]
        for call, dq, dout, (out, lse) in zip(self.calls, dqs, self.dout, results):
            for hop in _hops(call.masks):
                source = (call.rank - hop) % self.P
                dkvs[source] += _backward_hop(call, dout, None, out, lse, dq, [], self.kv[source], None, source)
        return dqs, dkvs


def emulated_ring(q, k, v, P, layout, dout):
    """-> out, (dq, dk, dv) of P ranks' causal ring, gathered, in float32 (float64 for float64)."""
    with torch.no_grad():
        ring = Emulated(q, k, v, dout, P, layout)
        results = ring.forward()
        dqs, dkvs = ring.backward(results)
        order = torch.cat(ring.rows).argsort()
        gathered = [torch.cat([part.to(ring.acc) for part in parts], 1)[:, order] for parts in
                    ([out for out, _ in results], dqs, [dkv[0] for dkv in dkvs], [dkv[1] for dkv in dkvs])]
    return gathered[0], gathered[1:]


def print_load(ranks: tuple[int, ...]):
    """Each layout's efficiency, and for 4 ranks what each of them computes at each hop."""
    print("causal load: scores per rank and hop, in units of a shard's square; efficiency = mean over ranks / sum of slowest")
    for P in ranks:
        for layout in LAYOUTS:
            load = causal_load(P, 1024, layout)
            efficiency = load.sum().item() / P / load.amax(0).sum().item()
            print(f"{P} ranks, {layout}: efficiency {efficiency:.2f}")
            if P == 4:
                for rank, row in enumerate(load):
                    print(f"    rank {rank}: " + " ".join(f"{x / 1024**2:.2f}" for x in row.tolist()))


def print_overhead(opt: Options) -> list[dict]:
    """All ranks' blocks and merges in one process, in ms, beside the plain kernel's: a row for each number and layout."""
    q, k, v, dout = (torch.randn(1, opt.tokens, 8, opt.head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves, rows = [x.clone().requires_grad_() for x in (q, k, v)], []
    out = attention(*leaves)
    with torch.no_grad():
        forward = median_ms(lambda: attention(q, k, v), "cuda")
    backward = median_ms(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True), "cuda")
    print(f"\noverhead: {opt.tokens} tokens, 8 heads of {opt.head_dim}, bfloat16: plain kernel {forward:.1f} ms forward, "
          f"{backward:.1f} ms backward")
    for P in opt.ranks:
        for layout in LAYOUTS:
            with torch.no_grad():
                ring = Emulated(q, k, v, dout, P, layout)
                results = ring.forward()
                ms = median_ms(ring.forward, "cuda"), median_ms(lambda: ring.backward(results), "cuda")
            rows.append(dict(ranks=P, layout=layout, tokens=opt.tokens, forward_ms=ms[0], backward_ms=ms[1],
                             plain_forward_ms=forward, plain_backward_ms=backward))
            print(f"{P} ranks, {layout}: forward {ms[0]:.1f} ms ({ms[0] / forward - 1:+.1%}), backward {ms[1]:.1f} ms "
                  f"({ms[1] / backward - 1:+.1%})")
    return rows


def print_overlap(opt: Options) -> list[dict]:
    """For shards of c tokens, from measured blocks, zigzag: half of all scores of a square at every hop."""
    rows = []
    print("\noverlap: one hop of zigzag, 8 query and 8 kv heads; the exchange is hidden from so many GB/s on")
    for c in (2048, 8192, 32768):
        q, k, v, dout = (torch.randn(1, c, 8, opt.head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
        call = _call(q, None, None, None, None, None, 1, 2, "zigzag", opt.head_dim**-0.5, True, None, None, 0, None)
        kv, acc = torch.stack([k, v]), torch.float32
        out, lse, dq = (torch.zeros_like(q, dtype=acc), torch.full((1, 8, c), -torch.inf, device="cuda"),
                        torch.zeros_like(q, dtype=acc))
        with torch.no_grad():
            forward = median_ms(lambda: _forward_hop(call, out, lse, kv, None, 0), "cuda")
            backward = median_ms(lambda: _backward_hop(call, dout, None, out, lse, dq, [], kv, None, 0), "cuda")
        need = [kv.nbytes / forward / 1e6, (kv.nbytes + 2 * k.numel() * 4) / backward / 1e6]
        rows.append(dict(tokens_per_rank=c, forward_ms=forward, backward_ms=backward, forward_gbps=need[0],
                         backward_gbps=need[1]))
        print(f"{c} tokens per rank: forward {forward:.2f} ms, {need[0]:.1f} GB/s; backward {backward:.2f} ms, "
              f"{need[1]:.1f} GB/s")
    return rows


def peak_memory(rank: int, P: int, folder: str, T: int, result):
    """In a process of its own: the peak, in bytes, of a model's training steps beyond what there was before the first."""
    from model import GPT, GPTConfig
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=P,
                            timeout=datetime.timedelta(minutes=10))
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=256, vocab_size=256, block_size=T))
    model.sequence_parallel(dist.group.WORLD)
    model.activation_checkpointing = True
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    idx = shard_sequence(torch.randint(256, (1, T)), *model.ring)
    before = status("VmRSS")
    for _ in range(2):
        model(idx, idx, reduction="sum")[1].backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        optimizer.step()
        optimizer.zero_grad()
    result.send(status("VmHWM") - before)
    dist.barrier()
    dist.destroy_process_group()


def status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def peaks_of(P: int, T: int) -> list[int]:
    """Each process's peak when P of them share a sequence of T tokens."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(P)]
        workers = [context.Process(target=peak_memory, args=(rank, P, folder, T, pipe[1])) for rank, pipe in enumerate(pipes)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            sys.exit(f"kernels.bench_ring: a process of {P} ended with an error, see above")
        return [pipe[0].recv() for pipe in pipes]


def measure_memory(opt: Options) -> list[dict]:
    """The peak of each rank of a ring, and of one process alone, in bytes, by the number of ranks."""
    print(f"\nmemory: 4 layers of 256, {opt.memory_tokens} tokens per rank, recomputation, float32, gloo: beyond the weights")
    rows = []
    for P in opt.memory_ranks:
        T = P * opt.memory_tokens
        peaks, alone = peaks_of(P, T), peaks_of(1, T)[0]
        rows.append(dict(ranks=P, tokens=T, peak_bytes=peaks, alone_bytes=alone))
        print(f"{T} tokens on {P} rank(s): {min(peaks) / 2**20:.0f} to {max(peaks) / 2**20:.0f} MiB per rank; one process "
              f"alone: {alone / 2**20:.0f} MiB", flush=True)
    return rows


def draw(rows: list[dict], path: Path):
    """measure_memory's rows as a picture."""
    from matplotlib.figure import Figure
    axes = (figure := Figure(figsize=(7, 4), dpi=120)).subplots()
    tokens = [row["tokens"] for row in rows]
    axes.plot(tokens, [row["alone_bytes"] / 2**20 for row in rows], "s--", color="grey", label="one process alone")
    axes.plot(tokens, [max(row["peak_bytes"]) / 2**20 for row in rows], "o-", label="in a ring: the rank with the most")
    axes.set(xlabel="tokens of the sequence", ylabel="peak memory of a training step, MiB per rank", ylim=(0, None),
             xticks=tokens, xticklabels=[f"{row['tokens']}\n{row['ranks']} rank{'s' * (row['ranks'] > 1)}" for row in rows])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, bbox_inches="tight")


def main(opt: Options):
    """Load, overhead, overlap and memory of ring attention, on this machine."""
    gpu = torch.cuda.is_available()
    print_load(opt.ranks)
    result = dict(machine=torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {os.cpu_count()} cores",
                  torch=torch.__version__, options=dataclasses.asdict(opt))
    if gpu:
        result |= dict(overhead=print_overhead(opt), overlap=print_overlap(opt))
    else:
        print("\noverhead, overlap: these need a GPU")
    if opt.memory_ranks:
        result["memory"] = measure_memory(opt)
        OUT.write_text(json.dumps(result, indent=1) + "\n")
        with contextlib.suppress(ImportError):
            draw(result["memory"], OUT.with_suffix(".png"))
        print(f"saved {OUT}")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options, description=main.__doc__))
