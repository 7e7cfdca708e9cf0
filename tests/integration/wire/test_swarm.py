"""A hundred at a time, against a provider that fails in every way at random."""

import asyncio
from collections import Counter
from random import Random

from dispatcher.provider import Answer, InDoubt, NeverLeft, Reply
from tests.integration.wire.client import client, send
from tests.integration.wire.raw_provider import RawProvider, Received
from tests.integration.wire.test_faults import FAULTS, hangs


async def test_under_random_faults_no_message_arrives_twice(raw: RawProvider) -> None:
    """Each message is received as often as its reply allows: an answer once, a doubt at most."""
    random = Random(4711)
    faults = [fault for fault, _ in FAULTS.values()]

    async def script(request: Received) -> None:
        await asyncio.sleep(random.choice([0, 0, 0.001, 0.01]))
        fate = random.random()
        if fate < 0.5:
            await request.line.answer()
            if fate < 0.1:
                request.line.hang_up()
        elif fate < 0.99:
            await random.choice(faults)(request)
        else:
            await hangs(request)

    raw.script = script
    texts = [f"text {number}" for number in range(1500)]
    replies: dict[str, Reply] = {}
    async with client(raw.url, timeout=2, concurrency=100) as provider:

        async def sender() -> None:
            while texts:
                text = texts.pop()
                replies[text] = await send(provider, text)

        async with asyncio.TaskGroup() as group:
            for _ in range(100):
                group.create_task(sender())

    received = Counter(dict(request.parameters)["text"] for request in raw.requests)
    assert max(received.values()) == 1
    for text, reply in replies.items():
        match reply:
            case Answer():
                assert received[text] == 1
            case NeverLeft():
                assert received[text] == 0
            case InDoubt():
                pass
    kinds = Counter(type(reply) for reply in replies.values())
    assert kinds[Answer] > 100
    assert kinds[InDoubt] > 100
