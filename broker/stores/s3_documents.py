"""The XML that S3 speaks: read strictly, written plainly (Amazon S3 API reference).

Rules: a document type declaration is refused, so no entity can be defined; names count without their namespace, since stores
differ in it; whatever is missing or malformed is `BadDocument`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote_plus
from xml.etree.ElementTree import Element, ParseError, SubElement, TreeBuilder, XMLParser, tostring

from broker.model import PartSeen

_MD5_ETAG = re.compile(r"[0-9a-f]{32}\Z")
_CODE = re.compile(r"[A-Za-z]{1,64}\Z")


class BadDocument(Exception):
    """Not the document that was asked for. The text names the element, never its content."""


@dataclass(frozen=True, slots=True)
class PartsPage:
    """One page of ListParts; `last` is the number to go on after, ``None`` on the last page."""

    parts: tuple[PartSeen, ...]
    last: int | None


@dataclass(frozen=True, slots=True)
class ObjectsPage:
    """One page of a bucket's objects; `next` is the token to go on with, ``None`` on the last page."""

    keys: tuple[str, ...]
    next: str | None


class _NoDoctype(TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise BadDocument("document type declaration")


def parse(body: bytes, *roots: str) -> Element:
    """The document's root element, which must have one of the names `roots`."""
    parser = XMLParser(target=_NoDoctype())
    try:
        parser.feed(body)
        element: Element = parser.close()
    except ParseError:
        raise BadDocument("no XML") from None
    if _local(element) not in roots:
        raise BadDocument(f"no {roots[0]}")
    return element


def error_code(body: bytes) -> str:
    """The code of an Error document, for instance ``NoSuchUpload``; empty when there is none."""
    try:
        code = parse(body, "Error").findtext("{*}Code", "")
    except BadDocument:
        return ""
    return code if _CODE.match(code) else ""


def upload_id(body: bytes) -> str:
    """The id in an InitiateMultipartUploadResult."""
    # The second is what rclone calls it.
    return _text(parse(body, "InitiateMultipartUploadResult", "InitiateMultipartUpload"), "UploadId")


def parts_page(body: bytes) -> PartsPage:
    """One page of a ListPartsResult. ETags are quoted MD5 digests of the parts on stores that say so; the caller knows which."""
    root = parse(body, "ListPartsResult")
    parts = tuple(_part(element) for element in root.iterfind("{*}Part"))
    truncated = root.findtext("{*}IsTruncated", "false") == "true"
    # Not NextPartNumberMarker: rclone gives the number of the first part that it left out.
    return PartsPage(parts, max(part.number for part in parts) if truncated and parts else None)


def open_uploads(body: bytes, key: str) -> list[str]:
    """The ids of the uploads at just `key` in a ListMultipartUploadsResult; others may begin with it."""
    found = parse(body, "ListMultipartUploadsResult").iterfind("{*}Upload")
    return [_text(element, "UploadId") for element in found if _text(element, "Key") == key]


def objects_page(body: bytes) -> ObjectsPage:
    """One page of a ListBucketResult (ListObjectsV2 with ``encoding-type=url``)."""
    root = parse(body, "ListBucketResult")
    encoded = root.findtext("{*}EncodingType") == "url"
    keys = (_text(element, "Key") for element in root.iterfind("{*}Contents"))
    truncated = root.findtext("{*}IsTruncated", "false") == "true"
    return ObjectsPage(
        tuple(unquote_plus(key) if encoded else key for key in keys), _text(root, "NextContinuationToken") if truncated else None
    )


def tagging(tags: Mapping[str, str]) -> bytes:
    """The body of PutObjectTagging."""
    root = Element("Tagging", xmlns="http://s3.amazonaws.com/doc/2006-03-01/")
    listed = SubElement(root, "TagSet")
    for name, value in tags.items():
        element = SubElement(listed, "Tag")
        SubElement(element, "Key").text = name
        SubElement(element, "Value").text = value
    document: bytes = tostring(root, encoding="utf-8", xml_declaration=True)
    return document


def tags(body: bytes) -> dict[str, str]:
    """The tags in a Tagging document."""
    found = parse(body, "Tagging").iterfind("{*}TagSet/{*}Tag")
    return {_text(element, "Key"): element.findtext("{*}Value", "") for element in found}


def md5_of_etag(etag: str | None) -> str | None:
    """The MD5 that an ETag may be: 32 hex digits. That of a multipart object ends in ``-N`` and is none."""
    bare = (etag or "").strip('"')
    return bare if _MD5_ETAG.match(bare) else None


def complete_request(parts: Sequence[PartSeen]) -> bytes:
    """The body of CompleteMultipartUpload."""
    root = Element("CompleteMultipartUpload", xmlns="http://s3.amazonaws.com/doc/2006-03-01/")
    for part in parts:
        element = SubElement(root, "Part")
        SubElement(element, "PartNumber").text = str(part.number)
        SubElement(element, "ETag").text = part.etag or f'"{part.digests["md5"]}"'
    document: bytes = tostring(root, encoding="utf-8", xml_declaration=True)
    return document


def _part(element: Element) -> PartSeen:
    etag = _text(element, "ETag")
    try:
        number, size = int(_text(element, "PartNumber")), int(_text(element, "Size"))
    except ValueError:
        raise BadDocument("a number in Part") from None
    if number < 1 or size < 0:
        raise BadDocument("a number in Part")
    md5 = md5_of_etag(etag)
    digests: Mapping[str, str] = {} if md5 is None else {"md5": md5}
    return PartSeen(number, size, digests, etag)


def _text(element: Element, name: str) -> str:
    text = element.findtext(f"{{*}}{name}")
    if not text:
        raise BadDocument(f"no {name}")
    return text


def _local(element: Element) -> str:
    return element.tag.rpartition("}")[2]
