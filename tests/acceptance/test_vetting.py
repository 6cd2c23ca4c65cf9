"""Who may boot what, at every door: tickets, redirects, Glance, DRS and Git LFS; members and signatures with OpenStack's own clients.

One broker where public images need approval and a signature is asked for nowhere; a SeaweedFS that is trusted with tokens.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import glanceclient  # type: ignore[import-untyped]
import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from glanceclient import exc

from broker.cli.main import main
from broker.client.signature import PROPERTIES
from broker.model import Role
from tests.parts.broker import PROJECT, Api
from tests.parts.cluster import Brokers, brokers_on, ok, put, register, s3_store, send
from tests.parts.postgres import Postgres
from tests.parts.process import find_program
from tests.parts.seaweedfs import S3Part

SETTINGS = '[policy.vetting]\nvisibilities = ["public"]\n'
CONTENT = random.Random(16).randbytes(300_000)


@dataclass(frozen=True)
class House:
    brokers: Brokers
    place: Path

    @property
    def url(self) -> str:
        return self.brokers.running[0].url

    def glance(self, role: Role = Role.MEMBER, project: str = PROJECT) -> Any:
        return glanceclient.Client("2", endpoint=self.url, token=self.brokers.token(role, project))

    def upload(self, content: bytes = CONTENT, **image: Any) -> str:
        """A new image of the project with its bytes at the store; its id."""

        async def bring() -> str:
            async with aiohttp.ClientSession() as session:
                done = await put(self.brokers.api(session), session, content, "weed", image={"name": "image", **image}, format="raw")
                return str(done["image"])

        return asyncio.run(bring())

    def broker(self, *arguments: str, role: Role = Role.MEMBER, project: str = PROJECT) -> Result:
        """The command `broker` in this process."""
        told = {"BROKER_URL": self.url, "BROKER_TOKEN": self.brokers.token(role, project), "XDG_STATE_HOME": str(self.place)}
        return CliRunner().invoke(main, list(arguments), env=told)


@pytest.fixture(scope="module")
def house(postgres: Postgres, seaweedfs: S3Part, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    place = tmp_path_factory.mktemp("vetting")
    with contextlib.ExitStack() as stack:
        brokers = stack.enter_context(brokers_on(postgres.create(), place, 1, settings=SETTINGS))
        weed = s3_store(brokers, seaweedfs)
        weed["settings"]["tokens"] = "trusted"
        asyncio.run(register(brokers, weed))
        yield House(brokers, place)


async def doors(api: Api, image: str, blob: str) -> dict[str, int]:
    """Every way to the bytes of an image, or to what leads there, and how each answers."""
    drs = "/ga4gh/drs/v1/objects"
    asked = {"operation": "download"}
    batch = ok(await api.post("/v1/tickets:batch", {"tickets": [{**asked, "image": image}, {**asked, "blob": blob}]}))["tickets"]
    found = {
        "ticket by image": (await api.post("/v1/tickets", {**asked, "image": image})).status,
        "ticket by blob": (await api.post("/v1/tickets", {**asked, "blob": blob})).status,
        "batch by image": batch[0].get("status", 201),
        "batch by blob": batch[1].get("status", 201),
        "explain": (await api.post("/v1/tickets:explain", {**asked, "image": image})).status,
        "content": (await api.get(f"/v1/images/{image}/content")).status,
        "blob": (await api.get(f"/v1/blobs/{blob}")).status,
        "replicas": (await api.get(f"/v1/blobs/{blob}/replicas")).status,
        "glance": (await api.get(f"/v2/images/{image}/file")).status,
        "drs by image": (await api.get(f"{drs}/{image}")).status,
        "drs by blob": (await api.get(f"{drs}/{blob}")).status,
        "another image of the blob": (await api.post("/v1/images", {"name": "copy", "blobs": {"raw": blob}})).status,
    }
    return {name: status // 100 for name, status in found.items()}


async def test_what_is_not_approved_is_behind_every_door(house: House) -> None:
    async with aiohttp.ClientSession() as session:
        owner, other = house.brokers.api(session), house.brokers.api(session, project="other")
        service, admin = (house.brokers.api(session, role, project="ops") for role in (Role.SERVICE, Role.ADMIN))
        done = await put(owner, session, CONTENT + b"doors", "weed", image={"name": "doors", "visibility": "public"}, format="raw")
        image, blob = done["image"], done["blob"]["id"]

        async def decide(decision: str) -> None:
            etag = (await admin.get(f"/v1/images/{image}")).etag
            body = {"decision": decision, "reason": "a test"}
            ok(await admin.send("PUT", f"/v1/images/{image}/vetting", body, headers={"If-Match": etag}))

        async def deactivate() -> None:
            etag = (await admin.get(f"/v1/images/{image}")).etag
            ok(await admin.patch(f"/v1/images/{image}", {"status": "deactivated"}, etag))

        async def closed() -> None:
            for asker in (owner, other, service):
                found = await doors(asker, image, blob)
                assert set(found.values()) == {4}, found

        assert ok(await owner.get(f"/v1/images/{image}"))["status"] == "pending"
        assert ok(await owner.get(f"/v2/images/{image}"))["status"] == "deactivated"
        for dialect in ("/v1", "/v2"):
            assert (await other.get(f"{dialect}/images/{image}")).status == 404
            assert image not in str((await other.get(f"{dialect}/images")).body)
        await closed()
        await decide("rejected")
        await closed()
        await decide("approved")
        for asker in (owner, other, service):
            assert set((await doors(asker, image, blob)).values()) <= {2, 3}
        # the copies that were just made are private images through which each may read the blob: gone with them
        for asker in (owner, other, service):
            for each in ok(await asker.get("/v1/images?name=copy"))["images"]:
                await asker.delete(f"/v1/images/{each['id']}", "*")
        await deactivate()
        await closed()
        open_for_admin = await doors(admin, image, blob)
        assert set(open_for_admin.values()) <= {2, 3}, open_for_admin


async def test_objects_of_git_lfs_are_behind_that_door_too(house: House) -> None:
    content = CONTENT + b"lfs"
    wish = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
    path = f"/lfs/{PROJECT}/repository/objects"
    lfs = {"Accept": "application/vnd.git-lfs+json", "Content-Type": "application/vnd.git-lfs+json"}
    async with aiohttp.ClientSession() as session:
        owner, admin = house.brokers.api(session), house.brokers.api(session, Role.ADMIN, project="ops")

        async def batch(operation: str) -> Any:
            body = {"operation": operation, "transfers": ["basic"], "objects": [wish], "hash_algo": "sha256"}
            (told,) = ok(await owner.send("POST", f"{path}/batch", body, headers=lfs))["objects"]
            return told

        upload = (await batch("upload"))["actions"]["upload"]
        assert await send(session, {"url": upload["href"], "headers": upload.get("header", {})}, content) in (200, 201)
        ok(await owner.send("POST", f"{path}/verify", wish, headers=lfs))
        assert "download" in (await batch("download"))["actions"]
        (image,) = [
            each for each in ok(await owner.get("/v1/images"))["images"]
            if any(held["digests"].get("sha256") == wish["oid"] for held in each["blobs"].values())
        ]  # fmt: skip
        ok(await admin.patch(f"/v1/images/{image['id']}", {"status": "deactivated"}, (await admin.get(f"/v1/images/{image['id']}")).etag))
        refused = await batch("download")
        assert refused["error"]["code"] == 403, refused
        assert "actions" not in refused


# -- python-glanceclient and openstack


def test_members_with_glanceclient(house: House) -> None:
    owner, friend, stranger = house.glance(), house.glance(project="friend"), house.glance(project="stranger")
    id = house.upload(CONTENT + b"members", visibility="shared")
    made = owner.image_members.create(id, "friend")
    assert (made.member_id, made.image_id, made.status, made["schema"]) == ("friend", id, "pending", "/v2/schemas/member")
    with pytest.raises(exc.HTTPConflict):
        owner.image_members.create(id, "friend")
    # the member reads at once, and lists when it has accepted
    assert friend.images.get(id).visibility == "shared"
    assert b"".join(friend.images.data(id).wrapped) == CONTENT + b"members"
    assert [image.id for image in friend.images.list(filters={"visibility": "shared"})] == []
    waiting = friend.images.list(filters={"visibility": "shared", "member_status": "pending"})
    assert [image.id for image in waiting] == [id]
    with pytest.raises(exc.HTTPForbidden, match="Only a member itself"):
        owner.image_members.update(id, "friend", "accepted")
    with pytest.raises(exc.HTTPBadRequest):
        friend.image_members.update(id, "friend", "maybe")
    assert friend.image_members.update(id, "friend", "accepted").status == "accepted"
    assert [image.id for image in friend.images.list(filters={"visibility": "shared"})] == [id]
    assert [member.status for member in owner.image_members.list(id)] == ["accepted"]
    # nobody else learns that there is anything
    for ask in (stranger.images.get, stranger.images.data, lambda id: list(stranger.image_members.list(id))):
        with pytest.raises(exc.HTTPNotFound):
            ask(id)
    with pytest.raises(exc.HTTPNotFound):
        owner.image_members.get(id, "stranger")
    with pytest.raises(exc.HTTPForbidden):
        friend.image_members.delete(id, "friend")
    private = house.upload(CONTENT + b"private")
    with pytest.raises(exc.HTTPForbidden, match="Only shared images have members"):
        owner.image_members.create(private, "friend")
    owner.image_members.delete(id, "friend")
    with pytest.raises(exc.HTTPNotFound):
        friend.images.get(id)


def test_members_from_the_command_lines(house: House) -> None:
    id = house.upload(CONTENT + b"commands", visibility="shared")

    def run(*command: str) -> str:
        token = house.brokers.token()
        told = {"OS_AUTH_TOKEN": token, "OS_IMAGE_URL": house.url}
        if command[0] == "openstack":
            told = {"OS_AUTH_TYPE": "admin_token", "OS_TOKEN": token, "OS_ENDPOINT": house.url, "OS_IMAGE_ENDPOINT_OVERRIDE": house.url}
        program = find_program(command[0], "pip install -e '.[test]'")
        environment = {**os.environ, **told, "PYTHONWARNINGS": "ignore"}
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=120, check=False, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    friend = str(uuid4())
    assert friend in run("glance", "member-create", id, friend)
    listed = run("openstack", "image", "member", "list", "-f", "value", id)
    assert listed.split() == [id, friend, "pending"]
    shown = house.broker("image", "accept", id, friend, project=friend)
    assert shown.exit_code == 0, shown.output
    shown = house.broker("image", "members", id)
    assert friend in shown.output
    assert "accepted" in shown.output


# -- signatures

KEY = rsa.generate_private_key(65537, 2048)
SIGNER = str(uuid4())

NOVA = """
import os, sys
from nova import monkey_patch
url, ids, *pairs = sys.argv[1:]
sys.argv = sys.argv[:1]
monkey_patch.patch(backend="threading")
import castellan.common.objects.x_509
import castellan.key_manager
certificates = dict(pair.split("=", 1) for pair in pairs)

