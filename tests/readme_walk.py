"""README from its first line to its last in the current folder: each command and each block of Python, in their order.

PATH=VENV/bin:$PATH python tests/readme_walk.py README.md    # `make fresh` runs it in a new environment

Prints what each prints and how long it took, and exits with 1 where one fails. ``weightlora check`` may end with 1:
it says that a runtime does not read the adapter.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def steps(text: str) -> Iterator[list[str]]:
    """Yield what a reader would type: the commands of a shell block one by one, a Python block as a whole."""
    for language, block in _BLOCK.findall(text):
        if language == "python":
            yield ["python", "-c", block]
        else:
            for line in block.replace("\\\n", " ").splitlines():
                yield ["bash", "-c", line]


def main(readme: Path) -> int:
    times: list[str] = []
    for words in steps(readme.read_text(encoding="utf-8")):
        shown = words[-1].strip() if words[0] == "bash" else "python <<'...'\n" + words[-1].strip()
        print(f"\n$ {shown}", flush=True)
        start = time.monotonic()
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        name = shown.splitlines()[0] if words[0] == "bash" else "a block of Python"
        times.append(f"{time.monotonic() - start:7.1f} s, exit {done.returncode}: {name}")
        seen = re.sub(r"[^\n]*\r", "", done.stdout)  # of a bar, what is left in the end
        print(f"{seen}[{times[-1].strip()}]", flush=True)
        allowed = (0, 1) if shown.startswith("weightlora check ") else (0,)
        if done.returncode not in allowed:
            return 1
    print("\n== wall time of each", *times, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
