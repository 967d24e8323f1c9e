"""What needs no torch does not import it: seconds of each start."""

from __future__ import annotations

import subprocess
import sys

from library.options.toml_file import PROJECT_ROOT

CODE = """
import importlib, sys

def check(what, *more):
    heavy = {"torch", "diffusers", "transformers", "peft", "accelerate", *more} & sys.modules.keys()
    if heavy:
        sys.exit(f"{what} imports {heavy}")

for name in ("options.network", "data.dataset_config", "data.training_images", "data.sources", "data.demo_pictures",
             "inference.prompt_syntax", "inference.infotext", "inference.grids", "inference.xy_grid",
             "inference.upscaling", "report.page"):
    importlib.import_module(f"library.{name}")
    check(name, "lmdb", "plotly")

from library.errors import UserError
from library.options.network import parse_network_options
try:
    sys.exit(parse_network_options(["--resume", "nowhere"], prog="x", description="") and "no error")
except UserError:
    check("the way to an error", "lmdb", "plotly")

from library.report.page import Page
page = Page("t")
page.table(["a"], [[1]])
page.html()
check("a page without figures", "lmdb", "plotly")

import evaluate
assert evaluate.main(["--checkpoint", ".", "--sampler", "none"]) == 2
check("a slip in evaluate.py")

import library.search.run.driver, library.search.space_file
check("the parent of a study")
"""


def test_what_needs_no_torch_does_not_import_it() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
