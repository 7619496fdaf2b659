"""The workers of the tests report what pytest reports, and a worker that ends is an error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = """
import pytest
from forked_workers import run_in_workers

@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    run_in_workers(session, 1)
    return True
"""
OUTCOMES = """
import warnings
import pytest

def test_passes(tmp_path): print("of a test that passes")
def test_fails(): print("of a test that fails"); assert 1 == 2
def test_is_skipped(): pytest.skip("no reason")
def test_warns(): warnings.warn("a warning")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_outcomes.py").write_text(OUTCOMES)
    return tmp_path


def _pytest(folder: Path) -> tuple[int, str]:
    helpers = Path(__file__).parent / "helpers"
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "-p", "no:cacheprovider", "-rfs", str(folder)]
    variables = {**os.environ, "PYTHONPATH": str(helpers)}
    result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)
    return result.returncode, result.stdout


def test_outcomes_are_reported_and_a_worker_that_ends_is_an_error(folder: Path) -> None:
    (folder / "test_end.py").write_text("import os\ndef test_end(): os._exit(0)")
    status, text = _pytest(folder)
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "2 failed, 2 passed, 1 skipped, 1 warning" in text
    assert all(words in text for words in ("of a test that fails", "assert 1 == 2", "no reason", "a warning"))
    assert "of a test that passes" not in text
    assert "FAILED test_end.py::test_end - The process of this test ended." in text
