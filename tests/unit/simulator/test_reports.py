"""Delivery reports: what is planned, and what a script receives."""

import asyncio
import socket
import struct
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from dispatcher.simulator.config import Config
from dispatcher.simulator.faults import Draw, Faults, draw
from dispatcher.simulator.reports import Report, Reporter, Reports, plan
from dispatcher.simulator.server import Simulator
from tests.unit.simulator.peers import Connect, Script, Until, target

SPANS = Reports(enroute=(1.0, 2.0), final=(10.0, 20.0), late_by=100.0)
HALF = Draw(0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)
QUICK = Reports(enroute=(0.0, 0.0), final=(0.0, 0.0))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [("ENROUTE", 1.5), ("DELIVRD", 15.0)]),
        ({"undelivered": 0.6}, [("ENROUTE", 1.5), ("UNDELIV", 15.0)]),
        ({"undelivered": 0.5}, [("ENROUTE", 1.5), ("DELIVRD", 15.0)]),
        ({"early": 1.0}, [("ENROUTE", None), ("DELIVRD", 15.0)]),
        ({"late": 1.0}, [("ENROUTE", 101.5), ("DELIVRD", 115.0)]),
        (
            {"doubled": 1.0},
            [("ENROUTE", 1.5), ("ENROUTE", 1.5), ("DELIVRD", 15.0), ("DELIVRD", 15.0)],
        ),
        ({"swapped": 1.0}, [("DELIVRD", 1.5), ("ENROUTE", 15.0)]),
        ({"swapped": 1.0, "undelivered": 1.0}, [("UNDELIV", 1.5), ("ENROUTE", 15.0)]),
        ({"lost": 1.0}, [("DELIVRD", 15.0)]),
        ({"early": 0.4, "late": 0.2}, [("ENROUTE", 101.5), ("DELIVRD", 115.0)]),
        ({"final": (0.0, 0.0)}, [("ENROUTE", 1.5), ("DELIVRD", 1.5)]),
    ],
)
def test_plan(change: dict[str, Any], expected: list[tuple[str, float | None]]) -> None:
    """Each mishap changes which reports come, and when."""
    reports = plan(replace(SPANS, **change), HALF, "id")

    assert reports == [Report("id", status, delay) for status, delay in expected]


def test_lost_reports() -> None:
    """What is lost is the first report, the last one or both, each for some messages."""
    settings = replace(SPANS, lost=1.0)

    counts = Counter(
        tuple(report.status for report in plan(settings, draw(1, "42", str(n), "a", 1), "id"))
        for n in range(3000)
    )

    assert set(counts) == {(), ("ENROUTE",), ("DELIVRD",)}
    assert min(counts.values()) > 900


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"url": "ftp://x"}, "reports: url must begin with http:// or https://."),
        ({"lost": 2.0}, "reports: lost must be a share from 0 to 1, but is 2.0."),
        (
            {"lost": 0.6, "early": 0.6},
            "reports: early, late, doubled, swapped, lost together must not exceed 1.",
        ),
        ({"undelivered": -1.0}, "reports: undelivered must be a share from 0 to 1, but is -1.0."),
        ({"enroute": (3.0, 1.0)}, "reports: enroute must be seconds MIN:MAX, but is 3:1."),
        ({"final": (-3.0, 1.0)}, "reports: final must be seconds MIN:MAX, but is -3:1."),
        ({"concurrency": 0}, "reports: concurrency and capacity must be at least 1."),
        (
            {"retry_for": -1.0},
            "reports: late_by, retry_after and retry_for must not be negative.",
        ),
    ],
)
def test_impossible_reports(change: dict[str, Any], sentence: str) -> None:
    """Settings that cannot be are refused in one sentence."""
    with pytest.raises(ValueError, match=r"\.$") as caught:
        Reports(**change)

    assert str(caught.value) == sentence


async def test_two_reports_per_extended_message(
    connect: Connect, script: Script, until: Until
) -> None:
    """An accepted extended message is reported twice in order; others are not reported."""
    async with Simulator(Config(reports=replace(QUICK, url=script.url))) as simulator:
        client = await connect(simulator)
        await client.send("359881111111")
        await client.send("1", extended=True)
        answer = await client.send(extended=True)

        await until(lambda: simulator.received()["reports"]["sent"] == 2)

        identifier = answer.removeprefix("MSG_OK:")
        assert script.reports == [(identifier, "ENROUTE"), (identifier, "DELIVRD")]
        assert simulator.received()["reports"] == {
            "planned": 2,
            "sent": 2,
            "failed": 0,
            "given_up": 0,
            "dropped": 0,
            "waiting": 0,
        }


