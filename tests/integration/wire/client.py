"""The client under test, with what all its messages have in common."""

from dispatcher.provider import Check, Provider, Reply, Wait

NUMBER = "359881234567"
TEXT = "Your code is 4711"


def client(
    url: str, *, timeout: float = 20, keepalive: float = 30, concurrency: int = 10
) -> Provider:
    """A client that waits longer than any test takes, unless told otherwise."""
    return Provider(url, timeout=timeout, keepalive=keepalive, concurrency=concurrency)


def yes() -> None:
    """The check of a message that may leave."""


async def send(
    provider: Provider, text: str = TEXT, *, check: Check = yes, wait: Wait | None = None
) -> Reply:
    """Send one message."""
    return await provider.send(
        user_id=7,
        service_id=42,
        msisdn=NUMBER,
        text=text,
        extended=True,
        check=check,
        wait=wait,
    )
