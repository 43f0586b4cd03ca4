"""What the maker and the readers of prepared data sets agree on: files, splits, columns.

A prepared data set holds the slices that networks see, made once, in a folder that `datasets.load_dataset` reads too:

```
OUT/data/train-00000-of-00002.parquet ...      one row per slice, a subject's rows together and in slice order
OUT/subjects.parquet                           one row per subject: where it came from, its grid, its number of rows
OUT/processor/processor_config.json            the processor that made the slices
OUT/recipe.yaml                                the recipe
OUT/README.md                                  data set card
```

Columns: `image (C, H, W)` float32 or float16 in the processor's value range, `mask (A, H, W)` uint8 (0 or 1),
`brain (H, W)` uint8 (0 or 1), `label` int8 (1 anomalous, 0 healthy, -1 unknown), `subject`, `slice` (index in the
volume on the network's grid).

A, the number of annotations, is one number per data set, at least 1: the largest of its subjects. `annotations` in
`subjects.parquet` says how many a subject has; the rest of its masks is zeros. A column of varying first dimension
would say so by itself, at the price of a Python loop over rows in every reader (0.039 instead of 0.024 ms a row).
"""

from __future__ import annotations

import pyarrow as pa


# C modalities, A annotations, H x W pixels.

SPLITS = ("train", "validation", "test")
SHARDS = "data/{split}-*-of-*.parquet"
# What another data set of the same name may have under other names, or not at all.
VARYING = ("data/*.parquet", "quality/*", "corrections.csv")
SUBJECTS = "subjects.parquet"
RECIPE = "recipe.yaml"
PROCESSOR = "processor"  # folder

SUBJECTS_SCHEMA = pa.schema(
    {
        "subject": pa.string(),
        "split": pa.string(),
        "group": pa.string(),
        "label": pa.int8(),
        "age": pa.float64(),
        "site": pa.string(),
        "annotations": pa.int32(),
        "rows": pa.int32(),
        "anomalous_rows": pa.int32(),
        "shape": pa.list_(pa.int32()),
        "spacing": pa.list_(pa.float64()),
        "affine": pa.list_(pa.float64()),
        "network_shape": pa.list_(pa.int32()),
        "network_affine": pa.list_(pa.float64()),
        "volume_files": pa.list_(pa.string()),
        "mask_files": pa.list_(pa.string()),
        "brain_file": pa.string(),
    }
)

COLUMNS = ("image", "mask", "brain", "label", "subject", "slice")
