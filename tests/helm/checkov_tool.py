"""checkov, in an environment of its own: it pins a hundred packages, some against ours. Made at its first use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from platformdirs import user_cache_path

VERSION = "3.3.30"


def checkov_executable() -> str:
    """The command; installed below the user's cache folder where it is not yet."""
    folder = user_cache_path("switchyard") / f"checkov-{VERSION}-py{sys.version_info.major}.{sys.version_info.minor}"
    executable = folder / "bin" / "checkov"
    done = folder / ".installed"
    if not done.exists():
        problem = _install(folder)
        if problem:
            missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
            missing(f"checkov {VERSION} could not be installed: {problem}")
        done.touch()
    return str(executable)


def _install(folder: Path) -> str:
    """Why it could not be installed, or ""."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", f"checkov=={VERSION}"]
    try:
        tried = subprocess.run(pip, capture_output=True, text=True, check=False, timeout=600)
    except subprocess.TimeoutExpired:
        return "it took longer than 600 s"
    lines = tried.stderr.strip().splitlines()
    return "" if tried.returncode == 0 else (lines[-1] if lines else f"pip ended with {tried.returncode}")
