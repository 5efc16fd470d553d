"""The other methods on a decoder, in half precision and with gradients of two batches a step."""

import pytest
from conformance import *  # noqa: F403 - every check
from conformance import KINDS, NAMES, runs

finished = runs(decoder=[name for name in NAMES if name not in KINDS])
pytestmark = pytest.mark.slow
