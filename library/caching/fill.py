"""Stores brought to where every picture has its entry: surveyed, locked, built, surveyed again, marked complete."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from library.caching.decoding import Importer
from library.caching.geometry import Geometry
from library.caching.pipeline import BuildResult, PixelEncoder, build
from library.caching.survey import Survey, Target, survey
from library.data.sources import ImageSource, Sample
from library.data.store import lock_store
from library.data.store_writer import mark, purge
from library.errors import UserError
from library.files import disk_of, require_space, write_text
from library.processes import Processes
from library.words import plural

Say = Callable[..., None]
Reason = tuple[str, int]


class Filling:
    """Fills stores from the pictures of one source, all of them cut by one geometry.

    label: how to call these pictures. Every process of a run goes through the same calls.
    """

    def __init__(
        self,
        label: str,
        source: ImageSource,
        geometry: Geometry,
        processes: Processes,
        *,
        batch_size: int,
        workers: int,
        say: Say,
        importer: Importer | None = None,
    ) -> None:
        self.label, self.source, self.geometry, self.processes = label, source, geometry, processes
        self.batch_size, self.workers, self.say, self.importer = batch_size, workers, say, importer

    def survey(self, targets: Mapping[str, Target], *, lock: bool = True) -> dict[str, Survey]:
        """State of each store. lock: False where this run holds the stores' locks itself."""
        return {name: survey(target, self.source, self.geometry, lock=lock) for name, target in targets.items()}

    def fill(self, states: dict[str, Survey], encoder: Callable[[str], PixelEncoder]) -> dict[str, Survey]:
        """Make what is missing; the states after it.

        encoder: gives the encoder of a store, and is asked only where a store has work.
        Raises UserError where a store is in use, the disk too small, or pictures changed while they were read.
        """
        self.processes.wait()
        todo = {name: state for name, state in states.items() if not state.complete}
        if todo:
            with locked([state.path for state in todo.values()], self.processes):
                self._announce(states)
                check_space(todo.values())
                self._build({name: state for name, state in todo.items() if state.work}, encoder)
                done = self.survey({name: state.target for name, state in todo.items()}, lock=False)
                self._finish(done.values())
            self.processes.wait()
            states = states | done
        return states

    def _announce(self, states: dict[str, Survey]) -> None:
        """A line per kind of store: what is there and what is not."""
        for state in states.values():
            if state.differences:
                self.say(f"{state.path} was made differently ({'; '.join(state.differences)}): rebuilding it.")
        for kind in dict.fromkeys(state.wanted.kind for state in states.values()):
            alike = [state for state in states.values() if state.wanted.kind == kind]
            counts = {
                "missing": sum(len(state.missing) for state in alike),
                "outdated": sum(len(state.stale) for state in alike),
                "touched": sum(len(state.doubtful) for state in alike),
            }
            words = [f"{count} {word}" for word, count in counts.items() if count]
            if words:
                present = sum(state.present for state in alike)
                total = sum(len(state.target.samples) for state in alike)
                self.say(f"{self.label} {_names(alike)}: {present} of {total} present, {', '.join(words)}")

    def _build(self, work: dict[str, Survey], encoder: Callable[[str], PixelEncoder]) -> None:
        result = build(
            work,
            self.source,
            {name: encoder(name) for name in work},
            geometry=self.geometry,
            batch_size=self.batch_size,
            workers=self.workers,
            device=self.processes.device,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            label=self.label,
            importer=self.importer,
        )
        self.processes.wait()
        counts = [result.encoded, result.unchanged, len(result.reasons), result.imported]
        summed = self.processes.sum(torch.tensor(counts, device=self.processes.device)).tolist()
        encoded, unchanged, unreadable, imported = summed
        if done := sum(summed):
            self.say(
                f"{self.label}: {encoded} encoded, {unchanged} unchanged, {unreadable} unreadable in {result.seconds:.1f} s "
                f"({done / max(result.seconds, 1e-3):.1f} images/s)"
            )
        self._tell_changed(result)
        if self.importer is not None:
            reasons = tally(self.processes.gather(result.not_imported))
            refused = f"; {_listed(reasons)}" if reasons else ""
            self.say(f"{self.label}: {imported} taken from kohya's .npz caches{refused}")

    def _tell_changed(self, result: BuildResult) -> None:
        if changed := self.processes.gather(result.changed):
            first = ", ".join(changed[:3])
            self.say(
                f"{self.label}: {plural(len(changed), 'picture')} changed since being cached, read again (first: {first})"
            )

    def _finish(self, states: Iterable[Survey]) -> None:
        """Mark the stores complete, once they are; take out what another producer left behind."""
        for state in states:
            if state.work:
                first = ", ".join(entry.sample.sample_id for entry in state.work[:3])
                raise UserError(
                    f"{plural(len(state.work), 'entry is', 'entries are')} still missing in {state.path} (first: {first}): files "
                    "changed while they were read. Run the same command again."
                )
        self.processes.wait()
        for state in states:
            if self.processes.is_main:
                # Where each picture is cut in its own way, entries of other runs fit their own pictures.
                if self.geometry.same_for_all:
                    purge(state.path, state.wanted.kind, state.wanted.fingerprint)
                mark(state.path, state.wanted.meta(complete=True))
            state.meta = state.wanted.meta(complete=True)
        self.processes.wait()


