"""
What the kernel tests share: the error criterion, guard bands, poisoned outputs, a count of live tensor bytes, processes
that form a group.

    q, k = guarded(q), guarded(k)                     # copies inside NaN-filled buffers, same shapes and strides
    with poisoned_empty():                            # outputs start as NaN, between guard bands of their own
        out = kernel(q.tensor, k.tensor)
    q.check(), k.check()                              # nothing around the inputs was written
    assert_close_2x(out, oracle in float64, same maths in plain torch in out's dtype, "out")
"""

import contextlib
import datetime
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from unittest import mock

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def relative_error(actual, oracle):
    """Frobenius norm of the difference over that of the oracle, in float64 (over 1 for an oracle that is all zeros)."""
    actual, oracle = actual.detach().double(), oracle.detach().double()
    return ((actual - oracle).norm() / (oracle.norm() or 1.0)).item()


def assert_close_2x(actual, oracle64, same_dtype_torch, name):
    """
    actual: what a kernel gave; oracle64: the same in float64; same_dtype_torch: the same maths in plain torch in
    actual's dtype (naive, unfused). Passes when

        error(actual) <= 2 * error(same_dtype_torch) + floor,    error(y) = ||y - oracle64|| / ||oracle64||  (Frobenius)

    with floor = eps of actual's dtype: a value rounded once to that dtype is off by at most eps / 2. For float64 the
    floor is 1e-12, the accuracy of the oracle itself. Entries where the oracle is infinite or NaN must be equal and are
    left out of the norms.
    """
    assert actual.shape == oracle64.shape == same_dtype_torch.shape, \
        f"{name}: {tuple(actual.shape)}, the oracle is {tuple(oracle64.shape)}, torch {tuple(same_dtype_torch.shape)}"
    assert oracle64.dtype == torch.float64, f"{name}: the oracle is {oracle64.dtype}, not float64"
    assert actual.dtype == same_dtype_torch.dtype, f"{name}: {actual.dtype}, plain torch gives {same_dtype_torch.dtype}"
    finite = oracle64.detach().isfinite()
    special, expected = actual.detach()[~finite].double(), oracle64.detach()[~finite]
    assert torch.equal(special.nan_to_num(7.0, 8.0, 9.0), expected.nan_to_num(7.0, 8.0, 9.0)), \
        f"{name}: differs from the oracle where that is infinite or NaN"
    assert actual.detach()[finite].isfinite().all(), \
        f"{name}: {(~actual.detach()[finite].isfinite()).sum()} values are infinite or NaN, the oracle's are not"
    error = relative_error(actual[finite], oracle64[finite])
    peer = relative_error(same_dtype_torch[finite], oracle64[finite])
    floor = max(torch.finfo(actual.dtype).eps, 1e-12)
    assert error <= 2 * peer + floor, f"{name}: relative error {error:.3e} > 2 x {peer:.3e} (plain torch) + {floor:.1e}"


def _sentinel(dtype):
    return float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).max // 2 - 1


class guarded:
    """
    A copy of `tensor`, same shape, dtype and strides, in the middle of a buffer filled with NaN (a large number for
    integers): `.tensor`. What lies around it and, for a non-contiguous layout, between its elements is the guard: a
    kernel that reads there gets NaN, and `check()` fails when it was written. A bool tensor cannot be guarded.
    """

    def __init__(self, tensor, band=256, fill=None):
        shape, stride = tensor.shape, tensor.stride()
        span = 1 + sum((n - 1) * s for n, s in zip(shape, stride)) if tensor.numel() else 0
        fill = _sentinel(tensor.dtype) if fill is None else fill
        self.buffer = torch.full((span + 2 * band,), fill, dtype=tensor.dtype, device=tensor.device)
        self.fill = self.buffer[0].clone()
        self.guard = torch.ones_like(self.buffer, dtype=torch.bool)
        self.tensor = self.buffer.as_strided(shape, stride, band)
        if tensor.numel():
            once = tuple(slice(None) if s else slice(0, 1) for s in stride)  # an expanded dim is stored once
            self.tensor[once] = tensor.detach()[once]
            self.guard.as_strided(shape, stride, band)[once] = False

    def check(self):
        around = self.buffer[self.guard]
        same = around.isnan() if self.fill.isnan() else around == self.fill
        assert same.all(), f"{(~same).sum()} elements outside a {tuple(self.tensor.shape)} tensor were written"


