"""GA4GH DRS at real stores: the published compliance suite, and bytes fetched by what an object says."""

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
import pytest
from aiohttp.multipart import parse_content_disposition

from tests.parts.cluster import Cluster, ok, opened, put

ROOT = Path(__file__).resolve().parents[2]
SUITE = Path(sys.prefix) / "drs-suite"
"""PyPI's drs-compliance-suite 1.0.3 without what it asks for beside: its pins are of 2022 (deploy/test.sh)."""

RUN = """
import json, sys, types
sys.modules["supported_drs_versions"] = versions = types.ModuleType("supported_drs_versions")
versions.SUPPORTED_DRS_VERSIONS = ["1.2.0"]  # the wheel asks for this module and does not bring it
from compliance_suite.report_runner import report_runner
print(report_runner(sys.argv[1], "transfer broker", "broker", "1.2.0", sys.argv[2]).to_json())
"""

NEWER = "Additional properties are not allowed ('drs', 'maxBulkRequestLength' were unexpected)"
"""The suite checks with the schemas of DRS 1.2, in which service-info has no further fields; since 1.4 this one is required."""


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
    assert SUITE.is_dir(), "pip install --no-deps --target .venv/drs-suite drs-compliance-suite==1.0.3 ga4gh-testbed-lib==0.2.0"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, url, str(file)], env={**os.environ, "PYTHONPATH": str(SUITE)}, cwd=place,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    phases = json.loads(done.stdout)["phases"]
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


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's client would heed them."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
