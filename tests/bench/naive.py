"""A broker as one would write it first: PyJWT, a pool query and botocore in every request. Kept to keep the distance in sight.

``python tests/bench/naive.py PORT DATABASE_URL AUDIENCE``
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import asyncpg
import jwt
import orjson
import uvloop
from aiohttp import web
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

_SQL = """
SELECT b.size, s.name, s.site, s.endpoint, r.key FROM blobs b JOIN replicas r ON r.blob_id = b.id JOIN stores s ON s.id = r.store_id
WHERE b.id = $1 AND r.state = 'active' LIMIT 3
"""


def main() -> None:
    port, url, audience, public = int(sys.argv[1]), sys.argv[2], sys.argv[3], jwt.PyJWKSet.from_json(sys.argv[4])

    async def serve() -> None:
        pool: Any = await asyncpg.create_pool(url, min_size=4, max_size=10)
        credentials = Credentials("BENCHKEY", "bench-secret")

        async def handle(request: web.Request) -> web.Response:
            token = request.headers["Authorization"][7:]
            key = next(k for k in public.keys if k.key_id == jwt.get_unverified_header(token)["kid"])
            jwt.decode(token, key.key, algorithms=["ES256"], audience=audience)
            asked = orjson.loads(await request.read())
            sources = []
            for row in await pool.fetch(_SQL, asked["blob"]):
                signed = AWSRequest("GET", f"{row['endpoint']}/images/{row['key']}")
                S3SigV4QueryAuth(credentials, "s3", "eu-1", expires=3600).add_auth(signed)
                sources.append(
                    {"store": row["name"], "site": row["site"], "method": "GET", "url": signed.prepare().url, "size": row["size"]}
                )
            return web.Response(body=orjson.dumps({"id": asked["blob"], "sources": sources}), content_type="application/json")

        app = web.Application()
        app.router.add_post("/v1/tickets", handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()

    uvloop.run(serve())


if __name__ == "__main__":
    main()
