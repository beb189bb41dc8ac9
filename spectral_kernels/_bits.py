"""Where the bits of a block of 16 components lie in a page (layout.py), for kernels.

GROUPS is `Bands.groups`; n counts its groups, i its blocks.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def rank_of(groups):
    """R: the number of components."""
    return 16 * sum(len(fields) for _, fields in groups)


@triton.constexpr_function
def page_bytes(groups):
    """Bytes of one side's page of one head."""
    return 512 * sum(subtiles_of(groups, n) for n in range(len(groups)))


@triton.constexpr_function
def place_of(groups, i):
    """(group, field, its lowest bit, its bits, whether it is a byte's top field) of block i; None
    past the last one."""
    for n in range(len(groups)):
        fields = groups[n][1]
        if i < len(fields):
            low = sum(fields[:i])
            return n, i, low, fields[i], low + fields[i] == 8
        i -= len(fields)
    return None


@triton.constexpr_function
def codes_of(groups, n, f):
    """(half the number of codes of field f of group n, its lowest bit)."""
    _, _, low, bits, _ = place_of(groups, first_block(groups, n) + f)
    return 2.0 ** (bits - 1), low


@triton.constexpr_function
def fields_of(groups, n):
    """How many fields group n has."""
    return len(groups[n][1])


@triton.constexpr_function
def bits_of(groups, n):
    """Bits of a byte that the fields of group n use."""
    return sum(groups[n][1])


@triton.constexpr_function
def first_block(groups, n):
    """The block in the lowest field of group n."""
    return groups[n][0] // 16


@triton.constexpr_function
def is_half_group(groups, n):
    """Whether group n holds two tokens a byte (layout.is_half)."""
    return bits_of(groups, n) <= 4


@triton.constexpr_function
def subtiles_of(groups, n):
    """Sub-tiles of 512 bytes in a page's group n."""
    return 1 if is_half_group(groups, n) else 2


@triton.constexpr_function
def group_offset(groups, n):
    """Bytes of a page before group n: all groups before the last are full."""
    return 1024 * n


@triton.constexpr_function
def field_mask(groups, i):
    """The bits of block i in a byte, four times."""
    place = place_of(groups, i)
    return (((1 << place[3]) - 1) << place[2]) * 0x01010101


@triton.constexpr_function
def field_weight(groups, i):
    """What a stored integer is multiplied by to count codes: fields are masked, not shifted (0 past
    the last block)."""
    place = place_of(groups, i)
    return 0.0 if place is None else 2.0 ** -place[2]


@triton.constexpr_function
def field_zero(groups, i):
    """What is added to the stored integer of block i, as masked, to get the coefficient over
    `field_weight`: a byte's top field is two's complement (+1/2), others are codes (-(2**bits -
    1)/2)."""
    place = place_of(groups, i)
    if place is None:
        return 0.0
    return (0.5 if place[4] else 0.5 - 2.0 ** (place[3] - 1)) * 2.0 ** place[2]


@triton.jit
def weights_and_zeros(r, GROUPS: tl.constexpr):
    """(`field_weight`, `field_zero`) of components r; 0 past the last block."""
    weight = tl.full(r.shape, 0.0, dtype=tl.float32)
    zero = tl.zeros(r.shape, dtype=tl.float32)
    for n in tl.static_range(rank_of(GROUPS) // 16):
        weight = tl.where(r // 16 == n, field_weight(GROUPS, n), weight)
        zero = tl.where(r // 16 == n, field_zero(GROUPS, n), zero)
    return weight, zero


@triton.jit
def masked_bytes(x, MASK: tl.constexpr, SHIFT: tl.constexpr, NATIVE: tl.constexpr):
    """The MASK bits of every byte, where they are or from SHIFT on, as int8; four bytes an
    instruction where inline assembly is to be had."""
    if MASK & 0xFF == 0xFF:
        y = x.to(tl.int8, bitcast=True)
    elif NATIVE:
        asm: tl.constexpr = f"{{ .reg .b32 t; shr.b32 t, $1, {SHIFT}; and.b32 $0, t, {MASK}; }}"
        y = tl.inline_asm_elementwise(asm, "=r,r", [x], tl.int8, True, 4)
    else:
        y = ((x >> SHIFT) & (MASK & 0xFF)).to(tl.int8, bitcast=True)
    return y
