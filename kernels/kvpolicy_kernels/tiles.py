"""Sizes of tiles and grids. triton's own functions for them are made for kernels: a call on the host takes it 2 us."""


def cdiv(total: int, part: int) -> int:
    """Parts of this size that the total takes."""
    return -(-total // part)


def next_power_of_2(number: int) -> int:
    """The least power of 2 that is not below a number above 0; 0 for 0."""
    return 1 << (number - 1).bit_length() if number else 0
