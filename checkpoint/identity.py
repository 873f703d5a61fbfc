"""What a router and its workers must have in common, or one would answer for another."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from switchyard.v1 import identity_pb2

from checkpoint.digest import file_digest


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The cluster and exactly which model it serves."""

    cluster: str
    """Name of the cluster."""
    model: str
    """Name that clients use."""
    weights: str
    """Digest of all weight files, and of what the config files say of the model (workers.model.identity). Empty in
    what a router says that takes over its workers': any."""
    tokenizer: str
    """Digest of tokenizer.json; empty where there is none."""

    def difference(self, other: ServedModel) -> str:
        """The first field in which the two differ, with both values; "" when they are the same."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            is_open = field.name == "weights" and not (mine and theirs)
            if mine != theirs and not is_open:
                return f"{field.name}: {theirs or 'none'} there, {mine or 'none'} here"
        return ""

    def message(self) -> identity_pb2.ServedModel:
        """The same as it goes over the wire."""
        return identity_pb2.ServedModel(
            cluster=self.cluster, model=self.model, weights=self.weights, tokenizer=self.tokenizer
        )

    @classmethod
    def of(cls, message: identity_pb2.ServedModel) -> ServedModel:
        """As it came over the wire."""
        return cls(message.cluster, message.model, message.weights, message.tokenizer)


def tokenizer_digest(directory: Path) -> str:
    """Digest of the model's tokenizer.json; "" where there is none. Raises CheckpointError."""
    path = directory / "tokenizer.json"
    return file_digest(path) if path.exists() else ""