@contextmanager
def locked(stores: Iterable[Path], processes: Processes) -> Iterator[None]:
    """Within the context the main process holds the stores' exclusive locks for all."""
    locks = [lock_store(path, exclusive=True) for path in stores] if processes.is_main else []
    try:
        processes.wait()
        yield
    finally:
        for lock in locks:
            if lock is not None:
                lock.close()


def check_space(states: Iterable[Survey]) -> None:
    """Raise UserError where what is missing does not fit on the disks of the stores."""
    by_disk: dict[int, list[Survey]] = {}
    for state in states:
        by_disk.setdefault(disk_of(state.path), []).append(state)
    for together in by_disk.values():
        needed = sum(state.needed_bytes for state in together)
        require_space(together[0].path, needed, f"Building {_names(together)}")


def dropped_of(states: Iterable[Survey]) -> dict[str, str]:
    """Why pictures have no entry, by sample id."""
    return {sample_id: why for state in states for sample_id, why in state.unreadable.items()}


def list_dropped(
    path: Path, label: str, samples: Iterable[Sample], dropped: dict[str, str], processes: Processes, say: Say
) -> None:
    """Write which pictures could not be read, and why, to the table at `path`, and say so; nothing where there are none."""
    if dropped and processes.is_main:
        paths = {sample.sample_id: sample.path for sample in samples}
        lines = [f"{sample_id}\t{paths[sample_id]}\t{why}\n" for sample_id, why in dropped.items()]
        write_text(path, "sample_id\tpath\treason\n" + "".join(lines))
        say(f"{label}: {plural(len(dropped), 'unreadable picture is', 'unreadable pictures are')} listed in {path}")


def nothing_usable(where: str, seen: int, dropped: dict[str, str]) -> UserError:
    """For a run that has no picture left."""
    return UserError(f"No usable images in {where}: {seen} seen, {_listed(tally(dropped.values()))}.")


def tally(reasons: Iterable[str]) -> list[Reason]:
    """Reasons with their counts, the most frequent first."""
    # The part before any detail in brackets or after a colon groups them.
    return Counter(reason.split(":")[-1].split("(")[0].strip() for reason in reasons).most_common()


def _listed(reasons: list[Reason]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons)


def _names(states: list[Survey]) -> str:
    if len(states) <= 2:
        return " and ".join(state.path.name for state in states)
    return f"{len(states)} stores in {states[0].path.parent}"
