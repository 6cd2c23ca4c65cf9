"""Reading what an S3 store wrote: strict, and safe against what XML allows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.model import PartSeen
from broker.stores import s3_documents as documents

MD5 = "69a41dff505e8c36b0373e700e2c875d"
NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


def listing(*parts: str, truncated: str = "false", namespace: str = f' xmlns="{NAMESPACE}"') -> bytes:
    body = "".join(f"<Part>{part}</Part>" for part in parts)
    return f'<?xml version="1.0"?><ListPartsResult{namespace}><IsTruncated>{truncated}</IsTruncated>{body}</ListPartsResult>'.encode()


def part(number: object = 1, size: object = 5, etag: str = f"&quot;{MD5}&quot;") -> str:
    return f"<PartNumber>{number}</PartNumber><Size>{size}</Size><ETag>{etag}</ETag>"


@pytest.mark.parametrize("namespace", ["", f' xmlns="{NAMESPACE}"', ' xmlns="http://doc.s3.amazonaws.com/2006-03-01"'])
def test_parts_page(namespace: str) -> None:
    page = documents.parts_page(listing(part(1), part(7, 0), truncated="true", namespace=namespace))
    assert page.parts == (PartSeen(1, 5, {"md5": MD5}, f'"{MD5}"'), PartSeen(7, 0, {"md5": MD5}, f'"{MD5}"'))
    assert page.last == 7
    assert documents.parts_page(listing(part())).last is None
    assert documents.parts_page(listing(truncated="true")).last is None


def test_an_etag_that_is_no_md5_gives_no_digest() -> None:
    (seen,) = documents.parts_page(listing(part(etag="opaque"))).parts
    assert seen.digests == {}
    assert seen.etag == "opaque"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<",
        b"\xff\xfe",
        b"<html></html>",
        b"<Error><Code>NoSuchUpload</Code></Error>",
        listing(part(0)),
        listing(part(1, -1)),
        listing(part("x")),
        listing(part(etag="")),
        listing("<PartNumber>1</PartNumber>"),
        b'<!DOCTYPE ListPartsResult [<!ENTITY a "b">]>' + listing(part(etag="&a;")),
        b'<!DOCTYPE r SYSTEM "http://192.0.2.1/x">' + listing(part()),
        listing(part(etag="&undefined;")),
        '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE r [<!ENTITY a "b">]><ListPartsResult/>'.encode("utf-16"),
    ],
)
def test_bad_listings(body: bytes) -> None:
    with pytest.raises(documents.BadDocument):
        documents.parts_page(body)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_cleanly(body: bytes) -> None:
    with pytest.raises(documents.BadDocument):
        documents.upload_id(body)
    assert documents.error_code(body) == ""


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"<Error><Code>NoSuchUpload</Code><Message>m</Message></Error>", "NoSuchUpload"),
        (b"<Error><Code>a b; drop</Code></Error>", ""),
        (b"<Error></Error>", ""),
        (b"<Other><Code>X</Code></Other>", ""),
    ],
)
def test_error_code(body: bytes, code: str) -> None:
    assert documents.error_code(body) == code


@pytest.mark.parametrize("root", ["InitiateMultipartUploadResult", "InitiateMultipartUpload"])
def test_upload_id(root: str) -> None:
    assert documents.upload_id(f"<{root}><UploadId>a-1</UploadId></{root}>".encode()) == "a-1"


@pytest.mark.parametrize(
    ("etag", "md5"),
    [(f'"{MD5}"', MD5), (MD5, MD5), (f'"{MD5}-2"', None), (None, None), ('""', None), (f'"{MD5[:-1]}"', None), (MD5.upper(), None)],
)
def test_md5_of_etag(etag: str | None, md5: str | None) -> None:
    assert documents.md5_of_etag(etag) == md5


def test_complete_request_names_each_part_once_and_escapes() -> None:
    body = documents.complete_request([PartSeen(1, 5, {}, '"<&>"'), PartSeen(2, 5, {"md5": MD5})])
    root = documents.parse(body, "CompleteMultipartUpload")
    assert [element.text for element in root.iterfind("{*}Part/{*}PartNumber")] == ["1", "2"]
    assert [element.text for element in root.iterfind("{*}Part/{*}ETag")] == ['"<&>"', f'"{MD5}"']
