"""The tool that runs the commands of README and docs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from library.options.toml_file import PROJECT_ROOT

sys.path.insert(0, str(PROJECT_ROOT / "tools"))

from run_docs import PAGES, STOPPED, Sandbox, commands_of


def test_commands_are_those_of_the_blocks_each_on_one_line() -> None:
    page = """Some `python x.py` in a sentence.

```
python train_network.py --max_train_steps 20   # tiny base
python generate.py --prompt "a # b" \\
    --images 4
outputs/mine/mine.safetensors
```

```toml
python = "no command"
```
"""
    assert list(commands_of(page)) == [
        "python train_network.py --max_train_steps 20",
        "python generate.py --prompt 'a # b' --images 4",
    ]


def test_every_page_of_commands_is_run() -> None:
    pages = [PROJECT_ROOT / "README.md", *(PROJECT_ROOT / "docs").glob("*.md")]
    with_commands = {page for page in pages if list(commands_of(page.read_text(encoding="utf-8")))}
    long = {PROJECT_ROOT / "docs" / "does_alignment_help.md"}  # hours: its own page says how many
    assert with_commands - long <= {PROJECT_ROOT / page for page in PAGES}


def test_every_link_of_the_pages_resolves() -> None:
    """Files, pictures, and headings by the anchors that GitHub gives them."""
    pages = [
        PROJECT_ROOT / "README.md",
        PROJECT_ROOT / "benchmarks" / "README.md",
        *(PROJECT_ROOT / "docs").glob("*.md"),
    ]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
        if not link.startswith("https://")
    ]
    assert len(links) > 50
    assert not [f"{page.name}: {link}" for page, link in links if not _resolves(page, link)]


def _resolves(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    if not anchor or not target.exists():
        return target.exists()
    headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
    return anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("command", "passed", "said"),
    [
        ("true", True, "ok "),
        ("sh -c 'echo no such thing; exit 2'", False, "no such thing"),
        (f"{sys.executable} -c 'import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: raise SystemExit({STOPPED})'",
         True, "stopped "),
        ("sleep 600", False, "FAILED"),
        ("python optimize.py --storage postgresql://x", True, "needs a PostgreSQL server"),
    ],
)  # fmt: skip
def test_what_counts_as_having_run(
    tmp_path: Path, command: str, passed: bool, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Sandbox.__new__(Sandbox)
    place.root, place.environment = tmp_path, {}
    assert place.try_command("page: command", command, 0.5) is passed
    assert said in capsys.readouterr().out
