"""The command `broker`: commands are loaded when they are used, so that the rest starts quickly."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from keyword import iskeyword
from typing import NoReturn

import click

from broker import __version__

COMMANDS = {
    "put": "Upload a file as an image.",
    "get": "Download an image, verified.",
    "copy": "Copy an image to one more store.",
    "agent": "Make the copies that were asked for, one after the other.",
    "ls": "List images, stores, replicas, copies, sites, paths.",
    "show": "Show an image, its blobs and where they lie.",
    "ticket": "Ask for a ticket and show it.",
    "why": "Show what a ticket would name, and why.",
    "image": "Name, change, share, approve and delete images.",
    "replica": "Register objects as replicas, change and forget them.",
    "store": "Register, probe, change and list stores.",
    "site": "Register, change and list sites.",
    "quota": "Set what projects may hold at once, and their shares.",
    "key": "List, rotate and revoke signing keys.",
    "token": "Make bearer tokens for this broker.",
    "serve": "Run the broker.",
    "migrate": "Bring the database's schema up to date.",
    "check": "Compare the catalogue's counts with its rows.",
    "rebuild": "Make a lost catalogue again from the stores.",
    "import": "Take over the images of a Glance.",
}
"""Name to summary. Command NAME is ``command`` in `broker.cli.NAME`, or `broker.cli.NAME_` where NAME is a word of Python's."""

EPILOG = """\b
First steps:
  broker serve                            run a broker, with a database of its own
  broker token create --role admin --project demo --ttl 1d
  export BROKER_URL=http://127.0.0.1:8080 BROKER_TOKEN=...
  broker site add eu/az1
  broker store add ...                    it is probed for what it really enforces
  broker put disk.qcow2 --name my-image
  broker get my-image

\b
Exit codes:
  0  done
  1  failed; the last lines say why, and what to do next
  2  the command line or the configuration is wrong
  3  not allowed: no token, a wrong one, or its role is too small
  4  no such thing, or none that the token may see
  5  the bytes do not match their digest; nothing was kept
  6  the broker, its database or a store cannot be reached; trying again may help
  7  every slot is taken; try again later
  130  interrupted
"""


def _module(name: str) -> str:
    return f"broker.cli.{name}_" if iskeyword(name) else f"broker.cli.{name}"


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in COMMANDS if find_spec(_module(name)) is not None]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        command: click.Command = import_module(_module(name)).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without loading them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name]) for name in self.list_commands(ctx)])


@click.command(cls=_Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="transfer-broker")
def main() -> None:
    """Negotiate transfers of images between clients and stores, without carrying a byte of them.

    A broker knows where copies of an image lie. Clients ask it for a ticket: a ranked list of places, each with a signed
    URL, and then move the bytes themselves.
    """


def fail(text: str, code: int = 1) -> NoReturn:
    """Say why on stderr and end with `code` (see ``broker --help``). Each line of `text` says one thing."""
    for line in text.splitlines():
        click.echo(f"broker: {line}", err=True)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
