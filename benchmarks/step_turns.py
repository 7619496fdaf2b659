"""The parent's end of `step.py`: start the sides, let them take turns, keep what they tell."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from step_sides import SIDES, serve
from step_windows import Setting


class OutOfMemoryError(Exception):
    """A side did not fit; its name."""


class FailedError(Exception):
    """A side ended with an error."""


class Side:
    """The parent's end of one side."""

    def __init__(self, name: str, setting: Setting, checkout: str | None) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=serve, args=(name, setting, checkout, there))
        self.process.start()
        there.close()  # or a dead child would never be an end of file here
        self.facts: dict[str, Any] = {}

    def receive(self) -> Any:
        """The answer to a command; raises what happened to the side instead."""
        try:
            kind, content = self.pipe.recv()
        except EOFError:
            self.process.join()
            kind, content = "failed", f"the process ended with status {self.process.exitcode}"
            if self.process.exitcode == -9:  # by the kernel, for want of memory
                kind = "out of memory"
        if kind == "out of memory":
            raise OutOfMemoryError(self.name)
        if kind == "failed":
            raise FailedError(f"{self.name}: {content}")
        return content

    def run(self, command: int | str) -> Any:
        """Let it take so many steps, or measure the machine."""
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
    """Processes that are ready for their first step."""
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
    """What the sides did, by name."""

    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Per step, a number for each turn."""
    memory: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    flops: float = 0.0
    matrix_rate: float = 0.0
    no_memory: list[str] = dataclasses.field(default_factory=list)
    apart: bool = False
    """Whether the sides were not in memory at the same time, and so did not take turns."""


def measure(setting: Setting, checkout: str | None, *, pairs: int, steps: int, warmup: int) -> Measured:
    """Take turns; where there is no memory for both at once, one after the other."""
    names = SIDES if checkout else SIDES[:1]
    setting = dataclasses.replace(setting, most_steps=warmup + pairs * steps)
    try:
        return take_turns(names, setting, checkout, turns=(pairs, steps, warmup))
    except OutOfMemoryError:
        whole = Measured(apart=True)
    for name in names:
        try:
            alone = take_turns((name,), setting, checkout, turns=(pairs, steps, warmup))
        except OutOfMemoryError:
            whole.no_memory.append(name)
            continue
        whole.seconds |= alone.seconds
        whole.memory |= alone.memory
        whole.flops, whole.matrix_rate = whole.flops or alone.flops, whole.matrix_rate or alone.matrix_rate
    return whole


def take_turns(
    names: tuple[str, ...], setting: Setting, checkout: str | None, *, turns: tuple[int, int, int]
) -> Measured:
    """Pairs of windows in alternating order."""
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
