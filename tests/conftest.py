"""Fixtures for every test."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data that is too large to be in the repository: `<repository>/../shared/data`.

    A test that asks for it is skipped, by name, where the folder is missing.
    """
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _stock_kernels():
    """Tests do not depend on whether this machine has the native kernels built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_MMLLM_KERNELS", "stock")
        yield
