"""Seconds per step beside another library, in one run: docs/benchmarks.md, "Beside other libraries".

    python benchmarks/peers/compare.py distrifuser --python ENVIRONMENT/bin/python
    python benchmarks/peers/compare.py ulysses

Each library has ranks of its own, which stand still while it is another's turn. A round gives every case one turn, so
that a noisy machine is noisy for all. Ratios are taken within each round; what is printed is their median. A table
for people, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, NoReturn

from rank import BARE, Settings
from rich.console import Console
from rich.table import Table
from turns import LostError, Ranks

from distrifusion.bench.plan import LATENT, Case
from distrifusion.bench.shapes import SHAPES, TEXT_TOKENS, TRANSFORMERS
from distrifusion.bench.timing import Timing
from distrifusion.errors import ConfigError
from distrifusion.forms import codec_choices

OURS = "ours"
PEERS = {"distrifuser": "distrifuser_unet", "ulysses": "ulysses"}
MODELS = {"distrifuser": "sdxl-mini", "ulysses": "flux-mini"}
RIVALS = {
    "distrifuser": [("displaced", "corrected_async_gn"), ("sync", "full_sync")],
    "ulysses": [("displaced", "ulysses"), ("sync", "ulysses")],
}
"""Ours, and theirs that it is compared with: also the order of the turns."""

WARM_UP = Case("displaced", 2).num_untimed  # steps before the timed ones, for all


@dataclass
class Entry:
    """One case of one library, and what was measured."""

    library: str
    case: str
    ranks: Sequence[int] | None = None  # None: all
    rounds: list[Timing] = field(default_factory=list)
    error: float = 0.0

    @property
    def all_rounds(self) -> Timing:
        """Every step."""
        seconds = [step for each in self.rounds for step in each.seconds]
        cpu_seconds = [step for each in self.rounds for step in each.cpu_seconds]
        return Timing(Case(None), (0, 0), seconds, cpu_seconds)

    def over(self, other: Entry) -> float:
        """How many times faster it is than ``other``: the median over the rounds."""
        return median(theirs.pace / own.pace for own, theirs in zip(self.rounds, other.rounds, strict=True))

    def take(self, answers: list[list[dict[str, float]]]) -> None:
        """A round's answers, by rank: rank 0's seconds, and the CPU seconds of all."""
        seconds = [step["seconds"] for step in answers[0]]
        cpu_seconds = [sum(step["cpu_seconds"] for step in steps) for steps in zip(*answers, strict=True)]
        self.rounds.append(Timing(Case(None), (0, 0), seconds, cpu_seconds))


def entries_for(peer: str, codecs: Sequence[str | None]) -> list[Entry]:
    """The cases in the order of their turns: A B A B."""
    entries = [Entry(OURS, BARE, [0]), Entry(PEERS[peer], BARE, [0])]
    for own, theirs in RIVALS[peer]:
        names = [Case(own, codec=codec).name for codec in codecs]  # type: ignore[arg-type]
        entries += [Entry(OURS, name) for name in names]
        if all(entry.case != theirs for entry in entries):
            entries.append(Entry(PEERS[peer], theirs))
    return entries


def measure(entries: Sequence[Entry], teams: dict[str, Ranks], rounds: int, steps: int) -> None:
    """Give every entry its turns, after a look at what it computes."""
    for entry in entries:
        if entry.case != BARE:
            entry.error = max(teams[entry.library].turn("check", case=entry.case, num_steps=WARM_UP + 1))
    for done in range(rounds):
        for entry in entries:
            order = {"case": entry.case, "num_warm_up": WARM_UP, "num_steps": steps}
            entry.take(teams[entry.library].turn("time", entry.ranks, **order))
        print(f"round {done + 1} of {rounds}", file=sys.stderr)


def summary(order: argparse.Namespace, settings: Settings, entries: Sequence[Entry]) -> dict[str, Any]:
    """The one JSON object."""
    single = entries[0]
    rows = [
        {
            "library": entry.library,
            "case": entry.case,
            "ranks": order.world if entry.ranks is None else len(entry.ranks),
            "seconds_per_step": round(entry.all_rounds.pace, 5),
            "spread": round(entry.all_rounds.spread, 4),
            "speedup": round(entry.over(single), 3),
            "cpu_seconds_per_step": round(median(entry.all_rounds.cpu_seconds), 5),
            "error": entry.error,
        }
        for entry in entries
    ]
    named = {entry.case: entry for entry in entries}
    ratios = {
        f"{entry.case} over {theirs}": round(entry.over(named[theirs]), 3)
        for own, theirs in RIVALS[order.peer]
        for entry in entries
        if entry.library == OURS and entry.case.split()[0] == own
    }
    run = {"world": order.world, "rounds": order.rounds, "steps": order.steps, "slow_link": order.slow_link}
    return {"peer": order.peer, **asdict(settings), **run, "cases": rows, "ratios": ratios}


def table(found: dict[str, Any]) -> Table:
    """The rows of `summary`."""
    link = f", link of {found['slow_link']}" if found["slow_link"] else ""
    grid = Table(title=f"{found['model']}, {found['size']} px, one thread per rank{link}")
    for name in ("library", "case", "ranks", "s/step", "spread", "x one rank", "CPU s", "error"):
        grid.add_column(name, justify="left" if name in ("library", "case") else "right", no_wrap=True)
    for row in found["cases"]:
        grid.add_row(
            row["library"],
            row["case"],
            str(row["ranks"]),
            f"{row['seconds_per_step']:.3f}",
            f"{row['spread']:.1%}",
            f"{row['speedup']:.2f}",
            f"{row['cpu_seconds_per_step']:.3f}",
            f"{row['error']:.1e}" if row["case"] != BARE else "-",
        )
    return grid


class Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> NoReturn:
        """See ArgumentParser."""
        self.exit(2, f"error: {message}\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--python", help="interpreter of the peer's environment (default: this one)")
    parser.add_argument("--model", help="a shape of distrifusion bench (default: sdxl-mini, or flux-mini for ulysses)")
    parser.add_argument("--size", type=int, default=1024, help="pixels of a side (default: 1024)")
    parser.add_argument("--world", type=int, default=2, help="ranks (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each case (default: 5)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps in each turn (default: 3)")
    parser.add_argument("--codec", action="append", help="of ours, see distrifusion bench; none is one too; repeatable")
    parser.add_argument("--slow-link", metavar="RATE", help="all over links of this rate: see scripts/slow-link")
    order = parser.parse_args(arguments)
    order.model = order.model or MODELS[order.peer]
    order.python = order.python or sys.executable
    known = {"distrifuser": SHAPES, "ulysses": TRANSFORMERS}[order.peer]
    if order.model not in known:
        parser.error(f"--model {order.model}: for {order.peer} it must be one of {', '.join(known)}")
    if shutil.which(order.python) is None:
        parser.error(f"--python {order.python}: there is no such program")
    for name, least in (("world", 2), ("rounds", 1), ("steps", 1), ("size", 64)):
        if getattr(order, name) < least:
            parser.error(f"--{name} {getattr(order, name)} must be at least {least}")
    # Both peers cut the picture into equal parts, distrifuser on every level.
    if order.size % (LATENT * 4 * order.world):
        parser.error(f"--size {order.size} must be a multiple of {LATENT * 4 * order.world} for {order.world} ranks")
    try:
        order.codecs = codec_choices(order.codec or ["none"])
    except ConfigError as error:
        parser.error(str(error))
    return order


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    order = parse(arguments)
    # Ulysses cuts the words too: as many more as make equal parts.
    text_tokens = TEXT_TOKENS if order.peer == "distrifuser" else -(-TEXT_TOKENS // order.world) * order.world
    settings = Settings(order.model, order.size, text_tokens, order.codecs)
    entries = entries_for(order.peer, order.codecs)
    try:
        with ExitStack() as stack:
            teams = {
                library: stack.enter_context(Ranks(library, python, settings, order.world, order.slow_link))
                for library, python in ((OURS, sys.executable), (PEERS[order.peer], order.python))
            }
            measure(entries, teams, order.rounds, order.steps)
    except LostError as loss:
        print(loss, file=sys.stderr)
        return loss.code
    found = summary(order, settings, entries)
    console = Console(width=120)
    console.print(table(found))
    for name, ratio in found["ratios"].items():
        console.print(f"{name}: {ratio:.2f}x", highlight=False)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
