"""What the matrix products and expert layers are to give, said in plain torch once more and otherwise than there."""

import torch
import torch.nn.functional as F


def torch_linear(x, weight, bias):
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def torch_w4(packed, scales, zeros, table):
    """Word by word as the layout is documented: word j of a block holds k = j + lanes * i at bits 4 i."""
    num_blocks, n, lanes = packed.shape
    codes = torch.empty(n, 4 * lanes * num_blocks, dtype=torch.float64)
    for b in range(num_blocks):
        for i in range(4):
            first = 4 * lanes * b + lanes * i
            codes[:, first : first + lanes] = packed[b].bitwise_right_shift(4 * i) & 15
    group = codes.shape[1] // scales.shape[0]
    if table is None:
        zero = torch.full_like(scales, 8) if zeros is None else zeros
        codes -= zero.T.repeat_interleave(group, 1)
    else:
        codes.apply_(lambda code: table[int(code)])
    return codes * scales.T.double().repeat_interleave(group, 1)


def torch_w4a16(x, packed, scales, zeros, table, offsets):
    weight = torch_w4(packed, scales, zeros, table)
    if offsets is not None:
        weight = weight + offsets.T.double().repeat_interleave(weight.shape[1] // len(offsets), 1)
    return torch.einsum("mk,nk->mn", x.double(), weight)


def torch_w8a16(x, packed, scales, zeros, offsets):
    """Word j of a block holds k = j in its low byte and k = j + lanes in the other; the sums of x take the offsets."""
    codes = packed.view(torch.uint8).unflatten(-1, (-1, 2)).permute(1, 0, 3, 2).flatten(1).double()
    group = codes.shape[1] // len(scales)
    codes -= 128 if zeros is None else zeros.T.repeat_interleave(group, 1)
    out = F.linear(x.double(), codes * scales.T.double().repeat_interleave(group, 1))
    return out if offsets is None else out + x.double().unflatten(1, (-1, group)).sum(2) @ offsets.double()


def torch_w4a8(x, packed, x_scales, scales, zeros):
    """Byte j of a block holds k = j in its low bits and k = j + lanes in its high ones, as signed numbers of 4 bits."""
    num_blocks, n, lanes = packed.shape
    weight = torch.empty(n, 2 * lanes * num_blocks, dtype=torch.float64)
    for b in range(num_blocks):
        first = 2 * lanes * b
        weight[:, first : first + lanes] = (packed[b].int() << 28) >> 28
        weight[:, first + lanes : first + 2 * lanes] = packed[b].int() >> 4
    group = weight.shape[1] // scales.shape[0]
    if zeros is not None:
        weight += 8 - zeros.T.double().repeat_interleave(group, 1)
    weight *= scales.T.double().repeat_interleave(group, 1)
    return torch.einsum("mk,nk->mn", x.double() * x_scales[:, None], weight)


def torch_w8a8(x, weight, x_scales, weight_scales):
    return F.linear(x.double() * x_scales[:, None], weight.double() * weight_scales[:, None])


def torch_fp8_block(x, weight, x_scales, weight_scales):
    """Block by block, each product scaled after it was summed."""
    out = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for i in range(weight_scales.shape[0]):
        columns = slice(128 * i, 128 * (i + 1))
        for j in range(weight_scales.shape[1]):
            depth = slice(128 * j, 128 * (j + 1))
            part = x[:, depth].double() @ weight[columns, depth].double().T
            out[:, columns] += part * x_scales[:, j : j + 1] * weight_scales[i, j]
    return out


def torch_group(expert_ids, num_experts, block):
    """By a stable sort."""
    flat = expert_ids.flatten().tolist()
    num_blocks = min(len(flat), len(flat) // block + min(len(flat), num_experts))
    order = sorted((expert, row) for row, expert in enumerate(flat) if expert >= 0)
    rows, experts = [], []
    for expert, row in order:
        if expert not in experts or len(rows) == block * len(experts):
            rows += [len(flat)] * (block * len(experts) - len(rows))
            experts.append(expert)
        rows.append(row)
    rows += [len(flat)] * (block * num_blocks - len(rows))
    experts += [-1] * (num_blocks - len(experts))
    return torch.tensor(rows), torch.tensor(experts)


def torch_moe(x, gate_up, down, expert_ids, weights):
    """Token by token."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, (experts, shares) in enumerate(zip(expert_ids.tolist(), weights.double(), strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            if expert >= 0:
                gate, up = F.linear(x[token].double(), gate_up[expert].double()).chunk(2)
                out[token] += share * F.linear(F.silu(gate) * up, down[expert].double())
    return out


def torch_moe_fp8(x, gate_up, down, x_scales, gate_up_scales, down_scales, expert_ids, weights):
    """Token by token, block by block; the gated activations are rounded to e4m3, 128 at a time."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, (experts, shares) in enumerate(zip(expert_ids.tolist(), weights.double(), strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            if expert < 0:
                continue
            row, row_scales = x[token : token + 1], x_scales[token : token + 1]
            gate, up = torch_fp8_block(row, gate_up[expert], row_scales, gate_up_scales[expert]).chunk(2, dim=1)
            pieces = (F.silu(gate) * up).split(128, dim=1)
            scales = torch.stack([piece.abs().max() / 448 for piece in pieces])[None]
            rounded = [(piece / scale).to(x.dtype) for piece, scale in zip(pieces, scales[0], strict=True)]
            out[token] += share * torch_fp8_block(torch.cat(rounded, 1), down[expert], scales, down_scales[expert])[0]
    return out


def torch_moe_weight_only(x, gate_up, down, expert_ids, weights):
    def dense(matrix):
        """Each expert's product with the unit matrix, transposed."""
        unit = torch.eye(matrix.codes.shape[1] * matrix.codes.shape[3] * 16 // matrix.bits, dtype=torch.float64)
        options = [
            [None if every is None else every[i] for every in (matrix.zeros, matrix.offsets)]
            for i in range(len(matrix.codes))
        ]
        each = [
            torch_w8a16(unit, codes, scales, *option)
            if matrix.bits == 8
            else torch_w4a16(unit, codes, scales, option[0], matrix.table, option[1])
            for codes, scales, option in zip(matrix.codes, matrix.scales, options, strict=True)
        ]
        return torch.stack(each).transpose(1, 2)

    return torch_moe(x, dense(gate_up), dense(down), expert_ids, weights)


def torch_sparse24(x, values, places):
    """Four by four, as the layout is documented."""
    num_blocks, n, _ = places.shape
    weight = torch.zeros(n, num_blocks, 4, 32, 4, dtype=torch.float64)
    kept = values.view(x.dtype).unflatten(-1, (-1, 2)).double()  # [block, part, n, word, first or second]
    for i in range(4):
        bits = (places >> 4 * i) & 15
        first = torch.where(bits & 1 > 0, 0, torch.where(bits & 2 > 0, 1, 2))
        second = torch.where(bits & 4 > 0, 2, torch.where(bits & 8 > 0, 3, 1))
        for place in range(4):
            part = kept[:, i, :, :, 0] * (first == place) + kept[:, i, :, :, 1] * (second == place)
            weight[:, :, i, :, place] = part.transpose(0, 1)
    return F.linear(x.double(), weight.flatten(1))


def torch_w2a8(x, packed, x_scales, weight_scales):
    """Byte j of a block holds k = j + 64 i at bits 2 i, as signed numbers of 2 bits."""
    num_blocks, n, lanes = packed.shape
    weight = torch.empty(n, num_blocks, 4, lanes, dtype=torch.float64)
    for i in range(4):
        weight[:, :, i] = ((packed.transpose(0, 1).int() >> 2 * i) & 3).apply_(lambda bits: (0, 1, -2, -1)[bits])
    return F.linear(x.double() * x_scales[:, None], weight.flatten(1) * weight_scales[:, None])


def torch_split_outliers(x, threshold):
    rest = torch.where(x.abs() >= threshold, 0.0, x.double())
    scales = rest.abs().amax(1, keepdim=True) / 127
    flags = [[bool((part.abs() >= threshold).any()) for part in row.split(32)] for row in x]
    return (rest / scales).round(), scales, torch.tensor(flags)


def torch_add_outliers(out, x, flags, weight, weight_scales, threshold):
    large = torch.where(x.abs() >= threshold, x.double(), 0.0)
    return out + F.linear(large, weight.double() * weight_scales[:, None])


def torch_lora(out, x, down, up, rows, sizes):
    out, rank = out.double(), up.shape[1]
    for slot, index in rows.segments:
        narrow = x[index].double() @ down[slot].double().T
        firsts = [sum(sizes[:piece]) for piece in range(len(sizes))]
        for piece, (first, size) in enumerate(zip(firsts, sizes, strict=True)):
            part = narrow[:, piece * rank : (piece + 1) * rank] @ up[slot, :, first : first + size].double()
            out[index, first : first + size] += part
    return out


TORCH_GEMM = {
    "add_lora": torch_lora,
    "fixed_order_linear": torch_linear,
    "w4a16_gemm": torch_w4a16,
    "w8a16_gemm": torch_w8a16,
    "w4a8_gemm": torch_w4a8,
    "add_low_rank": lambda out, x, down, up: out + F.linear(x.double(), up.double() @ down.double()),
    "sparse24_gemm": torch_sparse24,
    "w2a8_gemm": torch_w2a8,
    "split_outliers": torch_split_outliers,
    "add_outliers": torch_add_outliers,
    "fp8_gemm": torch_w8a8,
    "int8_gemm": torch_w8a8,
    "fp8_block_gemm": torch_fp8_block,
    "group_by_expert": torch_group,
    "moe_experts": torch_moe,
    "moe_experts_fp8": torch_moe_fp8,
    "moe_experts_weight_only": torch_moe_weight_only,
}
