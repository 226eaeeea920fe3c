"""Lets the tests of this folder import `references`, and caches what they export."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """`exports(name, plan=..., inputs=...)`: a reference as ONNX, written once a test run."""
    import references

    return references.Exports(tmp_path_factory.mktemp("references"))


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """`families(name, plan=...)`: a multimodal reference as ONNX, written once a test run."""
    import family_files

    return family_files.Exports(tmp_path_factory.mktemp("families"))
