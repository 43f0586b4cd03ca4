"""Prepared sets that ask what a method knows of lesions it was not trained on; docs/results.md has the table.

    python benchmarks/unknown_lesions.py TCGA_LGG_FLAIR MS OUT

The first two are folders of patients, each with flair, lesion and brain .nii.gz.

One channel, whatever the contrast, in slices about 6 mm apart as those of TCGA-LGG. All sets share the training split
(healthy phantoms in T1 and in T2, FLAIR of tumour patients of TCGA-LGG) and the validation split (other tumour
patients). They differ in their test split:

    OUT/tumour       FLAIR of tumour patients in no other split: a known kind of lesion
    OUT/stroke_t1    strokes of the phantom
    OUT/stroke_t2    the same in T2
    OUT/ms           multiple sclerosis, FLAIR

Masks of the training patients are kept: `sadm_labelled` learns from them, every other method from slices without
lesion.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from anodiff.data.phantoms.brains import make_subject
from anodiff.data.prepare import prepare
from anodiff.data.readers.subjects import Subject, read_volume_folders
from anodiff.data.rules import SliceRule, SplitRule
from anodiff.volumes.processor import VolumeProcessor


SLICE_DISTANCE = 6.0  # mm
HEALTHY_PHANTOMS = 12
STROKES = 8
SEED = 7  # of the phantoms
FRACTIONS = {"train": 0.6, "validation": 0.1, "test": 0.3}  # of the tumour patients, as in the recipe tcga_lgg_flair
SHARED = "Training: healthy phantoms and TCGA-LGG (Buda et al. 2019). Test: "
SOURCES = {
    "tumour": SHARED + "TCGA-LGG",
    "stroke_t1": SHARED + "phantoms with strokes, T1",
    "stroke_t2": SHARED + "phantoms with strokes, T2",
    "ms": SHARED + "multiple sclerosis (Lesjak et al. 2017, CC BY)",
}


def write_subject(folder: Path, volumes: dict[str, np.ndarray], affine: np.ndarray, thick: bool = False) -> None:
    """`mri`, `lesion` and `brain`, unless they are `thick` thinned along the third axis to `SLICE_DISTANCE`."""
    step = 1 if thick else round(SLICE_DISTANCE / np.linalg.norm(affine[:3, 2]))
    affine = affine @ np.diag([1, 1, step, 1])
    folder.mkdir(parents=True)
    for name, volume in volumes.items():
        nib.save(nib.Nifti1Image(volume[:, :, ::step], affine), folder / f"{name}.nii.gz")


def copy_patients(source: Path, raw: Path, thick: bool) -> None:
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        names = {"mri": "flair", "lesion": "lesion", "brain": "brain"}
        images = {name: nib.load(folder / f"{file}.nii.gz") for name, file in names.items()}
        volumes = {name: np.asanyarray(image.dataobj) for name, image in images.items()}
        write_subject(raw / folder.name, volumes, images["mri"].affine, thick)


def make_phantoms(raw: Path) -> None:
    for index in range(HEALTHY_PHANTOMS + STROKES):
        kind = "healthy" if index < HEALTHY_PHANTOMS else "stroke"
        subject = make_subject(index, seed=SEED, lesion=None if kind == "healthy" else kind)
        for modality in ("t1", "t2"):
            volumes = {"mri": subject.images[modality], "lesion": subject.lesion, "brain": subject.brain}
            write_subject(raw / f"{kind}_{modality}" / subject.name, volumes, subject.affine)


def read(raw: Path, split: str | None = None) -> list[Subject]:
    """Subjects by names that no other folder has, all in one split or in none yet."""
    subjects = read_volume_folders(raw, {"mri": "mri.nii.gz"}, ["lesion.nii.gz"], "brain.nii.gz")
    prefix = "" if split is None else f"{raw.name}_"
    return [dataclasses.replace(subject, name=prefix + subject.name, split=split) for subject in subjects]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tcga_lgg", type=Path)
    parser.add_argument("ms", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    processor = VolumeProcessor(
        modalities=["mri"], size=(64, 64), intensity="percentile", brain_mask="given", value_range=(0.0, 1.0)
    )
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        raw = Path(temporary)
        copy_patients(options.tcga_lgg, raw / "tumour", thick=True)  # their headers say 1 mm
        copy_patients(options.ms, raw / "ms", thick=False)
        make_phantoms(raw)
        patients = read(raw / "tumour")
        split_of = SplitRule(FRACTIONS).assign(patients)
        patients = [dataclasses.replace(patient, split=split_of[patient.name]) for patient in patients]
        common = [patient for patient in patients if patient.split != "test"]
        common += read(raw / "healthy_t1", "train") + read(raw / "healthy_t2", "train")
        tests = {name: read(raw / name, "test") for name in SOURCES if name != "tumour"}
        tests["tumour"] = [patient for patient in patients if patient.split == "test"]
        for name, subjects in tests.items():
            recipe = {"source": SOURCES[name], "license": "cc-by-nc-sa-4.0"}
            rules = {"recipe": recipe, "slices": SliceRule(min_brain=0.05)}
            failures = prepare(common + subjects, processor, options.out / name, root=raw, **rules)
            if failures:
                raise RuntimeError(f"Subjects that cannot be read: {failures}")


if __name__ == "__main__":
    main()
