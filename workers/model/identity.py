"""What tells one model's answers from another's: its weights, and how its config has them used. Without torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from checkpoint.errors import CheckpointError
from checkpoint.tensors import weights_digest
from workers.errors import ModelError
from workers.model.config import ModelConfig

_FAKE_WEIGHTS = "hashes of the history, 1"  # of the fake engine: changes with workers.runtime.fake.model


def weights_identity(directory: Path, model: ModelConfig, runner: str) -> str:
    """Digest of all bytes of the weights, and of what was read of config.json and generation_config.json.

    Raises ModelError.
    """
    try:
        weights = _FAKE_WEIGHTS if runner == "fake" else weights_digest(directory)
    except CheckpointError as error:
        raise ModelError(str(error)) from None
    return hashlib.blake2b(f"{weights}\0{model.fingerprint_fields()}".encode(), digest_size=16).hexdigest()
