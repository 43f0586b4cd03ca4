"""How far a call is: shown in the bar, and told to whoever wants to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm


@dataclass
class Progress:
    """
    Counts the steps of a call. A step is one of a batch of slices or draws, most often one evaluation of the network.

    Args:
        callback (callable, *optional*):
            `callback(done, total)` after every step, both >= 1. `done` grows by one, and is `total` at the end; `total`
            grows where a method finds on its way that there is more to do. What it raises ends the call.
        bar (`tqdm.tqdm`, *optional*): Shows the steps that are being done.
    """

    callback: Callable[[int, int], None] | None = None
    bar: tqdm | None = None
    done: int = 0
    total: int = 0

    def update(self) -> None:
        """Counts a step that is done."""
        self.done += 1
        self.bar.update()
        if self.callback is not None:
            self.callback(self.done, self.total)
