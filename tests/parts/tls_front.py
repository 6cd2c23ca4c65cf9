"""nginx that ends TLS before servers that have none."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

from tests.parts.authority import Pair
from tests.parts.process import find_program, free_ports, listens, running

_CONFIGURATION = """\
pid {state}/nginx.pid;
error_log {state}/error.log;
events {{ }}
http {{
    access_log off;
    client_max_body_size 0;
    client_body_temp_path {state}/body;
    proxy_temp_path {state}/proxy;
    fastcgi_temp_path {state}/fastcgi;
    uwsgi_temp_path {state}/uwsgi;
    scgi_temp_path {state}/scgi;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {pair.certificate};
        ssl_certificate_key {pair.key};
        location / {{
            proxy_pass {behind};
            proxy_http_version 1.1;
            proxy_request_buffering off;
            proxy_buffering off;
            proxy_set_header Host $http_host;
        }}
    }}
}}
"""


@contextlib.contextmanager
def start(directory: Path, behind: str, pair: Pair) -> Iterator[int]:
    """The port of 127.0.0.1 where the server at the URL `behind` speaks TLS with the certificate of `pair`, until the block ends."""
    directory.mkdir(parents=True)
    (port,) = free_ports(1)
    configuration = directory / "nginx.conf"
    configuration.write_text(_CONFIGURATION.format(state=directory, port=port, pair=pair, behind=behind))
    arguments = [find_program("nginx", "apt-get install nginx"), "-c", str(configuration), "-g", "daemon off; user root;"]
    with running(arguments, log=directory / "nginx.out", ready=lambda: listens(port), end=signal.SIGTERM):
        yield port
