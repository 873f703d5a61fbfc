"""One model and many adapters of it, and groups of ranks that run engines with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peft_adapters import make_adapter, ref_of
from tests.workers.engine_group import EngineGroup
from tests.workers.tiny_llama import make_checkpoint
from workers.engine.adapters.ref import AdapterRef


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="session")
def base(folder: Path) -> Path:
    return make_checkpoint("gqa", folder)


@pytest.fixture(scope="session")
def adapters(base: Path, folder: Path) -> list[AdapterRef]:
    """Six, of several ranks and modules."""
    kinds = [{}, {"r": 2}, {"target_modules": ["q_proj", "down_proj"]}, {"r": 16}, {"use_rslora": True}, {"r": 8}]
    return [ref_of(make_adapter(base, folder / f"a{i}", seed=i, **kind)) for i, kind in enumerate(kinds)]


@pytest.fixture(scope="session")
def single() -> Iterator[EngineGroup]:
    with EngineGroup(1, 1) as group:
        yield group


@pytest.fixture(scope="session", params=[1, 2], ids=lambda tp: f"tp{tp}")
def split(request: pytest.FixtureRequest, single: EngineGroup) -> Iterator[EngineGroup]:
    if request.param == 1:
        yield single
        return
    with EngineGroup(request.param, 1) as group:
        yield group
