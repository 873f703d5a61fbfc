"""The packed layout of 4-bit weights: there and back, and from the arithmetic of two common checkpoint formats."""

import pytest
import torch

from kernels.gemm.codes4 import dequantise, pack, unpack


def codes_of(n, k):
    return torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)


@pytest.mark.parametrize(("n", "k"), [(1, 128), (7, 384), (64, 1024)])
def test_unpacking_undoes_packing(n, k):
    codes = codes_of(n, k)
    packed = pack(codes)
    assert packed.shape == (k // 128, n, 32)
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed), codes)


def test_a_word_holds_codes_that_are_32_apart():
    codes = torch.zeros(2, 256, dtype=torch.uint8)
    codes[1, 128 + 5 + 32 * torch.arange(4)] = torch.tensor([1, 2, 3, 15], dtype=torch.uint8)
    assert pack(codes)[1, 1, 5].item() & 0xFFFF == 0xF321


def test_k_must_be_whole_blocks():
    with pytest.raises(ValueError, match="multiple of 128"):
        pack(codes_of(2, 192))


def test_words_of_checkpoints_that_pack_along_k_or_along_n_can_be_brought_here():
    codes = codes_of(16, 128)
    shifts = 4 * torch.arange(8, dtype=torch.int64)
    # Eight codes of neighbouring k in a word [k / 8, n], lowest bits first.
    along_k = (codes.T.reshape(16, 8, 16).long() << shifts[None, :, None]).sum(1).to(torch.int32)
    back = (along_k[:, None, :] >> shifts[None, :, None] & 15).reshape(128, 16).T
    assert torch.equal(unpack(pack(back)), codes)
    # Eight codes of neighbouring n in a word [k, n / 8], even ones first.
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    along_n = (codes.T.reshape(128, 2, 8)[:, :, order].long() << shifts).sum(2).to(torch.int32)
    back = torch.empty(128, 2, 8, dtype=torch.int64)
    back[:, :, order] = (along_n[:, :, None] >> shifts & 15).long()
    assert torch.equal(unpack(pack(back.reshape(128, 16).T)), codes)


def test_dequantised_weights_are_scaled_by_their_group():
    codes = codes_of(3, 256)
    scales = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(4, 1).expand(4, 3).contiguous()
    zeros = torch.tensor([0, 8, 16, 3], dtype=torch.uint8).view(4, 1).expand(4, 3).contiguous()
    weights = dequantise(pack(codes), scales, zeros, torch.float64)
    assert weights[2, 70] == 2.0 * (int(codes[2, 70]) - 8)
    assert weights[0, 130] == 4.0 * (int(codes[0, 130]) - 16)
    symmetric = dequantise(pack(codes), scales, None, torch.float64)
    assert symmetric[1, 255] == 8.0 * (int(codes[1, 255]) - 8)
