"""One method of each kind on a decoder and an encoder–decoder."""

from conformance import *  # noqa: F403 - every check
from conformance import KINDS, runs

finished = runs(KINDS, "decoder", "encoder-decoder")
