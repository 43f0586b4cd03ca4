"""What an evaluation can be told. No torch here: `--help` must be fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class EvalOptions:
    """One evaluation: several models and the baselines on one prepared data set."""

    model: list[str] = field(default_factory=list)
    """Pipeline folder or Hub id; give the flag once per model."""
    data: str = "phantom-mini"
    """Folder or Hub id of a prepared data set, or the name of a phantom."""
    split: str = "test"
    """Split that is scored."""
    validation_split: str = "validation"
    """Split that thresholds are chosen on; `none` for a set that has none."""
    output_dir: str = "outputs/eval"
    """Folder of the report; must not hold one already."""
    seed: int = 0
    """Seed of the pipelines' draws."""
    batch_size: int | None = None
    """Slices and draws that share one evaluation of the network; by default 16 on a CPU, and on a GPU as many as fill
    it."""
    fast: bool = False
    """What is fastest on this device: on a GPU bf16 weights and a compiled network, on a CPU another memory format."""
    mixed_precision: str | None = None
    """no, bf16 or fp16: type of the networks' weights, instead of what `fast` chooses; no is float32."""
    inference: dict[str, Any] = field(default_factory=dict)
    """Inference values instead of the checkpoints', by their names in the pipeline: noise_level, mode, num_draws,
    ..."""
    median_size: int | None = None
    """Side of the median filter in pixels, 0 for none; as the checkpoint says by default."""
    median_dimensions: int | None = None
    """2 or 3."""
    erosion: int | None = None
    """Pixels taken from the rim of the brain."""
    min_component_size: int | None = None
    """Smallest 3-D component of a mask, in voxels."""
    slice_score: str | None = None
    """mean, max or p99 of the map in the brain."""
    filter_order: str | None = None
    """erosion_first or median_first, for cDDPM and its relatives."""
    sign: str | None = None
    """both, brighter or darker: where maps count."""
    weighting: str | None = None
    """none or intensity: what maps are multiplied by."""
    normalization: str | None = None
    """none or healthy_maps: what maps are divided by."""
    healthy_fpr: float = 0.05
    """Share of healthy validation voxels above the healthy-only threshold."""
    protocol: str = "pooled"
    """Columns beside our own: none with `pooled`; `andi`: AP, Dice and Yen's threshold as ANDi's authors measure them,
    with a row of the equalised FLAIR; `uad_imag`: AP, Dice at validation thresholds and false positive rates of the
    benchmark UAD-IMAG; `anofpdm`: means over slices and image labels, of all slices and of the unhealthy ones, as
    AnoFPDM's authors measure them; `sadm`: means over volumes, errors of the reconstruction and thirds of the lesion
    sizes, as the authors of cDDPM and SADM measure them; `ensemble`: several masks against several annotations, which
    is how CIMD is evaluated whatever stands here."""
    sweep: tuple[float, float, float] | None = None
    """First, last and step of the thresholds that these protocols try: of maps scaled to [0, 1] for `andi` (0.01,
    0.299, 0.001 by default), of the maps themselves for `uad_imag` (100 of their scores by default) and `anofpdm`
    (0.01, 0.69, 0.01)."""
    strata: list[str] = field(default_factory=list)
    """Score groups of the subjects apart: by `size` or `contrast` of the lesion, or any column of `subjects.parquet`
    (age, site, ...; numbers in thirds). Give the flag once per name."""
    baselines: bool = True
    """Rows of the plain and the inverted intensity and of trivial statistics, with the same post-processing."""
    training_population: str | None = None
    """Who the models were trained on, for the record; from the recipe in the checkpoint by default."""
    calibrate: str | None = None
    """First choose the models' values on the labels of the validation split, without its masks, and store them in the
    checkpoint folders: `labels` (AnoFPDM's own, by image-level accuracy), `healthy`, `yen` or `otsu` (a threshold, for
    any method). `conformal`: what may be promised of healthy scans, and with its masks the probability of a lesion."""
    alpha: float = 0.05
    """Share of healthy scans, slices and voxels above the thresholds of `calibrate conformal`, at most."""
    calibration_slices: int | None = None
    """Validation slices that `calibrate labels` takes, evenly spread; all by default."""
    guidance_scales: list[float] = field(default_factory=list)
    """Candidates that `calibrate labels` chooses among; the checkpoint's own by default."""
    set_threshold: str | None = None
    """Store the threshold of this policy (validation or healthy) in the checkpoint folders."""
    push_to_hub: str | None = None
    """Hub id of an evaluated model: the results are added to its card. A folder's whole pipeline is pushed with it."""
    hub_private: bool | None = None
    """Visibility of a new repository; the account's default if not given."""
    hub_picture: str | None = None
    """Picture for the card; on phantoms it is cases.png, on scans only what you give."""
    report: str = "html"
    """html: beside the other files a page with tables, curves and some cases in a viewer, `report.html`; or none."""
    keep_maps: bool = False
    """Keep the maps of every subject (npz) beside the report."""
    merge: list[str] = field(default_factory=list)
    """Output folder of an earlier evaluation of the same splits with `keep_maps`, whose models take part as they are;
    give the flag once per folder. Their maps stay there."""
