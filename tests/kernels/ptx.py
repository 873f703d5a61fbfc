"""Executes the few PTX instructions that the kernels' inline assembly has: the interpreter lane knows none of them."""

import re

import torch

PACKED_TYPES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def execute(assembly, num_outputs, *inputs):
    """Registers $0 .. of 32 bits; the inputs are lists of equally many of them, and so are the outputs."""
    columns = [[int(value) & 0xFFFFFFFF for value in column] for column in inputs]
    results = []
    for row in zip(*columns, strict=True):
        registers = {f"${num_outputs + i}": value for i, value in enumerate(row)}
        for statement in assembly.strip().removeprefix("{").removesuffix("}").split(";"):
            if statement.strip() and not statement.strip().startswith(".reg"):
                _step(statement.strip(), registers)
        results.append([registers[f"${i}"] for i in range(num_outputs)])
    return [list(column) for column in zip(*results, strict=True)]


def _step(statement, registers):
    operation, operands = statement.split(maxsplit=1)
    to, *names = [word.strip() for word in operands.split(",")]
    values = [registers[name] if name in registers else int(name, 0) for name in names]
    name, *suffixes = operation.split(".")
    if suffixes[-1] in PACKED_TYPES:
        assert not any(re.fullmatch(r"0x\w+|\d+", operand) for operand in names), "takes registers only"
        registers[to] = _of_floats(name, PACKED_TYPES[suffixes[-1]], *values)
    else:
        registers[to] = _INTEGER[name](*values) & 0xFFFFFFFF


def _permuted(a, b, selector):
    data = (b << 32 | a).to_bytes(8, "little")
    picks = [selector >> (4 * i) & 15 for i in range(4)]
    signs = [0xFF if data[pick & 7] & 0x80 else 0 for pick in picks]
    return int.from_bytes(
        bytes(sign if pick & 8 else data[pick] for pick, sign in zip(picks, signs, strict=True)), "little"
    )


def _looked_up(a, b, c, table):
    """lop3: bit i of the table is the answer where the bits of a, b and c spell i."""
    cases = [(a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8) if table >> i & 1]
    result = 0
    for case in cases:
        result |= case
    return result


_INTEGER = {
    "mov": lambda a: a,
    "add": lambda a, b: a + b,
    "and": lambda a, b: a & b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "prmt": _permuted,
    "lop3": _looked_up,
}


def _of_floats(name, dtype, *values):
    a, b, *rest = (
        torch.tensor([value & 0xFFFF, value >> 16], dtype=torch.int32).to(torch.int16).view(dtype).double()
        for value in values
    )
    exact = a * b + rest[0] if name == "fma" else {"mul": a * b, "sub": a - b}[name]
    result = exact.to(dtype).view(torch.int16).tolist()
    return (result[0] & 0xFFFF) | (result[1] & 0xFFFF) << 16


def pairs(tensor):
    """A 16-bit tensor's neighbours as registers."""
    return (tensor.view(torch.int16).view(-1, 2).to(torch.int64) & 0xFFFF).matmul(torch.tensor([1, 1 << 16])).tolist()


def halves(registers, dtype):
    """The way back."""
    words = torch.tensor(registers)
    return torch.stack((words & 0xFFFF, words >> 16), 1).view(-1).to(torch.int32).to(torch.int16).view(dtype)
