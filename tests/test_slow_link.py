"""scripts/slow-link: its arguments, what it says where it cannot run, and, with root, what its ranks see and leave."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "slow-link"
SKIP = 77


@pytest.fixture(scope="module")
def slow_link() -> ModuleType:
    loader = SourceFileLoader("slow_link", str(SCRIPT))
    spec = importlib.util.spec_from_loader("slow_link", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # it would be written beside the script
    loader.exec_module(module)
    sys.dont_write_bytecode = written
    return module


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script to its end, after which none of its namespaces is left."""
    words = [sys.executable, str(SCRIPT), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, text=True, env={**os.environ, **environment}, **pipes) as process:  # type: ignore[call-overload]
        out, err = process.communicate(timeout=60)
    assert namespaces(process.pid) == []
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def namespaces(pid: int) -> list[str]:
    """Those of one run of the script."""
    return [path.name for path in Path("/run/netns").glob(f"slow-link-{pid}-*")]


@pytest.mark.parametrize(
    ("text", "bits"), [("200mbit", 200_000_000), ("2.5Gbit", 2_500_000_000), ("500kbit", 500_000), ("8kbit", 8_000)]
)
def test_rates(slow_link: ModuleType, text: str, bits: int) -> None:
    assert slow_link.parse_rate(text) == bits


def test_the_bucket_holds_four_milliseconds_or_some_packets(slow_link: ModuleType) -> None:
    assert slow_link.bucket(1_000_000_000) == ["tbf", "rate", "1000000000bit", "burst", "500000b", "latency", "50ms"]
    assert slow_link.bucket(1_000_000)[4] == "16000b"
    assert [slow_link.largest(bits) for bits in (1_000_000_000, 20_000_000, 1_000_000)] == [65_536, 8_000, 8_000]


