"""Writes log lines as a worker does, and says what one costs: `python -m bench.logger LINES`."""

from __future__ import annotations

import sys
import time

import structlog

from dispatcher import logs


def main() -> None:
    """Write the lines to standard output, and then the microseconds of CPU that each took."""
    lines = int(sys.argv[1])
    logs.configure("json", "info")
    log = structlog.stdlib.get_logger()
    began = time.process_time()
    for number in range(lines):
        log.info(
            "message.accepted",
            id=number,
            service_id=42,
            msisdn="35988***4567",
            reply="MSG_OK:123456789",
            provider_id="123456789",
            attempt=1,
            latency_ms=82.4,
            error=None,
        )
    sys.stdout.write(f"{(time.process_time() - began) / lines * 1e6:.2f}\n")


if __name__ == "__main__":
    main()
