"""The run of Self-Rewarding PPO that several files look at."""

import pytest

from tests.loops import srppo_lab


@pytest.fixture(scope="session")
def lab(request, tmp_path_factory):
    return srppo_lab.run(tmp_path_factory.mktemp("srppo_lab"))
