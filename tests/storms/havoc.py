"""Brokers as processes that are killed and started again, or stopped and let go on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from dataclasses import dataclass, field
from pathlib import Path

from tests.parts.broker import BrokerProcess, serve
from tests.parts.process import free_ports


@dataclass
class Havoc:
    """`count` brokers on one database; `worst` of them are down at a time."""

    database: str
    place: Path
    count: int
    worst: int
    settings: str
    longest_stop: float
    """Seconds; longer than a lease lasts, that what it held may end meanwhile."""
    draw: random.Random
    going: bool = True
    kills: int = 0
    stops: int = 0
    _stacks: list[contextlib.ExitStack] = field(default_factory=list)
    brokers: list[BrokerProcess] = field(default_factory=list)

    def __enter__(self) -> Havoc:
        self._ports = free_ports(self.count)
        for index in range(self.count):
            self._stacks.append(contextlib.ExitStack())
            self.brokers.append(self._start(index))
        return self

    def __exit__(self, *_: object) -> None:
        for stack in self._stacks:
            stack.close()

    @property
    def issuer(self) -> str:
        """The name under which they sign."""
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def urls(self) -> list[str]:
        return [broker.url for broker in self.brokers]

    async def run(self) -> None:
        """Until `going` is false: `worst` brokers are taken down, and brought back."""
        while self.going:
            victims = self.draw.sample(range(self.count), self.worst)
            await asyncio.gather(*[self._harm(victim) for victim in victims])
            await asyncio.sleep(self.draw.uniform(0.1, 0.7))

    async def _harm(self, victim: int) -> None:
        await asyncio.sleep(self.draw.uniform(0, 0.3))
        pid = self.brokers[victim].pid
        if self.draw.random() < 0.5:
            self.kills += 1
            os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(self.draw.uniform(0, 0.5))
            await asyncio.to_thread(self._restart, victim)
        else:
            self.stops += 1
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(self.draw.choice((0.5, 1, 2, self.longest_stop)))
            os.kill(pid, signal.SIGCONT)

    def _restart(self, index: int) -> None:
        self._stacks[index].close()
        self.brokers[index] = self._start(index)

    def _start(self, index: int) -> BrokerProcess:
        started = serve(self.database, self.place, settings=self.settings, port=self._ports[index], public_url=self.issuer)
        return self._stacks[index].enter_context(started)
