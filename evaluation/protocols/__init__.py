"""The evaluation protocols, a module each. A new one is a file here and a name in `PROTOCOLS`.

A protocol is a module with these names:

- `TASK`: the `task` of the pipelines that it scores. Those of anomaly maps have their columns beside our own
  (`pooled`).
- `TEXT`: what it adds to the protocol fields of a report; `{healthy_fpr}` stands for that option.
- `COLUMNS`: metric to title, those that the table shows where a row has them.
- `SWEEP`: first threshold, last one and step of its grid, `()` if it makes its grid of the scores, `None` if it has no
  grid.
- `NEEDS`: what must be computed or stored for it, a [`Needs`].
- `score(row, files, thresholds, options)`: the [`Scores`] of one row of the report, with its `name` and `settings`,
  from the files of its cases by split (`test`, perhaps `validation`) and the grid that the options give, `None` for
  its own.
"""

from __future__ import annotations

from importlib import import_module


PROTOCOLS = {
    name: import_module(f".{name}", __name__) for name in ("pooled", "andi", "uad_imag", "anofpdm", "sadm", "ensemble")
}
