"""An optimisation that does not apply says so once."""

import logging

from pyunlearn._declined import decline


def test_a_reason_is_logged_once_and_always_returned(caplog):
    with caplog.at_level(logging.INFO, "pyunlearn"):
        for reason in ("no cache", "no cache", "2 of 30 tokens", "15 of 7 tokens"):
            assert decline("a test's optimisation", reason) == reason
        decline("another of a test", "no cache")
    assert caplog.messages == [
        "a test's optimisation is not used: no cache",
        "a test's optimisation is not used: 2 of 30 tokens",
        "another of a test is not used: no cache",
    ]
