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
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def steps(text: str) -> Iterator[tuple[str, str]]:
    """Yield what a reader would type: the commands of a shell block one by one, a Python block as a whole."""
    for language, block in _BLOCK.findall(text):
        lines = [block] if language == "python" else block.replace("\\\n", " ").splitlines()
        yield from ((language, line.strip()) for line in lines if line.strip())


def run(language: str, code: str, session: dict[str, Any]) -> int:
    """Run a command, or a block in the session of the blocks before it; return its exit code."""
    if language == "python":
        try:
            exec(compile(code, "README.md", "exec"), session)
        except Exception:
            traceback.print_exc(file=sys.stdout)
            return 1
        return 0
    done = subprocess.run(
        ["bash", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(re.sub(r"[^\n]*\r", "", done.stdout), end="")  # of a bar, what is left in the end
    return done.returncode


def main(readme: Path) -> int:
    times: list[str] = []
    session: dict[str, Any] = {"__name__": "readme"}
    for language, code in steps(readme.read_text(encoding="utf-8")):
        print(f"\n{'$' if language == 'sh' else '>>>'} {code}", flush=True)
        start = time.monotonic()
        returned = run(language, code, session)
        name = code if language == "sh" else "a block of Python"
        times.append(f"{time.monotonic() - start:7.1f} s, exit {returned}: {name}")
        print(f"[{times[-1].strip()}]", flush=True)
        if returned not in ((0, 1) if code.startswith("weightlora check ") else (0,)):
            return 1
    print("\n== wall time of each", *times, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
