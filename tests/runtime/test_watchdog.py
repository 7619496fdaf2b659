"""Real processes watch each other; they sleep instead of waiting in a collective."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dino_lightning.runtime.watchdog import FIRST_EXIT_S, STARTED_BY, end_with_first_process

FIRST = """
import subprocess, sys, threading, time
from dino_lightning.runtime import watchdog
watchdog.POLL_INTERVAL_S = 0.1
codes = ["import sys, time; time.sleep(0.3); sys.exit(%s)" % word for word in sys.argv[2:]]
started = [subprocess.Popen([sys.executable, "-c", code]) for code in codes]
started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(%s)" % sys.argv[1]]))
print(started[-1].pid, flush=True)
threading.Thread(target=watchdog.watch_started, args=(started,), daemon=True).start()
try:
    time.sleep(5)
    print("not ended", flush=True)
finally:
    sys.exit(7)
"""

KILLED = """
import os, signal, sys, time
from dino_lightning.runtime import watchdog
watchdog.POLL_INTERVAL_S, watchdog.OTHERS_EXIT_S = 0.1, 0.5
os.environ[watchdog.STARTED_BY] = str(os.getpid())
if os.fork():
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
watchdog.end_with_first_process()
print("watched" if watchdog.STARTED_BY not in os.environ else "not watched", flush=True)
time.sleep(60)
print("outlived", flush=True)
"""


def ended(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(__file__).parents[2] / "src")
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env={**os.environ, "PYTHONPATH": source},
    )


def is_gone(number: int) -> bool:
    """Whether a process ends soon or is a zombie that its parent has not reaped."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(("argument", "status"), [("2", 2), ("1", 1)])
def test_a_failed_process_ends_all_with_its_status(argument: str, status: int) -> None:
    done = ended(FIRST, "60", "0", argument)
    assert done.returncode == status
    assert f"process 2 of this machine has ended with status {status}" in done.stderr
    assert "not ended" not in done.stdout
    assert is_gone(int(done.stdout.split()[0]))


def test_a_process_that_exits_on_request_does_not_end_the_first() -> None:
    """The first process still writes its checkpoint or asks SLURM."""
    assert FIRST_EXIT_S < 5
    done = ended(FIRST, "0.2", "75", "130", "0")
    assert done.returncode == 7
    assert done.stdout.endswith("not ended\n")


STOPPED = """
import atexit, os, signal, subprocess, sys, time
from dino_lightning.runtime import watchdog
watchdog.OTHERS_EXIT_S = 0.5
started = [subprocess.Popen([sys.executable, "-c", "pass"]),
           subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])]
os.kill(started[-1].pid, signal.SIGSTOP)
print(started[-1].pid, flush=True)
atexit.register(watchdog.end_started, started)
raise RuntimeError("lost")
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_stopped_process_does_not_outlive_the_first() -> None:
    done = ended(STOPPED)
    assert done.returncode == 1
    assert "RuntimeError: lost" in done.stderr
    assert is_gone(int(done.stdout.split()[0]))


NOTICES = """
import atexit, subprocess, sys
from dino_lightning.runtime import watchdog
watchdog.OTHERS_EXIT_S = 5
waits = "import sys; sys.stdin.read(); print('noticed', flush=True)"
started = [subprocess.Popen([sys.executable, "-c", waits], stdin=subprocess.PIPE)]
atexit.register(watchdog.end_started, started)
raise RuntimeError("lost")
"""


@pytest.mark.skipif(os.name != "posix", reason="elsewhere the first process waits itself")
def test_a_process_that_waits_for_the_first_notices_its_error() -> None:
    """Its connection to the first closes, and it can print a message before it is killed."""
    done = ended(NOTICES)
    assert (done.returncode, done.stdout) == (1, "noticed\n")


def test_no_process_outlives_the_first() -> None:
    begun = time.monotonic()
    done = ended(KILLED)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "watched\n"
    assert "the first process of this machine has ended" in done.stderr
    assert time.monotonic() - begun < 40


def test_a_process_that_was_not_started_by_another_watches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STARTED_BY, raising=False)
    end_with_first_process()
