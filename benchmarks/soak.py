"""Soak test: hours of training in which runs are killed, resumed, and must end as if they had not been interrupted.

    python benchmarks/soak.py FOLDER                              two hours
    python benchmarks/soak.py FOLDER --hours 0.1 --every 30       a short try

The first run, the reference, is not interrupted. Then the same run is repeated until the time is up. Events hit it at
random moments, `--every` seconds apart on average: signals, a killed loader process, a full disk. The kinds of events
take turns. An interrupted run is resumed with the same command line. When a run has finished, it is compared with the
reference: weights, optimizer, all rows of `metrics.csv`, k-NN. All runs use a copy of the code made at the start.

At the same time, one run is left undisturbed (soak_steady.py), to detect resources that grow slowly. Memory, file
handles, threads, shared memory and folder sizes are measured all the time. `FOLDER/report.md` and `report.json` have
the results; they are written every minute, so that they exist even if the soak test is killed.

The exit status is 1 if something failed. The full disk needs a tmpfs, which only root can mount.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import soak_measures as measures
from soak_compare import differences
from soak_events import EXIT_STATUSES, GRACEFUL, RESULTS_S, Events, signal_all
from soak_measures import Attempt
from soak_report import write_report
from soak_run import EPOCH_STEPS, RunProcess, copy_code, start_run
from soak_steady import Steady

DISK_MIB = 96
STALL_LIMIT_S = 240.0
"""A process without a new step for this long has stalled."""
CLEANUP_LIMIT_S = 10.0
"""How long child processes may outlive their parent."""
FINISH_LIMIT_S = 1800.0
"""How long the last run may take after the last event."""


class Soak:
    """The state of the soak test."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.random = random.Random(options.seed)
        self.folder: Path = options.folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.disk, self.mounted = self.folder / "disk", False
        copy_code(self.folder)
        self.began, self.written = time.time(), 0.0
        self.attempts: list[Attempt] = []
        self.runs: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.events = Events(self.random)
        self.next_event = float("inf")
        overrides = ["trainer.max_epochs=100000", "data.num_workers=1", "logger=csv"]
        steady = start_run("steady", self.folder / "steady", overrides, soak=self.folder, options=options)
        self.steady = Steady(steady)

    def soak(self) -> None:
        """Run the complete test."""
        self.mount()
        try:
            self.one_run(0)
            self.next_event = time.time() + self.until_next()
            number = 1
            while time.time() < self.end and self.runs[0]["completed"]:
                self.one_run(number)
                number += 1
            for failure in self.steady.end():
                self.fail(failure)
        finally:
            signal_all(f"SOAK_RUN={os.getpid()}-", signal.SIGKILL)
            self.write()
            self.unmount()

    @property
    def end(self) -> float:
        """Time from which no run starts and no event happens."""
        return self.began + self.options.hours * 3600

    def until_next(self) -> float:
        """Random number of seconds until the next event."""
        return self.random.uniform(self.options.every / 3, self.options.every * 5 / 3)

    # ------------------------------------------------------------------------------------------------------ runs

    def one_run(self, number: int) -> None:
        """Start a run, resume it until it has finished, and compare it with the reference, which is run 0."""
        folder, fruitless = self._folder_of(number), 0
        run: dict[str, Any] = {"number": number, "attempts": 0, "completed": False, "different": None}
        self.runs.append(run)
        while fruitless < 4:
            attempt = self.one_attempt(number, folder, disturbed=number > 0)
            run["attempts"] += 1
            if attempt.code == 0 and (folder / "summary.json").exists():
                run["completed"] = True
                break
            fruitless += 1
            if attempt.steps and (attempt.event is not None or attempt.code == 0):
                fruitless = 0
            if time.time() > self.end + FINISH_LIMIT_S:
                self.fail(f"{folder.name}: not finished {FINISH_LIMIT_S / 60:.0f} minutes after the last event")
                break
        else:
            self.fail(f"{folder.name}: {fruitless} consecutive attempts made no progress")
        if run["completed"]:
            self.compare(number, folder, run)
        self.write()
        if number > 0 and not run["different"]:
            shutil.rmtree(folder, ignore_errors=True)
        elif number > 0:  # keep it for inspection, but not on the small disk
            shutil.move(folder, self.folder / f"different-{folder.name}")

    def compare(self, number: int, folder: Path, run: dict[str, Any]) -> None:
        """Compare a finished run with the reference."""
        run["megabytes"] = round(measures.size_of(folder), 2)
        wrong = measures.wrong_rows(measures.rows_of(folder), finished=True)
        run["different"] = wrong + (differences(folder, self.disk / "reference") if number else [])
        unexpected = sorted({path.name for path in (folder / "checkpoints").iterdir()} - set(self.options.expected))
        run["different"] += [f"left in checkpoints/: {name}" for name in unexpected]
        for difference in run["different"]:
            self.fail(f"run {number}: {difference}")

    def one_attempt(self, number: int, folder: Path, *, disturbed: bool) -> Attempt:
        """Start or resume the run, and wait until it has finished or an event has ended it."""
        logger = "wandb" if number % 3 == 2 else "csv"
        attempt = Attempt(number, time.time() - self.began, logger, workers=1 + len(self.attempts) % 2)
        before, segments = measures.last_step(folder), measures.segments()
        run = self.start(folder, attempt)
        pids = {run.process.pid}
        began = progressed = time.time()
        next_sample, step = began + 10, before
        while run.process.poll() is None:
            now = time.time()
            if now >= next_sample:
                next_sample = now + 10
                pids |= set(measures.processes_of(run.marker))
                sample = measures.sample(run, seconds=now - began)
                if sample is not None:
                    attempt.samples.append(measures.as_json(sample))
                    if sample.step != step:
                        step, progressed = sample.step, now
            if now - progressed > STALL_LIMIT_S:
                self.fail(f"attempt {len(self.attempts)} of run {number}: no step for {STALL_LIMIT_S:.0f} s")
                attempt.event = "stalled"
                signal_all(run.marker, signal.SIGKILL)
            elif disturbed and now >= self.next_event and now < self.end:
                pids |= set(measures.processes_of(run.marker))
                self.disturb(run, attempt)
                self.next_event, progressed = time.time() + self.until_next(), time.time()
            self.steady.measure()
            if time.time() - self.written > 60:
                self.write()
            time.sleep(0.3)
        attempt.code, attempt.seconds = run.process.returncode, round(time.time() - began, 1)
        self.clean_up(run, attempt, pids=pids, segments=segments)
        self.judge(attempt)
        attempt.steps = max(attempt.steps, before if attempt.resumed is None else 0)
        return attempt

    def start(self, folder: Path, attempt: Attempt) -> RunProcess:
        """Start the first process of an attempt."""
        name = f"attempt{len(self.attempts):03}"
        self.attempts.append(attempt)
        overrides = [f"trainer.max_epochs={self.options.epochs}", f"data.num_workers={attempt.workers}"]
        overrides.append(f"logger={attempt.logger}")
        if self.options.resume == "auto" or (folder / "checkpoints" / "last.ckpt").exists():
            overrides.append(f"resume={self.options.resume}")
        return start_run(name, folder, overrides, soak=self.folder, options=self.options)

    def clean_up(self, run: RunProcess, attempt: Attempt, *, pids: set[int], segments: set[str]) -> None:
        """Record what an attempt has done and what it has left behind; kill remaining processes."""
        until = time.time() + CLEANUP_LIMIT_S
        while measures.processes_of(run.marker) and time.time() < until:
            time.sleep(0.2)
        attempt.left_processes = [measures.command_of(pid) for pid in measures.processes_of(run.marker)]
        signal_all(run.marker, signal.SIGKILL)
        attempt.left_segments = measures.segments_of(measures.segments() - segments, pids)
        attempt.left_files = measures.count_of(run.temporary)
        attempt.steps = measures.last_step(run.folder)
        lines = run.progress.read_text().splitlines() if run.progress.exists() else []
        progress = [json.loads(line) for line in lines]
        attempt.resumed = next((line["step"] for line in progress if line["event"] == "start"), None)

    def disturb(self, run: RunProcess, attempt: Attempt) -> None:
        """Let the next event happen to a run and record the effect."""
        kind = self.events.next_kind(run.process.pid, disk=self.mounted)
        at = time.time()
        if self.events.cause(kind, run, disk=self.disk):
            attempt.event, attempt.to_exit = kind, round(time.time() - at, 2)
        elif kind in EXIT_STATUSES:
            self.fail(f"attempt {len(self.attempts) - 1}: {kind} has not ended it in {time.time() - at:.0f} s")
            attempt.event = f"{kind}, ignored"
            signal_all(run.marker, signal.SIGKILL)
        else:
            attempt.tolerated.append(kind)

    def judge(self, attempt: Attempt) -> None:
        """Record the failures of an attempt that has ended."""
        name = f"attempt {self.attempts.index(attempt)} ({attempt.event or 'finished'})"
        folder = self._folder_of(attempt.run)
        earlier = [other for other in self.attempts[:-1] if other.run == attempt.run and other.resumed is not None]
        if attempt.resumed is not None and earlier:
            last = earlier[-1]
            last.lost = last.steps - attempt.resumed
            limit = 3 if last.event in GRACEFUL else self.rate * (self.options.minutes * 60 + 30) + 3
            if last.lost > limit or last.lost < -1:
                self.fail(f"{name}: resumed at step {attempt.resumed} of {last.steps}; the limit is {limit:.0f} steps")
        expected = 0 if attempt.event is None else EXIT_STATUSES.get(attempt.event)
        late = attempt.code == 0 and (attempt.to_exit or 0) < RESULTS_S and (folder / "summary.json").exists()
        if attempt.resumed is not None and expected is not None and attempt.code != expected and not late:
            self.fail(f"{name}: exit status {attempt.code} instead of {expected}")
        if attempt.left_processes:
            self.fail(f"{name}: processes left over: {', '.join(attempt.left_processes)}")
        if attempt.left_segments:
            self.fail(f"{name}: shared memory left over: {', '.join(attempt.left_segments[:5])}")
        if attempt.left_files and (attempt.event is None or attempt.event in GRACEFUL):
            self.fail(f"{name}: {attempt.left_files} temporary files left over")
        if attempt.resumed is not None:
            for wrong in measures.wrong_rows(measures.rows_of(folder), finished=False):
                self.fail(f"{name}: metrics.csv: {wrong}")

    def _folder_of(self, run: int) -> Path:
        return self.disk / ("reference" if run == 0 else f"run{run:03}")

    @property
    def rate(self) -> float:
        """Steps per second of the reference."""
        finished = [attempt for attempt in self.attempts if attempt.run == 0 and attempt.code == 0]
        return finished[0].steps / finished[0].seconds if finished else 10.0

    # ---------------------------------------------------------------------------------------------------- writing

    def fail(self, failure: str) -> None:
        """Record and print a failure, and continue."""
        line = f"{time.time() - self.began:7.0f} s  {failure}"
        self.failures.append(line)
        print(line, flush=True)

    def write(self) -> None:
        """Write the report with the results so far."""
        self.written = time.time()
        options = {key: str(value) for key, value in vars(self.options).items()}
        results = {
            "options": {**options, "disk": f"tmpfs of {DISK_MIB} MiB" if self.mounted else "no separate disk"},
            "hours": (time.time() - self.began) / 3600,
            "runs": self.runs,
            "attempts": [dataclasses.asdict(attempt) for attempt in self.attempts],
            "failures": self.failures,
            "steady": self.steady.samples,
            "steady_exit": self.steady.to_exit,
        }
        write_report(self.folder, results)

    def mount(self) -> None:
        """Mount a small disk that can be filled, if the system allows it."""
        self.disk.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "soak", str(self.disk)]
        self.mounted = shutil.which("mount") is not None and not subprocess.run(command, capture_output=True).returncode

    def unmount(self) -> None:
        """Copy the reference to the folder of the report and unmount the disk."""
        if self.mounted:
            time.sleep(1)  # until killed processes have closed their files
            shutil.copytree(self.disk, self.folder / "reference", dirs_exist_ok=True)
            subprocess.run(["umount", str(self.disk)], check=False)


def main() -> None:
    """Run the soak test; the exit status is 1 if something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hours", type=float, default=2.1, help="time after which no run starts")
    parser.add_argument("--every", type=float, default=180, help="mean seconds between events")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=24, help=f"length of a run, in epochs of {EPOCH_STEPS} steps")
    parser.add_argument("--pause", type=float, default=0.1, help="seconds that a run sleeps after each step")
    parser.add_argument("--minutes", type=float, default=0.5, help="time between checkpoints")
    parser.add_argument("--resume", default="auto", choices=["auto", "true"], help="true: only for resumed runs")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of the runs")
    expected = ["last.ckpt", "last-1.ckpt", "best_knn.ckpt"]
    parser.add_argument("--expected", nargs="*", default=expected, help="files in checkpoints/ of a finished run")
    soak = Soak(parser.parse_args())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    soak.soak()
    print((soak.folder / "report.md").read_text())
    sys.exit(1 if soak.failures else 0)


if __name__ == "__main__":
    main()
