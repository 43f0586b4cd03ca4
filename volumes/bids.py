"""Finds the scans of a BIDS data set, and names what is derived from them. No torch here.

A name is entities and a suffix, `sub-01_ses-2_run-1_FLAIR`. A derivative has the entities of its scan, `space-orig`, as
it lies on the scan's own grid, and a label or description of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from ..files import check_name, read_json, read_text, write_json, write_text
from .results import Result, is_whole
from .scans import Scan, name_modality


DESCRIPTION = "dataset_description.json"
SUFFIXES = (".nii.gz", ".nii")
# How derivatives name files of the data set that they are made of.
URI = "bids:raw:"
# In the order of the specification.
_ENTITIES = (
    "sub ses sample task acq ce trc stain rec dir run mod echo flip inv mt part proc hemi space split recording chunk"
    " seg res den label desc"
).split()
# Array of a result to what its derivative is called; `.bidsignore` names those that BIDS has no name for.
NAMES = {
    "anomaly_map": ({"desc": "anomalyscore"}, "map"),
    "pred_mask": ({"label": "L"}, "mask"),
    "probability_map": ({"label": "L"}, "probseg"),
    "healthy_rank_map": ({"desc": "healthyrank"}, "map"),
    "brain_mask": ({"desc": "brain"}, "mask"),
}
# What names of derivatives say themselves, so that those of images which differ in it alone would be the same.
_OF_DERIVATIVES = ("space", "label", "desc")
IGNORED = ("*_desc-anomalyscore_map.*", "*_desc-healthyrank_map.*", "cohort.*", "report.html", "logs/")


def split_name(name: str) -> tuple[dict[str, str], str]:
    """Returns the entities and the suffix of a name without its ending; raises a `ValueError` if it is none of BIDS."""
    *parts, suffix = name.split("_")
    pairs = [part.partition("-")[::2] for part in parts]
    entities = dict(pairs)
    if not (suffix.isalnum() and parts and len(entities) == len(parts)):
        raise ValueError(f"{name} is no name of BIDS, such as sub-01_ses-1_FLAIR.")
    for entity, label in pairs:
        if entity not in _ENTITIES or not label.replace("+", "").isalnum():
            raise ValueError(f"{name} is no name of BIDS: {entity}-{label} is no entity of it with a label.")
    return entities, suffix


def join_name(entities: Mapping[str, str], suffix: str = "") -> str:
    """Returns the name of entities, in the order of BIDS, and a suffix, if one is given."""
    parts = [f"{entity}-{entities[entity]}" for entity in sorted(entities, key=_ENTITIES.index)]
    return "_".join([*parts, suffix] if suffix else parts)


def folder_of(entities: Mapping[str, str]) -> Path:
    """Returns where images of a participant, or of a session, lie, relative to a data set."""
    return Path(*(f"{entity}-{entities[entity]}" for entity in ("sub", "ses") if entity in entities), "anat")


def find_modalities(root: Path) -> list[str]:
    """Returns the modalities that the images of a data set have, as of [`~volumes.scans.name_modality`]."""
    found = set()
    for _, folder in _sessions(root):
        found |= {modality for _, _, modality in _images(root, folder)[0]}
    return sorted(found)


def find_bids_scans(
    root: str | os.PathLike,
    modalities: Sequence[str],
    *,
    optional: Collection[str] = (),
    participants: Collection[str] = (),
    sessions: Collection[str] = (),
    labels: Mapping[str, Collection[str]] | None = None,
    brain: str | os.PathLike | None = None,
) -> tuple[list[Scan], list[tuple[str, str]]]:
    """
    Finds the scans of a BIDS data set: `root/sub-*/[ses-*/]anat/*`.

    For a single modality each image is a scan of its own, so that two runs are two scans. For several ones the only
    image of each in a session make a scan together, or else those with equal entities (`ce` apart).

    Args:
        modalities: Of the checkpoint, spelled in any way; `t1ce` is a T1w image with the entity `ce`, `t1` one without.
        optional: Those of them that a scan may lack, if it has others.
        participants, sessions: Labels with or without `sub-` and `ses-`; all by default.
        labels: Entity to its labels, `{"run": ["1"]}`: images with another label of it are left out, those without the
            entity are not.
        brain: Derived data set that holds the brain mask of each scan on its grid, `*_desc-brain_mask.nii.gz`.

    Returns:
        scans, which are named by the entities that their images share (`sub-01_run-1`), and participants, sessions or
        images that are not taken, with the reason.
    """
    root, scans, failed = Path(root), [], []
    spelled = {name_modality(name): name for name in modalities}
    wanted = [f"sub-{label.removeprefix('sub-')}" for label in participants]
    chosen = [f"ses-{label.removeprefix('ses-')}" for label in sessions]
    groups: dict[str, list[Path]] = {}
    for participant, folder in _sessions(root):
        groups.setdefault(participant, []).append(folder)
    if not groups and not wanted:
        failed.append((str(root), "has no participant, a folder such as sub-01."))
    failed += [(name, f"{root} has no folder {name}.") for name in wanted if name not in groups]
    for participant, folders in groups.items():
        if wanted and participant not in wanted:
            continue
        there = [folder.name for folder in folders if folder.name != participant]
        absent = [name for name in chosen if name not in there]
        if absent:
            names = ", ".join(there) or "there are none"
            failed.append((participant, f"has no session {' or '.join(absent)}; its sessions: {names}."))
        for folder in folders:
            if chosen and folder.name not in chosen:
                continue
            images, wrong = _images(root, folder)
            failed += [(path.relative_to(root).as_posix(), reason) for path, reason in wrong]
            files: dict[str, list] = {name: [] for name in modalities}
            for path, entities, modality in images:
                if modality in spelled and all(
                    entity not in entities or _same(entities[entity], allowed)
                    for entity, allowed in (labels or {}).items()
                ):
                    files[spelled[modality]].append((path, entities))
            found, reasons = _combine(files, optional, images)
            name = "_".join(folder.relative_to(root).parts)
            failed += [(name, reason) for reason in reasons]
            for entities, volume in found:
                scan = join_name(entities)
                check_name(f"the results of {folder}", scan)
                scans.append(Scan(scan, volume, _brain_of(brain, entities), next(iter(volume.values()))))
    return scans, failed


def _sessions(root: Path) -> Iterator[tuple[str, Path]]:
    """Yields participants and the folders of their sessions; one without any, or with images beside them, is one."""
    for participant in sorted(path for path in root.glob("sub-*") if path.is_dir()):
        sessions = sorted(path for path in participant.glob("ses-*") if path.is_dir())
        if not sessions or (participant / "anat").is_dir():
            yield participant.name, participant
        yield from ((participant.name, session) for session in sessions)


def _images(root: Path, session: Path) -> tuple[list[tuple[Path, dict[str, str], str]], list[tuple[Path, str]]]:
    """Returns the images of a session with their entities and modalities, and files with the name of an image that do
    not belong there, with the reason."""
    images, wrong = [], []
    where = dict(part.split("-", 1) for part in session.relative_to(root).parts)
    for path in sorted((session / "anat").glob("*")):
        stem = _stem(path)
        if not path.name.endswith(SUFFIXES) or path.name.startswith("."):
            continue
        try:
            modality = modality_of(stem)
        except ValueError:  # a mask, or what no checkpoint is for
            continue
        try:
            entities, _ = split_name(stem)
        except ValueError as error:
            wrong.append((path, str(error)))
            continue
        if {entity: entities[entity] for entity in ("sub", "ses") if entity in entities} != where:
            wrong.append((path, "its name says another participant or session than its folder."))
        elif derived := [entity for entity in _OF_DERIVATIVES if entity in entities]:
            wrong.append(
                (path, f"has the entity {' and '.join(derived)}: images of derivatives are not read, only raw ones.")
            )
        else:
            images.append((path, entities, modality))
    return images, wrong


def modality_of(stem: str) -> str:
    """Returns the modality of an image, as of [`~volumes.scans.name_modality`], by its name without an ending; raises a
    `ValueError` if its suffix is none."""
    # "FLAIR (copy)" is an image, too, with a wrong name.
    modality = name_modality(re.match(r"\w*", stem.rpartition("_")[2])[0])
    return "t1ce" if modality == "t1" and "_ce-" in stem else modality


def _same(label: str, wanted: Collection[str]) -> bool:
    """Tells whether a label is one of those wanted; 01 is 1."""
    return label.lstrip("0") in {one.lstrip("0") for one in wanted}


def _combine(
    files: Mapping[str, list], optional: Collection[str], images: list
) -> tuple[list[tuple[dict, dict[str, Path]]], list[str]]:
    """Returns the scans of a session, their entities and a file for each modality, and why other images make none."""
    there = {modality: found for modality, found in files.items() if found}
    missing = [modality for modality in files if modality not in there]
    if missing and there and set(missing) <= set(optional):
        files = there
    elif missing:
        names = ", ".join(path.name for path, _, _ in images) or "there are none"
        return [], [f"has no image for {' and '.join(missing)} among those chosen; its images: {names}."]
    if len(files) > 1 and all(len(found) == 1 for found in files.values()):
        shared = set.intersection(*(set(found[0][1].items()) for found in files.values()))
        return [(dict(shared), {modality: found[0][0] for modality, found in files.items()})], []
    groups: dict[tuple, dict[str, list[Path]]] = {}
    for modality, found in files.items():
        for path, entities in found:
            kept = {entity: label for entity, label in entities.items() if len(files) == 1 or entity != "ce"}
            groups.setdefault(tuple(kept.items()), {}).setdefault(modality, []).append(path)
    scans, reasons = [], []
    for key, group in groups.items():
        names = ", ".join(path.name for paths in group.values() for path in paths)
        missing = [modality for modality in files if modality not in group]
        if any(len(paths) > 1 for paths in group.values()):
            reasons.append(f"has several files with equal entities: {names}. Keep one of them.")
        elif missing:
            reasons.append(
                f"has no image for {' and '.join(missing)} with the entities of {names}. Choose by `--run_label` or"
                " `--acquisition_label` so that one image for each modality is left, or some have equal entities."
            )
        else:
            scans.append((dict(key), {modality: group[modality][0] for modality in files}))
    return scans, reasons


def _brain_of(brain: str | os.PathLike | None, entities: Mapping[str, str]) -> Path | None:
    """Returns the path of the brain mask of a scan in a derived data set, whether it is there or not."""
    if brain is None:
        return None
    folder = Path(brain) / folder_of(entities)
    names = [join_name({**entities, **space, "desc": "brain"}, "mask.nii.gz") for space in ({"space": "orig"}, {})]
    return next((folder / name for name in names if (folder / name).exists()), folder / names[-1])


def derivative_name(scan: str, array: str) -> str:
    """Returns the name of the derivative of a scan that holds an array of its result, `NAMES`, without an ending."""
    more, suffix = NAMES[array]
    return join_name({**entities_of(scan), "space": "orig", **more}, suffix)


def record_of(out: Path, scan: str) -> Path:
    """Returns where the record of a scan lies in a data set of results: beside its anomaly scores."""
    return out / folder_of(entities_of(scan)) / f"{derivative_name(scan, 'anomaly_map')}.json"


def pseudohealthy_name(image: Path) -> str:
    """Returns the name of the reconstruction of an image, without an ending."""
    entities, suffix = split_name(_stem(image))
    return join_name({**entities, "space": "orig", "desc": "pseudohealthy"}, suffix)


def _stem(image: Path) -> str:
    return image.name.removesuffix(".gz").removesuffix(".nii")


def entities_of(scan: str) -> dict[str, str]:
    """Returns the entities of a scan by its name, which has no suffix."""
    return split_name(f"{scan}_image")[0]


def read_description(folder: Path) -> dict:
    """Reads `dataset_description.json` of a data set; raises an error if there is none."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no BIDS data set, as it has no {DESCRIPTION}. Give the folder that holds it, or write one with"
            " Name and BIDSVersion."
        )
    description = read_json(path)
    if not isinstance(description, dict):
        raise ValueError(f"{path} must hold an object with Name and BIDSVersion, got {str(description)[:100]}.")
    return description


