"""What the workers of test_launch.py do."""

from __future__ import annotations

import os
import signal
import sys
import time

RANK = int(os.environ.get("RANK", "-1"))


def speak() -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "JOB_WORD")
    print(*(os.environ[name] for name in names), flush=True)  # a file's buffer would come after what goes to stderr
    print("own session", os.getsid(0) == os.getpid(), file=sys.stderr)


def fail() -> None:
    if RANK == 1:
        print("before the end", file=sys.stderr)
        sys.exit(7)
    time.sleep(60)


def die() -> None:
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def stop() -> None:
    print("stopped", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


def follow() -> None:
    from distrifusion.launch import follow_parent

    follow_parent()
    time.sleep(60)


def leave_behind() -> None:
    """A parent that is killed: prints its worker's process and then waits for the end."""
    from distrifusion.launch import Group

    group = Group(1, "launch_jobs", "follow", {})
    while not group.pids:
        time.sleep(0.05)
    print(group.pids[0], flush=True)
    time.sleep(60)
