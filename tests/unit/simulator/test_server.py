"""The provider on real sockets."""

import asyncio
import json
from typing import Any

import pytest

from dispatcher.simulator.config import Config
from dispatcher.simulator.faults import Fault, Faults
from dispatcher.simulator.http import BODY_MAX
from dispatcher.simulator.rules import Ban, Service
from dispatcher.simulator.server import PATH, Simulator
from tests.unit.simulator.peers import Connect, Until, target

DAY = 86400


async def test_answers_on_one_connection(connect: Connect) -> None:
    """One connection carries many requests, each answered by the rules."""
    service = Service(42, user=7, day=2, templates=("hello .*",))
    async with Simulator(Config(seed=1, services=(service,))) as simulator:
        client = await connect(simulator)

        answers = [
            await client.send(text="hello a"),
            await client.send(text="bye"),
            await client.send(text="hello b", user=8),
            await client.send("0881234567", "hello b"),
            await client.send(text="hello b", extended=True),
            await client.send(text="hello c"),
        ]

        assert answers[:4] == ["MSG_OK", "INVALID_PATTERN", "INVALID_INPUT", "INVALID_MSISDN"]
        assert answers[4].startswith("MSG_OK:")
        assert answers[5] == "LIMIT_DAY"
        assert simulator.received()["answers"] == {
            "MSG_OK": 2,
            "INVALID_PATTERN": 1,
            "INVALID_INPUT": 1,
            "INVALID_MSISDN": 1,
            "LIMIT_DAY": 1,
        }


@pytest.mark.parametrize("latency", [0.0, 0.01])
async def test_pipelined_requests_are_answered_in_order(connect: Connect, latency: float) -> None:
    """Requests written at once, and cut anywhere, are answered one after the other, in order."""
    config = Config(services=(Service(42, day=2),), faults=Faults(latency=(latency, latency)))
    async with Simulator(config) as simulator:
        client = await connect(simulator)
        data = b"".join(
            f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
            for path in (target(), "/other", target("1"), target(), target())
        )

        for place in range(0, len(data), 100):
            client.write(data[place : place + 100])
            await client.writer.drain()

        assert [await client.read() for _ in range(5)] == [
            (200, "MSG_OK"),
            (404, "Not Found"),
            (200, "INVALID_MSISDN"),
            (200, "MSG_OK"),
            (200, "LIMIT_DAY"),
        ]


async def test_half_closed_client_gets_all_its_answers(connect: Connect) -> None:
    """A client that has ended its side still gets every answer, then the end."""
    config = Config(faults=Faults(latency=(0.01, 0.02)))
    async with Simulator(config) as simulator:
        client = await connect(simulator)
        client.write(f"GET {target()} HTTP/1.1\r\n\r\n".encode() * 3)
        client.writer.write_eof()

        assert [await client.read() for _ in range(3)] == [(200, "MSG_OK")] * 3
        assert await client.reader.read() == b""


async def test_client_that_does_not_read_is_held_back(connect: Connect, until: Until) -> None:
    """A client that asks for much and reads nothing takes no more memory than one answer."""
    async with Simulator() as simulator:
        other = await connect(simulator)
        for number in range(1000):
            await other.send(f"35988123{number:04}", "a" * 160)
        client = await connect(simulator)
        client.write(b"GET /simulator/messages HTTP/1.1\r\n\r\n" * 100)
        size = len((await other.get("/simulator/messages"))[1])
        transports = [connection._transport for connection in simulator.connections]

        await until(lambda: any(t.get_write_buffer_size() for t in transports))

        assert max(t.get_write_buffer_size() for t in transports) < 2 * size
        assert await other.send("359881111111") == "MSG_OK"
        assert {(await client.read())[0] for _ in range(100)} == {200}


async def test_flood_is_not_read_ahead(connect: Connect, until: Until) -> None:
    """While an answer waits, what a client sends further is left in its hands, and then taken."""
    count = 10_000
    async with Simulator(Config(faults=Faults(latency=(0.1, 0.1)))) as simulator:
        client = await connect(simulator)
        client.write(f"GET {target()} HTTP/1.1\r\n\r\n".encode() * count)
        [connection] = simulator.connections

        await until(lambda: connection._paused)

        assert len(connection._buffer) < 1024 * 1024
        simulator.set({"faults": {"latency": 0}})
        assert [await client.read() for _ in range(count)] == [(200, "MSG_OK")] * count


