"""Where this machine's apt gets Debian from, for tests that fetch packages into folders of their own."""

from __future__ import annotations

import shutil
import subprocess

SUITE = "bookworm"


def mirror() -> str:
    """URL of the mirror that apt is configured with for SUITE; "" where there is none."""
    if shutil.which("apt-get") is None:
        return ""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", f"Codename: {SUITE}"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return said[0].rstrip("/") if said else ""
