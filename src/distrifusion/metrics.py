"""What ran, in numbers: the one line at the end of a run and its JSON twin."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Tally:
    """Calls of a VAE's encoder or decoder in one picture, and what they took on this rank in all."""

    calls: int = 0
    seconds: float = 0.0
    messages: int = 0
    bytes: int = 0

    def and_one(self, seconds: float, messages: int, num_bytes: int) -> Tally:
        """With another call."""
        return Tally(self.calls + 1, self.seconds + seconds, self.messages + messages, self.bytes + num_bytes)


@dataclass
class Report:
    """One picture (or one call of the pipeline) as it ran on this rank.

    ``patches`` are the rows (or columns) of latent each rank of a patch group owns, in the end where they have changed;
    ``stages`` the modules that each rank of a pipeline computes, ``balance`` what they follow (``"even"``, the weights,
    or ``"measured"``); ``seconds`` has one entry per call of the denoiser, ``messages`` and ``bytes`` what this rank
    sent in it, ``kinds`` how fresh it was
    (``"sync"``, ``"displaced"``, ``"naive"`` ...). ``slot_bytes`` is the memory for late messages, sent and received,
    and for what patches remember.
    ``vae`` is what a parallel VAE took in the same picture, by kind of call (``"encode"``, ``"decode"``): it is in none
    of the other counts.
    """

    strategy: str
    mesh: str
    split: str = "rows"
    patches: tuple[int, ...] = ()
    stages: tuple[tuple[str, ...], ...] = ()
    seconds: list[float] = field(default_factory=list)
    messages: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    balance: str = "even"
    slot_bytes: int = 0
    vae: dict[str, Tally] = field(default_factory=dict)

    def step(self, kind: str, seconds: float, messages: int, num_bytes: int) -> None:
        """Record one call of the denoiser."""
        self.kinds.append(kind)
        self.seconds.append(seconds)
        self.messages.append(messages)
        self.bytes.append(num_bytes)

    def add_to_last(self, messages: int, num_bytes: int) -> None:
        """What was sent after a call of the denoiser, for what it gave."""
        if self.messages:
            self.messages[-1] += messages
            self.bytes[-1] += num_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the medians of the prevailing (last) kind of step beside the counts of each kind."""
        last = self.kinds[-1] if self.kinds else self.strategy
        chosen = [i for i, kind in enumerate(self.kinds) if kind == last]
        return {
            "strategy": self.strategy,
            "mesh": self.mesh,
            "split": self.split,
            "patches": list(self.patches),
            **({"stages": [list(names) for names in self.stages]} if self.stages else {}),
            "balance": self.balance,
            "steps": {kind: self.kinds.count(kind) for kind in dict.fromkeys(self.kinds)},
            "seconds_per_step": median([self.seconds[i] for i in chosen]) if chosen else None,
            "messages_per_step": round(median([self.messages[i] for i in chosen])) if chosen else 0,
            "bytes_per_step": round(median([self.bytes[i] for i in chosen])) if chosen else 0,
            "slot_bytes": self.slot_bytes,
            "vae": {kind: asdict(tally) for kind, tally in self.vae.items()},
            "notes": list(self.notes),
        }

    def line(self) -> str:
        """The one line a person reads at the end."""
        facts = self.as_dict()
        pace = facts["seconds_per_step"]
        steps = " + ".join(f"{count} {kind}" for kind, count in facts["steps"].items()) or "none"
        balance = {"even": "", "measured": " (measured)"}.get(self.balance, f" (weights {self.balance})")
        owned = f"{self.split} per rank {'+'.join(map(str, self.patches)) or '-'}"
        if self.stages:
            owned = f"modules per rank {'+'.join(str(len(names)) for names in self.stages)}"
        parts = [
            f"strategy {self.strategy}",
            f"mesh {self.mesh}",
            f"{owned}{balance}",
            f"steps {steps}",
            f"{pace:.3f} s/step" if pace is not None else "- s/step",
            f"{human_bytes(facts['bytes_per_step'])} and {facts['messages_per_step']} messages sent per step and rank",
        ]
        parts += [f"slots {human_bytes(self.slot_bytes)}"] if self.slot_bytes else []
        parts += [
            f"{kind} {tally.seconds:.3f} s, {human_bytes(tally.bytes)} and {tally.messages} messages sent"
            for kind, tally in self.vae.items()
        ]
        return " | ".join(parts + self.notes)

    def copy(self) -> Report:
        """A snapshot that later steps leave alone."""
        return replace(
            self,
            seconds=list(self.seconds),
            messages=list(self.messages),
            bytes=list(self.bytes),
            kinds=list(self.kinds),
            notes=list(self.notes),
            vae=dict(self.vae),
        )

    def then(self, other: Report) -> Report:
        """The report of a picture that two denoisers made, ``other`` the later steps."""
        both = self.copy()
        both.patches = self.patches or other.patches
        for name in ("seconds", "messages", "bytes", "kinds"):
            getattr(both, name).extend(getattr(other, name))
        both.notes.extend(note for note in other.notes if note not in both.notes)
        return both


def human_bytes(count: float) -> str:
    """``count`` bytes in the largest binary unit that keeps the number at 1 or more."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
