"""deploy/fill.py: what it fills in, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.fill import fill

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
FORMS = ("*/*.conf", "*/*.cfg", "*/*.yaml")
TEMPLATES = sorted(path for form in FORMS for path in DEPLOY.glob(form) if re.search("@[A-Z]+@", path.read_text()))


def test_fills_every_place() -> None:
    assert (
        fill("a @A@ b @B@ @A@ @c@", {"A": "http://x:1/[::1]", "B": "/srv/a-b_c.d~"})
        == "a http://x:1/[::1] b /srv/a-b_c.d~ http://x:1/[::1] @c@"
    )


@pytest.mark.parametrize(
    ("values", "complaint"),
    [({}, "A is missing"), ({"A": "1", "B": "2"}, "there is no B"), ({"A": "a b"}, "A may have"), ({"A": ""}, "A may have"),
     ({"A": '1";'}, "A may have"), ({"A": "$x"}, "A may have"), ({"A": "1\n"}, "A may have"), ({"A": "@B@"}, "A may have")],
)  # fmt: skip
def test_refuses(values: dict[str, str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        fill("@A@", values)


def test_templates_name_at_their_top_what_they_want() -> None:
    assert len(TEMPLATES) >= 4
    for template in TEMPLATES:
        head = "".join(line for line in template.read_text().splitlines(keepends=True)[:30] if line.startswith("#"))
        assert set(re.findall("@[A-Z]+@", head)) == set(re.findall("@[A-Z]+@", template.read_text())), template


def test_from_the_command_line(tmp_path: Path) -> None:
    template = tmp_path / "x.conf"
    template.write_text("listen @LISTEN@;\n")
    for arguments, code, out in (
        ([str(template), "LISTEN=127.0.0.1:1"], 0, "listen 127.0.0.1:1;\n"), ([str(template)], 1, ""), ([str(tmp_path / "none")], 1, ""),
        ([str(template), "LISTEN"], 1, ""), ([], 1, ""),
    ):  # fmt: skip
        done = subprocess.run([sys.executable, str(DEPLOY / "fill.py"), *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (code, out)
        assert "Traceback" not in done.stderr
