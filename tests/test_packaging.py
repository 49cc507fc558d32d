"""PyPI has a package named `kernels` too: run from the repository, ours comes first and the other's names are still found."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(program, **environment):
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def test_lives_beside_the_other_kernels_package(tmp_path):
    (tmp_path / "kernels/layer").mkdir(parents=True)
    (tmp_path / "kernels/__init__.py").write_text(
        "from kernels.layer import Mode\nfrom .layer import Device\nattention = 'theirs'\n")
    (tmp_path / "kernels/layer/__init__.py").write_text("class Mode: pass\nclass Device: pass\n")
    program = ("from kernels import attention, Device, Mode; import kernels, kernels.layer; "
               "assert callable(attention) and Device is kernels.layer.Device; print(kernels.__file__)")
    done = run(program, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == ROOT / "kernels"


def test_an_unknown_name_is_an_import_error():
    done = run("from kernels import no_such_kernel")
    assert "ImportError: cannot import name 'no_such_kernel'" in done.stderr
