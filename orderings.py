"""The five orders in which a grid of codes becomes a sequence (§3, "On the Inherent Ordering of Image Data").

An order (Fig. 2) is a permutation p of the h·w cells: p[t] is the row-major index of the cell that is visited
at step t. The picture in each docstring is its inverse, the rank grid: it shows for each cell of a 4×4 grid
at which step it is visited. Those pictures are run as tests.

Symbols: B batch, h×w code grid, T = h·w steps.
"""
from collections.abc import Callable

import torch
from torch import Tensor


def cells(height: int, width: int) -> Tensor:
    """Row-major index of each cell of a grid: (height, width) int64. Raises ValueError for an empty grid."""
    if height < 1 or width < 1:
        raise ValueError(f"a code grid of {height}×{width} has no cells; height and width must be at least 1")
    return torch.arange(height * width).view(height, width)


def square_of_a_power_of_two(name: str, height: int, width: int) -> Tensor:
    """`cells` for the two orders that are defined by halving a square again and again; else ValueError."""
    if height != width or height < 1 or height & (height - 1):
        raise ValueError(f"the order {name} needs a square grid whose side is a power of two, not "
                         f"{height}×{width}; row, spiral and alternate take any size")
    return cells(height, width)


def row(height: int, width: int) -> Tensor:
    """Row by row from the top left: (height*width,) int64.

    >>> print(picture(row(4, 4), 4, 4))
     0  1  2  3
     4  5  6  7
     8  9 10 11
    12 13 14 15
    """
    return cells(height, width).flatten()


def spiral(height: int, width: int) -> Tensor:
    """From the centre outwards, for pictures of a centred object: (height*width,) int64.

    Starts left of and below the centre, then up, right, down, left in legs of 1, 1, 2, 2, 3, 3, … cells; what
    lies outside the grid is skipped.

    >>> print(picture(spiral(4, 4), 4, 4))
     9 10 11 12
     8  1  2 13
     7  0  3 14
     6  5  4 15
    """
    index = cells(height, width)
    y, x = height // 2, (width - 1) // 2
    visited = [int(index[y, x])]
    dy, dx = -1, 0
    leg = 2  # legs 2 and 3 have length 1, legs 4 and 5 have length 2, and so on
    while len(visited) < height * width:
        for _ in range(leg // 2):
            y, x = y + dy, x + dx
            if 0 <= y < height and 0 <= x < width:
                visited.append(int(index[y, x]))
        dy, dx = dx, -dy  # up → right → down → left
        leg += 1
    return torch.tensor(visited)


def zcurve(height: int, width: int) -> Tensor:
    """Quadrant by quadrant (Morton code), which keeps neighbours together: (height*width,) int64.

    Squares of a power of two.

    >>> print(picture(zcurve(4, 4), 4, 4))
     0  1  4  5
     2  3  6  7
     8  9 12 13
    10 11 14 15
    """
    def visit(square: Tensor) -> Tensor:
        if square.numel() == 1:
            return square.flatten()
        n = len(square) // 2
        return torch.cat([visit(square[:n, :n]), visit(square[:n, n:]),
                          visit(square[n:, :n]), visit(square[n:, n:])])

    return visit(square_of_a_power_of_two("zcurve", height, width))


def subsample(height: int, width: int) -> Tensor:
    """Every second row and column first, so that a prefix is a small version: (height*width,) int64.

    Squares of a power of two. The same recursion as `zcurve`, over the four interleaved quarters instead of
    the four quadrants.

    >>> print(picture(subsample(4, 4), 4, 4))
     0  4  1  5
     8 12  9 13
     2  6  3  7
    10 14 11 15
    """
    def visit(square: Tensor) -> Tensor:
        if square.numel() == 1:
            return square.flatten()
        return torch.cat([visit(square[y::2, x::2]) for y in (0, 1) for x in (0, 1)])

    return visit(square_of_a_power_of_two("subsample", height, width))


def alternate(height: int, width: int) -> Tensor:
    """Row by row, every second row from right to left: (height*width,) int64.

    >>> print(picture(alternate(4, 4), 4, 4))
     0  1  2  3
     7  6  5  4
     8  9 10 11
    15 14 13 12
    """
    index = cells(height, width).clone()
    index[1::2] = index[1::2].flip(1)
    return index.flatten()


ORDERINGS: dict[str, Callable[[int, int], Tensor]] = {
    "row": row, "spiral": spiral, "zcurve": zcurve, "subsample": subsample, "alternate": alternate,
}


def ranks(p: Tensor, height: int, width: int) -> Tensor:
    """The step at which each cell is visited, the inverse of p: (T,) → (height, width) int64."""
    return torch.argsort(p).view(height, width)


def picture(p: Tensor, height: int, width: int) -> str:
    """The rank grid of an order as text, as the docstrings above show it."""
    digits = len(str(height * width - 1))
    lines = ranks(p, height, width).tolist()
    return "\n".join(" ".join(f"{rank:{digits}d}" for rank in line) for line in lines)


def unroll(codes: Tensor, p: Tensor) -> Tensor:
    """The grid as a sequence: codes (B, h, w) → (B, T), in the order p (T,). ValueError if sizes differ."""
    if codes.shape[1] * codes.shape[2] != p.numel():
        raise ValueError(f"an order of {p.numel()} steps cannot unroll a grid of "
                         f"{codes.shape[1]}×{codes.shape[2]} cells")
    return codes.flatten(1)[:, p]  # (B, h, w) → (B, h*w) → (B, T)


def roll_up(sequence: Tensor, p: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `unroll`: sequence (B, T) → codes (B, height, width). ValueError if sizes differ."""
    if not sequence.shape[1] == p.numel() == height * width:
        raise ValueError(f"a sequence of {sequence.shape[1]} and an order of {p.numel()} steps do not fill "
                         f"{height}×{width} cells")
    return sequence[:, torch.argsort(p)].view(-1, height, width)  # (B, T) → (B, h*w) → (B, h, w)