def write_description(out: Path, root: Path, entry: dict) -> None:
    """
    Writes what describes a data set of results, in files that are the same whichever of several runs writes them; if it
    is described already, checks that it holds results of the same program and checkpoint.

    Args:
        out (`Path`): The data set of results, made if missing.
        root (`Path`): The data set that they are of.
        entry (`dict`): What makes the results, for `GeneratedBy`.
    """
    source = read_description(root)
    if out.resolve() == root.resolve():
        raise ValueError(f"The results must go into a folder of their own, got {out}, which holds the scans.")
    if (out / DESCRIPTION).exists():
        there = read_entry(out)
        changed = [name for name in entry if there.get(name) != entry[name]]
        if "CheckpointRevision" in entry and "CheckpointRevision" not in changed:
            changed = [name for name in changed if name != "Checkpoint"]  # another path to the same
        if changed:
            name = changed[0]
            raise ValueError(
                f"{out} holds results of another kind: {name} {there.get(name)}, now {entry[name]}. Choose another"
                " folder for the new ones."
            )
    else:
        out.mkdir(parents=True, exist_ok=True)
        link = quote(Path(os.path.relpath(root.resolve(), out.resolve())).as_posix())
        described = {
            "Name": f"Anomaly maps of {source.get('Name', root.name)}",
            "BIDSVersion": "1.10.0",
            "DatasetType": "derivative",
            "GeneratedBy": [entry],
            "SourceDatasets": [{"URL": link, **({"DOI": source["DatasetDOI"]} if "DatasetDOI" in source else {})}],
            "DatasetLinks": {"raw": link},
        }
        write_json(out / DESCRIPTION, described)
    if not (out / "README.md").exists():
        write_text(out / "README.md", _README)
    ignored = read_text(out / ".bidsignore").splitlines() if (out / ".bidsignore").exists() else []
    if set(IGNORED) - set(ignored):
        write_text(out / ".bidsignore", "\n".join(dict.fromkeys([*ignored, *IGNORED])) + "\n")


