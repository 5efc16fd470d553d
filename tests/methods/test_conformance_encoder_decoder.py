"""All methods but the default on an encoder–decoder."""

import pytest
from conformance import *  # noqa: F403 - every check
from conformance import NAMES, runs

finished = runs(encoder_decoder=[name for name in NAMES if name != "selected"])
pytestmark = pytest.mark.slow
