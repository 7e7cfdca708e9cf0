"""A message on its way, and the states it can be in."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class Status(StrEnum):
    """The states of a message, in the terms of SMPP 5.0 where it has one."""

    PENDING = "pending"
    SENDING = "sending"
    ACCEPTED = "accepted"
    ENROUTE = "enroute"
    DELIVERED = "delivered"
    UNDELIVERABLE = "undeliverable"
    REJECTED = "rejected"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Probe:
    """The probe of a closed egress as its worker took it: until when nobody else takes one."""

    ban_episode: int
    banned_until: datetime | None
    ill_until: datetime | None


# Not frozen: one is made for each message, and freezing takes half of that time.
@dataclass(slots=True)
class Message:
    """One claimed message, as the worker that claimed it holds it.

    Times are seconds on the clock of this machine that also counts suspend (`clock.now`).
    """

    id: int
    claim_no: int
    service_id: int
    user_id: int
    msisdn: str
    text: str
    extended: bool
    attempt: int
    """Which request this would be, from 1."""
    failures: int
    """How often in a row a request for it never left."""
    doubted: bool
    """Sent before, without an answer."""
    claimed_at: float
    slot: float | None
    """When its service's pace lets it go; None for a service without a pace."""
    delay: float
    """Seconds that must lie between it and the next one of its service; 0 without a pace."""
    last_slot: bool
    """Whether the slot after its own may be another worker's."""
    send_before: float | None
    """The end of the quota window it was debited to, or None without a limit."""
    expires: float | None
    ban_episode: int
    egress_probe: Probe | None
    """Sent to learn whether a ban or an illness of the provider is over; None for all others."""
    probes_service: bool
    """Sent to learn whether a block of its service is over."""