@contextlib.contextmanager
def poisoned_empty():
    """
    Inside it, torch.empty and torch.empty_like give tensors filled with NaN (integers: a large number), so that an element
    a kernel forgets is seen, between guard bands of 60000, so that one written out of bounds is seen even when it is
    NaN. The bands are checked at the end.
    """
    bands = []

    def poisoned(real):
        def empty(*args, **kwargs):
            out = real(*args, **kwargs)
            if out.dtype == torch.bool:
                return out
            bands.append(guarded(out.fill_(_sentinel(out.dtype)), fill=60000))
            return bands[-1].tensor

        return empty

    with mock.patch.object(torch, "empty", poisoned(torch.empty)), \
            mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)):
        yield
    for band in bands:
        band.check()


def randomised(model):
    """The model with its parameters away from the initial ones and zeros, so that every one of them counts."""
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1 and p.mean() == 1), std=0.2)
    return model


class LiveBytes(TorchDispatchMode):
    """
    Counts the bytes of the tensors that operations create inside it and that are still alive: `.now`, `.peak`. Tensors
    made before are not counted, nor is scratch memory inside one operation (a custom operator counts as one: call its
    launcher instead).
    """

    def __init__(self):
        super().__init__()
        self.peak, self._storages = 0, {}

    @property
    def now(self):
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        return sum(nbytes for _, nbytes in self._storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in known:
                storage = t.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now)
        return out


def _worker(rank, world, folder, environ, call, timeout, result):
    """One rank of run_ranks. Sends (True, what the function returned) or (False, the traceback), pickled."""
    signal.alarm(int(timeout) + 10)  # should the parent be gone by then
    os.environ.update(environ)
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
                                timeout=datetime.timedelta(seconds=timeout))
        function, args = pickle.loads(call)  # only now: what it imports reads the environment
        torch.manual_seed(0)
        reply = pickle.dumps((True, function(rank, world, *args)))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        reply = pickle.dumps((False, traceback.format_exc()))
    result.send_bytes(reply)


def run_ranks(world: int, function, *args, timeout=120) -> list:
    """
    What function(rank, world, *args) returned on each rank of a gloo group of `world` processes, the default group there,
    one thread each, with this process's environment. `function` is one of a module's; it, args and results are pickled.
    RuntimeError with the traceback where one raised or died, or where they took more than `timeout` seconds: none is
    left behind.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "triton"])  # imported once, not by each
    call, workers, results = pickle.dumps((function, args)), [], [None] * world
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(daemon=True, target=_worker, args=(rank, world, folder, dict(os.environ), call,
                                                                             timeout, sender))
                process.start()
                sender.close()  # then its end is seen here
                workers.append((process, receiver))
            end, open_ = time.monotonic() + timeout, {receiver: rank for rank, (_, receiver) in enumerate(workers)}
            while open_:
                ready = wait(list(open_), max(0, end - time.monotonic()))
                if not ready:
                    raise RuntimeError(f"rank(s) {list(open_.values())} of {world} did not finish in {timeout} s")
                for receiver in ready:
                    rank = open_.pop(receiver)
                    try:
                        fine, results[rank] = pickle.loads(receiver.recv_bytes())
                    except EOFError:
                        workers[rank][0].join(5)
                        raise RuntimeError(f"rank {rank} of {world} died, exit code {workers[rank][0].exitcode}") from None
                    if not fine:
                        raise RuntimeError(f"rank {rank} of {world} failed:\n{results[rank]}")
        finally:
            for process, _ in workers:
                process.join(0 if None in results else 5)
                process.kill()
                process.join()
    return results