def test_arguments(slow_link: ModuleType) -> None:
    order = slow_link.parse(["--rate", "1gbit", "--nproc", "3", "--", sys.executable, "-m", "x", "--rate", "y", "--"])
    assert (order.rate, order.nproc, order.port) == (1_000_000_000, 3, 29500)
    assert order.command == [sys.executable, "-m", "x", "--rate", "y", "--"]  # what follows -- is the command's


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--", "true"], "the following arguments are required: --rate"),
        (["--rate", "fast", "--", "true"], "'fast' must be a rate from 8kbit to 100gbit, such as 200mbit or 2.5gbit"),
        (["--rate", "200mbps", "--", "true"], "'200mbps' must be a rate"),
        (["--rate", "0kbit", "--", "true"], "'0kbit' must be a rate from 8kbit"),
        (["--rate", "1mbit", "--nproc", "1", "--", "true"], "'1' must be a whole number from 2 to 64"),
        (["--rate", "1mbit", "--port", "80", "--", "true"], "--port: 80 must be from 1024 to 65535"),
        (["--rate", "1mbit"], "no command: give it after --"),
        (["--rate", "1mbit", "--", "no-such-command"], "there is no command 'no-such-command'"),
        (["--rate", "1mbit", "--speed", "2", "--", "true"], "--speed"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], said: str) -> None:
    done = call(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")
    assert said in done.stderr


def test_ranks_cannot_get_past_the_link(slow_link: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTRIFUSION_SHARED_MEMORY", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    seen = slow_link.environment(1, 3, 29501)
    assert seen["DISTRIFUSION_SHARED_MEMORY"] == "0"
    assert seen["GLOO_SOCKET_IFNAME"] == seen["NCCL_SOCKET_IFNAME"] == "link0"
    assert {seen[name] for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE")} == {"1"}
    assert (seen["RANK"], seen["WORLD_SIZE"], seen["MASTER_ADDR"], seen["MASTER_PORT"]) == (
        *("1", "3", "10.213.0.1", "29501"),
    )
    assert seen["OMP_NUM_THREADS"] == "4"


def test_without_its_tools_it_skips_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "anything").write_text("#!/bin/sh\n")
    (tmp_path / "anything").chmod(0o755)
    done = call("--rate", "1mbit", "--", "anything", PATH=str(tmp_path))
    wanted = "ip and tc of iproute2 not found" if sys.platform == "linux" else "network namespaces need Linux"
    assert (done.returncode, done.stdout) == (SKIP, "")
    assert done.stderr.startswith(f"skipped: {wanted}")


@pytest.mark.parametrize("failing", ["veth", "tbf"])
def test_what_the_kernel_refuses_is_a_skip_that_leaves_nothing(failing: str, tmp_path: Path) -> None:
    """`ip` and `tc` are stand-ins that note their calls, one of which fails as a kernel without the module does."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("the stand-ins are only reached by root on Linux")
    for tool in ("ip", "tc"):
        stand_in = tmp_path / tool
        stand_in.write_text(
            f'#!/bin/sh\necho "{tool} $*" >> {tmp_path}/calls\n'
            f'case "{tool} $*" in *{failing}*) echo "RTNETLINK answers:" >&2; echo "Not supported" >&2; exit 2;; esac\n'
        )
        stand_in.chmod(0o755)
    done = call("--rate", "1mbit", "--", "true", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (SKIP, "", 1)
    assert done.stderr.startswith("skipped: `")
    assert done.stderr.endswith("failed: RTNETLINK answers: Not supported\n")
    calls = (tmp_path / "calls").read_text().splitlines()
    made = [line.split()[-1] for line in calls if line.startswith("ip netns add")]
    gone = [line.split()[-1] for line in calls if line.startswith("ip netns delete")]
    assert len(made) == 2
    assert gone == made


# --- with root: real namespaces


@pytest.fixture(scope="module")
def links() -> None:
    done = call("--rate", "1mbit", "--", "true")
    if done.returncode == SKIP:
        pytest.skip(done.stderr.strip())
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("world", ["2", "3"])
def test_each_rank_has_its_end_of_a_link_of_that_rate(links: None, world: str) -> None:
    look = 'echo "$RANK of $WORLD_SIZE"; ls /sys/class/net | sort | xargs; ip -br -4 address show dev link0; '
    look += "ip -d link show dev link0 | grep -o 'gso_max_size [0-9]*'; "
    done = call("--rate", "20mbit", "--nproc", world, "--", "sh", "-c", look + "tc qdisc show dev link0")
    assert (done.returncode, done.stderr) == (0, "")
    rank, devices, address, size, qdisc = done.stdout.splitlines()
    assert (rank, devices) == (f"0 of {world}", "link0 lo")
    assert "10.213.0.1/24" in address
    assert size == "gso_max_size 8000"
    assert "tbf" in qdisc
    assert "rate 20Mbit burst 16000b" in qdisc


@pytest.mark.parametrize(
    ("script", "code", "out", "err"),
    [
        ("exit $((RANK * 9))", 9, "", "error: rank 1 ended with exit code 9:\n"),
        ("echo said by $RANK; exit 4", 4, "said by 0\n", ""),
        (
            "[ $RANK = 0 ] || { echo last words; kill -9 $$; }",
            137,
            "",
            "error: rank 1 ended with exit code 137:\nlast words\n",
        ),
    ],
)
def test_the_exit_code_is_the_commands(links: None, script: str, code: int, out: str, err: str) -> None:
    done = call("--rate", "20mbit", "--", "sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_ctrl_c_leaves_nothing(links: None, tmp_path: Path) -> None:
    words = [sys.executable, str(SCRIPT), "--rate", "20mbit", "--", "sh", "-c", f"echo $$ > {tmp_path}/$RANK; sleep 60"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        while len([path for path in tmp_path.iterdir() if path.read_text()]) < 2:
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.05)
        assert len(namespaces(process.pid)) == 2
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "")
    assert namespaces(process.pid) == []
    for file in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_ranks_join_over_the_link_and_stay_on_gloo(links: None) -> None:
    code = """
import pathlib, torch
from distrifusion.comm.torch_dist import TorchComm
comm = TorchComm.from_environment("cpu")
sent = pathlib.Path("/sys/class/net/link0/statistics/tx_bytes")
before = int(sent.read_text())
parts = comm.all_gather(torch.full((50_000,), float(comm.rank)), [50_000] * comm.world, kind="context").wait()
comm.barrier()
print([part.unique().item() for part in parts], comm.wire, int(sent.read_text()) - before > 200_000)
comm.close()
"""
    done = call("--rate", "100mbit", "--nproc", "3", "--", sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[0.0, 1.0, 2.0] gloo True\n"
