"""Headers of servers that adapters post to."""

import time
from email.utils import formatdate

import pytest

from evsys_adapters.common.http_client import retry_after_seconds

DAY = 86_400.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("7", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("nan", 0.0),
        ("inf", DAY),
        ("1e12", DAY),
        ("soon", None),
        ("", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 2999 07:28:00 GMT", DAY),
        ("Wed, 21 Oct 2015 99:28:00 GMT", None),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", None),
    ],
)
def test_a_pause_that_a_server_asks_for_is_a_number_of_seconds_of_a_day_at_most(text, expected):
    assert retry_after_seconds(text) == expected


def test_a_date_is_the_time_until_it():
    assert 55 < retry_after_seconds(formatdate(usegmt=True, timeval=time.time() + 60)) <= 60
