"""The sequences of the coordinator's state machine, rule by rule."""

from __future__ import annotations

from sequence_driver import Driver, right


def test_a_sequence_is_read_decoded_token_by_token_and_ended(tmp_path):
    driver = Driver(tmp_path)
    number = driver.submit(max_tokens=4)
    (step,) = driver.steps.values()
    (row,) = step.rows
    assert (row.start, row.tokens, row.draw, row.opening.prompt) == (0, (1, 2, 3), True, 3)
    driver.run(1)
    (step,) = driver.steps.values()
    assert (step.rows[0].start, step.rows[0].tokens) == (3, tuple(driver.tokens[number][3:]))
    driver.run()
    assert driver.ends == {number: "length"}
    assert len(driver.tokens[number]) == 7
    assert right(driver)
