"""The CUDA operators on CPU tensors: loads a library that registers them, with emulated kernels, in
place of the CPU's. `make cuda-host-ops` builds it and runs the operator tests over it.

    FUSEDPO_TEST_CUDA_HOST      path of libfusedpo_ops_cuda_host.so; unset: nothing happens
    FUSEDPO_TEST_CAPTURING=1    every operator believes that it is captured into a CUDA graph
"""

from __future__ import annotations

import os

import torch

LIBRARY = os.environ.get("FUSEDPO_TEST_CUDA_HOST", "")
CAPTURING = LIBRARY != "" and os.environ.get("FUSEDPO_TEST_CAPTURING") == "1"


def load() -> None:
    """Call it after `import fusedpo`; torch warns of every kernel that is replaced."""
    if not LIBRARY:
        return
    from fusedpo import ops

    torch.ops.load_library(LIBRARY)
    ops._KEEP_WHOLE_ROWS.add("cpu")
    os.environ.setdefault("FUSEDPO_CHECK", "1")  # labels out of range raise, as on a CPU
