"""A strict reader of our Dockerfiles: it knows the few instructions that they use and refuses all others."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

KNOWN = ("FROM", "ARG", "ENV", "LABEL", "RUN", "COPY", "WORKDIR", "USER", "ENTRYPOINT", "CMD")


@dataclass(frozen=True)
class Instruction:
    """One instruction."""

    word: str
    text: str
    """What follows the word, on one line."""
    line: int


@dataclass(frozen=True)
class Stage:
    """From one FROM to the next."""

    base: str
    """As written: an image, a variable or another stage."""
    name: str
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class Dockerfile:
    """A whole file."""

    arguments: Mapping[str, str]
    """ARGs before the first FROM, which the FROMs may use."""
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Mount:
    """A --mount of a RUN."""

    kind: str
    target: str
    source: str = ""
    stage: str = ""


@dataclass(frozen=True)
class Run:
    """A RUN, taken apart."""

    command: str
    mounts: tuple[Mount, ...] = field(default=())


def parse(text: str) -> Dockerfile:
    """Reads a Dockerfile; ValueError names the line that is not understood."""
    arguments: dict[str, str] = {}
    stages: list[tuple[str, str, list[Instruction]]] = []
    for instruction in _instructions(text):
        if instruction.word == "FROM":
            match = re.fullmatch(r"(\S+)(?: AS (\S+))?", instruction.text)
            if match is None:
                raise ValueError(f"line {instruction.line}: FROM {instruction.text}")
            stages.append((match[1], match[2] or "", []))
        elif stages:
            stages[-1][2].append(instruction)
        elif instruction.word == "ARG":
            name, _, value = instruction.text.partition("=")
            arguments[name] = unquoted(value)
        else:
            raise ValueError(f"line {instruction.line}: {instruction.word} before FROM")
    return Dockerfile(arguments, tuple(Stage(base, name, tuple(found)) for base, name, found in stages))


def _instructions(text: str) -> list[Instruction]:
    found: list[Instruction] = []
    begun, parts = 0, []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith("#") or (not stripped and not parts):
            continue
        begun = begun or number
        parts.append(stripped.removesuffix("\\").strip())
        if stripped.endswith("\\"):
            continue
        word, _, rest = " ".join(parts).partition(" ")
        if word not in KNOWN:
            raise ValueError(f"line {begun}: {word} is not known here")
        found.append(Instruction(word, rest.strip(), begun))
        begun, parts = 0, []
    if parts:
        raise ValueError(f"line {begun}: the file ends within an instruction")
    return found


def run_of(instruction: Instruction) -> Run:
    """The command of a RUN and its mounts."""
    mounts, text = [], instruction.text
    while match := re.match(r"--mount=(\S+)\s+", text):
        keys = dict(pair.split("=", 1) for pair in match[1].split(","))
        known = {"type", "target", "source", "from", "id"}
        if keys.keys() - known or keys["type"] not in ("secret", "bind"):
            raise ValueError(f"line {instruction.line}: --mount={match[1]}")
        mounts.append(Mount(keys["type"], keys["target"], keys.get("source", ""), keys.get("from", "")))
        text = text[match.end() :]
    if text.startswith(("--", "[")):
        raise ValueError(f"line {instruction.line}: RUN {text}")
    return Run(text, tuple(mounts))


def copy_of(instruction: Instruction) -> tuple[str, list[str], str]:
    """Stage (or ""), sources and target of a COPY."""
    words = instruction.text.split()
    stage = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else ""
    if words[0].startswith("--") or len(words) < 2:
        raise ValueError(f"line {instruction.line}: COPY {instruction.text}")
    return stage, words[:-1], words[-1]


def pairs_of(instruction: Instruction) -> dict[str, str]:
    """The NAME=VALUE of an ENV or a LABEL."""
    return dict(part.split("=", 1) for part in shlex.split(instruction.text))


def list_of(instruction: Instruction) -> list[str]:
    """An ENTRYPOINT or a CMD, which are JSON here: a shell in between would get the signals."""
    return list(json.loads(instruction.text))


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """The text with ${NAME} and $NAME filled in; a name without a value is left."""
    return re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match[1], match[0]), text)


def unquoted(text: str) -> str:
    """The text without its quotes."""
    return "".join(shlex.split(text)) if text else ""


def sent_files(root: Path, ignore: Sequence[str]) -> list[Path]:
    """Files of the build context, relative to root: what .dockerignore leaves. The last pattern that fits counts."""
    patterns = [line for line in ignore if line and not line.startswith("#")]
    kept = {pattern[1:].split("/")[0] for pattern in patterns if pattern.startswith("!")}
    found = []
    for top in sorted(kept):
        paths = [path for match in root.glob(top) for path in ([match] if match.is_file() else match.rglob("*"))]
        found += [path.relative_to(root) for path in paths if path.is_file()]
    return sorted(path for path in found if not _is_ignored(path, patterns))


def _is_ignored(path: Path, patterns: Sequence[str]) -> bool:
    is_ignored = False
    above = [path, *path.parents][:-1]
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        if any(_fits(part.as_posix(), bare) for part in above):
            is_ignored = not pattern.startswith("!")
    return is_ignored


def _fits(path: str, pattern: str) -> bool:
    """Docker's matching: * stops at a slash, **/ is any number of folders."""
    if pattern.startswith("**/"):
        return fnmatch(path.rpartition("/")[2], pattern.removeprefix("**/"))
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(fnmatch(part, want) for part, want in zip(parts, wanted, strict=True))
