"""Which vLLM server samples a group, and when."""

from __future__ import annotations

import asyncio
from collections import Counter

from pgenrm_train.backends.grpo.placement import Placement


def test_groups_go_to_the_server_with_the_fewest_sequences_at_random_among_equals() -> None:
    async def first_server() -> int:
        placement = Placement(3, room=99)
        placement.in_flight = [1, 0, 0]
        server = await placement.take(8)
        assert placement.in_flight[server] == 8, "a group weighs as many as its samples"
        assert await placement.take(1) == 3 - server, "the other idle one"
        assert await placement.take(1) in (0, 3 - server)
        return server

    assert Counter(asyncio.run(first_server()) for _ in range(64)).keys() == {1, 2}


def test_a_group_waits_for_room_in_the_order_of_the_calls() -> None:
    async def order() -> list[str]:
        placement, served = Placement(2, room=8), []

        async def group(name: str, samples: int) -> None:
            server = await placement.take(samples)
            served.append(name)
            for _ in range(samples):
                await asyncio.sleep(0)
                placement.release(server)

        await asyncio.gather(
            *(group(*one) for one in (("a", 6), ("b", 4), ("c", 2), ("large", 20), ("d", 1)))
        )
        assert placement.in_flight == [0, 0]
        return served

    assert asyncio.run(order()) == ["a", "b", "c", "large", "d"]


def test_a_pause_waits_for_what_is_in_flight_and_lets_no_group_start() -> None:
    async def order() -> list[str]:
        placement, events = Placement(1, room=8), []

        async def group(name: str) -> None:
            await placement.take(4)
            events.append(name)

        async def pause() -> None:
            await placement.pause()
            events.append("paused")

        server = await placement.take(4)
        pausing = asyncio.create_task(pause())
        await asyncio.sleep(0)
        late = asyncio.create_task(group("late"))  # there is room for it
        for _ in range(4):
            await asyncio.sleep(0.01)
            assert not events
            placement.release(server)
        await asyncio.sleep(0.01)
        assert events == ["paused"]
        placement.resume()
        await asyncio.gather(pausing, late)
        return events

    assert asyncio.run(order()) == ["paused", "late"]
