"""`python proto/make_stubs.py [ROOT]`: makes the gRPC stubs of the repository at ROOT (default: this one).

`proto/gen` gets all contracts, as `switchyard.v1`. The client's distribution gets the one that clients speak, as
`switchyard_client._stubs`, since it is installed where nobody expects a package named `switchyard`. Only import names
differ: descriptors are the same bytes, so that one process can load both.
"""

import shutil
import sys
from pathlib import Path

from grpc_tools import protoc

CONTRACTS = "switchyard/v1"
CLIENT_CONTRACT = "generation"
CLIENT_PACKAGE = "switchyard_client._stubs"


def make_stubs(contracts: Path, root: Path) -> None:
    """Makes all stubs under `root` from the .proto files in `contracts`; what was there is replaced."""
    generated = root / "proto" / "gen"
    shutil.rmtree(generated, ignore_errors=True)
    (generated / CONTRACTS).mkdir(parents=True)
    names = sorted(f"{CONTRACTS}/{path.name}" for path in (contracts / CONTRACTS).glob("*.proto"))
    outputs = [f"--{kind}_out={generated}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"-I{contracts}", *outputs, *names]) != 0:
        sys.exit("make_stubs: protoc failed")
    for package in (generated / "switchyard", generated / CONTRACTS):
        (package / "__init__.py").touch()
    _copy_for_client(generated / CONTRACTS, root / "client" / CLIENT_PACKAGE.replace(".", "/"))


def _copy_for_client(generated: Path, package: Path) -> None:
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    module = f"{CLIENT_CONTRACT}_pb2"
    ours = CONTRACTS.replace("/", ".")
    for path in generated.glob(f"{module}*"):
        text = path.read_text().replace(f"from {ours} import ", f"from {CLIENT_PACKAGE} import ")
        (package / path.name).write_text(text.replace(f"'{ours}.{module}'", f"'{CLIENT_PACKAGE}.{module}'"))


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    make_stubs(here, Path(sys.argv[1]) if len(sys.argv) > 1 else here.parent)
