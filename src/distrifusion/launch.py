"""N worker processes of one entry point, supervised by torch's own elastic agent on a thread of this process.

The agent makes the rendezvous (its store is in this process, on a free port of the loopback), gives each worker
torchrun's variables, watches them, and ends all when one fails. It never restarts them: the caller decides, with a
fresh group. Beside the torch.distributed communicator this is the one file that imports ``torch.distributed``: the
agent is there.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed.elastic.rendezvous.registry as rendezvous_registry
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters

MONITOR_INTERVAL = 0.1  # seconds between two looks of the agent at its workers
_THREAD = "distrifusion-agent"

# The worker sends its own output to its log, before its first import: the files that the agent would open for it stay
# open until they are collected, which is a ResourceWarning in this process.
_ENTRY = """\
import os
path = os.path.join(os.environ["DISTRIFUSION_LOGS"], os.environ["RANK"])
log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
os.dup2(log, 1)
os.dup2(log, 2)
from {module} import {function}
{function}()
"""


@dataclass(frozen=True)
class Exit:
    """How one worker process ended. ``code`` is its exit code, or minus the signal that killed it."""

    rank: int
    pid: int
    code: int

    def __str__(self) -> str:
        if self.code >= 0:
            return f"exited with code {self.code}"
        try:
            return f"killed by signal {-self.code} ({signal.Signals(-self.code).name})"
        except ValueError:
            return f"killed by signal {-self.code}"


class Group:
    """One group of ``num_ranks`` workers; each calls ``function()`` of ``module`` in a fresh interpreter.

    ``environment`` comes on top of this process's. The workers are in sessions of their own: a Ctrl-C in the terminal
    reaches this process alone. What they write goes to logs that live as long as the group; `log_tail` reads them.
    ``monitor_interval`` is how many seconds lie between two looks of the agent at them.
    """

    def __init__(
        self,
        num_ranks: int,
        module: str,
        function: str,
        environment: Mapping[str, str],
        monitor_interval: float = MONITOR_INTERVAL,
    ) -> None:
        self.num_ranks = num_ranks
        self._monitor_interval = monitor_interval
        self.ended = threading.Event()
        """Set when no worker runs any more."""
        self.error: BaseException | None = None
        """Why the agent itself failed; None where it did its work."""
        self._exits: dict[int, Exit] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="distrifusion-"))
        own = {"DISTRIFUSION_LOGS": str(self._folder), "DISTRIFUSION_PARENT": str(os.getpid())}
        self._environment = {**environment, **own}
        self._arguments = ("-c", _ENTRY.format(module=module, function=function))
        # The address is given, or torch would look the host's name up, which takes seconds where no DNS answers.
        self._rendezvous = RendezvousParameters(
            backend="c10d",
            endpoint="127.0.0.1:0",
            run_id=uuid.uuid4().hex,
            min_nodes=1,
            max_nodes=1,
            local_addr="127.0.0.1",
            is_host="true",
        )
        self._agent: LocalElasticAgent | None = None
        # A daemon thread must not be inside the store's C++ code when the interpreter goes: that aborts the process.
        atexit.register(self.release)
        self._thread = threading.Thread(target=self._run, name=_THREAD, daemon=True)
        self._thread.start()

    @property
    def pids(self) -> dict[int, int]:
        """Process of each rank; empty until the agent has started them."""
        if self._agent is None:
            return {}
        workers = self._agent.get_worker_group().workers
        return {worker.global_rank: int(worker.id) for worker in workers if worker.id is not None}

    @property
    def exits(self) -> dict[int, Exit]:
        """The workers that failed, by rank; complete once ``ended`` is set. The agent ends the others by SIGTERM."""
        return dict(self._exits)

    def first_exit(self, seen: int | None = None) -> Exit | None:
        """The exit that ended the group: that of rank ``seen``, or of another that the agent did not end by SIGTERM."""
        likely = sorted(self._exits.values(), key=lambda leave: (leave.code == -signal.SIGTERM, leave.rank != seen))
        return likely[0] if likely else None

    def wait(self, timeout: float) -> bool:
        """Wait until no worker runs any more, for ``timeout`` seconds at most; False where some still do."""
        return self.ended.wait(timeout)

    def kill(self) -> None:
        """End every worker at once, stopped or stuck ones too. May be called twice."""
        deadline = time.monotonic() + 10
        while not self.ended.is_set() and time.monotonic() < deadline:
            for pid in self.pids.values():  # none yet where the agent is still starting them
                with suppress(ProcessLookupError, PermissionError):
                    if sys.platform == "win32":
                        os.kill(pid, signal.SIGTERM)
                    else:
                        os.killpg(pid, signal.SIGKILL)  # the agent made each worker the leader of a session
            self.ended.wait(0.1)

    def release(self) -> None:
        """End what still runs and remove the workers' logs. May be called twice."""
        atexit.unregister(self.release)
        self.kill()
        self._thread.join(10)
        shutil.rmtree(self._folder, ignore_errors=True)

    def log_tail(self, rank: int, num_lines: int = 30) -> str:
        """The last lines that ``rank`` wrote to stdout and stderr; empty where there are none."""
        try:
            text = (self._folder / str(rank)).read_text(errors="replace")
        except OSError:
            return ""
        return "\n".join([line for line in text.splitlines() if line.strip()][-num_lines:])

    def _run(self) -> None:
        handler = None
        try:
            handler = rendezvous_registry.get_rendezvous_handler(self._rendezvous)
            spec = WorkerSpec(
                role="rank",
                local_world_size=self.num_ranks,
                entrypoint=sys.executable,
                args=self._arguments,
                rdzv_handler=handler,
                max_restarts=0,
                monitor_interval=self._monitor_interval,
                local_addr="127.0.0.1",
            )
            self._agent = LocalElasticAgent(spec, logs_specs=_Environment(self._environment), exit_barrier_timeout=5)
            result = self._agent.run()
            for rank, failure in result.failures.items():
                self._exits[rank] = Exit(rank, failure.pid, failure.exitcode)
        except BaseException as error:  # a thread has nobody to raise to: the caller finds it in `error`
            self.error = error
        finally:
            if handler is not None:
                handler.shutdown()
            self.ended.set()


def follow_parent() -> None:
    """For a worker without a channel to its parent: end when the parent has gone without a word, in mid-step too."""

    def watch() -> None:
        while os.getppid() == int(os.environ["DISTRIFUSION_PARENT"]):
            time.sleep(1.0)
        shutil.rmtree(os.environ["DISTRIFUSION_LOGS"], ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="distrifusion-parent", daemon=True).start()


class _Environment(LogsSpecs):
    """Gives the workers their environment, by the one hook that the agent has for it; the agent redirects nothing."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__()
        self._environment = dict(environment)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """See LogsSpecs. Runs just before the workers start."""
        for variables in envs.values():
            variables.update(self._environment, TORCHELASTIC_ERROR_FILE="")
        inherit = dict.fromkeys(envs, "")
        return LogsDest(stdouts=inherit, stderrs=inherit, error_files=dict.fromkeys(envs, os.devnull))

    @property
    def root_log_dir(self) -> str:
        """See LogsSpecs."""
        return ""


class _Quiet(logging.Filter):
    """Drops what the agent logs on our threads: the caller is told by exception, and torchrun's own lines stay."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.threadName != _THREAD


for _name in ("multiprocessing.api", "agent.server.api", "agent.server.local_elastic_agent"):
    logging.getLogger(f"torch.distributed.elastic.{_name}").addFilter(_Quiet())
