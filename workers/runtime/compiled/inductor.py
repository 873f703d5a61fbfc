"""Traces code with torch.export and compiles it with Inductor, ahead of time; imported only where that is done.

Products are calls of oneDNN inside the compiled code. Their weights are arguments, so that the layers of a model share
a library, while Inductor knows packed weights only as constants: hence an operation of our own. Uses parts of Inductor
that are not public; whoever calls this must go on without it when they have changed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._inductor import ir, mkldnn_ir
from torch._inductor.lowering import register_lowering
from torch._inductor.utils import fresh_cache
from torch._inductor.virtualized import V

from workers.runtime.compiled.library import Traced

_MOST_ROWS = 1 << 20
_UNSIGNED_ZERO = 128  # of rows that are rounded to 8 bits
_OPTIONS: dict[str, Any] = {
    "cpp.dynamic_threads": True,  # small steps take one thread, see step_threads
    "emulate_precision_casts": True,  # what is rounded between two operations is rounded here, too
    "compile_threads": 1,
    "cpp_cache_precompile_headers": False,  # takes longer than the few files that would gain
    "cpp.vec_isa_ok": True,  # believe the processor what it can, rather than compile a test for each of its parts
}
_operations = torch.library.Library("switchyard", "DEF")
_operations.define("packed_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_operations.define("packed_int8_linear(Tensor codes, Tensor weight, Tensor scales, Tensor zeros) -> Tensor")


def _shape_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _int8_shape_of(codes: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return codes.new_empty(codes.shape[0], weight.shape[1], dtype=torch.float32)


torch.library.register_fake("switchyard::packed_linear", _shape_of, lib=_operations)
torch.library.register_fake("switchyard::packed_int8_linear", _int8_shape_of, lib=_operations)


@register_lowering(torch.ops.switchyard.packed_linear.default, type_promotion_kind=None)
def _call_onednn(x: Any, weight: Any, bias: Any) -> Any:
    return ir.TensorBox.create(mkldnn_ir.LinearUnary.create(x, weight, bias, "none", [], ""))


@register_lowering(torch.ops.switchyard.packed_int8_linear.default, type_promotion_kind=None)
def _call_onednn_int8(codes: Any, weight: Any, scales: Any, zeros: Any) -> Any:
    one = V.graph.add_tensor_constant(torch.tensor(1.0), name="one")
    zero = V.graph.add_tensor_constant(torch.tensor(_UNSIGNED_ZERO, dtype=torch.int32), name="zero")
    no_bias: Any = None
    product = mkldnn_ir.QLinearPointwisePT2E.create(
        codes, one, zero, weight, scales, zeros, no_bias, 1.0, 0, torch.float32, "none", [], ""
    )
    return ir.TensorBox.create(product)


class _Module(nn.Module):
    def __init__(self, code: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self._code = code

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        return self._code(*arguments)


def compile_to(package: Path, traced: Traced) -> None:
    """Write the package."""
    num_rows = torch.export.Dim("num_rows", min=2, max=_MOST_ROWS)  # it computes one row as well
    shapes: list[dict[int, Any] | None] = [None if traced.is_one_row else {0: num_rows}] * traced.num_with_rows
    for index, is_dynamic in enumerate(traced.is_dynamic):
        shapes.append({0: torch.export.Dim(f"size_{index}", min=2)} if is_dynamic else None)
    arguments = tuple(traced.arguments)
    with torch.no_grad():
        program = torch.export.export(_Module(traced.code), arguments, dynamic_shapes=(tuple(shapes),), strict=False)
        if sum(node.op == "placeholder" for node in program.graph.nodes) != len(arguments):
            raise ValueError("the code reads tensors that are not among its arguments")
        _use_our_operations(program.graph)
        with fresh_cache(dir=str(package.parent)):  # what it leaves behind goes with the folder
            torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=_OPTIONS)


def _use_our_operations(graph: torch.fx.Graph) -> None:
    for node in graph.nodes:
        if node.target is torch.ops.mkldnn._linear_pointwise.default:
            x, weight, bias, *rest = node.args
            assert rest[0] == "none"
            node.target, node.args = torch.ops.switchyard.packed_linear.default, (x, weight, bias)
        elif node.target is torch.ops.onednn.qlinear_pointwise.default:
            codes, scale, zero, weight, scales, zeros, *rest = node.args
            assert (scale, zero) == (1.0, _UNSIGNED_ZERO)
            assert rest[:5] == [None, 1.0, 0, torch.float32, "none"]
            node.target = torch.ops.switchyard.packed_int8_linear.default
            node.args = (codes, weight, scales, zeros)
