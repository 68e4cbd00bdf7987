"""The nine numbers of a coefficient row, reached by their names."""

from __future__ import annotations

from torch import Tensor

COLUMNS = ("a", "b", "c", "p", "q", "s", "k_out", "k_x", "w")


class Coefficients:
    """Coefficient rows by name: ``x_t = a x + b y + c n``, ``tgt = p x + q y + s n``, ``f = k_out F + k_x x_t``.

    Each number is a view of the rows: ``Coefficients(coef).w.mul_(2)`` doubles every row's weight ``w``.

    Args:
        rows: ``(R, 9)`` from ``path.coefficients``, or one row ``(9,)``.
        like: a batch that the numbers are to be multiplied with. Each is then ``(R, 1, ...)`` and broadcasts over it;
            it is ``(R,)`` when not given.
    """

    __slots__ = ("_dims", "_rows")

    a: Tensor
    b: Tensor
    c: Tensor
    p: Tensor
    q: Tensor
    s: Tensor
    k_out: Tensor
    k_x: Tensor
    w: Tensor

    def __init__(self, rows: Tensor, like: Tensor | None = None) -> None:
        self._rows, self._dims = rows, 1 if like is None else like.dim()

    def __getattr__(self, name: str) -> Tensor:
        if name not in COLUMNS:
            raise AttributeError(f"a coefficient row has no number {name!r}, only {', '.join(COLUMNS)}")
        number = self._rows.select(-1, COLUMNS.index(name))
        return number if self._dims < 2 else number.view(-1, *[1] * (self._dims - 1))

    @property
    def scales(self) -> Tensor:
        """The scales ``a, b, c`` of ``x_t`` side by side, ``(R, 3)``."""
        return self._rows[..., : COLUMNS.index("c") + 1]
