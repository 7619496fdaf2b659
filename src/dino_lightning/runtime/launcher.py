"""Lightning's launcher of processes, with `runtime.watchdog` instead of Lightning's own supervision.

Lightning checks the started processes every five seconds, and if one fails it kills all with SIGKILL, including itself.
The command then always ends with status 137, and a process that has saved and exited on request counts as failed while
the first one still writes. Nothing watches the first process: if it is killed, the others wait for
`collective_timeout_s`.
"""

import atexit
import threading
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from dino_lightning.errors import UserError
from dino_lightning.runtime.watchdog import end_started, started_by_this_one, watch_started


class Launcher(_SubprocessScriptLauncher):
    """Starts a process for each additional device; if one fails, ends all with its exit status."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other processes unless a scheduler has, then call `function`."""
        try:
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        except ValueError as error:
            raise UserError(
                f"trainer.devices={self.num_processes} and trainer.num_nodes={self.num_nodes} do not match "
                f"the SLURM job: {' '.join(str(error).split())}"
            ) from error
        if not self.cluster_environment.creates_processes_externally:
            with started_by_this_one():
                self._call_children_scripts()
            atexit.register(end_started, self.procs)
            threading.Thread(target=watch_started, args=(self.procs,), daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)
