"""Requests /v2/health/live of HOST PORT [TOKEN] every 20 ms; prints a line per answer: start, seconds, status.

It is a separate process, so that the work of the attacking interpreter does not delay it.
"""

from __future__ import annotations

import http.client
import select
import sys
import time

EVERY_S = 0.02


def main() -> None:
    """Send requests until standard input is closed."""
    host, port = sys.argv[1], int(sys.argv[2])
    shown = {"Authorization": f"Bearer {sys.argv[3]}"} if sys.argv[3:] and sys.argv[3] else {}
    connection = http.client.HTTPConnection(host, port, timeout=60)
    while not select.select([sys.stdin], [], [], EVERY_S)[0]:
        begun = time.monotonic()
        try:
            connection.request("GET", "/v2/health/live", headers=shown)
            answer = connection.getresponse()
            answer.read()
            status = str(answer.status)
        except (OSError, http.client.HTTPException) as error:
            status = type(error).__name__
            connection.close()
        print(f"{begun:.6f} {time.monotonic() - begun:.6f} {status}", flush=True)


if __name__ == "__main__":
    main()
