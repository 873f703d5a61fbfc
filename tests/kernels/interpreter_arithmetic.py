"""Child process of test_interpreter.py: small kernels over narrow types in the repaired interpreter, against torch.

Prints one JSON line per check: how many values are wrong. Run with TRITON_INTERPRET=1.
"""

import json

import torch
import triton
import triton.language as tl

from kernels.harness.interpret import repair

N = 256
BF16, FP8, FP8_WIDE = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2


@triton.jit
def arithmetic(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "neg":
        z = -x
    elif OP == "maximum":
        z = tl.maximum(x, y)
    elif OP == "less":
        z = tl.where(x < y, x, y)
    elif OP == "fma":
        z = tl.fma(x, y, x)
    else:
        z = tl.abs(x)
    tl.store(out_ptr + i, z)


@triton.jit
def convert(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@triton.jit
def reduce(x_ptr, out_ptr, N: tl.constexpr, M: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + i[:, None] * N + j[None, :])
    tl.store(out_ptr + i, tl.sum(x, 1))
    tl.store(out_ptr + M + i, tl.max(x, 1))


@triton.jit
def product(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tile = i[:, None] * N + i[None, :]
    tl.store(out_ptr + tile, tl.dot(tl.load(x_ptr + tile), tl.load(y_ptr + tile)))


EXPECTED = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "neg": lambda x, y: -x,
    "maximum": torch.maximum,
    "less": lambda x, y: torch.where(x < y, x, y),
    "fma": lambda x, y: x * y + x,
    "abs": lambda x, y: x.abs(),
}
CONVERSIONS = [
    (torch.float32, BF16),
    (torch.float16, BF16),
    (BF16, torch.float32),
    (BF16, torch.float16),
    (torch.float32, FP8),
    (torch.float32, FP8_WIDE),
    (BF16, FP8),
    (FP8, torch.float32),
    (FP8_WIDE, torch.float16),
    (FP8, BF16),
    (torch.float32, torch.float16),
]


def say(check, out, expected):
    same = (out == expected) | (out.isnan() & expected.isnan())
    print(json.dumps({"check": check, "wrong": int((~same).sum()), "of": out.numel()}))


def values():
    """Normal numbers of many sizes, and the hard ones: halves to round, overflow, subnormals, both zeros."""
    hard = [1.99, 1.0 + 2**-9, 1.0 + 3 * 2**-9, 10000.0, -70000.0, 448.0, 464.0, 2.0**-9, 3e-5, 0.0, -0.0, float("nan")]
    spread = torch.randn(N, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, N)
    return torch.cat((torch.tensor(hard), spread[len(hard) :]))


def saturated(x, dtype):
    """As the GPU converts to fp8: the largest finite number instead of infinity or NaN."""
    return x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max) if dtype.itemsize == 1 else x


def main():
    repair()
    repair()  # a second call must not wrap twice
    x, y = values().to(BF16), values().flip(0).to(BF16)
    for name, expected in EXPECTED.items():
        out = torch.full((N,), 9.0, dtype=BF16)
        arithmetic[(1,)](x, y, out, OP=name, N=N)
        say(f"bf16 {name}", out.float(), expected(x.float(), y.float()).to(BF16).float())
    for source, target in CONVERSIONS:
        x = saturated(values(), source).to(source)
        out = torch.zeros(N, dtype=target)
        convert[(1,)](x, out, N=N)
        say(f"{source} to {target}".replace("torch.", ""), out.float(), saturated(x.float(), target).to(target).float())
    x = torch.randint(-8, 9, (4, 64), generator=torch.Generator().manual_seed(2)).to(BF16)  # sums are exact in bf16
    out = torch.zeros(8, dtype=BF16)
    reduce[(1,)](x, out, N=64, M=4)
    say("bf16 sum and max", out.float(), torch.cat((x.float().sum(1), x.float().amax(1))))
    for dtype in (BF16, FP8):
        a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
        out = torch.zeros(32, 32)
        product[(1,)](a, b, out, N=32)
        expected = a.double() @ b.double()
        say(f"{dtype} dot".replace("torch.", ""), (out - expected).abs() < 1e-5, torch.ones(32, 32, dtype=torch.bool))


if __name__ == "__main__":
    main()
