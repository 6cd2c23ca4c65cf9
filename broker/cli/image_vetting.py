"""`broker image …`: approval of images, and their signatures."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import click
from cryptography import x509

from broker.cli import exits
from broker.cli.connection import Connection, connected, image_named, print_json
from broker.cli.display import print_table, shown
from broker.client.answers import Document, Image
from broker.client.api import Broker
from broker.client.download import download
from broker.client.progress import Progress
from broker.client.signature import PROPERTIES, NotValid, Signature, check, signature_of
from broker.client.sources import Wanted
from broker.client.trouble import LocalTrouble, TransferFailed

_ENDINGS = (".pem", ".crt", ".der")


@click.command(short_help="List the images that wait for approval.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@connected
def pending(connection: Connection, as_json: bool) -> None:
    """List the images that wait for approval, as far as you may see them."""

    async def work(broker: Broker) -> list[Image]:
        return [image async for image in broker.images(status="pending")]

    found = exits.run(connection.ask(work))
    if as_json:
        print_json({"images": [image.document for image in found]})
        return
    rows = [(image.id, image.name, image.project, image.visibility, " ".join(image.blobs), image.document["updated_at"]) for image in found]
    print_table(("image", "name", "project", "visibility", "formats", "changed"), rows)


@click.command(short_help="Approve an image as it is now.")
@click.argument("image")
@connected
def approve(connection: Connection, image: str) -> None:
    """Approve IMAGE (a name or id) as it is now: from then on everyone who may see it gets tickets for it."""
    _decide(connection, image, "approved", "")


@click.command(short_help="Reject an image: it gives no tickets until approved.")
@click.argument("image")
@click.option("--reason", default="", help="Why; its project can read it.")
@connected
def reject(connection: Connection, image: str, reason: str) -> None:
    """Reject IMAGE (a name or id): only administrators get tickets for it, until one approves it."""
    _decide(connection, image, "rejected", reason)


def _decide(connection: Connection, name: str, decision: str, reason: str) -> None:
    async def work(broker: Broker) -> Document:
        image = await image_named(broker, name)
        return await broker.decide_vetting(image.id, decision, reason, image.etag or "")

    print_history(exits.run(connection.ask(work)))


@click.command(short_help="Show what was decided of an image.")
@click.argument("image")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@connected
def vetting(connection: Connection, image: str, as_json: bool) -> None:
    """Show whether IMAGE (a name or id) is approved, and what was decided of it."""

    async def work(broker: Broker) -> Document:
        return await broker.vetting((await image_named(broker, image)).id)

    answer = exits.run(connection.ask(work))
    if as_json:
        print_json(answer)
    else:
        print_history(answer)


def print_history(answer: Mapping[str, Any]) -> None:
    """What `broker image vetting` shows."""
    click.echo(answer["vetting"] or "needs no approval")
    if "obstacle" in answer:
        click.echo(f"cannot be approved: {answer['obstacle']}")
    if answer["history"]:
        rows = [
            (each["at"], each["outcome"], " ".join(each["blobs"]), each.get("subject", ""), each["detail"]) for each in answer["history"]
        ]
        print_table(("at", "outcome", "formats", "by", "detail"), rows)


class _Verdict(NamedTuple):
    format: str
    blob: str
    valid: bool
    detail: str


@click.command(short_help="Check the signature of an image.")
@click.argument("image")
@click.option(
    "--certificate-dir", "certificates", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Certificates that are trusted: UUID.pem, .crt or .der, named as the image names its signer's.",
)  # fmt: skip
@click.option("--tell", is_flag=True, help="Tell the broker the verdict; needs the role service or admin.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@connected
def verify(connection: Connection, image: str, certificates: Path, tell: bool, as_json: bool, quiet: bool) -> None:
    """Check the signature of IMAGE (a name or id): fetch its bytes by a ticket, in every format, and check its img_signature… properties.

    Ends with 5 when the signature does not hold. An image without one, or whose signer's certificate is not there, ends with 1 and no
    verdict. Needs as much space in TMPDIR as the image is large.
    """
    verdicts = exits.run(_verify(connection, image, certificates, tell, as_json or quiet))
    if as_json:
        print_json({"verdicts": [verdict._asdict() for verdict in verdicts]})
    else:
        print_table(("format", "signature", "detail"), [(v.format, "valid" if v.valid else "invalid", v.detail) for v in verdicts])
    if not all(verdict.valid for verdict in verdicts):
        raise SystemExit(exits.WRONG_BYTES)


async def _verify(connection: Connection, name: str, certificates: Path, tell: bool, quiet: bool) -> list[_Verdict]:
    async with connection.open() as broker:
        image = await image_named(broker, name)
        properties: Mapping[str, str] = image.document["properties"]
        blobs = {format: blob for format, blob in sorted(image.blobs.items()) if blob.state == "active"}
        if not blobs:
            raise LocalTrouble("the image has no bytes yet")
        verdicts = []
        for format, blob in blobs.items():
            try:
                signature = signature_of(properties)
                if signature is None:
                    raise LocalTrouble("the image has no signature", f"its properties would be {', '.join(PROPERTIES)}")
                signer = _certificate(certificates, signature.certificate)
                check(signature, await _digest(broker, image, format, signature, quiet), signer, datetime.now(UTC))
                verdict = _Verdict(format, str(blob.id), True, f"signed by {signer.subject.rfc4514_string()}")
            except NotValid as error:
                verdict = _Verdict(format, str(blob.id), False, str(error))
            verdicts.append(verdict)
            if tell:
                looked_at = {name: properties[name] for name in PROPERTIES if name in properties}
                await broker.tell_verdict(image.id, blob.id, verdict.valid, looked_at, verdict.detail)
        return verdicts


async def _digest(broker: Broker, image: Image, format: str, signature: Signature, quiet: bool) -> bytes:
    """The hash that was signed, of bytes that were fetched now."""
    with tempfile.TemporaryDirectory(prefix="broker-verify-") as directory:
        progress = Progress()
        async with shown(progress, f"fetch {image.name} ({format})", json=False, quiet=quiet):
            fetched = await download(broker, Wanted(image.id, formats=(format,)), Path(directory) / "blob", progress=progress)
        if fetched.blob.id != image.blobs[format].id:
            raise TransferFailed("the image was changed meanwhile", "run the same command again")
        return await asyncio.to_thread(_hashed, fetched.path, signature.algorithm)


def _hashed(path: Path, algorithm: str) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).digest()


def _certificate(directory: Path, id: str) -> x509.Certificate:
    """The certificate of that id, a UUID. Raises `LocalTrouble`."""
    path = next((path for ending in _ENDINGS if (path := directory / f"{id}{ending}").exists()), None)
    if path is None:
        raise LocalTrouble(f"no certificate {id} is in {directory}", "the image's signer is not among those that are trusted here")
    try:
        content = path.read_bytes()
        return x509.load_pem_x509_certificate(content) if content.startswith(b"-----") else x509.load_der_x509_certificate(content)
    except (OSError, ValueError):
        raise LocalTrouble(f"{path} is no certificate that can be read") from None


COMMANDS = (pending, approve, reject, vetting, verify)
