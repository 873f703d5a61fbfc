"""One file becomes one dataclass, or one line says why not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from settings.loading import SettingsError, build, load, write


@dataclass(frozen=True, slots=True)
class Branch:
    num_steps: int = 3
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps: must be at least 1, not {self.num_steps}")


@dataclass(frozen=True, slots=True)
class Whole:
    name: str
    branch: Branch = field(default_factory=Branch)
    branches: dict[str, Branch] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    folder: Path | None = None
    secret: str = field(default="", repr=False)


def test_what_was_written_is_read_by_its_owner_alone(tmp_path: Path) -> None:
    value = Whole("a", Branch(2, 1e-05), {"b": Branch(7)}, ("x", "y"), tmp_path, "s3cret")
    path = tmp_path / "spec.json"
    path.write_text("{}")
    path.chmod(0o644)
    write(path, value)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load(Whole, path) == value


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\nbranches: {b: {num_steps: 7}}\n")
    (tmp_path / "a.json").write_text('{"name": "a", "branches": {"b": {"num_steps": 7}}}')
    assert load(Whole, tmp_path / "a.yaml") == load(Whole, tmp_path / "a.json") == Whole("a", branches={"b": Branch(7)})


BOMB = "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9 if i else 'x'}]\n" for i in range(9))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", ":1: not JSON (Expecting property name enclosed in double quotes)"),
        ("a.json", '{"name": "a", "name": "b"}', ": name is given twice"),
        ("a.json", "[]", ": must hold keys and values, not a list"),
        (
            "a.json",
            '{"name": "a", "branch": {"num_step": 1}}',
            ": branch.num_step: unknown key (did you mean num_steps?)",
        ),
        (
            "a.json",
            '{"name": "a", "branches": {"b": {"num_steps": 0}}}',
            ": branches.b.num_steps: must be at least 1, not 0",
        ),
        (
            "a.json",
            '{"name": "a", "branch": {"num_steps": "2"}}',
            ": branch.num_steps: must be a valid integer, not the text '2'",
        ),
        (
            "a.json",
            '{"name": "a", "branch": {"num_steps": true}}',
            ": branch.num_steps: must be a valid integer, not true",
        ),
        ("a.json", "{}", ": name: missing"),
        ("a.json", '{"name": "a", "names": ["x", 1]}', ": names.1: must be a valid string, not 1"),
        ("a.json", '{"name": "a", "secret": 12345678}', ": secret: must be a valid string"),
        ("a.yaml", "name: a\nname: b", ":2: not YAML (name is given twice)"),
        ("a.yaml", "\xff", ": not UTF-8 text"),
        ("a.yaml", "name: 2020-99-99", ": not readable (month must be in 1..12)"),
        ("a.yaml", "name: &a [*a]", ": is nested in more than 100 levels, or in itself"),
        ("a.yaml", "branch: &a {num_steps: *a}", ": is nested in more than 100 levels, or in itself"),
        ("a.yaml", BOMB, ": holds more than 100000 values"),
    ],
)
def test_one_line_says_what_is_wrong(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(SettingsError) as refused:
        load(Whole, path)
    assert str(refused.value) == f"{path}{message}"


@pytest.mark.parametrize(("name", "unit"), [("a.json", '{"a":'), ("a.yaml", "{a: "), ("a.yaml", "[")])
def test_what_is_nested_thousands_of_times_is_named(tmp_path: Path, name: str, unit: str) -> None:
    close = "]" if unit == "[" else "}"
    (tmp_path / name).write_text(unit * 5000 + "1" + close * 5000)
    with pytest.raises(SettingsError, match=rf"/{name}: "):
        load(Whole, tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nothing\.json: No such file or directory$"):
        load(Whole, tmp_path / "nothing.json")


def test_content_without_a_file_begins_with_its_key() -> None:
    with pytest.raises(SettingsError, match=r"^branch\.rate: must be a valid number, not the text 'x'$"):
        build(Whole, {"name": "a", "branch": {"rate": "x"}})
