"""The corpus of the example adapter: library modules whose every function has a docstring of one form.

`python -m training.qlora.docstrings OUT` writes OUT/train and OUT/held_out: a sentence, then the sections Args, Returns
or Yields, and Raises, made from the function's own code. Everything else of a module stays as it is. Held out are
modules that the demo model was not trained on. Knows nothing of models.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from training.corpus import HELD_OUT_MODULES

Function = ast.FunctionDef | ast.AsyncFunctionDef

# In alphabetical order, so many as fit: small modules that are mostly functions.
_TRAIN_BYTES, _HELD_OUT_BYTES = 150_000, 40_000
_MODULE_BYTES = range(1_500, 14_000)
_MOST_DEFAULT = 16  # characters of a default that a docstring mentions
_NAMES = {"__init__": "Initialize the object.", "__repr__": "Describe the object.", "__str__": "Describe the object."}


def styled(source: str) -> str:
    """A module with new docstrings."""
    lines = source.splitlines(keepends=True)
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, Function)]
    for function in sorted(functions, key=lambda node: node.lineno, reverse=True):
        _style(lines, function)
    return "".join(lines)


def _style(lines: list[str], function: Function) -> None:
    """Put a docstring into the lines. Functions below it have theirs already; those above keep their line numbers."""
    first = function.body[0]
    begin = min([first.lineno, *(each.lineno for each in getattr(first, "decorator_list", []))])
    header = _header_end(lines, function, begin)
    if header is None:
        return
    old = first if ast.get_docstring(function) is not None else None
    if old is not None and (old.end_lineno is None or _shares_its_line(function, old)):
        return
    text = lines[begin - 1]
    indent = text[: len(text) - len(text.lstrip())]
    new = [f"{indent}{line}".rstrip() + "\n" for line in docstring(function)]
    if old is not None and old.end_lineno is not None:
        lines[begin - 1 : old.end_lineno] = new
    else:
        lines[header:header] = new


def _shares_its_line(function: Function, old: ast.stmt) -> bool:
    """Whether something else stands behind the docstring on its last line."""
    return len(function.body) > 1 and function.body[1].lineno == old.end_lineno


def _header_end(lines: list[str], function: Function, begin: int) -> int | None:
    """The number of the line with the header's colon; None where the body is on that line too."""
    last = max([function.lineno, *(node.end_lineno or 0 for node in _header_nodes(function))])
    for number in range(last, begin):
        if lines[number - 1].partition("#")[0].rstrip().endswith(":"):
            return number
    return None


def _header_nodes(function: Function) -> Iterator[ast.expr | ast.arg]:
    arguments = function.args
    yield from _arguments(function)
    yield from (default for default in (*arguments.defaults, *arguments.kw_defaults) if default is not None)
    if function.returns is not None:
        yield function.returns


def docstring(function: Function) -> list[str]:
    """Its lines, without indentation."""
    sections = [("Args", _args(function)), *_results(function), ("Raises", _raised(function))]
    lines = [_summary(function)]
    for title, entries in sections:
        if entries:
            lines += ["", f"{title}:", *(f"    {entry}" for entry in entries)]
    if len(lines) == 1:
        return [f'"""{lines[0]}"""']
    return [f'"""{lines[0]}', *lines[1:], '"""']


def _summary(function: Function) -> str:
    """The old docstring's first line if it is a sentence of plain characters, else the function's name in words."""
    old = (ast.get_docstring(function) or "").partition("\n")[0].strip()
    if 8 <= len(old) <= 80 and not set(old) & set("\\\"'`"):
        return old if old.endswith(".") else old + "."
    return _NAMES.get(function.name, _words(function.name).capitalize() + ".")


def _words(name: str) -> str:
    return name.strip("_").replace("_", " ") or "value"


def _arguments(function: Function) -> list[ast.arg]:
    given = function.args
    stars = [each for each in (given.vararg, given.kwarg) if each is not None]
    return [*given.posonlyargs, *given.args, *given.kwonlyargs, *stars]


def _args(function: Function) -> list[str]:
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    pairs = list(zip(reversed(positional), reversed(given.defaults), strict=False))
    pairs += [(arg, value) for arg, value in zip(given.kwonlyargs, given.kw_defaults, strict=True) if value is not None]
    defaults = {argument.arg: ast.unparse(value) for argument, value in pairs}
    stars = {each.arg: star for each, star in ((given.vararg, "*"), (given.kwarg, "**")) if each is not None}
    found = []
    for argument in _arguments(function):
        name = argument.arg
        if name in ("self", "cls"):
            continue
        default = defaults.get(name, "")
        is_mentioned = default and len(default) <= _MOST_DEFAULT and not set(default) & set("\\\"'")
        end = f" Defaults to {default}." if is_mentioned else ""
        found.append(f"{stars.get(name, '')}{name}: The {_words(name)}.{end}")
    return found


def _own_nodes(function: Function) -> Iterator[ast.AST]:
    """Of its body, without functions and classes inside it."""
    waiting: list[ast.AST] = list(reversed(function.body))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, Function | ast.ClassDef | ast.Lambda):
            waiting.extend(reversed(list(ast.iter_child_nodes(node))))


def _results(function: Function) -> list[tuple[str, list[str]]]:
    nodes = list(_own_nodes(function))
    if any(isinstance(node, ast.Yield | ast.YieldFrom) for node in nodes):
        return [("Yields", ["The next value."])]
    values = [node.value for node in nodes if isinstance(node, ast.Return) and node.value is not None]
    if not values:
        return []
    return [("Returns", [_result(values)])]


def _result(values: list[ast.expr]) -> str:
    constants = {value.value for value in values if isinstance(value, ast.Constant)}
    if len(constants) == len(values) and constants <= {True, False}:
        return "True or False."
    names = {value.id for value in values if isinstance(value, ast.Name)}
    if len(names) == 1 and len(values) == 1:
        return f"The {_words(names.pop())}."
    return "The result, or None." if None in constants else "The result."


def _raised(function: Function) -> list[str]:
    names = []
    for node in _own_nodes(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = ast.unparse(raised)
            if name.replace(".", "").isidentifier() and name[0].isupper() and name not in names:
                names.append(name)
    return [f"{name}: If something is wrong." for name in names]


def corpus(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Styled modules by name: to train on, and held out. root: of a standard library."""
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for path in sorted(root.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        num_functions = text.count("def ")
        if len(text) not in _MODULE_BYTES or not num_functions or len(text) // num_functions > 900:
            continue
        is_held_out = path.stem in HELD_OUT_MODULES
        part, most = (held_out, _HELD_OUT_BYTES) if is_held_out else (train, _TRAIN_BYTES)
        new = styled(text)
        if sum(map(len, part.values())) + len(new) <= most:
            part[path.stem] = new
    return train, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    parts = dict(zip(("train", "held_out"), corpus(Path(sysconfig.get_paths()["stdlib"])), strict=True))
    for name, modules in parts.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        for module, text in modules.items():
            (folder / f"{module}.txt").write_text(text, encoding="utf-8")
        print(f"{folder}: {len(modules)} modules, {sum(len(text.encode()) for text in modules.values())} bytes")


if __name__ == "__main__":
    main()
