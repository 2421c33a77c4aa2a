"""Small checkpoints in the fused layout."""

from pathlib import Path

import pytest

from tests.support import checkpoints
from tests.support.loading import RAW, TENSORS


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    checkpoints.write_fused(tmp_path / "dbrx", RAW, TENSORS)
    return tmp_path / "dbrx"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    checkpoints.write_fused(tmp_path / "dbrx", RAW, TENSORS, shards=3)
    return tmp_path / "dbrx"
