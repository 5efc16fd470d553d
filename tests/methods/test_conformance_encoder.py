"""Every method on an encoder."""

from conformance import *  # noqa: F403 - every check
from conformance import NAMES, runs

finished = runs(encoder=NAMES)
