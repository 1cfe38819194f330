"""Placement of groups on vLLM servers.

All samples of a group go to one server.  It reads the prompt once, and the other samples find it in its
prefix cache.  A group waits until the servers have room, so a fast server gets more groups.  Between `pause`
and `resume` none starts, because vLLM sleeps.
"""

import asyncio
import random


class Placement:
    """Sequences in flight per server; `room` is the limit for all servers together."""

    def __init__(self, servers: int, room: int) -> None:
        self.in_flight, self.room = [0] * servers, room
        self.paused = False
        self._turn, self._ended = asyncio.Lock(), asyncio.Event()

    async def take(self, samples: int) -> int:
        """Reserve places for a group, in the order of the calls; returns the index of its server.

        The server is the one with the fewest sequences, at random among equals, because several samplers
        share the servers and do not know each other's groups.  A group larger than `room` gets its places
        once nothing else is in flight.
        """
        async with self._turn:
            while self.paused or (any(self.in_flight) and sum(self.in_flight) + samples > self.room):
                await self._change()
            fewest = min(self.in_flight)
            server = random.choice([i for i, count in enumerate(self.in_flight) if count == fewest])
            self.in_flight[server] += samples
            return server

    def release(self, server: int, sequences: int = 1) -> None:
        """Return the places of sequences that have ended."""
        self.in_flight[server] -= sequences
        self._ended.set()

    async def pause(self) -> None:
        """Start no further group; returns once no sequence is in flight."""
        self.paused = True
        while any(self.in_flight):
            await self._change()

    def resume(self) -> None:
        self.paused = False
        self._ended.set()

    async def _change(self) -> None:
        self._ended.clear()
        await self._ended.wait()
