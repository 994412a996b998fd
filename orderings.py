"""The five orders in which a grid of codes becomes a sequence (§3), and which token stands where in it (§4).

An order (Fig. 2) is a permutation p of the h·w cells, (h·w,) int64: p[t] is the row-major index of the cell
that is visited at step t. What §3's text leaves open, where a spiral starts and how it turns, or which
quarter comes first, is as in the authors' release. The picture in each docstring is the inverse, the rank
grid: for each cell of a 4×4 grid, the step at which it is visited. Those pictures are run as tests.

`TokenLayout` puts the image's codes, of one scale or several, behind the tokens of a condition.

Symbols: B batch, h×w code grid, T image tokens, P prefix tokens, K image codes, C condition codes,
V vocabulary.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def cells(height: int, width: int) -> Tensor:
    """Row-major index of each cell of a grid: (height, width) int64. Raises ValueError for an empty grid."""
    if height < 1 or width < 1:
        raise ValueError(f"a code grid of {height}×{width} has no cells; height and width must be at least 1")
    return torch.arange(height * width).view(height, width)


def by_quarters(name: str, height: int, width: int, quarters: Callable[[Tensor], list[Tensor]]) -> Tensor:
    """Recursive order over the four quarters of a 2ⁿ×2ⁿ grid: (height*width,). ValueError for other grids."""
    if height != width or height < 1 or height & (height - 1):
        raise ValueError(f"the order {name} needs a square grid whose side is a power of two, not "
                         f"{height}×{width}; row, spiral and alternate take any size")

    def visit(square: Tensor) -> Tensor:
        return torch.cat(list(map(visit, quarters(square)))) if len(square) > 1 else square.flatten()

    return visit(cells(height, width))


def row(height: int, width: int) -> Tensor:
    """Row by row from the top left.

    >>> ranks(row(4, 4), 4, 4)
    tensor([[ 0,  1,  2,  3],
            [ 4,  5,  6,  7],
            [ 8,  9, 10, 11],
            [12, 13, 14, 15]])
    """
    return cells(height, width).flatten()


def spiral(height: int, width: int) -> Tensor:
    """From the centre outwards, for pictures of a centred object.

    Starts left of and below the centre, then up, right, down, left in legs of 1, 1, 2, 2, 3, 3, … cells; what
    lies outside the grid is skipped.

    >>> ranks(spiral(4, 4), 4, 4)
    tensor([[ 9, 10, 11, 12],
            [ 8,  1,  2, 13],
            [ 7,  0,  3, 14],
            [ 6,  5,  4, 15]])
    """
    index = cells(height, width)
    y, x = height // 2, (width - 1) // 2
    dy, dx = -1, 0
    visited, leg = [], 2  # legs 2 and 3 have length 1, legs 4 and 5 have length 2, and so on
    while len(visited) < height * width:
        for _ in range(leg // 2):
            if 0 <= y < height and 0 <= x < width:
                visited.append(int(index[y, x]))
            y, x = y + dy, x + dx
        dy, dx = dx, -dy  # up → right → down → left
        leg += 1
    return torch.tensor(visited)


def zcurve(height: int, width: int) -> Tensor:
    """Quadrant by quadrant (Morton code): neighbours stay together. ValueError unless 2ⁿ×2ⁿ.

    >>> ranks(zcurve(4, 4), 4, 4)
    tensor([[ 0,  1,  4,  5],
            [ 2,  3,  6,  7],
            [ 8,  9, 12, 13],
            [10, 11, 14, 15]])
    """
    return by_quarters("zcurve", height, width,
                       lambda square: [part for half in square.chunk(2, 0) for part in half.chunk(2, 1)])


def subsample(height: int, width: int) -> Tensor:
    """Every second row and column first: a prefix is a small version. ValueError unless 2ⁿ×2ⁿ.

    The same recursion as `zcurve`, over the four interleaved quarters instead of the four quadrants.

    >>> ranks(subsample(4, 4), 4, 4)
    tensor([[ 0,  4,  1,  5],
            [ 8, 12,  9, 13],
            [ 2,  6,  3,  7],
            [10, 14, 11, 15]])
    """
    return by_quarters("subsample", height, width,
                       lambda square: [square[y::2, x::2] for y in (0, 1) for x in (0, 1)])


def alternate(height: int, width: int) -> Tensor:
    """Row by row, every second row from right to left.

    >>> ranks(alternate(4, 4), 4, 4)
    tensor([[ 0,  1,  2,  3],
            [ 7,  6,  5,  4],
            [ 8,  9, 10, 11],
            [15, 14, 13, 12]])
    """
    index = cells(height, width)
    index[1::2] = index[1::2].flip(1)
    return index.flatten()


ORDERINGS = {order.__name__: order for order in (row, spiral, zcurve, subsample, alternate)}


def ranks(p: Tensor, height: int, width: int) -> Tensor:
    """The step at which each cell is visited, the inverse of p: (T,) → (height, width) int64."""
    return torch.argsort(p).view(height, width)


def unroll(codes: Tensor, p: Tensor) -> Tensor:
    """The grid as a sequence: codes (B, h, w) → (B, T), in the order p (T,). ValueError unless h·w = T."""
    if codes.shape[1] * codes.shape[2] != p.numel():
        raise ValueError(f"an order of {p.numel()} steps cannot unroll a grid of "
                         f"{codes.shape[1]}×{codes.shape[2]} cells")
    return codes.flatten(1)[:, p]  # (B, h, w) → (B, h*w) → (B, T)


def roll_up(sequence: Tensor, p: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `unroll`: sequence (B, T) → codes (B, height, width). ValueError if sizes differ."""
    if not sequence.shape[1] == p.numel() == height * width:
        raise ValueError(f"a sequence of {sequence.shape[1]} and an order of {p.numel()} steps do not fill "
                         f"{height}×{width} cells")
    return sequence[:, ranks(p, height, width)]  # (B, T) → (B, h, w)


