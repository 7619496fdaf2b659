"""Refuses connections to other machines in this process, and writes a file of attempts."""

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import traceback
from typing import Any, NoReturn

THIS_MACHINE = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "", None, socket.gethostname())
NEW_NETWORK = 0x40000000
"""Linux's CLONE_NEWNET."""


def install() -> None:
    """Refuse connections to other machines, and their names.

    Attempts are appended to the file in the environment variable NETWORK_LOG.
    """
    for name in ("connect", "connect_ex"):
        _guard_connect(name)
    for name in ("getaddrinfo", "gethostbyname"):
        _guard_names(name)


def leave_network() -> None:
    """Move this process and its children, also those that are not Python, to a network of their own if the system
    allows it.

    The new network has the loopback device, by which W&B talks to its service.
    """
    if sys.platform == "linux" and shutil.which("ip") and ctypes.CDLL(None).unshare(NEW_NETWORK) == 0:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def _guard_connect(name: str) -> None:
    original = getattr(socket.socket, name)

    def connect(self: socket.socket, address: Any, *rest: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in THIS_MACHINE:
            _refuse(name, address)
        return original(self, address, *rest)

    setattr(socket.socket, name, connect)


def _guard_names(name: str) -> None:
    original = getattr(socket, name)

    def resolve(host: Any, *rest: Any, **options: Any) -> Any:
        host = host.decode() if isinstance(host, bytes) else host
        if host not in THIS_MACHINE:
            _refuse(name, host)
        return original(host, *rest, **options)

    setattr(socket, name, resolve)


def _refuse(attempt: str, address: Any) -> NoReturn:
    with open(os.environ["NETWORK_LOG"], "a") as file:
        places = " < ".join(f"{frame.filename}:{frame.name}" for frame in traceback.extract_stack()[-3::-1])
        file.write(f"{attempt} {address} by {places[:2000]}\n")
    raise OSError(f"no network in this test: {attempt} {address}")
