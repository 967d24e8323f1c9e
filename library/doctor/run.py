"""doctor.py's work for every script that asks for it: examine, write the page, say what was found."""

from __future__ import annotations

from library.errors import EXIT_FAILED, EXIT_OK
from library.files import require_writable
from library.options.doctor import DoctorOptions
from library.options.run import RunOptions
from library.progress import doing


def look(options: RunOptions, doctor: DoctorOptions) -> int:
    """Write the page and the findings and print them. The exit code is 1 where something spoils the training.

    Raises UserError where the datasets cannot be read or the page cannot be written.
    """
    require_writable(doctor.page.parent)
    from library.doctor.examine import examine
    from library.doctor.findings import spoiled
    from library.doctor.page import lines, verdict, write_report

    examination = examine(options, doctor)
    with doing("writing the page"):
        beside = write_report(examination, doctor.page)
    for line in [*lines(examination), *map(noted, examination.notes), verdict(examination)]:
        print(line)
    print(f"page      {doctor.page}\nfindings  {beside}")
    return EXIT_FAILED if spoiled(examination.findings) else EXIT_OK


def report_before(options: RunOptions) -> int:
    """--dry_run --report of a training script: its page lies where the run's files will."""
    return look(options, DoctorOptions(page=options.output.output_dir / "doctor.html"))


def noted(note: str) -> str:
    return note if note.startswith("warning: ") else f"note: {note}"
