"""The parent process of `step.py`: starts the two sides, lets them alternate and collects their measurements."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from step_batches import Setting
from step_sides import SIDES, serve


class OutOfMemoryError(Exception):
    """A side did not fit into memory; the message is its name."""


class FailedError(Exception):
    """A side failed."""


class Side:
    """Controls the process of one side."""

    def __init__(self, name: str, setting: Setting, checkout: str | None) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=serve, args=(name, setting, checkout, child_pipe))
        self.process.start()
        child_pipe.close()  # otherwise `recv` would not raise EOFError when the child has ended
        self.facts: dict[str, Any] = {}

    def receive(self) -> Any:
        """The answer to a command.

        Raises:
            OutOfMemoryError: The side did not fit into memory.
            FailedError: The side failed.
        """
        try:
            kind, content = self.pipe.recv()
        except EOFError:
            self.process.join()
            kind, content = "failed", f"the process ended with status {self.process.exitcode}"
            if self.process.exitcode == -9:  # the kernel kills processes if memory runs out
                kind = "out of memory"
        if kind == "out of memory":
            raise OutOfMemoryError(self.name)
        if kind == "failed":
            raise FailedError(f"{self.name}: {content}")
        return content

    def run(self, command: int | str) -> Any:
        """Let the side take `command` steps, or measure the matrix rate."""
        self.pipe.send(command)
        return self.receive()

    def close(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError, OSError):
            self.pipe.send("stop")
        self.process.join(timeout=60)
        if self.process.is_alive():
            self.process.kill()
        self.pipe.close()


@contextmanager
def sides(names: tuple[str, ...], setting: Setting, checkout: str | None) -> Iterator[list[Side]]:
    """The processes of the sides, ready for their first step."""
    with ExitStack() as stack:
        started = []
        for name in names:
            started.append(Side(name, setting, checkout))
            stack.callback(started[-1].close)
        for side in started:
            side.facts = side.receive()
        yield started


@dataclasses.dataclass
class Measured:
    """The measurements of the sides, by name."""

    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Seconds per step, for each turn."""
    memory: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    flops: float = 0.0
    matrix_rate: float = 0.0
    no_memory: list[str] = dataclasses.field(default_factory=list)
    apart: bool = False
    """Whether the sides ran one after the other, because they did not fit into memory at the same time."""


def measure(setting: Setting, checkout: str | None, *, pairs: int, steps: int, warmup: int) -> Measured:
    """Measure the sides in turns; one after the other if there is not enough memory for both."""
    names = SIDES if checkout else SIDES[:1]
    setting = dataclasses.replace(setting, max_steps=warmup + pairs * steps)
    try:
        return take_turns(names, setting, checkout, turns=(pairs, steps, warmup))
    except OutOfMemoryError:
        measured = Measured(apart=True)
    for name in names:
        try:
            alone = take_turns((name,), setting, checkout, turns=(pairs, steps, warmup))
        except OutOfMemoryError:
            measured.no_memory.append(name)
            continue
        measured.seconds |= alone.seconds
        measured.memory |= alone.memory
        measured.flops = measured.flops or alone.flops
        measured.matrix_rate = measured.matrix_rate or alone.matrix_rate
    return measured


def take_turns(
    names: tuple[str, ...], setting: Setting, checkout: str | None, *, turns: tuple[int, int, int]
) -> Measured:
    """Let the sides alternate, in pairs of turns whose order is reversed every time."""
    pairs, steps, warmup = turns
    measured = Measured(seconds={name: [] for name in names})
    with sides(names, setting, checkout) as running:
        for side in running:
            side.run(warmup)
        for pair in range(pairs):
            for side in running if pair % 2 else reversed(running):
                done = side.run(steps)
                measured.seconds[side.name].append(done["seconds"] / steps)
                measured.memory[side.name] = done["memory"]
        measured.flops = running[0].facts.get("flops", 0.0)
        measured.matrix_rate = running[0].run("matrix rate")
    return measured
