"""Layouts of other formats, held against bits set one by one as their readers take them apart."""

import numpy
import pytest
import torch

from qat_kernels.layouts import (
    pack_along_k,
    pack_awq,
    pack_gptq_zeros,
    unpack_along_k,
    unpack_awq,
    unpack_gptq_zeros,
)

SHAPES = [(32, 32), (64, 96), (8, 128), (96, 64)]


def codes(n, k, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    values = torch.randint(low, high, (n, k), generator=generator, dtype=torch.int8)
    values.view(-1)[:2] = torch.tensor([low, high - 1])  # both ends, whatever was drawn
    return values


def bits_of(column, bits):
    """The numbers in a little-endian stream of 32-bit words, read bit by bit."""
    stream = numpy.unpackbits(column.numpy().view(numpy.uint8), bitorder="little")
    fields = stream[: len(stream) // bits * bits].reshape(-1, bits)
    return fields @ (1 << numpy.arange(bits))


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_weights_lie_along_k(bits, n, k):
    values = codes(n, k, bits)
    words = pack_along_k(values, bits)
    assert words.dtype == torch.int32
    assert tuple(words.shape) == (k * bits // 32, n)
    for row in range(n):
        expected = values[row].numpy().astype(int) + 2 ** (bits - 1)
        assert (bits_of(words[:, row].contiguous(), bits) == expected).all()
    assert torch.equal(unpack_along_k(words, bits), values)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_zeros_lie_along_n(bits, version):
    zeros = codes(32, 5, bits).clamp(min=-(2 ** (bits - 1)) + 1)
    words = pack_gptq_zeros(zeros, bits, version)
    assert tuple(words.shape) == (5, bits)
    for group in range(5):
        expected = zeros[:, group].numpy().astype(int) + 2 ** (bits - 1) - (version == 1)
        assert (bits_of(words[group].contiguous(), bits) == expected).all()
    assert torch.equal(unpack_gptq_zeros(words, bits, version), zeros)
    # read as the other version they are off by one
    other = unpack_gptq_zeros(words, bits, 3 - version)
    assert torch.equal(other - zeros, torch.full_like(zeros, 1 if version == 2 else -1))


def test_version_1_of_symmetric_int4_stores_sevens():
    words = pack_gptq_zeros(torch.zeros(8, 1, dtype=torch.int8), 4, 1)
    assert words.item() == 0x77777777
    assert pack_gptq_zeros(torch.zeros(8, 1, dtype=torch.int8), 4, 2).item() == 0x88888888 - 2**32


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_version_1_refuses_the_least_zero_point(bits):
    zeros = torch.zeros(32, 2, dtype=torch.int8)
    zeros[3, 1] = -(2 ** (bits - 1))
    pack_gptq_zeros(zeros, bits, 2)
    with pytest.raises(ValueError, match="would wrap"):
        pack_gptq_zeros(zeros, bits, 1)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_awq_interleaves_columns(n, k):
    """As AutoAWQ packs: bits 4 i of a word hold column (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    values = codes(n, k, 4)
    words = pack_awq(values)
    assert words.dtype == torch.int32
    assert tuple(words.shape) == (k, n // 8)
    unsigned = words.numpy().view(numpy.uint32)
    for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        found = (unsigned >> (4 * nibble)) & 15
        assert (found == values.t()[:, column::8].numpy().astype(int) + 8).all()
    assert torch.equal(unpack_awq(words), values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_along_k(codes(8, 36, 4), 4), "36 input features of 4 bits"),
        (lambda: pack_along_k(codes(8, 40, 3), 3), "40 input features of 3 bits"),
        (lambda: pack_gptq_zeros(codes(12, 1, 4), 4, 2), "12 output features of 4 bits"),
        (lambda: pack_awq(codes(12, 32, 4)), "12 output features of 4 bits"),
        (lambda: pack_awq(codes(8, 32, 5)), "do not fit 4 bits"),
    ],
)
def test_what_does_not_fill_words_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
