#!/usr/bin/env python3
"""Two ranks on a link of a chosen rate: what displaced, sync and the codecs lose there, in one table.

    sudo .venv/bin/python benchmarks/slow_link.py                     # sdxl-mini at 1024 px: some twenty minutes
    sudo .venv/bin/python benchmarks/slow_link.py --size 256 --rounds 1 --steps 2       # whether it works

All runs are `distrifusion bench` under `scripts/slow-link`, so Gloo carries everything and only the rate differs. The
first is at 10 Gbit/s. From it follows the rate R at which the bytes of a plain displaced step take 0.8 of that step.
Then come R, a quarter of it (int8), and a sixteenth (1bit); and 10 Gbit/s once more at the end. Machines drift by as
much as is asked for here, so a step is told in steps of the bare model on one rank in the same run: what a rate costs
is how many more of them it takes than in the two runs at 10 Gbit/s, in the mean. Plain values at parts of R are waited
for many times as long as they are computed, and are measured in one round of two steps. Needs what scripts/slow-link
needs; exits with its 77 where that is not there, with 1 where a criterion is not met.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "scripts" / "slow-link"
FREE = 10_000_000_000  # bits per second: a link that takes no part in the time
SHARE = 0.8  # of a step, that its bytes take
PLAIN, BARE = "none", "bare model"
PARTS = {PLAIN: 1, "int8": 4, "1bit": 16}  # codec -> part of the rate at which it is measured
HOLDS, LOSES = 0.10, 0.40  # displaced loses at most, plain sync at least

Rows = dict[str, dict[str, Any]]
"""Case -> its row of bench's JSON, and ``bare_steps``: its step over that of the bare model on one rank in this run."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sdxl-mini", help="as of bench (default: sdxl-mini)")
    parser.add_argument("--size", default="1024", help="pixels, as of bench (default: 1024)")
    parser.add_argument("--rounds", type=int, default=5, help="as of bench (default: 5)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps in each round (default: 6)")
    parser.add_argument("--json", type=Path, help="write all that bench has said to this file")
    return parser.parse_args()


def bench(order: argparse.Namespace, rate: int, codecs: list[str], rounds: int, steps: int) -> Rows:
    """Measure displaced and sync at ``rate`` with each of ``codecs``."""
    words = [sys.executable, str(SCRIPT), "--rate", f"{rate // 1000}kbit", "--nproc", "2", "--"]
    words += [sys.executable, "-m", "distrifusion", "bench", "--json", "--world", "2"]
    words += ["--strategy", "displaced", "--strategy", "sync", "--model", order.model, "--size", order.size]
    words += ["--rounds", str(rounds), "--steps", str(steps)]
    for codec in codecs:
        words += ["--codec", codec]
    print(f"{rate / 1e6:.1f} Mbit/s, codec {' and '.join(codecs)} ...", file=sys.stderr, flush=True)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as ran:
        try:
            said, _ = ran.communicate()
        finally:
            ran.terminate()  # where this is interrupted: it takes its links away
    if ran.returncode:
        sys.exit(ran.returncode)
    found = json.loads(said)
    assert found["wire"] == "gloo", "slow-link keeps the ranks on the network"
    bare = next(row["seconds_per_step"] for row in found["cases"] if row["case"] == BARE)
    return {row["case"]: {**row, "bare_steps": row["seconds_per_step"] / bare} for row in found["cases"]}


def throttled(order: argparse.Namespace, rate: int, codec: str) -> Rows:
    """Measure ``codec`` at ``rate``, and plain values."""
    rows = bench(order, rate, [codec], order.rounds, order.steps)
    return rows if codec == PLAIN else {**bench(order, rate, [PLAIN], 1, 2), **rows}


def mean_pace(runs: list[Rows], case: str) -> float:
    """Seconds per step over some runs."""
    return sum(rows[case]["seconds_per_step"] for rows in runs) / len(runs)


def lost(free: list[Rows], rows: Rows, case: str) -> float:
    """What a rate costs ``case``: the part by which its step, measured in steps of the bare model, becomes longer."""
    return rows[case]["bare_steps"] / (sum(run[case]["bare_steps"] for run in free) / len(free)) - 1


def named(strategy: str, codec: str) -> str:
    """What bench calls a case."""
    return strategy if codec == PLAIN else f"{strategy} {codec}"


def table(free: list[Rows], at: dict[str, tuple[int, Rows]]) -> Iterator[str]:
    """A row for each case at each rate."""
    yield "| rate Mbit/s | case | bytes | s/step at 10 Gbit/s | s/step | lost | waits s | link used |"
    yield "|---|---|---|---|---|---|---|---|"
    for codec, (rate, rows) in at.items():
        codecs, strategies = dict.fromkeys([PLAIN, codec]), ("displaced", "sync")
        for case in (named(strategy, each) for each in codecs for strategy in strategies):
            row, pace = rows[case], mean_pace(free, case)
            seconds, busy = row["seconds_per_step"], row["bytes_per_step"] * 8 / rate
            cells = [f"{rate / 1e6:.1f}", case, f"{row['bytes_per_step']:,}".replace(",", " ")]
            cells += [
                f"{pace:.3f}",
                f"{seconds:.3f}",
                f"{lost(free, rows, case):+.1%}",
                f"{row['waited_per_step']:.3f}",
            ]
            yield f"| {' | '.join([*cells, f'{busy / seconds:.0%}'])} |"


def judge(free: list[Rows], at: dict[str, tuple[int, Rows]]) -> Iterator[tuple[bool, str]]:
    """The criteria, and what was found."""
    for codec, (rate, rows) in at.items():
        where, case = f"at {rate / 1e6:.1f} Mbit/s", named("displaced", codec)
        share = lost(free, rows, case)
        yield share <= HOLDS, f"{where} {case} loses {share:+.1%}; at most {HOLDS:.0%}"
        if codec != PLAIN:
            plain, coded = (rows[each]["seconds_per_step"] for each in ("displaced", named("sync", codec)))
            yield coded < plain, f"{where} sync {codec} takes {coded:.3f} s, plain displaced {plain:.3f} s: less"
        sync = lost(free, rows, "sync")
        yield sync >= LOSES, f"{where} plain sync loses {sync:+.1%}; at least {LOSES:.0%}"


def main() -> int:
    """Measure, and say what was found."""
    order = parse()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    free = [bench(order, FREE, list(PARTS), order.rounds, order.steps)]
    step = free[0]["displaced"]
    rate = round(step["bytes_per_step"] * 8 / (SHARE * (step["seconds_per_step"] - step["waited_per_step"])))
    at = {codec: (rate // part, throttled(order, rate // part, codec)) for codec, part in PARTS.items()}
    free.append(bench(order, FREE, list(PARTS), order.rounds, order.steps))
    print(*table(free, at), "", sep="\n")
    verdicts = list(judge(free, at))
    print(*(f"- {'met' if is_met else 'MISSED'}: {text}" for is_met, text in verdicts), sep="\n")
    if order.json is not None:
        runs = {"unthrottled": free, "throttled": {codec: {"rate": rate, **rows} for codec, (rate, rows) in at.items()}}
        order.json.write_text(json.dumps(runs) + "\n")
    return 0 if all(is_met for is_met, _ in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