@pytest.mark.parametrize(
    ("encoded", "text"),
    [
        ("a+b%20c%2Bd", "a b c+d"),
        ("%D0%A1%D0%BC%D0%B5%D1%82%D0%BA%D0%B0%21", "Сметка!"),
        ("%F0%9F%98%80%26text%3Dx%0D%0A", "😀&text=x\r\n"),
    ],
)
async def test_text_is_decoded(connect: Connect, encoded: str, text: str) -> None:
    """A text comes out as it was written, and is answered and logged as such."""
    async with Simulator() as simulator:
        client = await connect(simulator)

        answer = await client.get(
            f"{PATH}?user_id=7&service_id=42&msisdn=359881234567&text={encoded}&extended=yes"
        )

        [message] = simulator.messages()
        assert (message["text"], message["answer"]) == (text, answer[1])


@pytest.mark.parametrize("query", ["", "&text=b", "&text=100%", "&msisdn=359881234567"])
async def test_query_that_cannot_be_read(connect: Connect, query: str) -> None:
    """No query, a parameter given twice and a broken escape are inconsistent parameters."""
    async with Simulator() as simulator:
        client = await connect(simulator)
        path = target() + query if query else PATH

        assert await client.get(path) == (200, "INVALID_INPUT")
        assert simulator.messages()[0]["msisdn"] is None


async def test_other_paths_and_methods(connect: Connect) -> None:
    """Only a GET of the provider's path is a message."""
    async with Simulator() as simulator:
        client = await connect(simulator)

        assert await client.get("/users/send_bulk.php5") == (404, "Not Found")
        assert await client.get("/simulator/other") == (404, "Not Found")
        assert await client.post(target()) == (405, "Method Not Allowed")
        assert simulator.received()["requests"] == 0


async def test_broken_request_ends_its_connection(connect: Connect) -> None:
    """A line break within a request is no request, is counted and ends the connection."""
    async with Simulator() as simulator:
        client = await connect(simulator)
        client.write(b"GET /a\r\nb HTTP/1.1\r\n\r\n")

        assert await client.read() == (400, "Bad Request")
        assert await client.reader.read() == b""
        assert simulator.received()["malformed"] == 1


