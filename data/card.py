"""Says in words what a prepared data set holds: its card, and whom a model that learns from it sees."""

from __future__ import annotations

import yaml

from ..volumes.processor import VolumeProcessor
from .layout import SHARDS, SPLITS


_REHOSTING = {
    "forbidden": "- The licence forbids to offer the images for download: keep every copy of this repository private",
    "allowed": "- The licence allows to offer the images for download",
}


def make_card(
    name: str, processor: VolumeProcessor, recipe: dict, rows: list[dict], failures: dict, correction: dict | None
) -> str:
    """Returns the card of a prepared data set in Markdown, whose header makes `load_dataset` find the shards of every
    split, from the rows of `subjects.parquet`, the subjects that were left out with the reason, and what
    [`~data.correction.Correction.describe`] says."""
    lines, files = [], []
    for split in SPLITS:
        of_split = [row for row in rows if row["split"] == split and row["rows"]]
        if of_split:
            kept, anomalous = (sum(row[name] for row in of_split) for name in ("rows", "anomalous_rows"))
            lines.append(f"| {split} | {len(of_split)} | {kept} | {anomalous} |")
            files.append({"split": split, "path": SHARDS.format(split=split)})
    header = {
        "license": recipe.get("license", "unknown"),
        "tags": ["anomaly-detection", "medical-imaging", "anodiff"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    left_out = f"\nLeft out, because they could not be read: {', '.join(sorted(failures))}.\n" if failures else ""
    rehosting = f"{_REHOSTING[recipe['rehosting']]}\n" if "rehosting" in recipe else ""
    exceeds = "" if processor.config.clip else ", may exceed it"
    corrected = ""
    if correction is not None:
        done = ", ".join(f"{key}: {value}" for key, value in correction.items())
        corrected = f"- Corrected before: {done}; per subject in `corrections.csv` and `quality/`\n"
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---

# {name}

Slices for anomaly detection with diffusion models, prepared by `anodiff` with `recipe.yaml`.

- Source: {recipe.get("source", "not stated")}
- Licence of the images: {recipe.get("license", "unknown")}
{rehosting}- Modalities, in channel order: {", ".join(processor.config.modalities)}
{corrected}- Groups (patients): {len({row["group"] for row in rows})}, none of them in two splits

| split | subjects | slices | anomalous slices |
| --- | --- | --- | --- |
{chr(10).join(lines)}
{left_out}
| column | content |
| --- | --- |
| `image` | (C, H, W), in the range {list(processor.config.value_range)}{exceeds} |
| `mask` | (A, H, W), a lesion mask per annotator, 0 or 1; the first `annotations` of `subjects.parquet`, then zeros |
| `brain` | (H, W), 0 or 1 |
| `label` | 1 anomalous, 0 healthy, -1 unknown |
| `subject` | name; the rows of a subject are together and in slice order |
| `slice` | index of the slice in the volume, on the network's grid |

`subjects.parquet` holds groups, grids and source files, `processor/` the settings that made the slices.

```python
from anodiff.data.prepared import load_prepared
split = load_prepared("{name}", "{files[0]["split"]}")     # this folder, or its id on the Hub
```

The recipe:

```yaml
{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```
"""


def describe_population(recipe: dict) -> str:
    """Returns whom a model that was trained on data of `recipe` has seen, in words for a card or a report."""
    rule = {
        "healthy_by_mask": "lesion-free slices of the training subjects, who may be ill",
        "healthy_by_label": "healthy training subjects",
        "all": "all slices of the training subjects",
        "not_anomalous": "slices of the training subjects that are not known to be anomalous",
    }[recipe.get("trained_on") or recipe.get("slices", {}).get("train", "all")]
    return f"{rule} ({recipe['source']})" if "source" in recipe else rule
