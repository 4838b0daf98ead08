"""The sampler follows the models that the server has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("prometheus_client", reason="needs the extra serve")

from runtime.gateway.models.version import Version, find_versions
from runtime.gateway.telemetry.sampler import Sampler


class Models(list[Version]):
    """Models as a repository holds them."""

    changes = 0
    ready = False


def test_versions_that_come_and_go_are_followed(chain_plan):
    models = Models(find_versions([chain_plan]))
    service: Any = SimpleNamespace(repository=models, astray=0, last_astray="")
    sampler = Sampler(service, cast(Any, None))
    assert [model.version for model in sampler.sample().models] == ["1"]
    (added,) = find_versions([chain_plan])
    added.number = "2"
    models.append(added)
    assert [model.version for model in sampler.sample().models] == ["1", "2"]
    del models[0]
    assert list(sampler.text_times) == [added]
    assert [model.version for model in sampler.sample().models] == ["2"]
    assert [model.version for model in sampler.slowest()] == ["2"]