async def test_connection_close_is_kept(connect: Connect) -> None:
    """A client that wants the connection closed gets its answer and the end."""
    async with Simulator() as simulator:
        client = await connect(simulator)
        client.write(f"GET {target()} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())

        assert await client.read() == (200, "MSG_OK")
        assert await client.reader.read() == b""


async def test_addresses_are_told_apart(connect: Connect) -> None:
    """A service answers only the addresses on its list, and a ban hits only the one that erred."""
    service = Service(42, allowed_ips=("127.0.0.1", "127.0.0.3"))
    config = Config(services=(service,), ban=Ban(refused=1, seconds=1000))
    async with Simulator(config) as simulator:
        good, bad, third = [
            await connect(simulator, ip) for ip in ("127.0.0.1", "127.0.0.2", "127.0.0.3")
        ]

        assert [await bad.send() for _ in range(3)] == ["INVALID_IP", "INVALID_IP", "BAN_IP_TEMP"]
        assert [await good.send(), await third.send()] == ["MSG_OK", "MSG_OK"]
        assert list(simulator.received()["banned"]) == ["127.0.0.2"]


async def test_delay_is_measured_on_arrival(connect: Connect) -> None:
    """Two messages that arrive together are too close, however long the answers take."""
    config = Config(
        services=(Service(42, delay=1000.0),), faults=Faults(latency=(0.01, 0.05)), seed=2
    )
    async with Simulator(config) as simulator:
        clients = [await connect(simulator) for _ in range(5)]

        answers = await asyncio.gather(*(client.send() for client in clients))

        assert sorted(answers) == ["LIMIT_DELAY"] * 4 + ["MSG_OK"]
        service = simulator.received()["services"]["42"]
        assert (service["accepted"], service["refused_for_delay"]) == (1, 4)
        assert service["min_spacing"] is not None
        assert service["min_spacing_accepted"] is None


async def test_latency_is_kept(connect: Connect) -> None:
    """No answer comes sooner than the least latency."""
    async with Simulator(Config(faults=Faults(latency=(0.05, 0.06)))) as simulator:
        client = await connect(simulator)
        loop = asyncio.get_running_loop()
        start = loop.time()

        assert await client.send() == "MSG_OK"
        assert loop.time() - start >= 0.049


async def test_summary_proves_once(connect: Connect) -> None:
    """Messages are told apart by service, number and text; one taken twice is shown."""
    async with Simulator() as simulator:
        client = await connect(simulator)
        for text, service in [("a", 42), ("b", 42), ("a", 43), ("b", 42)]:
            await client.send(text=text, service=service)
        await client.send("1", "c")
        await client.send("1", "c")

        received = simulator.received()

        assert received["requests"] == 6
        assert received["messages"] == 4
        assert received["accepted"] == 4
        assert received["repeated"] == 2
        assert received["received_twice"] == 1
        assert received["doubles"] == [
            {
                "service_id": "42",
                "msisdn": "359881234567",
                "text": "b",
                "requests": 2,
                "accepted": 2,
                "swallowed": 0,
            }
        ]
        assert {name: s["accepted"] for name, s in received["services"].items()} == {
            "42": 3,
            "43": 1,
        }
        spacing = received["services"]["42"]
        assert spacing["min_spacing"] is not None
        assert spacing["accepted_span"] is not None
        assert 0 < spacing["min_spacing"] <= spacing["accepted_span"]


async def test_drop_and_late_close_without_an_answer(connect: Connect) -> None:
    """Both end the connection after reading; the late one has been accepted and counted."""
    config = Config(services=(Service(42, day=1),), faults=Faults(late=1.0))
    async with Simulator(config) as simulator:
        for changes in ({"late": 0, "drop": 1}, {"drop": 0, "late": 1}, {"late": 0}):
            simulator.set({"faults": changes})
            client = await connect(simulator)
            client.write(f"GET {target()} HTTP/1.1\r\n\r\n".encode())
            client.writer.write_eof()
            end = await client.reader.read()
            assert end == b"" or end.endswith(b"LIMIT_DAY")

        received = simulator.received()
        assert received["faults"] == {"drop": 1, "late": 1}
        assert received["answers"] == {"LIMIT_DAY": 1}
        assert received["accepted"] == 1
        [double] = received["doubles"]
        assert (double["requests"], double["accepted"], double["swallowed"]) == (3, 1, 1)
        assert [(m["answer"], m["fault"]) for m in simulator.messages()] == [
            (None, "drop"),
            ("MSG_OK", "late"),
            ("LIMIT_DAY", None),
        ]


async def test_late_refusal_is_not_accepted(connect: Connect) -> None:
    """What the rules refuse is not accepted, though the answer is lost."""
    config = Config(services=(Service(42, disabled=True),), faults=Faults(late=1.0))
    async with Simulator(config) as simulator:
        client = await connect(simulator)
        client.write(f"GET {target()} HTTP/1.1\r\n\r\n".encode())

        assert await client.reader.read() == b""
        assert simulator.received()["accepted"] == 0
        assert simulator.messages()[0]["answer"] == "SERVICE_DISABLED"


async def test_reset(connect: Connect) -> None:
    """A reset connection is reset, not closed."""
    async with Simulator(Config(faults=Faults(reset=1.0))) as simulator:
        client = await connect(simulator)
        client.write(f"GET {target()} HTTP/1.1\r\n\r\n".encode())

        with pytest.raises(ConnectionResetError):
            await client.reader.read()
        assert simulator.received()["faults"] == {"reset": 1}


async def test_hang(connect: Connect, until: Until) -> None:
    """A hanging request is never answered, others go on, and a client that leaves is let go."""
    async with Simulator(Config(faults=Faults(hang=1.0))) as simulator:
        hanging, leaving = await connect(simulator), await connect(simulator)
        for client in (hanging, leaving):
            client.write(f"GET {target()} HTTP/1.1\r\n\r\n".encode() * 2)
        await until(lambda: simulator.received()["faults"] == {"hang": 2})
        simulator.set({"faults": {"hang": 0}})

        assert await (await connect(simulator)).send("359881111111") == "MSG_OK"
        await until(lambda: len(simulator.connections) == 3)
        await leaving.close()
        await until(lambda: len(simulator.connections) == 2)
    # The end resets or closes what hangs; either way no byte of an answer has come.
    try:
        assert await hanging.reader.read() == b""
    except ConnectionResetError:
        assert not hanging.reader._buffer  # type: ignore[attr-defined]  # no public look inside


async def test_errors_and_garbage(connect: Connect) -> None:
    """A 5xx and a piece of garbage are answers that accept nothing."""
    async with Simulator(Config(seed=1, faults=Faults(error=1.0))) as simulator:
        client = await connect(simulator)
        status, _ = await client.get(target())
        assert status in (500, 502, 503, 504)

        simulator.set({"faults": {"error": 0, "garbage": 1}})
        for number in range(60):
            client = await connect(simulator)
            path = target(f"3598812345{number:02}")
            client.write(f"GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
            head, _, body = (await client.reader.read()).partition(b"\r\n\r\n")
            whole = head.startswith(b"HTTP/1.1 200") and f"Length: {len(body)}".encode() in head
            assert not (whole and body == b"MSG_OK")

        received = simulator.received()
        assert received["faults"] == {"error": 1, "garbage": 60}
        assert received["accepted"] == 0


async def test_same_seed_same_fate(connect: Connect) -> None:
    """Under one seed each message meets the same fate, in whatever order the messages come."""
    faults = Faults(drop=0.2, error=0.2, garbage=0.2, late=0.2)
    messages = [f"3598812345{number:02}" for number in range(40)] * 2

    async def fates(seed: int, order: list[str]) -> dict[str, list[tuple[Any, Any]]]:
        async with Simulator(Config(seed=seed, faults=faults)) as simulator:
            for msisdn in order:
                client = await connect(simulator)
                path = target(msisdn, extended=True)
                client.write(f"GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
                await client.reader.read()
            found: dict[str, list[tuple[Any, Any]]] = {msisdn: [] for msisdn in sorted(order)}
            for message in simulator.messages():
                found[message["msisdn"]].append((message["answer"], message["fault"]))
            return found

    first = await fates(11, messages)

    assert first == await fates(11, messages[::-1])
    assert first != await fates(12, messages)
    assert {fault for fate in first.values() for _, fault in fate} == {
        Fault.DROP,
        Fault.ERROR,
        Fault.GARBAGE,
        Fault.LATE,
        None,
    }


async def test_windows_follow_the_providers_clock(connect: Connect) -> None:
    """Setting the provider's clock ahead by a day renews its daily limit."""
    async with Simulator(Config(services=(Service(42, day=1),))) as simulator:
        client = await connect(simulator)
        assert [await client.send(), await client.send()] == ["MSG_OK", "LIMIT_DAY"]

        simulator.set({"clock_offset": DAY})

        assert [await client.send(), await client.send()] == ["MSG_OK", "LIMIT_DAY"]


async def test_set_while_it_runs(connect: Connect) -> None:
    """Services, bans and rates are changed at the control address, on the same port."""
    async with Simulator(Config(services=(Service(42, day=9),))) as simulator:
        client = await connect(simulator)
        answers = []
        for changes in (
            {"services": [{"id": 42, "disabled": True}]},
            {"services": [{"id": 42, "disabled": False, "allowed_ips": ["10.0.0.0/8"]}]},
            {"services": [{"id": 42, "allowed_ips": []}], "ban_now": 1000},
            {"unban": True},
            {"ban_now": {"seconds": 1000, "ip": "127.0.0.1"}},
            {"ban_now": {"seconds": 1000, "ip": "10.0.0.1"}, "unban": True},
            {"services": [{"id": 42, "day": 1}], "unban": True},
            {"ban": {"refused": 0, "seconds": 1000}, "services": [{"id": 42, "delay": 1000}]},
            {"services": [{"id": 42, "day": None}]},
            {},
        ):
            status, body = await client.post("/simulator/set", json.dumps(changes))
            assert (status, json.loads(body)) == (200, {"ok": True})
            answers.append(await client.send())

        assert answers == [
            "SERVICE_DISABLED",
            "INVALID_IP",
            "BAN_IP_TEMP",
            "MSG_OK",
            "BAN_IP_TEMP",
            "MSG_OK",
            "LIMIT_DAY",
            "LIMIT_DAY",
            "LIMIT_DELAY",
            "BAN_IP_TEMP",
        ]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("[]", "the set of changes must be a JSON object."),
        ('{"port": 1}', "port cannot be changed while the simulator runs."),
        ('{"faults": {"drop": 2}}', "faults: drop must be a share from 0 to 1, but is 2.0."),
        ('{"ban_now": {"secs": 2}}', "ban_now has no setting 'secs', but seconds, ip."),
        ('{"ban_now": true}', "ban_now: seconds cannot be True."),
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ],
)
async def test_set_refuses(connect: Connect, body: str, error: str) -> None:
    """A change that does not fit is refused in one sentence, and nothing is changed."""
    async with Simulator() as simulator:
        client = await connect(simulator)
        before = simulator.config

        status, answer = await client.post("/simulator/set", body)

        assert (status, json.loads(answer)) == (400, {"error": error})
        assert simulator.config == before


async def test_received_and_messages_over_http(connect: Connect) -> None:
    """The control address tells the summary, and the log from any request on."""
    async with Simulator(Config(seed=5)) as simulator:
        client = await connect(simulator)
        await client.send(text="Здравей")
        await client.send("1", "x")

        status, body = await client.get("/simulator/received")
        assert (status, json.loads(body)) == (200, simulator.received())
        assert simulator.received()["seed"] == 5

        status, body = await client.get("/simulator/messages")
        lines = [json.loads(line) for line in body.splitlines()]
        assert (status, lines) == (200, simulator.messages())
        assert [(m["n"], m["text"], m["answer"]) for m in lines] == [
            (1, "Здравей", "MSG_OK"),
            (2, "x", "INVALID_MSISDN"),
        ]
        assert lines[0]["monotonic"] < lines[1]["monotonic"]
        assert lines[0]["time"].endswith("+00:00")

        status, body = await client.get("/simulator/messages?after=1")
        assert [json.loads(line)["n"] for line in body.splitlines()] == [2]
        assert (await client.get("/simulator/messages?after=x"))[0] == 400


async def test_log_keeps_the_newest(connect: Connect) -> None:
    """The log is bounded; the summary still knows all."""
    async with Simulator(Config(log_size=2)) as simulator:
        client = await connect(simulator)
        for text in "abc":
            await client.send(text=text)

        assert [message["text"] for message in simulator.messages()] == ["b", "c"]
        assert simulator.received()["messages"] == 3


async def test_reset_forgets(connect: Connect) -> None:
    """After a reset nothing was received, used or banned; the set-up stays."""
    config = Config(services=(Service(42, day=1),), ban=Ban(after=1, seconds=1000), seed=1)
    async with Simulator(config) as simulator:
        fresh = simulator.received()
        client = await connect(simulator)
        first = await client.send(extended=True)
        assert await client.send() == "BAN_IP_TEMP"

        assert (await client.post("/simulator/reset"))[0] == 200

        assert simulator.received() == fresh
        assert simulator.messages() == []
        assert await client.send(extended=True) == first


async def test_large_body_arrives_whole(connect: Connect) -> None:
    """A body as large as is allowed is read to its end."""
    async with Simulator() as simulator:
        client = await connect(simulator)

        status, _ = await client.post("/simulator/set", " " * (BODY_MAX - 2) + "{}")

        assert status == 200


async def test_same_port_twice() -> None:
    """A port that is taken is an error at the start."""
    async with Simulator() as simulator:
        port = int(simulator.address.rpartition(":")[2])
        with pytest.raises(OSError, match="in use"):
            await Simulator(Config(port=port)).__aenter__()


async def test_ipv6(connect: Connect) -> None:
    """An IPv6 address is served and shown as a URL writes it."""
    async with Simulator(Config(host="::1")) as simulator:
        assert simulator.url.startswith("http://[::1]:")
        client = await connect(simulator, "::1")

        assert await client.send() == "MSG_OK"
        assert simulator.messages()[0]["ip"] == "::1"
