"""The five orders and the layout of tokens.

Oracles: the pictures in the docstrings (run as doctests); literal sequences of the authors' later release;
identities (base-4 digits, ring by ring, neighbours);
a slow loop for unroll and roll_up; literal sequences for the layout.
"""
import doctest

import pytest
import torch

import orderings
from orderings import ORDERINGS, TokenLayout, ranks, roll_up, unroll

ANY_SIZE = ["row", "spiral", "alternate"]
POWER_OF_TWO = ["zcurve", "subsample"]
RECTANGLES = [(1, 1), (1, 2), (2, 1), (1, 7), (7, 1), (2, 3), (3, 2), (3, 3), (4, 9), (9, 4), (5, 5), (6, 16),
              (16, 16)]


def morton_code(y: int, x: int, bits: int) -> int:
    """Interleave the bits of y and x, y first: the textbook Z-order curve."""
    return sum(((y >> i & 1) << (2 * i + 1)) | ((x >> i & 1) << (2 * i)) for i in range(bits))


def base_4_reversed(number: int, digits: int) -> int:
    """The number whose base-4 digits are those of `number` in reverse."""
    result = 0
    for _ in range(digits):
        result = 4 * result + number % 4
        number //= 4
    return result


def test_docstring_pictures_are_what_the_code_draws():
    outcome = doctest.testmod(orderings)
    assert outcome.failed == 0
    assert outcome.attempted >= 5  # one picture an order


def test_the_five_orders_have_the_names_of_the_command_line_in_this_order():
    assert list(ORDERINGS)[:5] == ["row", "spiral", "zcurve", "subsample", "alternate"]  # yours may follow
    assert all(ORDERINGS[name] is getattr(orderings, name) for name in list(ORDERINGS)[:5])


@pytest.mark.parametrize("height, width", RECTANGLES)
@pytest.mark.parametrize("name", ANY_SIZE)
def test_every_cell_of_a_rectangle_is_visited_once(name, height, width):
    p = ORDERINGS[name](height, width)
    assert p.dtype == torch.int64
    assert p.shape == (height * width,)
    assert sorted(p.tolist()) == list(range(height * width))


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("name", ORDERINGS)
def test_every_cell_of_a_square_is_visited_once(name, side):
    p = ORDERINGS[name](side, side)
    assert p.dtype == torch.int64
    assert p.shape == (side * side,)
    assert sorted(p.tolist()) == list(range(side * side))


@pytest.mark.parametrize("height, width", [
    (3, 3), (6, 6), (12, 12), (4, 8), (8, 4), (1, 2), (0, 0), (0, 4), (-4, -4)])
@pytest.mark.parametrize("name", POWER_OF_TWO)
def test_the_recursive_orders_refuse_all_but_squares_of_a_power_of_two(name, height, width):
    with pytest.raises(ValueError, match=f"order {name} needs a square grid whose side is a power of two, "
                                         f"not {height}×{width}; row, spiral and alternate take any size"):
        ORDERINGS[name](height, width)


@pytest.mark.parametrize("height, width", [(0, 4), (4, 0), (0, 0), (-1, 4), (-2, -2)])
@pytest.mark.parametrize("name", ANY_SIZE)
def test_an_empty_grid_is_refused(name, height, width):
    with pytest.raises(ValueError, match=f"a code grid of {height}×{width} has no cells"):
        ORDERINGS[name](height, width)


@pytest.mark.parametrize("name, first, last", [
    ("spiral", [135, 119, 120, 136, 152, 151, 150, 134, 118, 102, 103, 104, 105, 121, 137, 153, 169, 168, 167,
                166], [207, 223, 239, 255]),
    ("zcurve", [0, 1, 16, 17, 2, 3, 18, 19, 32, 33, 48, 49, 34, 35, 50, 51, 4, 5, 20, 21],
     [238, 239, 254, 255]),
    ("subsample", [0, 8, 128, 136, 4, 12, 132, 140, 64, 72, 192, 200, 68, 76, 196, 204, 2, 10, 130, 138],
     [119, 127, 247, 255]),
    ("alternate", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 31, 30, 29, 28],
     [243, 242, 241, 240]),
    ("row", list(range(20)), [252, 253, 254, 255]),
])
def test_16x16_sequences_are_those_of_the_authors_release(name, first, last):
    p = ORDERINGS[name](16, 16).tolist()
    assert p[:20] == first
    assert p[-4:] == last


