"""Proof that a stored fragment was written with the cluster's secret.

A checksum finds faults, but a process that can write to a tier outside the host can forge one. So values there end in a
tag: AES-256-GMAC (NIST SP 800-38D) under a fresh random nonce. Knows nothing of what a value holds.
"""

import hashlib
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_NONCE_BYTES = 12
TAG_BYTES = _NONCE_BYTES + 16


class FragmentAuthenticator:
    """Tags and checks values under one secret. Thread-safe."""

    def __init__(self, secret: str) -> None:
        """Raises ValueError for an empty secret."""
        if not secret:
            raise ValueError("tier_secret: must not be empty where there is a tier outside the host")
        self._mac = AESGCM(_derive(secret, b"mac", 32))
        self.key_id = _derive(secret, b"key id", 4).hex()
        """Distinguishes values of one secret from those of another, without revealing it."""

    def tag(self, value: bytes | memoryview) -> bytes:
        """TAG_BYTES to be stored behind the value."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._mac.encrypt(nonce, b"", value)

    def is_genuine(self, value: memoryview, tag: bytes | memoryview) -> bool:
        """Whether this tag was made for this value under this secret."""
        try:
            self._mac.decrypt(tag[:_NONCE_BYTES], tag[_NONCE_BYTES:], value)
        except InvalidTag:
            return False
        return True


def cluster_secret(secret: str, cluster: str) -> str:
    """The secret of one cluster's fragments. Clusters that are given the same one still refuse each other's, in every
    tier and between hosts; those of the same name share what they have."""
    return hashlib.blake2b(f"{cluster}\0{secret}".encode(), person=b"sy cluster", digest_size=32).hexdigest()


def _derive(secret: str, purpose: bytes, num_bytes: int) -> bytes:
    return hashlib.blake2b(secret.encode(), person=b"sy " + purpose, digest_size=num_bytes).digest()
