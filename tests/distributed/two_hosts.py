"""Two hosts on one machine: network namespaces with a virtual cable between them that can be unplugged.

Needs root and Linux. Both hosts see the same disk, as those of a cluster do, and nothing else of each other.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from shutil import which

RETRIES = 6
"""`net.ipv4.tcp_retries2` of both hosts."""


@dataclass(frozen=True)
class Host:
    """A host."""

    name: str
    """Name of the network namespace."""
    device: str
    """Its end of the cable."""
    address: str

    def command(self, *words: str) -> list[str]:
        """Run on this host."""
        return ["ip", "netns", "exec", self.name, *words]

    def pull_cable(self) -> None:
        """Unplug the cable: packets are lost silently."""
        _ip("-n", self.name, "link", "set", self.device, "down")

    def plug_cable(self) -> None:
        """Plug the cable in again."""
        _ip("-n", self.name, "link", "set", self.device, "up")


def why_not() -> str:
    """Why this machine cannot create namespaces; empty if it can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    if which("ip") is None:
        return "network namespaces need the program `ip` (iproute2)"
    name = f"dino{os.getpid()}t"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    _ip("netns", "delete", name)
    return ""


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two connected hosts, removed afterwards."""
    mark = os.getpid() % 100000
    hosts = tuple(
        Host(f"dino{mark}{side}", f"d{mark}{side}", f"10.77.0.{number}") for number, side in enumerate("ab", 1)
    )
    first, second = hosts
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        _ip(
            "link",
            "add",
            first.device,
            "netns",
            first.name,
            "type",
            "veth",
            "peer",
            "name",
            second.device,
            "netns",
            second.name,
        )
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.device)
            _ip("-n", host.name, "link", "set", host.device, "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
            # How often Linux sends again before it gives a connection up: some 25 seconds instead of 15 minutes, for
            # which torchrun waits without a timeout.
            give_up = f"echo {RETRIES} > /proc/sys/net/ipv4/tcp_retries2"
            subprocess.run(host.command("sh", "-c", give_up), check=True, capture_output=True)
        yield first, second
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
