"""The gateway's own socket."""

from __future__ import annotations

import pytest

from runtime.errors import LaunchFailed
from runtime.gateway.server import listen


@pytest.mark.parametrize("host", ["a" * 100, "a..b", "a\0b", "256.0.0.1"])
def test_an_invalid_host_name_is_refused_with_a_message(host):
    """A label of more than 63 characters was an internal error."""
    with pytest.raises(LaunchFailed, match="Choose another --host"):
        listen(host, 0)
