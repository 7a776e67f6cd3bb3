"""Least squares from streamed batches: only the sums `X'X`, `X'Y` and `Y'Y` are kept."""

from __future__ import annotations

import torch


class NormalEquations:
    """Normal equations of `Y ~ X W (+ b)` in float64.

    Args:
        num_inputs: Columns of X.
        num_outputs: Columns of Y.
        device: Where the sums live.
        bias: Fit a constant row `b` as well.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        device: torch.device | str = "cpu",
        bias: bool = False,
    ) -> None:
        size = num_inputs + int(bias)
        self.bias = bias
        self.num_rows = 0
        self.xx = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.xy = torch.zeros(size, num_outputs, dtype=torch.float64, device=device)
        # Errors need the diagonal of Y'Y only.
        self.yy = torch.zeros(num_outputs, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add rows.

        Args:
            x: [num_rows, num_inputs], any float dtype.
            y: [num_rows, num_outputs], any float dtype.
        """
        x, y = x.double(), y.double()
        if self.bias:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy += y.square().sum(0)
        self.num_rows += len(x)

    def solve(self, ridge: float = 0.0) -> torch.Tensor:
        """Ridge solution W, float64 [num_inputs (+ 1 row for the bias), num_outputs].

        Args:
            ridge: Weight of `|W|^2` relative to the mean diagonal of `X'X`, so that its meaning
                does not depend on the amount of data or the scale of X. The bias is not shrunk.
                Inputs that were always zero get zero weights whatever it is.

        Raises:
            ValueError: If the system is singular to working precision.
        """
        num_inputs = len(self.xx) - int(self.bias)
        factor = ridge_factor(self.xx, ridge, num_inputs)
        if factor is None:
            raise ValueError(
                f"the {num_inputs} features of {self.num_rows} tokens are linearly dependent and "
                f"ridge={ridge} does not repair it; raise the ridge or use more tokens"
            )
        return torch.cholesky_solve(self.xy, factor)

    def squared_error(self, weights: torch.Tensor) -> float:
        """`|Y - X W|^2` over the rows seen, for weights as returned by `solve`.

        Rounding limits it to about 1e-15 of `|Y|^2`; a negative remainder is reported as 0.
        """
        residual = (
            self.yy - 2 * (weights * self.xy).sum(0) + (weights * (self.xx @ weights)).sum(0)
        ).sum()
        return max(residual.item(), 0.0)

    def relative_error(self, weights: torch.Tensor) -> float:
        """`|Y - X W|^2 / |Y|^2` over the rows seen, for weights as returned by `solve`.

        Outputs that are all zero count as rebuilt exactly when the prediction is zero too.
        """
        return relative(self.squared_error(weights), self.yy.sum().item())


def ridge_factor(xx: torch.Tensor, ridge: float, num_shrunk: int) -> torch.Tensor | None:
    """Cholesky factor of `X'X` with a ridge on its diagonal.

    Args:
        xx: [size, size] float64.
        ridge: Relative to the mean of the diagonal's first `num_shrunk` entries, which get it.
        num_shrunk: The rest is a bias.

    Returns:
        Lower factor [size, size], or None if the matrix is singular to working precision.
    """
    diagonal = xx.diagonal()
    added = torch.zeros_like(diagonal)
    added[:num_shrunk] = ridge * diagonal[:num_shrunk].mean()
    # The row and column of an input that is always zero, as of a pruned head, are zero, and so is
    # its row of X'Y: with any positive number on the diagonal its weights come out as zero.
    factor, info = torch.linalg.cholesky_ex(xx + torch.diag(added.masked_fill(diagonal == 0, 1.0)))
    return factor if int(info) == 0 else None


def relative(residual: float, total: float) -> float:
    """Ratio of two sums of squares, with 0/0 = 0."""
    if total > 0:
        return residual / total
    return 0.0 if residual == 0 else float("inf")