def test_2x2_sequences_are_those_of_the_authors_release():
    for name, sequence in {"row": [0, 1, 2, 3], "spiral": [2, 0, 1, 3], "zcurve": [0, 1, 2, 3],
                           "subsample": [0, 1, 2, 3], "alternate": [0, 1, 3, 2]}.items():
        assert ORDERINGS[name](2, 2).tolist() == sequence, name


def rank_grid(name: str, height: int, width: int) -> list[list[int]]:
    return ranks(ORDERINGS[name](height, width), height, width).tolist()


def test_8x8_spiral_picture_is_that_of_the_authors_release():
    assert rank_grid("spiral", 8, 8) == [
        [49, 50, 51, 52, 53, 54, 55, 56],
        [48, 25, 26, 27, 28, 29, 30, 57],
        [47, 24, 9, 10, 11, 12, 31, 58],
        [46, 23, 8, 1, 2, 13, 32, 59],
        [45, 22, 7, 0, 3, 14, 33, 60],
        [44, 21, 6, 5, 4, 15, 34, 61],
        [43, 20, 19, 18, 17, 16, 35, 62],
        [42, 41, 40, 39, 38, 37, 36, 63]]


def test_rectangles_look_as_drawn_here():
    assert rank_grid("row", 2, 3) == [[0, 1, 2], [3, 4, 5]]
    assert rank_grid("alternate", 3, 2) == [[0, 1], [3, 2], [4, 5]]
    assert rank_grid("spiral", 3, 3) == [[8, 1, 2], [7, 0, 3], [6, 5, 4]]
    assert rank_grid("spiral", 2, 4) == [[5, 1, 2, 6], [4, 0, 3, 7]]  # steps 3 to 4 pass below the grid
    assert rank_grid("spiral", 3, 5) == [[14, 8, 1, 2, 9], [13, 7, 0, 3, 10], [12, 6, 5, 4, 11]]


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16, 32])
def test_zcurve_rank_is_the_morton_code(side):
    bits = side.bit_length() - 1
    assert ranks(ORDERINGS["zcurve"](side, side), side, side).tolist() == [
        [morton_code(y, x, bits) for x in range(side)] for y in range(side)]


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16, 32])
def test_subsample_rank_is_the_morton_code_with_its_base_4_digits_reversed(side):
    bits = side.bit_length() - 1
    assert ranks(ORDERINGS["subsample"](side, side), side, side).tolist() == [
        [base_4_reversed(morton_code(y, x, bits), bits) for x in range(side)] for y in range(side)]


@pytest.mark.parametrize("level", [0, 1, 2, 3, 4])
def test_a_subsample_prefix_is_the_strided_grid(level):
    grid = torch.arange(256).view(16, 16)
    strided = grid[::16 >> level, ::16 >> level].flatten()
    prefix = ORDERINGS["subsample"](16, 16)[:4 ** level]
    assert prefix.sort().values.tolist() == strided.tolist()


@pytest.mark.parametrize("side", [2, 3, 4, 5, 8, 11, 16])
@pytest.mark.parametrize("name", ["spiral", "alternate"])
def test_each_step_goes_to_a_neighbour_cell_on_squares(name, side):
    p = ORDERINGS[name](side, side)
    y, x = p // side, p % side
    assert ((y.diff().abs() + x.diff().abs()) == 1).all()


