"""One method of each kind on a decoder; on an encoder–decoder the default."""

from conformance import *  # noqa: F403 - every check
from conformance import KINDS, runs

finished = runs(decoder=KINDS, encoder_decoder=["selected"])
