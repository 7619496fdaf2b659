"""Python's fork server as a fork of the test process, instead of a new Python that imports the libraries again."""

import atexit
import logging
import multiprocessing
import os
import sys
import traceback
import weakref
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import forkserver, util
from pathlib import Path
from typing import TextIO

NEW_PYTHON = util.spawnv_passfds
HAS_GPU = Path("/dev/nvidiactl").exists()
"""Forked processes cannot use a GPU that the test process has used."""
PRELOADED_MODULES = [
    "lightning.pytorch",
    "timm",
    "numba.np.ufunc",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "dino_lightning.training.run",
]


def start_fork_server() -> None:
    """Fork the server from this process. Call it before the first test, while there are no other threads that work.

    With a GPU the server is a new Python.
    """
    multiprocessing.set_forkserver_preload(PRELOADED_MODULES)
    if not HAS_GPU:
        util.spawnv_passfds = _fork  # type: ignore[assignment]
        try:
            forkserver.ensure_running()
        finally:
            util.spawnv_passfds = NEW_PYTHON


def _fork(path: bytes, arguments: Sequence[str], file_descriptors: Sequence[int]) -> int:
    """Replaces `util.spawnv_passfds`, which starts Python with `arguments`."""
    code = arguments[-1]
    if "forkserver" not in code:  # of Python's resource tracker
        return NEW_PYTHON(path, arguments, file_descriptors)  # type: ignore[arg-type]
    if pid := os.fork():
        return pid
    status = 1
    try:
        _close_all_but({0, 1, 2, *file_descriptors})
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)  # were pytest's
        forget_cleanups()
        logging.root.handlers.clear()  # pytest's
        redirect_library_logs(sys.stderr)  # they go to pytest's closed files
        _prepare()
        exec(code, {})
        status = 0
    except SystemExit:
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def redirect_library_logs(stream: TextIO) -> None:
    """Libraries have chosen the stream of their messages when they were imported."""
    for reference in logging._handlerList:  # type: ignore[attr-defined]
        handler = reference()
        if type(handler) is logging.StreamHandler:
            handler.stream = stream  # `setStream` would flush the earlier one, which may be closed


def forget_cleanups() -> None:
    """Leave what the test process removes at its end, such as W&B's temporary folder, to that process."""
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]


def _prepare() -> None:
    """Do once what each program would repeat: fill Hydra's config store, find its plugins and those of PIL."""
    from hydra.core.plugins import Plugins
    from PIL import Image

    from dino_lightning.config import register

    register()
    Plugins.instance()
    Image.init()


def _close_all_but(kept: set[int]) -> None:
    """Close the files of the test process, but keep their numbers: its file objects close them later a second time."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else map(str, range(256)):
        if int(name) not in kept:
            with suppress(OSError):
                os.fstat(int(name))
                os.dup2(nothing, int(name), inheritable=False)
