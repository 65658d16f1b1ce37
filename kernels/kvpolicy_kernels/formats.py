"""How the entries of a cache lie in memory: as the model made them, or as codes of 8 or 4 bits. Torch defines it.

A row, the key or the value of one entry, is encoded by itself: `code = round((x - zero) / step)`. Step and zero are
fp16 numbers in an array of their own, so that rows of codes stay as wide as loads are; attention folds them into its
scores and weights. A row that is rotated first has no channel that stands out, and then 15 steps reach. The rotation
is a Hadamard transform with random signs. Keys are rotated after RoPE, and attention turns its query and its result
instead of the entries, since (R q) . (R k) = q . k.

What all keys of a head have in common needs no codes either. Where it is known, as of keys with a bias, keys are
encoded less this centre, and attention adds q . centre to their scores.

Every row is encoded on its own, so a ring can overwrite one entry, and rows can be moved without touching a bit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MAX_DIM = 256
ALIGNMENT = 16  # head dims are multiples of it
WORD_BITS = 16
_LARGEST = torch.finfo(torch.float16).max
_SIGN_SEED, _SIGN_FACTOR, _SIGN_STEP = 21, 6364136223846793005, 1442695040888963407  # Knuth's MMIX


class Encoded(NamedTuple):
    """Rows of D channels.

    codes:  int16 [..., W] with W = D * bits / 16: word i holds the channels `j * W + i`, from the lowest bits on;
            16 bits: the rows themselves, [..., D]
    scales: float16 [..., 2], the step and the zero of each row;  16 bits: [..., 0]
    """

    codes: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True)
class EntryFormat:
    """What becomes of the entries of a layer.

    bits:         of a code, 8 or 4; 16 leaves the model's own bf16 or fp16
    rotated:      rows are rotated before they are encoded
    centred:      keys are encoded less the `KeyCentre` of their layer, where the model has one
    exact_recent: the last tokens, and the sink tokens, that stay as they are in a block of their own
    key_channels: the part of a key's channels that is kept, in (0, 1]; which ones is chosen per KV head (ThinK)

    Raises `ValueError` for values that do not fit, and for a rotation of fewer key channels, which mixes them.
    """

    bits: int
    rotated: bool = False
    centred: bool = False
    exact_recent: int = 0
    key_channels: float = 1.0

    def __post_init__(self) -> None:
        if self.bits not in (4, 8, 16):
            raise ValueError(f"EntryFormat: bits must be 4, 8 or 16, got {self.bits}")
        if self.exact_recent < 0:
            raise ValueError(f"EntryFormat: exact_recent must be at least 0, got {self.exact_recent}")
        if not 0 < self.key_channels <= 1:
            raise ValueError(f"EntryFormat: key_channels must lie in (0, 1], got {self.key_channels}")
        if self.rotated and (self.bits == 16 or self.key_channels < 1):
            raise ValueError(
                f"EntryFormat: rows are rotated where all channels are encoded, got bits={self.bits} and "
                f"key_channels={self.key_channels}"
            )

    def key_dim(self, dim: int) -> int:
        """Channels that a key of `dim` channels keeps: `dim - int(dim * (1 - key_channels))`, as ThinK counts."""
        return dim - int(dim * (1 - self.key_channels) + 1e-9)

    def row_bytes(self, dim: int) -> int:
        """Bytes of one row of `dim` channels, step and zero included."""
        check_dim(dim)
        return dim * self.bits // 8 + (0 if self.bits == 16 else 2 * 2)

    @property
    def codes_in_word(self) -> int:
        """Codes of one row that a word of 16 bits holds."""
        return WORD_BITS // self.bits

    def encode(self, rows: Tensor) -> Encoded:
        """rows: [..., D], floating point. Computes in fp32; raises `ValueError` for a head dim that has no format.

        Encoding what `decode` returned gives the same codes, unless a row lies so far from zero that fp16 cannot tell
        its least from its largest value. A decoded value is off by half a step, and by the rounding of zero and step.
        """
        check_dim(rows.shape[-1])
        if self.bits == 16:
            return Encoded(rows, rows.new_empty(*rows.shape[:-1], 0, dtype=torch.float16))
        x, levels = rows.float(), 2**self.bits - 1
        if self.rotated:
            x = x @ rotation(rows.shape[-1], rows.device)
        zero = x.amin(-1, keepdim=True).clamp(-_LARGEST, _LARGEST).half()
        step = ((x.amax(-1, keepdim=True) - zero.float()) / levels).clamp(0, _LARGEST).half()
        safe = torch.where(step == 0, 1.0, step.float())
        codes = ((x - zero.float()) / safe).round().clamp(0, levels).to(torch.int32)
        scales = torch.cat([step, zero], -1)
        return Encoded(_words(codes, self.bits), scales)

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Tensor:
        """[..., D], for arguments that `encode` returned. Computes in fp32."""
        if self.bits == 16:
            return encoded.codes.to(dtype)
        scales = encoded.scales.float()
        x = _codes(encoded.codes, self.bits).float() * scales[..., :1] + scales[..., 1:]
        if self.rotated:
            x = x @ rotation(x.shape[-1], x.device).T
        return x.to(dtype)


INT8 = EntryFormat(8, centred=True)
INT4 = EntryFormat(4, rotated=True, centred=True, exact_recent=32)
THINK = EntryFormat(16, exact_recent=32, key_channels=0.6)
FORMATS = {"int8": INT8, "int4": INT4}
"""The formats of codes that have a name."""


def rounded(rows: Tensor, entry_format: EntryFormat, centre: Tensor | None = None) -> Tensor:
    """Rows as their codes say them, [..., D].

    centre: float32, of a shape that fits, what a format that is centred encodes keys less of
    """
    if centre is None or not entry_format.centred:
        return entry_format.decode(entry_format.encode(rows), rows.dtype)
    decoded = entry_format.decode(entry_format.encode(rows.float() - centre), torch.float32)
    return (decoded + centre).to(rows.dtype)


def check_dim(dim: int) -> None:
    """Raises `ValueError` for a head dim that has no format."""
    if dim % ALIGNMENT or not 0 < dim <= MAX_DIM:
        raise ValueError(
            f"formats: head dim {dim} has no format: it must be a multiple of {ALIGNMENT}, and {MAX_DIM} at most"
        )


def rotation(dim: int, device: torch.device) -> Tensor:
    """float32 [dim, dim], orthogonal; a row x becomes `x @ rotation`."""
    scale: float = block_of(dim) ** -0.5
    return signed_hadamard(dim, device).float() * scale


def block_of(dim: int) -> int:
    """Channels that are mixed with one another: the largest power of two that divides `dim`."""
    return dim & -dim


@functools.lru_cache(maxsize=16)
def signed_hadamard(dim: int, device: torch.device) -> Tensor:
    """int8 [dim, dim] of 1 and -1 in blocks along the diagonal, 0 elsewhere: `rotation` before it is scaled."""
    block = block_of(dim)
    hadamard = torch.ones(1, 1, dtype=torch.int8)
    while len(hadamard) < block:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    blocks = torch.eye(dim // block, dtype=torch.int8).kron(hadamard)
    signed: Tensor = hadamard_signs(dim, torch.device("cpu"))[:, None] * blocks
    return signed.to(device)


@functools.lru_cache(maxsize=16)
def hadamard_signs(dim: int, device: torch.device) -> Tensor:
    """int8 [dim] of 1 and -1, by which a row is multiplied before its blocks meet Hadamard's matrix.

    They are part of the format, since rows outlive a process: their generator is written down here.
    """
    state, signs = _SIGN_SEED, []
    for _ in range(dim):
        state = (state * _SIGN_FACTOR + _SIGN_STEP) % 2**64
        signs.append(1 - 2 * (state >> 63))
    return torch.tensor(signs, dtype=torch.int8).to(device)


def _words(codes: Tensor, bits: int) -> Tensor:
    """int32 [..., D] of 0 to 2**bits - 1 -> int16 [..., D * bits / 16]."""
    word = torch.zeros_like(codes[..., : codes.shape[-1] * bits // WORD_BITS])
    for j, part in enumerate(codes.chunk(WORD_BITS // bits, -1)):
        word += part << (bits * j)
    return torch.where(word >= 2**15, word - 2**16, word).to(torch.int16)


def _codes(words: Tensor, bits: int) -> Tensor:
    """int16 [..., W] -> int32 [..., W * 16 / bits]."""
    word = words.to(torch.int32)
    return torch.cat([(word >> shift) & (2**bits - 1) for shift in range(0, WORD_BITS, bits)], -1)
