"""The Host headers that a server accepts, and ambiguous ones."""

from __future__ import annotations

import pytest

from onnxsplit.errors import InputError
from runtime.gateway.access import AccessControl
from runtime.gateway.errors import Forbidden


@pytest.mark.parametrize(
    "host",
    [
        "lo\tcalhost", "localhost/evil", "localhost#evil", "localhost?evil", "a@localhost", "localhost:abc",
        "localhost:", "localhost:1:2", "[::1", "::1", "[localhost]:1", "local host", "localhost\n", "[]", ":80",
    ],
)  # fmt: skip
def test_a_host_that_is_not_written_as_one_is_refused(host):
    for access in (AccessControl(), AccessControl(loopback=False)):
        with pytest.raises(InputError, match="the Host header is"):
            access.check_site([host], [], "/v2")


@pytest.mark.parametrize("host", ["localhost", "LocalHost:8000", "127.0.0.1:1", "[::1]", "[::1]:8000"])
def test_this_host_is_asked_by_its_names(host):
    AccessControl().check_site([host], [f"http://{host}"], f"http://{host}/v2")


def test_other_names_are_for_servers_of_a_network():
    for host in ("node_1.example-net:80", "10.0.0.7", "[fd00::1]:80"):
        AccessControl(loopback=False).check_site([host], [], "/v2")
        with pytest.raises(Forbidden):
            AccessControl().check_site([host], [], "/v2")
