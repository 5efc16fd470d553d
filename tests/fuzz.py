"""How much the generators of the tests try: ``WEIGHTLORA_FUZZ`` and ``WEIGHTLORA_FUZZ_SEED``; see CONTRIBUTING.md."""

import os
import random
import sys

#: None: the small numbers that the suite runs with. 1: the numbers of ``make fuzz``; 0.1: a tenth of them.
FACTOR = os.environ.get("WEIGHTLORA_FUZZ")


def cases(suite, full):
    """The number of cases: ``suite``, or where WEIGHTLORA_FUZZ is given, that times ``full``."""
    return suite if FACTOR is None else max(suite, round(float(FACTOR) * full))


def generator(number=0):
    """Random numbers that WEIGHTLORA_FUZZ_SEED changes; ``number`` tells the generators of a file apart."""
    return random.Random(10**6 * int(os.environ.get("WEIGHTLORA_FUZZ_SEED", "0")) + number)


def tell(capsys, text):
    """Print the counts of a generator, whatever pytest captures."""
    with capsys.disabled():
        sys.stdout.write(f"\n{text}\n")
