"""Each key of a TOML or JSON text is found on its line."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from library.data.key_lines import key_lines
from library.options.toml_file import tomllib


def test_the_line_of_a_key_is_found_in_every_form_of_toml() -> None:
    text = '''a.b = 1
"quoted key" = "# no comment [not.a.table]"
text = """
fake = 1
"""
list = [
  1, # one
  { x = 1, y = [ { z = 2 } ] },
]
[t."u.v"]
when = 1979-05-27 07:32:00
[[d]]
k = 1
[[d.s]]
k = 1
[[d.s]]
k = 2
[d.s.table]
k = 3
[[d]]
[[d.s]]
k = 4
'''
    lines = key_lines(text)
    assert lines["a", "b"] == 1 and lines["quoted key",] == 2 and lines["text",] == 3 and ("fake",) not in lines
    assert lines["list",] == 6 and lines["list", 0] == 7 and lines["list", 1, "y", 0, "z"] == 8
    assert lines["t", "u.v", "when"] == 11 and lines["d", 0] == 12 and lines["d", 0, "k"] == 13
    assert (lines["d", 0, "s", 0, "k"], lines["d", 0, "s", 1, "k"]) == (15, 17)
    assert (lines["d", 0, "s", 1, "table", "k"], lines["d", 1], lines["d", 1, "s", 0, "k"]) == (19, 20, 22)


KEYS = st.text("abc.[]{}:,=# ", min_size=1, max_size=4)
SCALARS = st.booleans() | st.integers(0, 9) | st.floats(-9, 9) | st.text("ab\n#=[]{},:.", max_size=6)
TREES = st.dictionaries(
    KEYS,
    st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=10
    ),
    max_size=4,
)


def paths(value: Any, path: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    """The way to every value inside."""
    inner = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    return {(*path, key) for key, _ in inner}.union(*(paths(one, (*path, key)) for key, one in inner))


def inline(value: Any) -> str:
    """A value in TOML, tables inline."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {inline(one)}" for key, one in value.items()) + " }"
    return f"[\n{', '.join(map(inline, value))} ,]" if isinstance(value, list) and value else json.dumps(value)


@given(TREES)
def test_every_key_of_any_json_or_toml_has_a_line(content: dict[str, Any]) -> None:
    toml = "".join(f"\n{json.dumps(key)} = {inline(value)} # = [\n" for key, value in content.items())
    assert paths(tomllib.loads(toml)) == paths(content) == key_lines(toml).keys()
    for indent in (None, 1):
        assert key_lines(json.dumps(content, indent=indent), json_text=True).keys() == paths(content)
    spread = json.dumps(content, indent=1).splitlines()
    for path, line in key_lines(json.dumps(content, indent=1), json_text=True).items():
        assert isinstance(path[-1], int) or json.dumps(path[-1]) + ":" in spread[line - 1]
