"""What goes wrong between the provider and its client, by rate and by seed.

Every request draws its numbers from a hash of the seed, the message (service, number, text) and
how many requests for that message came before. So a run repeats exactly under its seed, in
whatever order concurrent requests arrive, and a second request for a message has its own fate.
"""

from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from http import HTTPStatus
from struct import Struct
from typing import NamedTuple, TypeVar

from dispatcher.simulator.http import response

Choice = TypeVar("Choice")

_NUMBERS = Struct("<8Q")

ERRORS = (
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)
GARBAGE = (
    b"",
    b"MSG_OKAY",
    b"MSG_OK:",
    b"msg_ok",
    b"MSG_OK\nMSG_OK",
    b"MSG_OK:" + b"x" * 65,
    b"LIMIT_HOUR",
    b"\xff\xfe\x00\x80",
    b"<html><body>Maintenance</body></html>",
)
# What is no whole answer: it ends with the connection.
BROKEN = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 24\r\n\r\nMSG_OK",
    b"HTTP/1.1 200 OK\r\nContent-Le",
    b"MSG_OK\r\n\r\n",
)


class Draw(NamedTuple):
    """Eight independent numbers, from 0 up to but not 1, for the decisions about one request."""

    fault: float
    variant: float
    latency: float
    identifier: float
    report: float
    outcome: float
    enroute: float
    final: float


def draw(seed: int, service_id: str | None, msisdn: str | None, text: str | None, nth: int) -> Draw:
    """The numbers for the nth request (from 1) for a message under a seed."""
    key = f"{seed}\n{service_id}\n{msisdn}\n{nth}\n{text}".encode()
    # 53 bits are what a float holds exactly; 64 could round up to 1.
    return Draw(*[(n >> 11) * 2.0**-53 for n in _NUMBERS.unpack(blake2b(key).digest())])


def between(span: tuple[float, float], number: float) -> float:
    """The point of a span that a drawn number stands for."""
    return span[0] + (span[1] - span[0]) * number


def one_of(number: float, rates: tuple[tuple[Choice, float], ...]) -> Choice | None:
    """The choice that a drawn number falls on; None in what the rates leave of 1."""
    end = 0.0
    for choice, rate in rates:
        end += rate
        if number < end:
            return choice
    return None


class Fault(StrEnum):
    """One way in which a request gets no usable answer.

    Only `late` reaches the provider's rules: it may accept the message, and the connection is
    closed before the answer. The others swallow the request.
    """

    DROP = "drop"
    RESET = "reset"
    HANG = "hang"
    ERROR = "error"
    GARBAGE = "garbage"
    LATE = "late"


@dataclass(frozen=True, slots=True)
class Faults:
    """How often each fault happens, as a share of all requests, and the latency of all answers.

    `latency` is a span in seconds. `drop` closes the connection after reading, `reset` resets it,
    `hang` keeps it open and never answers, `error` is a 5xx, `garbage` an answer of no table,
    `late` accepts and then closes without answering.

    Raises ValueError with one sentence for a value that cannot be.
    """

    latency: tuple[float, float] = (0.0, 0.0)
    drop: float = 0.0
    reset: float = 0.0
    hang: float = 0.0
    error: float = 0.0
    garbage: float = 0.0
    late: float = 0.0

    def __post_init__(self) -> None:
        """Refuse shares that are none, and a span that runs backwards."""
        check_rates("faults", {fault.value: rate for fault, rate in self.rates})
        check_span("faults: latency", self.latency)

    @property
    def rates(self) -> tuple[tuple[Fault, float], ...]:
        """Each fault with its rate, in the order in which a drawn number walks them."""
        return (
            (Fault.DROP, self.drop),
            (Fault.RESET, self.reset),
            (Fault.HANG, self.hang),
            (Fault.ERROR, self.error),
            (Fault.GARBAGE, self.garbage),
            (Fault.LATE, self.late),
        )


def check_rates(where: str, rates: dict[str, float]) -> None:
    """Raise ValueError unless each rate is a share and all together are at most 1."""
    for name, rate in rates.items():
        if not 0 <= rate <= 1:
            raise ValueError(f"{where}: {name} must be a share from 0 to 1, but is {rate}.")
    if sum(rates.values()) > 1 + 1e-9:
        raise ValueError(f"{where}: {', '.join(rates)} together must not exceed 1.")


def check_span(where: str, span: tuple[float, float]) -> None:
    """Raise ValueError unless the span's seconds run forwards from 0."""
    if not 0 <= span[0] <= span[1]:
        raise ValueError(f"{where} must be seconds MIN:MAX, but is {span[0]:g}:{span[1]:g}.")


def spoiled(fault: Fault, number: float, *, keep: bool) -> tuple[bytes, bool]:
    """The bytes of a 5xx or garbage answer, and whether the connection lives on after it."""
    if fault is Fault.ERROR:
        return response(ERRORS[int(number * len(ERRORS))], b"error", keep=keep), keep
    place = int(number * (len(GARBAGE) + len(BROKEN)))
    if place < len(GARBAGE):
        return response(200, GARBAGE[place], keep=keep), keep
    return BROKEN[place - len(GARBAGE)], False
