"""One cache of remote code for all tests here: transformers binds its package of copied code to the first folder it sees."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    cache = str(tmp_path_factory.mktemp("modules"))
    patch.setattr("transformers.utils.hub.HF_MODULES_CACHE", cache, raising=False)
    patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    yield
    patch.undo()
