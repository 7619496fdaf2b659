"""Hours of training under blows: runs are killed in every way there is, go on, and must end as if nothing had happened.

    python benchmarks/soak.py FOLDER                              two hours
    python benchmarks/soak.py FOLDER --hours 0.1 --every 30       a try

First comes an uninterrupted run, the reference. Then the same run again and again until the time is up, each hit at
random moments, `--every` seconds apart on average, by each kind of blow in turn, and started again with the same
command line. Each ends by itself and is held against the reference: weights, optimizer, all rows of `metrics.csv`,
k-NN. All run a copy of the code as it is at the beginning.
Beside them one run is left alone for all that time (soak_steady.py): what grows slowly shows in it.
Memory, handles, threads, shared memory and folders are measured all the while. `FOLDER/report.md` and
`report.json` say what was seen; they are written every minute, so that a soak that is cut off leaves them too.

Exit status 1 where something failed. A full disk is tried where a tmpfs can be mounted (as root).
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
from soak_blows import LEAVES, ORDERLY, RESULTS_S, Blows, signal_all
from soak_compare import differences
from soak_measures import Leg
from soak_report import write_report
from soak_steady import Steady

HERE = Path(__file__).resolve().parent
DISK = 96
"""MiB of the tmpfs."""
STALL_LIMIT, GRACE = 240.0, 10.0
"""Seconds: without a new step; for what is left over to disappear."""
EPOCH = 32
"""Steps."""
RUN = (
    f"data.train_images={16 * EPOCH}",
    "data.val_images=64",
    "data.batch_size_per_device=16",
    "backbone.drop_path_rate=0.1",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "cpu_threads=1",
    "callbacks.pictures.every_n_epochs=1000",
    "callbacks.pictures.images=2",
    "callbacks.knn.bank=256",
    "callbacks.knn.every_n_epochs=4",
)


class Soak:
    """The whole soak and what it has seen."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.random = options, random.Random(options.seed)
        self.folder: Path = options.folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.disk, self.mounted = self.folder / "disk", False
        self.code = self.copy_of_the_code()
        self.began, self.written = time.time(), 0.0
        self.legs: list[Leg] = []
        self.runs: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.blows = Blows(self.random)
        self.next_blow = float("inf")
        self.steady = self.start_steady()

    def soak(self) -> None:
        """Everything, in its order."""
        self.mount()
        try:
            self.one_run(0)
            self.next_blow = time.time() + self.until_next()
            number = 1
            while time.time() < self.end and self.runs[0]["completed"]:
                self.one_run(number)
                number += 1
            for what in self.steady.end():
                self.fail(what)
        finally:
            signal_all(f"SOAK_LEG={os.getpid()}-", signal.SIGKILL)
            self.write()
            self.unmount()

    @property
    def end(self) -> float:
        """Time from which no other run begins and nothing is killed any more."""
        return self.began + self.options.hours * 3600

    def until_next(self) -> float:
        """Seconds to the next blow."""
        return self.random.uniform(self.options.every / 3, self.options.every * 5 / 3)

    def copy_of_the_code(self) -> Path:
        """All legs run the same code, whatever happens to the checkout in these hours."""
        code = self.folder / "code"
        for name in ("src", "conf"):
            shutil.copytree(HERE.parent / name, code / name, dirs_exist_ok=True)
        for path in (HERE.parent / "train.py", HERE / "soak_watch.py"):
            shutil.copy(path, code)
        return code

    # ------------------------------------------------------------------------------------------------------ runs

    def one_run(self, number: int) -> None:
        """A run, in as many legs as it takes; compared with the reference, which is run 0."""
        folder, vain = self._folder_of(number), 0
        run: dict[str, Any] = {"number": number, "legs": 0, "completed": False, "different": None}
        self.runs.append(run)
        while vain < 4:
            leg = self.one_leg(number, folder, blows=number > 0)
            run["legs"] += 1
            if leg.code == 0 and (folder / "summary.json").exists():
                run["completed"] = True
                break
            vain = vain + 1 if not leg.steps or (leg.kind is None and leg.code != 0) else 0
            if time.time() > self.end + 1800:
                self.fail(f"{folder.name}: not at its end half an hour after the last blow")
                break
        else:
            self.fail(f"{folder.name}: given up after {vain} legs in a row that came to nothing")
        if run["completed"]:
            self.compare(number, folder, run)
        self.write()
        if number > 0 and not run["different"]:
            shutil.rmtree(folder, ignore_errors=True)
        elif number > 0:  # what is different is kept to be looked at, but not on the small disk
            shutil.move(folder, self.folder / f"different-{folder.name}")

    def compare(self, number: int, folder: Path, run: dict[str, Any]) -> None:
        """Hold the end of a run against the reference."""
        run["megabytes"] = round(measures.size_of(folder), 2)
        wrong = measures.wrong_rows(measures.rows_of(folder), whole=True)
        run["different"] = wrong + (differences(folder, self.disk / "reference") if number else [])
        strange = sorted({path.name for path in (folder / "checkpoints").iterdir()} - set(self.options.kept))
        run["different"] += [f"left in checkpoints/: {name}" for name in strange]
        for difference in run["different"]:
            self.fail(f"run {number}: {difference}")

    def one_leg(self, number: int, folder: Path, *, blows: bool) -> Leg:
        """Start the run or go on with it, until it ends by itself or by a blow."""
        workers = 1 + len(self.legs) % 2
        logger = "wandb" if number % 3 == 2 else "csv"
        leg = Leg(number, time.time() - self.began, logger, workers)
        before, segments = measures.last_step(folder), measures.segments()
        process, marker, temporary, events = self.start(folder, leg)
        pids = {process.pid}
        began = moved = time.time()
        due, step = began + 10, before
        while process.poll() is None:
            now = time.time()
            if now >= due:
                due = now + 10
                pids |= set(measures.processes_of(marker))
                seen = measures.sample(process.pid, marker, folder=folder, temporary=temporary, seconds=now - began)
                if seen is not None:
                    leg.samples.append(measures.plain(seen))
                    if seen.step != step:
                        step, moved = seen.step, now
            if now - moved > STALL_LIMIT:
                self.fail(f"leg {len(self.legs)} of run {number}: no step for {STALL_LIMIT:.0f} s")
                leg.kind = "stalled"
                signal_all(marker, signal.SIGKILL)
            elif blows and now >= self.next_blow and now < self.end:
                pids |= set(measures.processes_of(marker))
                self.hit(process, marker, leg)
                self.next_blow, moved = time.time() + self.until_next(), time.time()
            self.steady.measure()
            self.write_now_and_then()
            time.sleep(0.3)
        leg.code, leg.seconds = process.returncode, round(time.time() - began, 1)
        self.after(leg, folder, marker, temporary, events, pids=pids, segments=segments, before=before)
        return leg

    def start(self, folder: Path, leg: Leg) -> tuple[subprocess.Popen[bytes], str, Path, Path]:
        """The process, the mark of all its processes, its folder for temporary files, and where it tells events."""
        name = f"leg{len(self.legs):03}"
        self.legs.append(leg)
        words = [f"trainer.max_epochs={self.options.epochs}", f"data.num_workers={leg.workers}"]
        words += [f"logger={leg.logger}", f"output_dir={folder}"]
        if self.options.resume == "auto" or (folder / "checkpoints" / "last.ckpt").exists():
            words.append(f"resume={self.options.resume}")
        return self.launch(name, words)

    def start_steady(self) -> Steady:
        """The run that nothing hits."""
        folder = self.folder / "steady"
        words = ["trainer.max_epochs=100000", "data.num_workers=1", "logger=csv", f"output_dir={folder}"]
        process, marker, temporary, _ = self.launch("steady", words)
        return Steady(process, marker, folder, temporary)

    def launch(self, name: str, own: list[str]) -> tuple[subprocess.Popen[bytes], str, Path, Path]:
        """As `start`, for any run."""
        temporary, events = self.folder / "tmp" / name, self.folder / "events" / f"{name}.jsonl"
        for path in (temporary, events.parent, self.folder / "logs"):
            path.mkdir(parents=True, exist_ok=True)
        words = [*RUN, *own, f"callbacks.checkpoint.every_n_minutes={self.options.minutes}"]
        words += [f"imports=[{self.code / 'soak_watch.py'}]", *self.options.set]
        mark = f"SOAK_LEG={os.getpid()}-{name}-"
        environment = {**os.environ, "SOAK_LEG": mark.removeprefix("SOAK_LEG="), "SOAK_EVENTS": str(events)}
        environment |= {"SOAK_PAUSE": str(self.options.pause), "TMPDIR": str(temporary), "WANDB_SILENT": "true"}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.code / "src")}
        with (self.folder / "logs" / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, str(self.code / "train.py"), *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        return process, mark, temporary, events

    def after(
        self,
        leg: Leg,
        folder: Path,
        marker: str,
        temporary: Path,
        events: Path,
        *,
        pids: set[int],
        segments: set[str],
        before: int,
    ) -> None:
        """What a leg has done and left."""
        until = time.time() + GRACE
        while measures.processes_of(marker) and time.time() < until:
            time.sleep(0.2)
        for pid in measures.processes_of(marker):
            leg.left_processes.append(measures.command_of(pid))
        signal_all(marker, signal.SIGKILL)
        leg.left_segments = measures.segments_of(measures.segments() - segments, pids)
        leg.left_files = measures.count_of(temporary)
        leg.steps = measures.last_step(folder)
        told = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
        leg.resumed = next((event["step"] for event in told if event["event"] == "start"), None)
        self.judge(leg)
        leg.steps = max(leg.steps, before if leg.resumed is None else 0)

    def hit(self, process: subprocess.Popen[bytes], marker: str, leg: Leg) -> None:
        """Hit a run and note what came of it."""
        kind = self.blows.next_kind(process.pid, disk=self.mounted)
        at = time.time()
        if self.blows.strike(kind, process, marker, disk=self.disk):
            leg.kind, leg.to_exit = kind, round(time.time() - at, 2)
        elif kind in LEAVES:
            self.fail(f"leg {len(self.legs) - 1}: {kind} has not ended it in {time.time() - at:.0f} s")
            leg.kind = f"{kind}, ignored"
            signal_all(marker, signal.SIGKILL)
        else:
            leg.survived.append(kind)

    def judge(self, leg: Leg) -> None:
        """Failures of a leg that has ended."""
        name = f"leg {self.legs.index(leg)} ({leg.kind or 'by itself'})"
        trained = [other for other in self.legs[:-1] if other.run == leg.run and other.resumed is not None]
        if leg.resumed is not None and trained:
            last = trained[-1]
            last.lost = last.steps - leg.resumed
            most = 3 if last.kind in ORDERLY else self.rate * (self.options.minutes * 60 + 30) + 3
            if last.lost > most or last.lost < -1:
                self.fail(f"{name}: goes on at step {leg.resumed} of {last.steps}, more than {most:.0f} steps back")
        expected = 0 if leg.kind is None else LEAVES.get(leg.kind)
        late = leg.code == 0 and (leg.to_exit or 0) < RESULTS_S and (self._folder_of(leg.run) / "summary.json").exists()
        if leg.resumed is not None and expected is not None and leg.code != expected and not late:
            self.fail(f"{name}: exit status {leg.code} instead of {expected}")
        if leg.left_processes:
            self.fail(f"{name}: processes left over: {', '.join(leg.left_processes)}")
        if leg.left_segments:
            self.fail(f"{name}: shared memory left over: {', '.join(leg.left_segments[:5])}")
        if leg.left_files and (leg.kind is None or leg.kind in ORDERLY):
            self.fail(f"{name}: {leg.left_files} temporary files left over")
        if leg.resumed is not None:
            for wrong in measures.wrong_rows(measures.rows_of(self._folder_of(leg.run)), whole=False):
                self.fail(f"{name}: metrics.csv: {wrong}")

    def _folder_of(self, run: int) -> Path:
        return self.disk / ("reference" if run == 0 else f"run{run:03}")

    @property
    def rate(self) -> float:
        """Steps per second of the reference."""
        done = [leg for leg in self.legs if leg.run == 0 and leg.code == 0]
        return done[0].steps / done[0].seconds if done else 10.0

    # ---------------------------------------------------------------------------------------------------- writing

    def fail(self, what: str) -> None:
        """Keep a failure and go on."""
        line = f"{time.time() - self.began:7.0f} s  {what}"
        self.failures.append(line)
        print(line, flush=True)

    def write_now_and_then(self) -> None:
        """Every minute."""
        if time.time() - self.written > 60:
            self.write()

    def write(self) -> None:
        """The report as of now."""
        self.written = time.time()
        options = {key: str(value) for key, value in vars(self.options).items()}
        seen = {
            "options": {**options, "disk": f"tmpfs of {DISK} MiB" if self.mounted else "as it is"},
            "hours": (time.time() - self.began) / 3600,
            "runs": self.runs,
            "legs": [dataclasses.asdict(leg) for leg in self.legs],
            "failures": self.failures,
            "steady": self.steady.samples,
            "steady_exit": self.steady.to_exit,
        }
        write_report(self.folder, seen)

    def mount(self) -> None:
        """A small disk that can be filled, if the system lets us."""
        self.disk.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "soak", str(self.disk)]
        self.mounted = shutil.which("mount") is not None and not subprocess.run(command, capture_output=True).returncode

    def unmount(self) -> None:
        """Keep the reference beside the report and give the disk back."""
        if self.mounted:
            time.sleep(1)  # until processes that were killed have closed their files
            shutil.copytree(self.disk, self.folder / "kept", dirs_exist_ok=True)
            subprocess.run(["umount", str(self.disk)], check=False)


def main() -> None:
    """Soak, and leave with status 1 where something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hours", type=float, default=2.1, help="until no other run begins")
    parser.add_argument("--every", type=float, default=180, help="mean seconds between blows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=24, help=f"of {EPOCH} steps each: length of a run")
    parser.add_argument("--pause", type=float, default=0.1, help="seconds for which a run sleeps after each step")
    parser.add_argument("--minutes", type=float, default=0.5, help="between checkpoints")
    parser.add_argument("--resume", default="auto", choices=["auto", "true"], help="true: from the second leg on")
    parser.add_argument("--set", nargs="*", default=[], help="other settings of the run, KEY=VALUE")
    parser.add_argument(
        "--kept",
        nargs="*",
        default=["last.ckpt", "last-1.ckpt", "best_knn.ckpt"],
        help="files that may stand in checkpoints/ at the end",
    )
    soak = Soak(parser.parse_args())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    soak.soak()
    print((soak.folder / "report.md").read_text())
    sys.exit(1 if soak.failures else 0)


if __name__ == "__main__":
    main()
