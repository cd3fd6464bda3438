"""The output folder: it appears whole or not at all. Until then its parts lie in a hidden folder beside it.

That folder is also what a run that was cut off goes on from:

    .NAME.part/lock                      held by the run that is at it
               settings.json             what all results have in common
               pictures/CASE/000.png
               results/CASE/000.json     one picture's numbers; it is written last, so what is there is done
               references/STEPS/000.npz  one device's picture and latents in full precision; removed at the end
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ..errors import ConfigError, DistrifusionError
from .plan import Case, case_of
from .store import Store


class Output:
    """A folder to be written.

    Args:
        path: where it will be.
        force: replace what is there, and forget what an earlier run has left.
        add: take over the results of a finished folder at ``path``.

    Raises:
        ConfigError: it cannot be written, or it is there already and neither ``force`` nor ``add`` says what to do, or
            it is there and no comparison, which ``force`` would not replace either.
    """

    def __init__(self, path: Path, *, force: bool = False, add: bool = False) -> None:
        self.path = path
        self._force, self._add = force, add
        name = path.absolute().name
        if not name:
            raise ConfigError(f"output {str(path)!r} names no folder")
        self.part = path.absolute().with_name(f".{name}.part")
        self.store = Store(self.part)
        if force and add:
            raise ConfigError("--force throws away what is there and --add keeps it: give one of them")
        if path.exists() and not path.is_dir():
            raise ConfigError(f"output {str(path)!r} is a file: name a folder")
        if not self.part.parent.is_dir():
            raise ConfigError(f"output {str(path)!r}: there is no folder {str(path.parent)!r}")
        if add and not (path / "metrics.json").is_file():
            raise ConfigError(f"output {str(path)!r} holds no metrics.json that results could be added to")
        if path.is_dir() and any(path.iterdir()):
            if not (path / "metrics.json").is_file():  # a slip such as `-o ~` must not cost a home
                raise ConfigError(f"output {str(path)!r} is there, not empty and no comparison: name another")
            if not (force or add):
                raise ConfigError(
                    f"output {str(path)!r} is there and not empty: name another, or give --force to replace it or "
                    "--add to add cases to it"
                )
        self._lock: IO[str] | None = None
        self._is_new = not self.part.exists()
        try:
            self.part.mkdir(exist_ok=True)
            (self.part / "trial").touch()
            (self.part / "trial").unlink()
        except OSError as error:
            raise ConfigError(
                f"output {str(path)!r}: the folder {str(path.parent)!r} cannot be written to ({error.strerror})"
            ) from error
        finally:
            if self._is_new:  # so far this was a question
                with suppress(OSError):  # not empty: another run has begun meanwhile
                    self.part.rmdir()

    def open(self, settings: dict[str, Any]) -> None:
        """Make the hidden folder, or go on with one of the same ``settings``.

        Raises:
            ConfigError: what is there is of other settings, the first of which is named, or another run is at it.
        """
        try:
            self._open(settings)
        except BaseException:
            self._unlock()
            raise

    def _open(self, settings: dict[str, Any]) -> None:
        try:
            self.part.mkdir(exist_ok=True)
            self._lock = (self.part / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, whatever ends it
        except BlockingIOError:
            self._is_new = False  # so discard leaves the other's alone
            raise ConfigError(f"output {str(self.path)!r} is being written by another run") from None
        except OSError as error:
            raise DistrifusionError(f"output {str(self.path)!r} cannot be written: {error}") from error
        if self._force:
            for path in self.part.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        noted = self.part / "settings.json"
        if self._add:
            found = _read(self.path / "metrics.json")
            _check_same(found.get("settings", {}), settings, f"output {str(self.path)!r}")
            if not noted.is_file():
                self._take_over(found)
        if noted.is_file():
            _check_same(_read(noted), settings, f"{str(self.part)!r}, which an unfinished run has left,")
        try:
            part = noted.with_suffix(".part")
            part.write_text(json.dumps(settings))
            part.replace(noted)
        except OSError as error:
            raise DistrifusionError(f"output {str(self.path)!r} cannot be written: {error}") from error

    def cases(self) -> list[Case]:
        """The cases that have results in a folder that was taken over; none without ``add``."""
        return [case_of(facts) for facts in _read(self.path / "metrics.json")["cases"]] if self._add else []

    def finish(self, cases: Iterable[Case]) -> None:
        """Put the folder in its place; only what a reader wants is left in it: pictures of ``cases`` among it.

        Raises:
            DistrifusionError: it cannot be put there.
        """
        kept = {case.name for case in cases}
        for folder in self.part.glob("pictures/*"):  # an unfinished run may have been asked for others
            if folder.name not in kept:
                shutil.rmtree(folder)
        shutil.rmtree(self.part / "references", ignore_errors=True)
        shutil.rmtree(self.part / "results", ignore_errors=True)
        for name in ("settings.json", "lock"):
            with suppress(FileNotFoundError):
                (self.part / name).unlink()
        old = self.part.with_suffix(".old")
        try:
            if self.path.is_dir():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(self.path, old)
            os.replace(self.part, self.path)
        except OSError as error:
            raise DistrifusionError(f"output {str(self.path)!r} could not be written: {error}") from error
        shutil.rmtree(old, ignore_errors=True)
        self._unlock()

    def discard(self) -> None:
        """Leave no trace, if this run has made the hidden folder and nothing is done yet."""
        if not self.has_results():
            self._remove_if_new()
        self._unlock()

    def has_results(self) -> bool:
        """Whether the hidden folder holds anything that another run could go on from."""
        return any(self.part.glob("results/*/*.json")) or any(self.part.glob("references/*/*.npz"))

    def _remove_if_new(self) -> None:
        if self._is_new:
            shutil.rmtree(self.part, ignore_errors=True)

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _take_over(self, found: dict[str, Any]) -> None:
        shutil.copytree(self.path / "pictures", self.part / "pictures", dirs_exist_ok=True)
        for facts in found["cases"]:
            for result in facts["results"]:
                self.store.put_numbers(case_of(facts), result["index"], result)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} is not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{str(path)!r} holds {type(found).__name__} where an object should be")
    return found


def _check_same(found: dict[str, Any], settings: dict[str, Any], where: str) -> None:
    for name, value in settings.items():
        if found.get(name) != value:
            said = "others" if isinstance(value, list) else f"{found.get(name)!r}, not {value!r}"
            raise ConfigError(
                f"{where} holds results of {name} {said}: give the same, name another output, or --force to start anew"
            )
