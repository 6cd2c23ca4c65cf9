"""Content-Disposition for signed URLs: whatever the name, the field tells that name, and nothing else."""

from __future__ import annotations

import pytest
from aiohttp.multipart import content_disposition_filename, parse_content_disposition
from hypothesis import given
from hypothesis import strategies as st

from broker.sign.disposition import attachment


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("debian-12.qcow2", 'attachment; filename="debian-12.qcow2"'),
        ("my image (1).img", 'attachment; filename="my image (1).img"'),
        ("a;b=c,d", 'attachment; filename="a;b=c,d"'),
        ('a".html', "attachment; filename=\"a_.html\"; filename*=UTF-8''a%22.html"),
        ("a\\", "attachment; filename=\"a_\"; filename*=UTF-8''a%5C"),
        ("100%41.img", "attachment; filename=\"100_41.img\"; filename*=UTF-8''100%2541.img"),
        ("a\r\nSet-Cookie: b=c", "attachment; filename=\"a__Set-Cookie_ b=c\"; filename*=UTF-8''a%0D%0ASet-Cookie%3A%20b%3Dc"),
        ("образ.img", "attachment; filename=\"_____.img\"; filename*=UTF-8''%D0%BE%D0%B1%D1%80%D0%B0%D0%B7.img"),
    ],
)
def test_a_name_in_a_field(name: str, field: str) -> None:
    assert attachment(name) == field


@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40))
def test_any_name_is_told_and_nothing_else(name: str) -> None:
    field = attachment(name)
    assert field.isascii() and field.isprintable()
    kind, parameters = parse_content_disposition(field)
    assert kind == "attachment" and set(parameters) <= {"filename", "filename*"}
    # Where it has to, the reader takes both parameters for the same name (RFC 6266 section 4.3).
    assert (parameters.get("filename*") or content_disposition_filename(parameters)) == name
