"""The other methods on an encoder–decoder."""

import pytest
from conformance import *  # noqa: F403 - every check
from conformance import KINDS, NAMES, runs

finished = runs([name for name in NAMES if name not in KINDS], "encoder-decoder")
pytestmark = pytest.mark.slow
