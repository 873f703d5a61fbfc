"""Makes the fixtures of quantized checkpoints anew, each with the tool that made it.

    python -m tests.quant.make_fixtures [NAME...] [--envs FOLDER] [--write]

Every tool gets a virtual environment of its own, because their pins clash; --envs keeps them for the next run.
Without --write the files are only compared with those of the manifest: other versions may write other bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable, Mapping
from pathlib import Path

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "fixtures"
MANIFEST = FIXTURES / "manifest.json"
NOTE = "made.json"
SCRIPTS: dict[str, tuple[str, ...]] = {
    "llmcompressor": (
        "ct-w4a16-g32",
        "ct-w4a16-asym",
        "ct-w4a16-channel",
        "ct-w4a16-k96",
        "ct-w8a16",
        "ct-w8a8",
        "ct-w8a8-static",
        "ct-w4a8",
        "ct-fp8-dynamic",
        "ct-fp8-static",
        "ct-fp8-block",
        "ct-mxfp4",
        "ct-nvfp4",
        "ct-nvfp4-a4",
        "ct-fp8-kv",
        "ct-mixed",
        "ct-moe-w4a16",
    ),
    "llmcompressor_old": ("ct-w4a16-actorder",),
    "gptqmodel": (
        "gptq-v1",
        "gptq-v2",
        "gptq-actorder",
        "gptq-asym",
        "gptq-8bit",
        "gptq-channel",
        "gptq-dynamic",
        "gptq-mislabelled",
        "awq-gemm",
        "awq-not-converted",
    ),
    "bitsandbytes": ("bnb-nf4", "bnb-nf4-double", "bnb-int8"),
    "transformers": (
        "fp8-deepseek",
        "fp8-deepseek-ragged",
        "fp8-deepseek-moe",
        "codec-mxfp4-gptoss",
        "codec-bitnet",
    ),
    "modelopt": ("modelopt-fp8", "modelopt-fp8-kv", "modelopt-int8-sq"),
}
"""The fixtures of `by_TOOL.py`, in the order in which they are made."""
SHARED_ENVIRONMENTS = {"bitsandbytes": "transformers"}
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "BUILD_CUDA_EXT": "0",
    "TORCHDYNAMO_DISABLE": "1",  # torch.compile wants a compiler
    "PYTHONHASHSEED": "0",  # a tool writes a list from a set
    "PYTHONDONTWRITEBYTECODE": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.quant.make_fixtures")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a fixture; all of them unless any is named")
    parser.add_argument("--envs", type=Path, help="where the environments are kept; a temporary folder unless given")
    parser.add_argument("--write", action="store_true", help="replace the fixtures and their lines in the manifest")
    options = parser.parse_args()
    known = {name for names in SCRIPTS.values() for name in names}
    if unknown := sorted(set(options.names) - known):
        parser.error(f"no such fixture: {', '.join(unknown)}")
    with tempfile.TemporaryDirectory() as scratch:
        envs = options.envs or Path(scratch) / "envs"
        made = Path(scratch) / "made"
        for tool, of_tool in SCRIPTS.items():
            if names := [name for name in of_tool if name in (options.names or known)]:
                python = _environment(SHARED_ENVIRONMENTS.get(tool, tool), envs.resolve())
                _run_script(tool, python, made, names)
        different = [name for path in sorted(made.iterdir()) for name in _take(path, options.write)]
    sys.exit(f"differs from the manifest: {', '.join(different)}" if different else None)


def _environment(tool: str, envs: Path) -> Path:
    """The interpreter of the tool's environment, which is made if it is not there."""
    requirements = HERE / f"requirements_{tool}.txt"
    installed = envs / tool / requirements.name
    python = envs / tool / "bin" / "python"
    if not installed.exists() or installed.read_text() != requirements.read_text():
        venv.create(envs / tool, clear=True, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        torch = next(line for line in requirements.read_text().splitlines() if line.startswith("torch=="))
        # torch comes first, with what it needs on this machine. The lists name all else, and one tool among them
        # asks for an older torch.
        subprocess.run([*pip, torch], check=True)
        subprocess.run([*pip, "--no-deps", "-r", str(requirements)], check=True, env={**os.environ, **SETTINGS})
        shutil.copy(requirements, installed)
    return python


def _run_script(tool: str, python: Path, made: Path, names: Iterable[str]) -> None:
    command = [str(python), str(HERE / f"by_{tool}.py"), "--out", str(made), *names]
    # In a folder of its own: tools leave logs where they run.
    subprocess.run(command, check=True, env={**os.environ, **SETTINGS}, cwd=made.parent)


def _take(folder: Path, write: bool) -> list[str]:
    """The made files that differ from the manifest; with `write` they replace the fixture instead."""
    name = folder.name
    note = json.loads((folder / NOTE).read_text())
    (folder / NOTE).unlink()
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    manifest = json.loads(MANIFEST.read_text()) if MANIFEST.exists() else {"fixtures": {}, "skipped": {}}
    if not write:
        return _differences(name, files, manifest["fixtures"].get(name, {}).get("files", {}))
    shutil.rmtree(FIXTURES / name, ignore_errors=True)
    shutil.copytree(folder, FIXTURES / name, copy_function=shutil.copyfile)
    manifest["fixtures"][name] = {**note, "files": files}
    manifest["fixtures"] = dict(sorted(manifest["fixtures"].items()))
    MANIFEST.write_text(json.dumps(manifest, indent=2) + "\n")
    return []


def _differences(name: str, made: Mapping[str, str], listed: Mapping[str, str]) -> list[str]:
    return [f"{name}/{file}" for file in sorted({*made, *listed}) if made.get(file) != listed.get(file)]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
