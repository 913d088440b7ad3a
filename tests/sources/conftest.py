"""What several tests of sources share."""

import pytest

from tests.sources.adapters import adapt


@pytest.fixture
def adapter(llama, tmp_path):
    return adapt(llama, tmp_path / "adapter")
