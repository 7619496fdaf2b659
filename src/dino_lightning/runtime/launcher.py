"""Lightning's launcher of processes, which watch each other as `processes` says instead of as Lightning does.

Lightning watches the processes that it has started every five seconds, and at the first that fails it kills all by
SIGKILL, itself included: the command then ends with status 137 whatever was wrong, and a process that has saved and
left on request counts as failed while the first one is still writing. Nobody watches the first process: when that is
killed while the others are on their way to it, they wait for `collective_timeout_s`.
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
    """Starts a process for each further device, and ends all when one of them fails, with its exit status."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the others where nobody else has, then call `function`."""
        try:
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        except ValueError as error:
            raise UserError(
                f"trainer.devices={self.num_processes} and trainer.num_nodes={self.num_nodes} are not what "
                f"the SLURM job has: {' '.join(str(error).split())}"
            ) from error
        if not self.cluster_environment.creates_processes_externally:
            with started_by_this_one():
                self._call_children_scripts()
            atexit.register(end_started, self.procs)
            threading.Thread(target=watch_started, args=(self.procs,), daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)
