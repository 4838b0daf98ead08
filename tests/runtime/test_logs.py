"""Log lines can be read by people and by programs."""

from __future__ import annotations

import logging

from runtime.logs import DropLog, log_event


def test_a_log_line_names_the_event_and_its_subject(caplog):
    log = logging.getLogger("runtime.test")
    with caplog.at_level(logging.INFO, "runtime.test"):
        log_event(log, logging.INFO, "attempt over", request=7, attempt=2, stage=None, reason='it said "no"\nand died')
        log_event(log, logging.DEBUG, "not shown", request=8)
    (record,) = caplog.records
    assert record.getMessage() == 'attempt over request=7 attempt=2 reason="it said \\"no\\"\\nand died"'
    assert record.fields == {"request": 7, "attempt": 2, "reason": 'it said "no"\nand died'}


def test_what_is_dropped_fills_no_log(caplog):
    drops = DropLog(logging.getLogger("runtime.test"))
    for _ in range(1000):
        drops.note("garbage")
    assert len(caplog.records) == 1
    drops._next_s = 0
    drops.note("again")
    assert caplog.records[-1].fields == {"reason": "again", "more": 999}
