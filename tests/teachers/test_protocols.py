"""Image sizes of an ImageSpec."""

from teachers.protocols import ImageSpec

HALF = (0.5, 0.5, 0.5)


def test_a_size_is_the_side_of_a_square_or_height_and_width() -> None:
    square, oblong = ImageSpec(32, HALF, HALF), ImageSpec((32, 48), HALF, HALF)
    assert (square.height, square.width) == (32, 32)
    assert (oblong.height, oblong.width) == (32, 48)