def read_entry(out: Path) -> dict:
    """Returns what made the results in a data set, as `write_description` got it; raises a `ValueError` if the data set
    is none of ours."""
    entries = read_description(out).get("GeneratedBy")
    entry = entries[0] if isinstance(entries, list) and entries else None
    if not isinstance(entry, dict) or entry.get("Name") != "anodiff" or not {"Modalities", "Plane"} <= entry.keys():
        raise ValueError(
            f"{out} is a data set of something else than anodiff, by its {DESCRIPTION}: choose another folder."
        )
    return entry


def find_results(out: Path, root: Path) -> tuple[list[tuple[Scan, Result]], list[tuple[str, str]]]:
    """
    Finds the results in a data set of results.

    Args:
        out, root: As of [`write_description`].

    Returns:
        scans with their results, and what is not whole with the reason.
    """
    results, failed = [], []
    spelled = {name_modality(name): name for name in read_entry(out)["Modalities"]}
    more, suffix = NAMES["anomaly_map"]
    for record in sorted(out.glob(f"sub-*/**/anat/*_{join_name(more, suffix)}.json")):
        entities, _ = split_name(record.stem)
        name = join_name({entity: label for entity, label in entities.items() if entity not in ("space", *more)})
        if not is_whole(record.parent, (record.stem,)):
            failed.append(
                (name, "its result is not whole: files that its record names are missing. Predict it again.")
            )
            continue
        values = read_json(record)
        images = [root / source.removeprefix(URI) for source in values["Sources"]]
        names = {f"{array}.nii.gz": f"{derivative_name(name, array)}.nii.gz" for array in NAMES}
        names["reconstruction.nii.gz"] = f"{pseudohealthy_name(images[0])}.nii.gz"
        files = {ours: record.parent / theirs for ours, theirs in names.items() if theirs in values["files"]}
        volume = {spelled[modality_of(_stem(image))]: image for image in images}
        results.append((Scan(name, volume, None, images[0]), Result(values, record.parent, files)))
    return results, failed


_README = """# Anomaly maps

Made by `anodiff bids` of the BIDS data set that `dataset_description.json` names, which also names the checkpoint. Every
file lies on the grid of its scan.

- `*_label-L_mask.nii.gz`: where the anomaly score is above the threshold in the file beside it. No lesion is certain.
- `*_label-L_probseg.nii.gz`: probability of a lesion; of calibrated checkpoints only.
- `*_desc-anomalyscore_map.nii.gz`: raw scores, no probabilities. The file beside it is the record of the scan: scores of
  its slices, settings, and the files of its result.
- `*_desc-healthyrank_map.nii.gz`: which share of healthy voxels has a lower score, at least.
- `*_desc-pseudohealthy_*.nii.gz`: the scan as the network expects it of a healthy brain. No measurement.
- `*_desc-brain_mask.nii.gz`: the brain, where it was extracted.
- `cohort.tsv`, `report.html`: all scans in a table and in a viewer, made by the level `group`.
- `logs/`: how long each scan took, what was warned of, SHA-256 of its images, and why one has no result.

Research use, not a medical device.
"""
