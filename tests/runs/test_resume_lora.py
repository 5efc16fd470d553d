"""Methods that train stock LoRA from beginning to end resume with all of their state."""

import pytest
from small_run import methods_that_train, resumes


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", methods_that_train("lora"))
def test_its_own_checkpoints_are_whole(base, tmp_path, method):
    """No state of any method is taken for damage: the run resumes without a warning, to the same adapter."""
    assert resumes(base, tmp_path, method)