@pytest.mark.parametrize("height, width", [(1, 5), (5, 1), (3, 8), (8, 3), (7, 4)])
def test_alternate_goes_to_a_neighbour_cell_on_rectangles(height, width):
    p = ORDERINGS["alternate"](height, width)
    assert (((p // width).diff().abs() + (p % width).diff().abs()) == 1).all()


@pytest.mark.parametrize("side", [4, 7, 16])
def test_each_square_number_of_spiral_steps_fills_a_square(side):
    p = ORDERINGS["spiral"](side, side)
    for n in range(1, side + 1):
        y, x = p[:n * n] // side, p[:n * n] % side
        assert y.max() - y.min() == x.max() - x.min() == n - 1


@pytest.mark.parametrize("height, width", RECTANGLES)
def test_a_rectangular_spiral_is_the_square_one_without_the_cells_outside(height, width):
    side = 2 * max(height, width)  # even: the square starts in row side/2, column side/2 − 1
    expected = []
    for cell in ORDERINGS["spiral"](side, side).tolist():
        y = cell // side - side // 2 + height // 2
        x = cell % side - (side // 2 - 1) + (width - 1) // 2
        if 0 <= y < height and 0 <= x < width:
            expected.append(y * width + x)
    assert ORDERINGS["spiral"](height, width).tolist() == expected


@pytest.mark.parametrize("name", ORDERINGS)
def test_ranks_say_when_each_cell_is_visited(name):
    p = ORDERINGS[name](8, 8)
    rank = ranks(p, 8, 8)
    assert [rank[cell // 8, cell % 8].item() for cell in p.tolist()] == list(range(64))


def test_unroll_and_roll_up_do_what_a_slow_loop_does_and_undo_each_other():
    for name, height, width in (("row", 3, 5), ("spiral", 3, 5), ("alternate", 3, 5), ("zcurve", 4, 4),
                                ("subsample", 16, 16)):
        p = ORDERINGS[name](height, width)
        codes = torch.randint(1000, (3, width, height)).transpose(1, 2)  # strided
        sequence = torch.zeros(3, height * width, dtype=torch.int64)
        for picture_index in range(3):
            for t, cell in enumerate(p.tolist()):
                sequence[picture_index, t] = codes[picture_index, cell // width, cell % width]
        assert torch.equal(unroll(codes, p), sequence), name
        assert torch.equal(roll_up(sequence, p, height, width), codes), name


def test_sizes_that_differ_are_refused():
    with pytest.raises(ValueError, match="an order of 16 steps cannot unroll a grid of 4×5 cells"):
        unroll(torch.zeros(2, 4, 5, dtype=torch.int64), ORDERINGS["row"](4, 4))
    for length, steps, height, width in ((15, 16, 4, 4), (16, 15, 4, 4), (16, 16, 4, 5), (20, 16, 4, 5)):
        with pytest.raises(ValueError, match=f"a sequence of {length} and an order of {steps} steps do not"):
            roll_up(torch.zeros(2, length, dtype=torch.int64), ORDERINGS["row"](1, steps), height, width)


# the token layout


def test_the_papers_layouts_have_its_sizes():
    single = TokenLayout(1024, 16, 16)
    assert (single.vocab_size, single.block_size, single.prefix_length) == (1025, 256, 1)
    assert single.lengths == [256]
    multiscale = TokenLayout(1024, 16, 16, scales=(1, 2, 4, 8))
    assert sum(multiscale.lengths) == multiscale.block_size == 341  # §3
    maps = TokenLayout(1024, 16, 16, condition_size=1024, condition_length=256, null_token=False)
    assert (maps.vocab_size, maps.block_size, maps.prefix_length) == (2048, 512, 256)
    classes = TokenLayout(1024, 16, 16, condition_size=1000, condition_length=1)
    assert (classes.vocab_size, classes.block_size) == (2025, 257)


def test_a_sequence_is_the_condition_then_each_grid_in_the_order():
    """Literal: 3 image codes, 2 condition codes with the ids 3 and 4, the null token 5; alternate unrolls 2×2
    as 0, 1, 3, 2 and leaves the condition as it is."""
    layout = TokenLayout(3, 2, 2, "alternate", (1,), condition_size=2, condition_length=4)
    grids = [torch.tensor([[[2]], [[0]]]), torch.tensor([[[0, 1], [2, 0]], [[2, 2], [1, 0]]])]
    condition = torch.tensor([[[0, 1], [1, 0]], [[1, 0], [0, 0]]])  # (B, h, w)
    sequence = [[3, 4, 4, 3, 2, 0, 1, 0, 2], [4, 3, 3, 3, 0, 2, 2, 0, 1]]
    assert layout.tokens(grids, condition).tolist() == sequence
    assert layout.image_tokens(grids).tolist() == [row[4:] for row in sequence]
    assert layout.permutation.tolist() == [0, 1, 2, 4, 3]
    dropped = condition.flatten(1).masked_fill(torch.tensor([[True], [False]]), -1)
    assert layout.prefix(dropped, 2).tolist() == [[5] * 4, [4, 3, 3, 3]]
    assert layout.prefix(None, 2).tolist() == [[5] * 4] * 2
    assert TokenLayout(3, 2, 2).prefix(None, 2).tolist() == [[3], [3]]
    label = TokenLayout(3, 2, 2, condition_size=2, condition_length=1, null_token=False)
    assert label.prefix(torch.tensor([1, 0]), 2).tolist() == [[4], [3]]
    few = TokenLayout(1024, 2, 2, condition_size=2, condition_length=1).prefix(torch.tensor([1], dtype=torch.uint8), 1)
    assert few.tolist() == [[1025]] and few.dtype == torch.int64


def test_grids_undo_the_sequence_for_codes_and_for_losses():
    for order in ORDERINGS:
        for scales in ((), (1, 2, 4), (2,)):
            layout = TokenLayout(50, 8, 8, order, scales)
            grids = [torch.randint(50, (3, side, side)) for side in (*scales, 8)]
            back = layout.grids(layout.tokens(grids, None)[:, 1:])
            assert all(map(torch.equal, grids, back)) and len(grids) == len(back), (order, scales)
            nats = [grid.double() / 7 for grid in grids]
            assert all(map(torch.equal, nats, layout.grids(layout.image_tokens(nats))))


def test_the_loss_is_that_of_each_image_token_and_of_no_condition():
    layout = TokenLayout(4, 2, 2, "spiral", condition_size=3, condition_length=2)
    tokens = torch.cat([torch.randint(4, 7, (2, 2)), torch.randint(4, (2, 4))], 1)  # (B, P + T)
    logits = torch.randn(2, 5, layout.vocab_size)
    loss = layout.loss(logits, tokens)
    assert loss.shape == (2, 4) and loss.dtype == torch.float32
    for b in range(2):
        for t in range(4):
            nats = -logits[b, 1 + t].log_softmax(0)[tokens[b, 2 + t]]
            assert loss[b, t].item() == pytest.approx(nats.item(), rel=1e-5)
    assert layout.loss(logits.bfloat16(), tokens).dtype == torch.float32
    with pytest.raises(ValueError, match="logits of 6 positions for 6 tokens; the last token is never an input"):
        layout.loss(torch.randn(2, 6, layout.vocab_size), tokens)


def test_layouts_that_cannot_be_are_refused():
    for values, sentence in [
            ({"order": "sprial"}, "choose one of row, spiral, zcurve, subsample, alternate"),
            ({"scales": (2, 1)}, "they must grow"), ({"scales": (3,)}, "divide 8×8"),
            ({"scales": (8,)}, "grow"), ({"codebook_size": 0}, "8×8 cells of 0 codes"),
            ({"height": -8, "width": -8}, "each number must be at least 1"),
            ({"condition_size": 3}, "both must be 0, or neither"),
            ({"condition_length": 1}, "both must be 0, or neither"),
            ({"condition_size": -1, "condition_length": -1}, "both must be 0, or neither"),
            ({"null_token": False}, "needs the null token to start with"),
            ({"order": "zcurve", "width": 12}, "needs a square grid")]:
        with pytest.raises(ValueError, match=sentence):
            TokenLayout(**{"codebook_size": 9, "height": 8, "width": 8} | values)
    label, none = TokenLayout(9, 8, 8, condition_size=2, condition_length=1), TokenLayout(9, 8, 8)
    for condition in (torch.zeros(2, 3), torch.zeros(4), torch.zeros(1, 2)):  # two labels are wanted
        with pytest.raises(ValueError, match=r"this model needs 2 rows of 1 codes"):
            label.prefix(condition, 2)
    with pytest.raises(ValueError, match="a condition for a model that has none"):
        none.prefix(torch.zeros(2), 2)
    for scales, sides in (((), (4, 2)), ((1, 2), (1, 2))):  # a grid too many, and one too few
        with pytest.raises(ValueError, match=r"zip\(\) argument"):
            TokenLayout(9, 4, 4, scales=scales).image_tokens([torch.zeros(2, side, side) for side in sides])
