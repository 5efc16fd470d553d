"""Where no bar is shown, the log has a line every half minute; where one is, it has none."""

import io
import logging
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from weightlora.selection.progress import Progress


@pytest.mark.parametrize("shown", [True, False])
def test_a_line_every_half_minute_where_there_is_no_bar(shown, caplog):
    caplog.set_level(logging.INFO, "weightlora")
    clock, output = SimpleNamespace(seconds=0.0), io.StringIO()
    with tqdm(total=20, file=output, disable=not shown) as bar:
        progress = Progress(bar, "head", now=lambda: clock.seconds)
        for step in range(1, 17):  # of 8 seconds each
            clock.seconds += 8
            if step == 5:
                progress.set_description("scoring")
            progress.update()
    lines = [] if shown else ["head: 4 of 20", "scoring: 8 of 20", "scoring: 12 of 20", "scoring: 16 of 20"]
    assert caplog.messages == lines
    assert ("16/20" in output.getvalue()) == shown
