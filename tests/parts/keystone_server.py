"""OpenStack Keystone in one process: ``python keystone_server.py DIRECTORY PORT``.

Reads DIRECTORY/keystone.conf. On the first start it makes the database (SQLite), the Fernet keys and the administrator, whose
password is in OS_BOOTSTRAP_PASSWORD; later starts serve what is there. Run as a program only, isolated (-I): its directory
holds a keystone.py that would hide Keystone.
"""
# mypy: ignore-errors

import os
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")


def prepare(configuration: str) -> None:
    """What an administrator does with keystone-manage, which can run one command a process."""
    from keystone.cmd import cli

    owner = ["--keystone-user", str(os.getuid()), "--keystone-group", str(os.getgid())]
    for command in (["db_sync"], ["fernet_setup", *owner], ["bootstrap"]):
        child = os.fork()
        if child == 0:
            cli.main(argv=["keystone-manage", "--config-file", configuration, *command])
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            raise SystemExit(f"keystone-manage {command[0]} failed")


def main() -> None:
    directory, port = Path(sys.argv[1]), int(sys.argv[2])
    configuration = str(directory / "keystone.conf")
    if not (directory / "ready").exists():
        prepare(configuration)
        (directory / "ready").touch()
    os.environ["OS_KEYSTONE_CONFIG_FILES"] = configuration
    del sys.argv[1:]  # Keystone would read them
    from keystone.wsgi.api import application
    from werkzeug.serving import make_server

    make_server("127.0.0.1", port, application, threaded=True).serve_forever()


if __name__ == "__main__":
    main()
