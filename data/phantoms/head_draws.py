"""What is random in a head, drawn once however often the head is looked at."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...schedulers.draws import fold_in, normal, uniform


# What keys are folded with, one number per purpose.
SHAPE, KNOTS, TISSUE, TEXTURE, FIELDS, SCANNER, NOISE, MASK, RIMS, LESION, LOOK, ERRORS = range(1, 13)


class HeadDraws:
    """
    Draws numbers of heads and remembers them: a head that is looked at again, at other places or finer, needs no draw
    anew. Starting the kernels of draws takes a GPU longer than the draws themselves.

    Args:
        keys (`torch.Tensor` of shape `(B, 2)`): One for each head.
    """

    def __init__(self, keys: torch.Tensor):
        self.keys = keys
        self._made: dict = {}

    def __len__(self) -> int:
        return len(self.keys)

    def of(self, *purposes: int) -> HeadDraws:
        """Returns the draws for a purpose, or for one of its parts, from keys of their own."""
        draws = self
        for purpose in purposes:
            draws = draws.once(purpose, lambda draws=draws, purpose=purpose: HeadDraws(fold_in(draws.keys, purpose)))
        return draws

    def normal(self, *shape: int) -> torch.Tensor:
        """Returns standard normal numbers `(B, *shape)`, the same for every call with this shape."""
        return self.once(("normal", shape), lambda: normal(self.keys, shape))

    def uniform(self, *shape: int) -> torch.Tensor:
        """Returns numbers in [0, 1), `(B, *shape)`, the same for every call with this shape."""
        return self.once(("uniform", shape), lambda: uniform(self.keys, shape))

    def once(self, what: object, make: Callable[[], object]):
        """Returns what is made of these draws under a name, making it at the first call. It must not be changed."""
        if what not in self._made:
            self._made[what] = make()
        return self._made[what]
