"""How free places are shared between services."""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heapify, heapreplace


def share(free: int, held: Mapping[int, int]) -> dict[int, int]:
    """Give each free place to the service that holds the fewest.

    `held` maps each service that may send to the messages already held for it, so a service
    whose answers come slowly cannot take the places of one whose answers come at once. Ties go
    in the order of `held`. Returns only services that get a place.
    """
    if free <= 0 or not held:
        return {}
    queue = [(count, order, service) for order, (service, count) in enumerate(held.items())]
    heapify(queue)
    places: dict[int, int] = {}
    for _ in range(free):
        count, order, service = queue[0]
        places[service] = places.get(service, 0) + 1
        heapreplace(queue, (count + 1, order, service))
    return places