@cache
def cached_order(order: str, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """`ORDERINGS[order]`, made once for each size and device: (height*width,) int64."""
    return ORDERINGS[order](height, width).to(device)


@dataclass(frozen=True)
class TokenLayout:
    """Which token stands where: the condition's first, then the image's, scale by scale, each in the order.

        ids        0 … K−1 image codes · K … K+C−1 condition codes · K+C the null token, which is never a code
        sequence   P prefix tokens (a condition, or one null token) · T image tokens, coarse to fine

    Plain values, so that `asdict` goes into a checkpoint. The condition is never permuted. Raises ValueError
    for sizes that do not fit together.
    """
    codebook_size: int  # K
    height: int  # of the finest grid
    width: int
    order: str = "row"
    scales: tuple[int, ...] = ()  # sides of the coarser grids, (1, 2, 4, 8) below 16×16; §3, multiscale
    condition_size: int = 0  # C: classes, or codes of the condition's first stage; 0: no condition
    condition_length: int = 0  # 1 for a class, h·w for a map
    null_token: bool = True  # starts an unconditional sequence, or stands for a dropped condition

    def __post_init__(self):
        if self.order not in ORDERINGS:
            raise ValueError(f"order is {self.order!r}; choose one of {', '.join(ORDERINGS)}")
        if min(self.codebook_size, self.height, self.width) < 1:
            raise ValueError(f"{self.height}×{self.width} cells of {self.codebook_size} codes; each number "
                             "must be at least 1")
        sides = (*self.scales, min(self.height, self.width))
        if any(a < 1 or b <= a or self.height % a or self.width % a for a, b in zip(sides, sides[1:])):
            raise ValueError(f"scales are {self.scales}; they must grow, and divide "
                             f"{self.height}×{self.width} (for --multiscale, a power of two)")
        size, length = self.condition_size, self.condition_length
        if min(size, length) < 0 or (size > 0) != (length > 0):
            raise ValueError(f"condition_length is {length} and condition_size {size}; both must be 0, or "
                             "neither")
        if not self.condition_length and not self.null_token:
            raise ValueError("a sequence without a condition needs the null token to start with")
        self.permutation  # an order that cannot unroll one of the grids raises here

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each grid, coarse to fine."""
        return [*((side, side) for side in self.scales), (self.height, self.width)]

    @property
    def lengths(self) -> list[int]:
        """Image tokens of each grid; their sum is T, 341 for all scales of 16×16."""
        return [height * width for height, width in self.sizes]

    @property
    def prefix_length(self) -> int:
        """P, the tokens before the image."""
        return max(1, self.condition_length)

    @property
    def vocab_size(self) -> int:
        """V, the number of ids."""
        return self.codebook_size + self.condition_size + self.null_token

    @property
    def block_size(self) -> int:
        """Positions of a GPT: 512 for the paper's maps. Behind a condition the last one is not used."""
        return self.condition_length + sum(self.lengths)

    @property
    def permutation(self) -> Tensor:
        """Which cell is visited at each step, (T,) int64, counting through the cells of all grids."""
        grids = torch.arange(sum(self.lengths)).split(self.lengths)  # each cell's number, (h·w,) each
        return self.image_tokens([grid.view(1, *size) for grid, size in zip(grids, self.sizes)])[0]

    def prefix(self, condition: Tensor | None, batch: int) -> Tensor:
        """What comes before the image: (B, P) int64.

        `condition` has B rows of P codes, in any shape, in [0, C); −1 stands for the null token. Without one
        all tokens are the null token, which starts an unconditional sequence. Raises ValueError for another
        number of rows or codes, or if the model has no condition; the codes' values are not checked.
        """
        P, null = self.prefix_length, self.codebook_size + self.condition_size
        if condition is None:
            if not self.null_token:
                raise ValueError("this model has no null token: it needs a condition")
            return torch.full((batch, P), null)
        if not self.condition_length:
            raise ValueError("a condition for a model that has none")
        if len(condition) != batch or condition.numel() != batch * P:
            raise ValueError(f"a condition of the shape {tuple(condition.shape)}; this model needs {batch} "
                             f"rows of {P} codes")
        condition = condition.reshape(batch, P).long()
        return torch.where(condition < 0, null, condition + self.codebook_size)

    def image_tokens(self, grids: list[Tensor]) -> Tensor:
        """Codes in the order in which they are predicted: grids coarse to fine, (B, h, w) each → (B, T)."""
        return torch.cat([unroll(codes, cached_order(self.order, *size, codes.device))
                          for codes, size in zip(grids, self.sizes, strict=True)], 1)

    def tokens(self, grids: list[Tensor], condition: Tensor | None) -> Tensor:
        """Grids coarse to fine, (B, h, w) each, and a condition as in `prefix` → (B, P + T) int64."""
        image = self.image_tokens(grids)
        return torch.cat([self.prefix(condition, len(image)).to(image.device, non_blocking=True), image], 1)

    def grids(self, image_tokens: Tensor) -> list[Tensor]:
        """Inverse of `image_tokens`, also for losses or ranks: (B, T) → grids coarse to fine, (B, h, w)."""
        parts = image_tokens.split(self.lengths, dim=1)
        return [roll_up(part, cached_order(self.order, *size, part.device), *size)
                for part, size in zip(parts, self.sizes)]

    def loss(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Cross-entropy of each image token, none of the prefix (§4, p(z|c)): (B, T) float32, in nats.

        `logits` (B, P + T − 1, V) are a GPT's for tokens[:, :-1], of the tokens (B, P + T). ValueError for
        another number of them.
        """
        if logits.shape[1] != tokens.shape[1] - 1:
            raise ValueError(f"logits of {logits.shape[1]} positions for {tokens.shape[1]} tokens; the last "
                             "token is never an input")
        T = sum(self.lengths)
        logits, targets = logits[:, -T:].float(), tokens[:, -T:]  # (B, T, V), (B, T)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(-1, T)
