"""Prints what extras of the project need, one requirement a line: `python3 requirements.py pyproject.toml router`.

The dependencies are installed before the project itself: a changed line of code then makes a layer of megabytes, not
of gigabytes. Needs nothing but Python.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any


def requirements(project: dict[str, Any], extras: list[str]) -> list[str]:
    """What the project needs with these extras; extras that name other extras are followed."""
    found = list(project["dependencies"])
    for extra in extras:
        for needed in project["optional-dependencies"][extra]:
            own = re.fullmatch(rf"{project['name']}\[(.+)\]", needed)
            found += requirements(project, own[1].split(",")) if own else [needed]
    return sorted(set(found))


if __name__ == "__main__":
    project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
    sys.stdout.write("\n".join(requirements(project, sys.argv[2:])) + "\n")