class Manager:
    def __init__(self, *_): pass
    def get(self, context, id):
        with open(certificates[id], "rb") as file:
            return castellan.common.objects.x_509.X509(file.read())

castellan.key_manager.API = Manager
from nova import context, objects
objects.register_all()
from nova.conf import CONF
from nova.image import glance
CONF([], project="nova", default_config_files=[])
CONF.set_override("api_servers", [url], group="glance")
CONF.set_override("verify_glance_signatures", True, group="glance")
who = context.RequestContext("alice", "demo", auth_token=os.environ["TOKEN"])
for id in ids.split(","):
    try:
        glance.GlanceImageServiceV2().download(who, id, dst_path=os.environ["TARGET"])
        print(id, "booted")
    except Exception as error:
        print(id, type(error).__name__)
"""


def certificate(key: Any, encoding: Encoding) -> bytes:
    now, name = datetime.now(UTC), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "images")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).serial_number(1).public_key(key.public_key())
    times = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=9))
    return times.sign(KEY, hashes.SHA256()).public_bytes(encoding)


def signature_of(content: bytes) -> dict[str, str]:
    value = KEY.sign(content, padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.MAX_LENGTH), hashes.SHA256())
    return dict(zip(PROPERTIES, (base64.b64encode(value).decode(), "SHA-256", "RSA-PSS", SIGNER), strict=True))


def test_signatures_are_checked_by_us_and_by_nova_alike(house: House, tmp_path: Path) -> None:
    (tmp_path / "signers").mkdir()
    (tmp_path / "signers" / f"{SIGNER}.pem").write_bytes(certificate(KEY, Encoding.PEM))
    (tmp_path / "signer.der").write_bytes(certificate(KEY, Encoding.DER))
    content = CONTENT + b"signed"
    good = house.upload(content, properties=signature_of(content))
    bad = house.upload(content + b"!", properties=signature_of(content))
    directory = str(tmp_path / "signers")

    said = house.broker("image", "verify", good, "--certificate-dir", directory, "--quiet")
    assert said.exit_code == 0, said.output
    assert "valid" in said.output
    assert "CN=images" in said.output
    said = house.broker("image", "verify", bad, "--certificate-dir", directory, "--tell", "--quiet", role=Role.ADMIN)
    assert said.exit_code == 5, said.output
    assert "does not fit the bytes" in said.output
    said = house.broker("image", "vetting", bad, "--json")
    assert '"outcome":"invalid"' in said.output
    # what cannot be judged gets no verdict
    (tmp_path / "none").mkdir()
    said = house.broker("image", "verify", good, "--certificate-dir", str(tmp_path / "none"), "--quiet")
    assert (said.exit_code, "no certificate" in said.output) == (1, True), said.output
    said = house.broker("image", "verify", house.upload(CONTENT + b"plain"), "--certificate-dir", directory, "--quiet")
    assert (said.exit_code, "has no signature" in said.output) == (1, True), said.output
    said = house.broker("image", "verify", good, "--certificate-dir", directory, "--tell", "--quiet")
    assert said.exit_code == 3, said.output
    # what waits for approval is fetched by administrators alone
    waiting = house.upload(content + b"?", properties=signature_of(content + b"?"), visibility="public")
    for role, code in ((Role.SERVICE, 3), (Role.ADMIN, 0)):
        said = house.broker("image", "verify", waiting, "--certificate-dir", directory, "--tell", "--quiet", role=role)
        assert said.exit_code == code, said.output

    environment = {**os.environ, "TOKEN": house.brokers.token(), "TARGET": str(tmp_path / "image"), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", NOVA, house.url, f"{bad},{good}", f"{SIGNER}={tmp_path / 'signer.der'}"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.split() == [bad, "InvalidSignature", good, "booted"], done.stdout + done.stderr
    assert (tmp_path / "image").read_bytes() == content


def test_glance_has_its_own_words_for_approval(house: House) -> None:
    id = house.upload(CONTENT + b"reactivated", visibility="public")
    owner, admin = house.glance(), house.glance(Role.ADMIN, "ops")
    assert owner.images.get(id).status == "deactivated"
    with pytest.raises(exc.HTTPForbidden, match="waits for an administrator's approval"):
        owner.images.data(id)
    with pytest.raises(exc.HTTPForbidden):
        owner.images.reactivate(id)
    admin.images.reactivate(id)
    other = house.glance(project="other")
    assert (owner.images.get(id).status, other.images.get(id).status) == ("active", "active")
    owner.images.update(id, kernel_id=str(uuid4()))
    assert owner.images.get(id).status == "deactivated"
    admin.images.deactivate(id)
    with pytest.raises(exc.HTTPForbidden, match="has rejected"):
        owner.images.data(id)
    with pytest.raises(exc.HTTPNotFound):
        other.images.get(id)


def test_an_image_is_proposed_and_approved_from_the_command_line(house: House) -> None:
    id = house.upload(CONTENT + b"proposed", name="proposed", visibility="public")
    assert id in house.broker("image", "pending", role=Role.ADMIN).output
    refused = house.broker("image", "approve", id)
    assert (refused.exit_code, "Not allowed" in refused.output) == (3, True), refused.output
    shown = house.broker("show", id)  # its project sees the image, and not where the bytes are
    assert (shown.exit_code, "pending" in shown.output) == (0, True), shown.output
    rejected = house.broker("image", "reject", id, "--reason", "who are you?", role=Role.ADMIN)
    assert rejected.exit_code == 0, rejected.output
    assert "who are you?" in house.broker("image", "vetting", id).output
    approved = house.broker("image", "approve", "proposed", role=Role.ADMIN)
    assert approved.exit_code == 0, approved.output
    assert house.broker("image", "pending", role=Role.ADMIN).output.count(id) == 0
    assert house.glance(project="other").images.get(id).status == "active"
    protected = house.broker("image", "set", id, "--protected", "--tag", "b", "--tag", "a", "--min-disk", "3")
    assert protected.exit_code == 0, protected.output
    assert house.broker("image", "delete", id).exit_code == 3
    with pytest.raises(exc.HTTPForbidden, match="protected"):
        house.glance().images.delete(id)
    image = house.glance().images.get(id)
    assert (image.protected, sorted(image.tags), image.min_disk) == (True, ["a", "b"], 3)
