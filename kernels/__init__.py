"""nanoLong's kernels: one file each, Triton beside its plain torch reference. backend.py says which runs."""

import importlib.util
import os
import pkgutil
import sys

from kernels.attention import attention
from kernels.decode import decode_attention
from kernels.loss import linear_cross_entropy
from kernels.memory import infini_attention, memory_read
from kernels.merge import apply_sink_logit, merge_attention
from kernels.norm import rms_norm
from kernels.rope import rope, rope_frequencies, rope_turns
from kernels.swiglu import swiglu

# PyPI has another package named `kernels`, which transformers imports from when it is installed. Run from the
# repository, this package comes first; what it does not have is taken from that one, so that both work in one process.
__path__ = pkgutil.extend_path(__path__, __name__)


def __getattr__(name):
    files = (os.path.join(folder, "__init__.py") for folder in __path__[1:])
    other = next(filter(os.path.exists, files), None)
    if name.startswith("__") or other is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if "kernels.pypi" not in sys.modules:
        spec = importlib.util.spec_from_file_location("kernels.pypi", other)
        spec.submodule_search_locations = None  # its own modules stay kernels.<name>
        sys.modules["kernels.pypi"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["kernels.pypi"])
    return getattr(sys.modules["kernels.pypi"], name)
