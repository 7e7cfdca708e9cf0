"""A text arrives as it is: it cannot add a parameter, break the line or lose a character."""

from base64 import b64encode

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yarl import URL

from dispatcher.provider import Answer, Provider
from tests.integration.wire.client import NUMBER, yes
from tests.integration.wire.raw_provider import RawProvider

HOSTILE = [
    "",
    " ",
    "   leading and trailing   ",
    "&service_id=9",
    "x&msisdn=359880000000&extended=no",
    "a=b=c;d=e",
    "line\r\nHost: elsewhere\r\n\r\nGET /second HTTP/1.1\r\n",
    "\n",
    "tab\tbell\x07nul\x00del\x7f",
    "#fragment",
    "?query",
    "a+b c%20d",
    "%00%0d%0a%41%zz%",
    "../../etc/passwd",
    "//host/path\\back",
    "'\"<script>`{}|^[]~",
    "Вашата фактура № 5 е готова",  # noqa: RUF001 - Bulgarian, not Latin
    "日本語のテキスト",
    "مرحبا \u202eobrev\u202c",
    "👩\u200d👩\u200d👧\u200d👦 🇧🇬",
    "e\u0301 \u00e9 \ufeff \u2028 \u2029 \u00a0",
    "\U0001f600" * 160,
    "\U0010ffff\uffff\ufffe",
    "x" * 10_000,
]


async def deliver(
    raw: RawProvider,
    text: str,
    *,
    user_id: int = 7,
    service_id: int = 42,
    extended: bool = True,
    query: str = "",
) -> str:
    """Send a text over the wire; returns the request's target."""
    before = len(raw.requests)
    async with Provider(raw.url + query, timeout=20, keepalive=30, concurrency=1) as provider:
        reply = await provider.send(
            user_id=user_id,
            service_id=service_id,
            msisdn=NUMBER,
            text=text,
            extended=extended,
            check=yes,
        )
    assert isinstance(reply, Answer)
    assert not raw.rests
    (request,) = raw.requests[before:]
    assert request.head.count(b"\r\n") == len(request.head.split(b"\r\n")) - 1
    assert {line.split(b":")[0] for line in request.head.split(b"\r\n")[1:-2]} == {
        b"Host",
        b"User-Agent",
    }
    expected = [
        ("user_id", str(user_id)),
        ("service_id", str(service_id)),
        ("msisdn", NUMBER),
        ("text", text),
    ]
    if extended:
        expected.append(("extended", "yes"))
    assert request.parameters[-len(expected) :] == expected
    return request.target


@pytest.mark.parametrize("text", HOSTILE)
async def test_a_hostile_text_arrives_exactly(raw: RawProvider, text: str) -> None:
    """Characters with a meaning in a URL or in HTTP lose it on the way and have it back after."""
    target = await deliver(raw, text)
    assert target.startswith(f"/send.php?user_id=7&service_id=42&msisdn={NUMBER}&text=")
    assert target.count("&") == 4


@given(
    text=st.text(max_size=160),
    user_id=st.integers(0, 2**63 - 1),
    service_id=st.integers(0, 2**63 - 1),
    extended=st.booleans(),
)
@settings(
    max_examples=100,
    deadline=None,
    # The raw provider may serve all examples: each looks at its own request only.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
async def test_any_text_arrives_exactly(
    raw: RawProvider, text: str, user_id: int, service_id: int, *, extended: bool
) -> None:
    """Whatever Unicode a text is made of, the provider reads that text."""
    await deliver(raw, text, user_id=user_id, service_id=service_id, extended=extended)


async def test_a_message_without_reports_says_nothing_of_them(raw: RawProvider) -> None:
    """The parameter `extended` is there or it is not."""
    assert "extended" not in await deliver(raw, "x", extended=False)


async def test_the_protocols_example_is_sent_letter_for_letter(raw: RawProvider) -> None:
    """A space is %20, as the provider's documentation writes it."""
    target = await deliver(raw, "sms notification")
    assert target == (
        f"/send.php?user_id=7&service_id=42&msisdn={NUMBER}&text=sms%20notification&extended=yes"
    )


@pytest.mark.parametrize(
    ("query", "begins"),
    [
        ("?", "/send.php?user_id=7&"),
        ("?key=a%2Bb%20c", "/send.php?key=a%2Bb%20c&user_id=7&"),
        ("?a=1&b=2#part", "/send.php?a=1&b=2&user_id=7&"),
        ("#part", "/send.php?user_id=7&"),
    ],
)
async def test_an_address_may_have_a_query_of_its_own(
    raw: RawProvider, query: str, begins: str
) -> None:
    """Our parameters come after those that the address has; a fragment is not sent."""
    assert (await deliver(raw, "x", query=query)).startswith(begins)


async def test_an_address_may_name_a_user(raw: RawProvider) -> None:
    """What stands before the host is sent as HTTP's own credentials, and not in the address."""
    address = raw.url.replace("//", "//me:s%20ecret@")
    async with Provider(address, timeout=20, keepalive=30, concurrency=1) as provider:
        reply = await provider.send(
            user_id=7, service_id=42, msisdn=NUMBER, text="x", extended=False, check=yes
        )
    assert isinstance(reply, Answer)
    (request,) = raw.requests
    assert request.head.split(b"\r\n")[1:] == [
        f"Host: {URL(raw.url).authority}".encode(),
        b"User-Agent: dispatcher",
        b"Authorization: Basic " + b64encode(b"me:s ecret"),
        b"",
        b"",
    ]
