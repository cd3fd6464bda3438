"""The public face is frozen, light to import, and the import rules of the house hold."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import distrifusion as df

ROOT = Path(__file__).parent.parent

PUBLIC = [
    "ConfigError",
    "DistrifusionError",
    "Engine",
    "ParallelConfig",
    "PeerLost",
    "RanksDisagree",
    "UnsupportedModel",
    "load",
    "parallelize",
    "report",
    "reset",
    "restore",
    "run_ranks",
]


def test_public_names_are_frozen() -> None:
    assert df.__all__ == PUBLIC
    assert dir(df) == sorted([*PUBLIC, "__version__"])


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_and_described(name: str) -> None:
    thing = getattr(df, name)
    assert thing.__name__ == name
    assert thing.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'paralelize'"):
        df.paralelize  # noqa: B018


def test_all_errors_are_under_one() -> None:
    for name in ("ConfigError", "UnsupportedModel", "RanksDisagree", "PeerLost"):
        assert issubclass(getattr(df, name), df.DistrifusionError)


def test_importing_it_and_making_a_configuration_needs_no_torch() -> None:
    program = (
        "import sys, distrifusion as df; from distrifusion import geometry, mesh, metrics; "
        "str(df.ParallelConfig(cfg=2)); dir(df); heavy = {'torch', 'diffusers', 'numpy', 'transformers'}; "
        "print(sorted({name.split('.')[0] for name in sys.modules} & heavy))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_imports_point_down_only() -> None:
    pytest.importorskip("importlinter")
    program = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "0 broken" in ran.stdout


def test_only_the_torch_communicator_and_the_launcher_touch_torch_distributed() -> None:
    package = ROOT / "src" / "distrifusion"
    statement = re.compile(
        r"^\s*(import torch\.distributed|from torch\.distributed|from torch import distributed)", re.M
    )
    users = {
        path.relative_to(package).as_posix() for path in package.rglob("*.py") if statement.search(path.read_text())
    }
    assert "comm/torch_dist.py" in users
    assert {user for user in users if not user.startswith("comm/")} <= {"launch.py"}
    assert not {"comm/protocol.py", "comm/threads.py", "comm/slots.py", "comm/base.py"} & users
