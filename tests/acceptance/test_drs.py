"""GA4GH DRS at real stores: the published compliance suite, two clients as PyPI has them, and bytes fetched by what an object says."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp.multipart import parse_content_disposition
from yarl import URL

from tests.parts.cluster import Cluster, ok, opened, put

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = Path(sys.prefix) / "drs-clients"
"""drs-compliance-suite 1.0.3, drs-cli 0.2.3 and Gen3's drsclient 0.3.2, on newer versions of what they ask for (deploy/test.sh)."""

SUITE = """
import json, sys, types
sys.modules["supported_drs_versions"] = versions = types.ModuleType("supported_drs_versions")
versions.SUPPORTED_DRS_VERSIONS = ["1.2.0"]  # the wheel asks for this module and does not bring it
from compliance_suite.report_runner import report_runner
print(report_runner(sys.argv[1], "transfer broker", "broker", "1.2.0", sys.argv[2]).to_json())
"""

ASK = """
import json, sys
from drs_cli.client import DRSClient
from drsclient.client import DrsClient
port, token, id, gone = sys.argv[1:]
client = DRSClient("http://127.0.0.1", port=int(port), token=token)
found = client.get_object(id)
urls = [client.get_access_url(found.id, method.access_id).url for method in found.access_methods]
gen3 = DrsClient(f"http://127.0.0.1:{port}", token=token)
same = gen3.get(id).json()
urls += [gen3.download(id, method["access_id"]).json()["url"] for method in same["access_methods"]]
errors = [client.get_object(gone).status_code, gen3.get(gone).status_code]
checksums = {each.type: each.checksum for each in found.checksums}
print(json.dumps({"checksums": checksums, "size": same["size"], "urls": urls, "errors": errors}))
"""

NEWER = "Additional properties are not allowed ('drs', 'maxBulkRequestLength' were unexpected)"
"""The suite checks with the schemas of DRS 1.2, in which service-info has no further fields; since 1.4 this one is required."""


def ran(program: str, *arguments: str) -> str:
    """What a program prints that uses the clients."""
    assert CLIENTS.is_dir(), "run deploy/test.sh, which fetches them"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(CLIENTS), "NO_PROXY": "127.0.0.1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def report(url: str, place: Path, token: str, ids: dict[str, bool]) -> list[dict[str, Any]]:
    """Every case of the suite's report, for the objects with these ids, and whether they are bundles."""
    who = {"auth_type": "bearer", "auth_token": token}
    config = {
        "service_info": {"auth_type": "none", "auth_token": ""},
        "drs_object_info": [{"drs_id": id, "is_bundle": is_bundle, **who} for id, is_bundle in ids.items()],
        "drs_object_access": [{"drs_id": id, **who} for id, is_bundle in ids.items() if not is_bundle],
    }
    file = place / "suite.json"
    file.write_text(json.dumps(config))
    phases = json.loads(ran(SUITE, url, str(file)))["phases"]
    return [{**case, "phase": phase["phase_name"]} for phase in phases for test in phase["tests"] for case in test["cases"]]


async def images(cluster: Cluster, session: aiohttp.ClientSession) -> tuple[dict[str, Any], dict[str, Any]]:
    """An image with one format at three stores, and one with two formats."""
    api = cluster.api(session)
    one = await put(api, session, os.urandom(70_000), "weed", "disk", "swift", image={"name": "reads, chr 1"}, format="raw")
    two = await put(api, session, os.urandom(80_000), "weed", image={"name": "both"}, format="raw")
    other = await put(api, session, os.urandom(90_000), "swift", image={"name": "other"}, format="qcow2")
    blobs = {"raw": two["blob"]["id"], "qcow2": other["blob"]["id"]}
    made = ok(await api.post("/v1/images", {"name": "both", "blobs": blobs}), 201)
    return one, made


def test_the_compliance_suite(cluster: Cluster, tmp_path: Path) -> None:
    async def prepare() -> tuple[dict[str, Any], dict[str, Any]]:
        async with aiohttp.ClientSession() as session:
            return await images(cluster, session)

    one, two = asyncio.run(prepare())
    ids = {one["blob"]["id"]: False, one["image"]: False, two["id"]: True}
    cases = report(f"{cluster.running[0].url}/ga4gh/drs/v1", tmp_path, cluster.token(), ids)
    failed = {(case["phase"], case["case_name"]): case["message"] for case in cases if case["status"] == "FAIL"}
    assert failed == {("service info", "Service Info response schema validation"): NEWER}
    passed = [case["phase"] for case in cases if case["status"] == "PASS"]
    # Five cases for each id (of a bundle one is the expanded one), three for each replica of both ids of the same bytes.
    assert {phase: passed.count(phase) for phase in passed} == {"service info": 2, "drs object info": 15, "drs object access": 18}


async def test_bytes_come_from_every_replica_that_an_object_names(cluster: Cluster) -> None:
    content = os.urandom(50_000)
    async with aiohttp.ClientSession() as session:
        api = cluster.api(session)
        one = await put(api, session, content, "weed", "disk", "swift", image={"name": "Üb/er.bam"}, format="raw")
        url = f"/ga4gh/drs/v1/objects/{one['image']}"
        shown = ok(await api.get(url))
        assert {each["type"]: each["checksum"] for each in shown["checksums"]}["sha-256"] == hashlib.sha256(content).hexdigest()
        methods = shown["access_methods"]
        assert len({method["access_id"] for method in methods}) == len(methods) == 3
        names = []
        for method in methods:
            access = ok(await api.get(f"{url}/access/{method['access_id']}"))
            async with opened(session, {"method": "GET", "headers": {}, **access}) as answer:
                assert await answer.read() == content
                if "Content-Disposition" in answer.headers:  # of S3 and Swift; tokens hold none
                    names.append(parse_content_disposition(answer.headers["Content-Disposition"])[1]["filename"])
        assert names == [shown["name"]] * 2 == ["b_er.bam.raw"] * 2


async def test_clients_as_they_are(cluster: Cluster) -> None:
    content = os.urandom(40_000)
    async with aiohttp.ClientSession() as session:
        one = await put(cluster.api(session), session, content, "weed", "swift", image={"name": "variants.vcf"}, format="raw")
        port, gone = str(URL(cluster.running[0].url).port), "00000000-0000-4000-8000-000000000000"
        told = json.loads(await asyncio.to_thread(ran, ASK, port, cluster.token(), one["image"], gone))
        assert (told["size"], told["errors"], len(told["urls"])) == (len(content), [404, 404], 4)
        assert told["checksums"] == {"sha-256": hashlib.sha256(content).hexdigest(), "md5": hashlib.md5(content).hexdigest()}
        for url in told["urls"]:
            async with opened(session, {"method": "GET", "url": url}) as answer:
                assert await answer.read() == content