async def test_parameter_names_are_set(connect: Connect, until: Until) -> None:
    """The script's own parameter names are used, beside what its address has already."""
    queries: list[dict[str, str]] = []

    async def take(request: web.Request) -> web.Response:
        queries.append(dict(request.query))
        return web.Response()

    app = web.Application()
    app.router.add_get("/", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/?key=a"
    reports = replace(QUICK, url=url, id_param="id", status_param="state")
    try:
        async with Simulator(Config(reports=reports)) as simulator:
            answer = await (await connect(simulator)).send(extended=True)
            await until(lambda: len(queries) == 2)
    finally:
        await runner.cleanup()

    identifier = answer.removeprefix("MSG_OK:")
    assert queries == [
        {"key": "a", "id": identifier, "state": "ENROUTE"},
        {"key": "a", "id": identifier, "state": "DELIVRD"},
    ]


async def test_early_report_comes_before_the_answer(connect: Connect, script: Script) -> None:
    """With an early report the script has it before the client has its answer."""
    config = Config(reports=replace(QUICK, url=script.url, early=1.0, final=(1000.0, 1000.0)))
    async with Simulator(config) as simulator:
        client = await connect(simulator)
        script.gate.clear()
        asking = asyncio.create_task(client.send(extended=True))
        while script.at_once == 0:  # noqa: ASYNC110 - what is waited for announces nothing
            await asyncio.sleep(0.005)
        assert not asking.done()

        script.gate.set()
        answer = await asking

        assert script.reports == [(answer.removeprefix("MSG_OK:"), "ENROUTE")]
        assert simulator.received()["reports"]["waiting"] == 1


async def test_early_report_goes_before_all_that_is_due(
    connect: Connect, script: Script, until: Until
) -> None:
    """A report that an answer waits for does not queue behind those that nobody waits for."""
    script.gate.clear()
    config = Config(reports=replace(QUICK, url=script.url, concurrency=1))
    async with Simulator(config) as simulator:
        one, other = await connect(simulator), await connect(simulator)
        first = (await one.send("359881111111", extended=True)).removeprefix("MSG_OK:")
        await until(lambda: script.at_once == 1)
        simulator.set({"reports": {"early": 1}})
        asking = asyncio.create_task(other.send("359882222222", extended=True))
        await until(lambda: simulator.received()["reports"]["waiting"] == 3)

        script.gate.set()
        second = (await asking).removeprefix("MSG_OK:")
        await until(lambda: len(script.reports) == 4)

        assert script.reports == [
            (first, "ENROUTE"),
            (second, "ENROUTE"),
            (first, "DELIVRD"),
            (second, "DELIVRD"),
        ]


async def test_late_fault_is_reported(connect: Connect, script: Script, until: Until) -> None:
    """A message whose answer was lost is delivered and reported like any other."""
    config = Config(faults=Faults(late=1.0), reports=replace(QUICK, url=script.url))
    async with Simulator(config) as simulator:
        client = await connect(simulator)
        with pytest.raises(asyncio.IncompleteReadError):
            await client.send(extended=True)

        await until(lambda: len(script.reports) == 2)

        answer = simulator.messages()[0]["answer"]
        assert {identifier for identifier, _ in script.reports} == {answer.removeprefix("MSG_OK:")}


async def test_client_that_leaves_is_still_sent_for(
    connect: Connect, script: Script, until: Until
) -> None:
    """A message accepted from a client that left before the answer counts, and is reported."""
    config = Config(faults=Faults(latency=(0.1, 0.1)), reports=replace(QUICK, url=script.url))
    async with Simulator(config) as simulator:
        client = await connect(simulator)
        client.write(f"GET {target(extended=True)} HTTP/1.1\r\n\r\n".encode())
        await until(lambda: simulator.received()["accepted"] == 1)
        # A reset, not an end: a half-closed client would still be answered.
        client.writer.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        client.writer.transport.abort()
        await until(lambda: not simulator.connections)
        assert script.reports == []

        await until(lambda: len(script.reports) == 2)


async def test_report_is_sent_again_until_answered_200(
    connect: Connect, script: Script, until: Until
) -> None:
    """An answer other than 200, a redirect too, brings the report again."""
    script.answers = [503, 302]
    reports = replace(QUICK, url=script.url, retry_after=0.01)
    async with Simulator(Config(reports=reports)) as simulator:
        await (await connect(simulator)).send(extended=True)

        await until(lambda: simulator.received()["reports"]["sent"] == 2)

        assert len(script.reports) == 4
        assert simulator.received()["reports"]["failed"] == 2


async def test_reports_wait_while_the_script_is_away(
    connect: Connect, script: Script, until: Until
) -> None:
    """Reports for a script that is not there are kept and arrive once it is."""
    with socket.socket() as away:
        away.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{away.getsockname()[1]}/"
        reports = replace(QUICK, url=url, retry_after=0.01)
        async with Simulator(Config(reports=reports)) as simulator:
            await (await connect(simulator)).send(extended=True)
            await until(lambda: simulator.received()["reports"]["failed"] >= 2)
            assert simulator.received()["reports"]["waiting"] == 2

            simulator.set({"reports": {"url": script.url}})

            await until(lambda: simulator.received()["reports"]["sent"] == 2)
            assert len(script.reports) == 2


async def test_report_is_given_up_in_the_end(connect: Connect, until: Until) -> None:
    """A report that is not taken within its time is given up and counted."""
    reports = replace(QUICK, url="http://127.0.0.1:1/", retry_for=0.0)
    async with Simulator(Config(reports=reports)) as simulator:
        await (await connect(simulator)).send(extended=True)

        await until(lambda: simulator.received()["reports"]["given_up"] == 2)
        assert simulator.received()["reports"]["waiting"] == 0


async def test_reports_are_sent_a_few_at_once(
    connect: Connect, script: Script, until: Until
) -> None:
    """No more reports are under way than set, and no more wait than there is room for."""
    script.gate.clear()
    reports = replace(QUICK, url=script.url, concurrency=2, capacity=3)
    async with Simulator(Config(reports=reports)) as simulator:
        client = await connect(simulator)
        await client.send(extended=True)
        await until(lambda: script.at_once == 2)
        await client.send("359881111111", extended=True)
        await client.send("359882222222", extended=True)
        script.gate.set()

        await until(lambda: simulator.received()["reports"]["waiting"] == 0)

        assert script.at_most == 2
        assert simulator.received()["reports"]["dropped"] == 1
        assert len(script.reports) == 5


async def test_early_report_without_room_lets_the_answer_go(
    connect: Connect, script: Script, until: Until
) -> None:
    """An answer does not wait for a report that is dropped, nor for one that is forgotten."""
    script.gate.clear()
    reports = replace(QUICK, url=script.url, early=1.0, concurrency=1, capacity=1)
    async with Simulator(Config(reports=reports)) as simulator:
        clients = [await connect(simulator) for _ in range(3)]
        first = asyncio.create_task(clients[0].send("359881111111", extended=True))
        await until(lambda: script.at_once == 1)
        second = asyncio.create_task(clients[1].send("359882222222", extended=True))
        await until(lambda: simulator.received()["reports"]["waiting"] == 2)

        third = await clients[2].send("359883333333", extended=True)
        assert third.startswith("MSG_OK:")
        assert not second.done()

        simulator.reset()
        assert (await second).startswith("MSG_OK:")
        script.gate.set()
        assert (await first).startswith("MSG_OK:")


async def test_without_an_address_nothing_is_planned(connect: Connect) -> None:
    """Without a script's address an extended message is answered and not reported."""
    async with Simulator() as simulator:
        answer = await (await connect(simulator)).send(extended=True)

        assert answer.startswith("MSG_OK:")
        assert simulator.received()["reports"]["planned"] == 0


async def test_reports_left_when_the_address_is_taken_away(until: Until) -> None:
    """Reports that wait while the address is removed fail instead of ending the reporter."""
    reporter = Reporter(replace(QUICK, retry_for=0.0))
    running = asyncio.create_task(reporter.run())

    reporter.push(Report("id", "ENROUTE", 0.0))

    await until(lambda: reporter.counts["given_up"] == 1)
    assert not running.done()
    running.cancel()
    await asyncio.wait({running})
