"""The commands of a page of the documentation, as Bash reads them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def commands(page: Path) -> list[list[str]]:
    """The words after `python` of each command in the indented blocks, in their order; variables
    that a block sets stay set, and loops run."""
    blocks = re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", page.read_text(), re.MULTILINE)
    stub = 'python() { printf "%s\\0" "$@"; printf "\\n\\0"; }\n'
    script = stub + "\n".join(blocks)
    done = subprocess.run(
        ["bash", "-euc", script], capture_output=True, text=True, check=True, cwd=page.parent
    )
    assert not done.stderr
    found: list[list[str]] = [[]]
    for word in done.stdout.split("\0")[:-1]:
        if word == "\n":
            found.append([])
        else:
            found[-1].append(word)
    return found[:-1]
