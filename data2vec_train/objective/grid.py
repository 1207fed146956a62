"""Rows and columns of the tokens of one input."""


def grid_of(num_tokens: int, grid: tuple[int | None, int] | None) -> tuple[int, int] | None:
    """`grid`, with rows of None replaced by the number of rows that the tokens fill; None for a sequence."""
    if grid is None:
        return None
    rows, columns = grid
    return num_tokens // columns if rows is None else rows, columns
