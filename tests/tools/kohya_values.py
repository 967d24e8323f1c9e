"""What train_network.py does at 0, false and "" for each of kohya's options, and the table of it in docs/kohya_values.tsv.

`python -m tests.tools.kohya_values` writes the columns of this program anew; what kohya's script does there is read in its source.
"""

from __future__ import annotations

import contextlib
import csv
import io
import tempfile
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.options.network import TrainNetworkOptions, parse_network_options
from library.options.parser import flatten
from library.options.toml_file import PROJECT_ROOT

PAGE = PROJECT_ROOT / "docs" / "kohya_values.tsv"
VALUES = {"0": "0", "false": "false", "empty": '""'}
"""Name of a column -> how a file writes the value."""
BESIDE = {
    "learning_rate": "unet_lr = 1e-4\n",
    "lr_scheduler_min_lr_ratio": 'lr_scheduler = "cosine_with_min_lr"\n',
    "validation_seed": "validation_split = 0.5\n",
}
"""Options without which one would have no effect, whatever its value."""


def here(option: str, value: str) -> str:
    """off, default (which is something), 0, or refused, of a line `option = value` in a --config_file."""
    if option == "config_file":
        return "not read in a file"
    defaults = flatten(TrainNetworkOptions())
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        file = Path(folder) / "my.toml"
        file.write_text(f"{BESIDE.get(option, '')}{option} = {value}\n", encoding="utf-8")
        try:
            found = flatten(
                parse_network_options(["--config_file", str(file)], prog="train_network.py", description=None)
            )
        except UserError:
            return "refused"
    return effect(found.get(option), defaults.get(option))


def effect(value: Any, default: Any) -> str:
    if value is None or value is False or value in ("", []):
        return "off"
    if value == default and value != 0:
        return "default"
    return "0" if value in (0, [0.0]) else str(value)


def rows() -> list[dict[str, str]]:
    with PAGE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def write(table: list[dict[str, str]]) -> None:
    lines = ["\t".join(table[0]), *("\t".join(row.values()) for row in table)]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    table = rows()
    for row in table:
        row |= {f"here at {name}": here(row["option"], text) for name, text in VALUES.items()}
    write(table)
