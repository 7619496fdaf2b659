"""Run Triton kernels on the CPU, in Triton's interpreter."""

import os
import sys


def use_interpreter() -> None:
    """Make this process interpret the kernels that it imports from now on.

    Triton reads `TRITON_INTERPRET` when it is imported, and a process of `run_program` has imported it already, so
    Triton and the kernels are imported again. Only for a process that uses no other kernels. The compiled library stays
    loaded: a process cannot load it twice.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    for name in list(sys.modules):
        of_triton = name.split(".")[0] == "triton" and not name.startswith("triton._C")
        if of_triton or name.startswith("dino_lightning.models.kernels"):
            del sys.modules[name]
