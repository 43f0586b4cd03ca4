"""Finds the scans that a person names by files and folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .volume import IMAGE_SUFFIXES, VOLUME_SUFFIXES


@dataclass(frozen=True)
class Scan:
    """Names one scan: its name among the results, the volume and brain mask for the pipeline, the path as given."""

    name: str
    volume: dict | Path
    brain: Path | None
    source: Path


def find_scans(
    paths: list[str], modalities: list[str], brain: str | None = None
) -> tuple[list[Scan], list[tuple[str, str]]]:
    """
    Finds the scans in files and folders. Returns scans with different names, and paths without a scan with the reason;
    raises if the results of several scans would go into one folder.

    Args:
        paths: Files (one scan each), or folders: one scan with a file per modality, or several scans in files or
            sub-folders. The file of a modality is called after it, alone (`flair.nii.gz`) or at the end
            (`patient1_flair.nii.gz`).
        modalities: Of the checkpoint, in its order.
        brain: Name of the brain mask beside each scan.
    """
    found: list[tuple[Path, dict | Path]] = []
    failed = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append((path, path))
            continue
        one = _by_modality(path, modalities)
        scans = [(path, one)] if one else []
        if not one:
            folders = [(child, _by_modality(child, modalities)) for child in sorted(path.iterdir()) if child.is_dir()]
            scans = [(child, volume) for child, volume in folders if volume]
        scans = scans or [(file, file) for file in _files(path) if file.name != brain]
        if not scans:
            wanted = ", ".join(f"{name}.nii.gz" for name in modalities)
            failed.append((str(path), f"holds no scan: neither {wanted}, nor scans in files or sub-folders."))
        found += scans

    stems = [_stem(source) for source, _ in found]
    scans = []
    for (source, volume), stem in zip(found, stems, strict=True):
        name = stem if stems.count(stem) == 1 else f"{source.resolve().parent.name}_{stem}"
        folder = source if source.is_dir() else source.parent
        scans.append(Scan(name, volume, folder / brain if brain else None, source))
    names = [scan.name for scan in scans]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"Several scans would be written into the same folder: {', '.join(twice)}. Predict them separately."
        )
    return scans, failed


def _by_modality(folder: Path, modalities: list[str]) -> dict[str, Path] | None:
    files = _files(folder)
    chosen = {}
    for modality in modalities:
        matches = [path for path in files if _stem(path) == modality or _stem(path).endswith(f"_{modality}")]
        if len(matches) != 1:
            return None
        chosen[modality] = matches[0]
    return chosen


def _files(folder: Path) -> list[Path]:
    suffixes = VOLUME_SUFFIXES + IMAGE_SUFFIXES
    files = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in files if path.name.lower().endswith(suffixes))


def _stem(path: Path) -> str:
    for suffix in sorted(VOLUME_SUFFIXES + IMAGE_SUFFIXES, key=len, reverse=True):
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name
