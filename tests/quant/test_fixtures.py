"""The fixtures are the files that the manifest names, byte for byte, and a script makes each of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tests.quant.make_fixtures.__main__ import SCRIPTS

FIXTURES = Path(__file__).parent / "fixtures"


def test_fixtures_are_those_of_the_manifest() -> None:
    manifest = json.loads((FIXTURES / "manifest.json").read_text())
    listed = {
        f"{name}/{file}": sha256
        for name, fixture in manifest["fixtures"].items()
        for file, sha256 in fixture["files"].items()
    }
    found = {
        f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in FIXTURES.glob("*/*")
    }
    assert found == listed


def test_a_script_makes_every_fixture() -> None:
    manifest = json.loads((FIXTURES / "manifest.json").read_text())
    made = {name for names in SCRIPTS.values() for name in names}
    assert made == {*manifest["fixtures"], *manifest["skipped"]}
