"""Exit codes of the command `broker`, in one place (`broker --help` lists them), and what errors look like.

A failure ends with one line on stderr that says what happened, and one that says what to do next where we know it.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

import click
import stamina.instrumentation

from broker import errors
from broker.client.trouble import BrokerUnreachable, ClientError, VerificationFailed, WrongSetting

OK = 0
FAILED = 1
USAGE = 2
DENIED = 3
NOT_FOUND = 4
WRONG_BYTES = 5
UNREACHABLE = 6
BUSY = 7
INTERRUPTED = 130

Value = TypeVar("Value")

_HINTS: dict[type[errors.BrokerError], str] = {
    errors.Unauthenticated: "set BROKER_TOKEN to a valid token; its operator makes one with: broker token create (--config …)",
    errors.Forbidden: "ask an administrator, or use a token of another project or role",
    errors.NotFound: "broker ls (images, stores, replicas, copies, sites), broker quota list, broker key list show what this token may see",
    errors.NoSource: "broker ticket IMAGE shows why each store is excluded",
    errors.NoDestination: "broker ls stores lists stores; broker store probe NAME tells what one can do",
    errors.Busy: "try again later",
    errors.QuotaExceeded: "if that does not help, ask an administrator (broker quota)",
    errors.PreconditionFailed: "somebody changed it meanwhile: look again, then repeat",
    errors.Gone: "run the same command again: it begins anew",
    errors.Mismatch: "see that these are the right bytes, then run the same command again",
    errors.StoreUnavailable: "is the store running, are its address and its credential right? Else try again later, or elsewhere",
    errors.Unavailable: "try again later",
}

_FIELD_HINTS = {
    "observed": "where the broker cannot look, broker replica register, adopt --file and set --file tell what this machine sees; "
    "where it can, broker replica add, or adopt without --file",
}


def code_of(error: BaseException) -> int:
    """The exit code that stands for an error."""
    match error:
        case errors.Unauthenticated() | errors.Forbidden():
            return DENIED
        case errors.Invalid() | errors.Malformed() | WrongSetting():
            return USAGE
        case errors.NotFound():
            return NOT_FOUND
        case errors.Mismatch() | VerificationFailed():
            return WRONG_BYTES
        case errors.Busy() | errors.QuotaExceeded():
            return BUSY
        case BrokerUnreachable() | errors.Unavailable() | errors.StoreUnavailable():
            return UNREACHABLE
        case KeyboardInterrupt() | asyncio.CancelledError():
            return INTERRUPTED
        case _:
            return FAILED


def explain(error: errors.BrokerError | ClientError) -> list[str]:
    """An error in lines for people, the last one saying what to do next."""
    if isinstance(error, ClientError):
        return [str(error)] + ([error.hint] if error.hint else [])
    lines = [f"{error.title}: {error.detail}" if error.detail not in ("", error.title) else error.title]
    if error.field:
        lines[0] += f" (field {error.field}" + (f", expected {error.expected})" if error.expected else ")")
    lines += [f"  {item['store']}: {item['reason']}" for item in error.extra.get("excluded", ())]
    hint = next((text for kind, text in _HINTS.items() if isinstance(error, kind)), _FIELD_HINTS.get(error.field or "", ""))
    if isinstance(error, errors.Forbidden) and error.expected:
        hint = ""  # what would be allowed is said
    if error.retry_after and not isinstance(error, errors.StoreUnavailable):
        later = f"try again in {error.retry_after:.0f} s"
        hint = f"{later}; {hint}" if isinstance(error, errors.QuotaExceeded) else later
    return lines + ([hint] if hint else [])


def run(work: Coroutine[Any, Any, Value], interrupted: str = "") -> Value:
    """Run a command's work; end the process with the right code when it fails. `interrupted` says how to go on after Ctrl-C."""
    stamina.instrumentation.set_on_retry_hooks([])  # they log to stdout, among the results
    try:
        return asyncio.run(_stoppable(work))
    except (errors.BrokerError, ClientError) as error:
        for line in explain(error):
            click.echo(f"broker: {line}", err=True)
        raise SystemExit(code_of(error)) from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        click.echo("broker: interrupted" + (f"; {interrupted}" if interrupted else ""), err=True)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        raise SystemExit(FAILED) from None


async def _stoppable(work: Coroutine[Any, Any, Value]) -> Value:
    """SIGTERM ends a command as Ctrl-C does: what was reached is kept."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task
