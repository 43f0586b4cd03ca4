"""Finds the scans that a person names by files and folders, and says of the rest why it is none. No torch here."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..files import check_name
from .dicom import SUFFIXES, find_study, is_dicom_file, split_choice
from .results import result_files
from .volume import IMAGE_SUFFIXES, VOLUME_SUFFIXES, DicomFiles


# What files call a modality, without separators and in lower case; ends of BIDS and BraTS among them. A checkpoint's
# own name stands for the whole line that it is in.
ALIASES = (
    ("t1", "t1w", "t1n", "mprage", "t1mprage"),
    ("t1ce", "t1c", "t1gd", "t1post", "t1wce", "t1cew", "cet1", "cet1w", "cegadt1w", "cegadoliniumt1w"),
    ("t2", "t2w"),
    ("flair", "t2flair", "t2f", "t2wflair"),
    ("pd", "pdw"),
    ("t2star", "t2starw"),
    ("dwi",),
    ("adc",),
    ("swi",),
    ("bold",),
    ("asl",),
    ("ct",),
    ("pet",),
)
_LONGEST = 3  # Words that one of these may be written in: T1-ce, ce-gad_T1w.
# Words after which a modality is not that of the file, but what it was registered to: FLAIR_to_T1, space-T1w_FLAIR.
_REFERENCES = frozenset("space to in on from".split())
# Words of masks. `brain` is one only where no modality is named, or the same name without it is there, too: a scan
# without its skull is often called NAME_brain.
MASKS = frozenset(
    "mask masks brainmask lesionmask seg segm segmentation segmentations dseg probseg aseg aparc parc label labels"
    " labelmap lesion lesions roi rois annotation annotations gt groundtruth".split()
)
# Files that lie beside scans and are none: tables and texts.
_TEXTS = (
    ".csv .tsv .json .jsonl .txt .md .rst .yaml .yml .xml .html .pdf .log .xls .xlsx .ods .docx .bval .bvec .py .sh"
    " .ini .db"
).split()
_TEXT_NAMES = ("readme", "license", "licence", "changes", "citation", "notice", "makefile")


@dataclass(frozen=True)
class Scan:
    """Names one scan: its name among the results, the volume and brain mask for the pipeline, the path as given, and
    the image of labels that its results are measured by."""

    name: str
    volume: dict | Path | DicomFiles
    brain: Path | None
    source: Path
    atlas: Path | None = None

    def images(self) -> list:
        """Returns the images of the volume, of each modality one."""
        return [*self.volume.values()] if isinstance(self.volume, dict) else [self.volume]


@dataclass
class _Listing:
    """What lies in a folder: files that are read, those of DICOM, others that may be scans, folders; links count as
    what they point to, and as files of their name where there is nothing."""

    files: list[Path] = field(default_factory=list)
    slices: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    names: dict[str, Path] = field(default_factory=dict)
    has_results: bool = False


def find_scans(
    paths: list[str],
    modalities: list[str],
    brain: str | None = None,
    output: str | os.PathLike | None = None,
    atlas: str | None = None,
    optional: Collection[str] = (),
) -> tuple[list[Scan], list[tuple[str, str]]]:
    """
    Finds the scans in files and folders.

    Args:
        paths: Files (one scan each), or folders: one scan with a file per modality, or several scans in files, or in
            sub-folders. The file of a modality has its name or an alias (`ALIASES`) as a word of its own, in any
            case: `flair.nii.gz`, `patient1_FLAIR.nii.gz`, `sub-01_ce-gad_T1w.nii.gz`. Where no file of a folder names
            a modality each is a scan, of a sub-folder its only one. A folder that holds files of DICOM, or a ZIP
            archive, is a file in this sense; files of DICOM that are named one by one are a scan for each folder that
            they are in. `PATH#4` is the series with this number.
        modalities: Of the checkpoint, in its order.
        brain: Name of the brain mask beside each scan, in any case.
        output: Folder of results, which is not looked into.
        atlas: Name of the image of labels beside each scan, in any case.
        optional: Modalities of the checkpoint that a scan may lack, if it has others. A single file is then a scan of
            the modality that its name says.

    Returns:
        scans with different names, and paths that are not taken with the reason: no text and no earlier result is
        left out of both.

    Raises:
        ValueError: The results of several scans would go into one folder.
    """
    found: list[tuple[Path, dict | Path | DicomFiles]] = []
    failed: list[tuple[str, str]] = []
    reader = _Reader(modalities, (brain, atlas), None if output is None else os.path.abspath(output), optional)
    slices, others = _find_slices(paths)
    for path in others:
        if not path.is_dir():
            reason = reader.contradiction(path)
            if reason:
                failed.append((str(path), reason))
            else:
                found.append((path, reader.alone(path, path)))
            continue
        try:
            scans, reasons = reader.search(path)
        except OSError as error:
            scans, reasons = [], [(path, f"cannot be read: {error.strerror}.")]
        if not scans and not reasons:
            wanted = ", ".join(f"{name}.nii.gz" for name in modalities)
            reasons = [(path, f"holds no scan: neither {wanted}, nor scans in files or sub-folders.")]
        found += scans
        failed += [(str(source), reason) for source, reason in reasons]
    for source, volume in slices.items():
        reason = reader.contradiction(source)
        if reason:
            failed.append((str(source), reason))
        else:
            found.append((source, reader.alone(source, volume)))
    # What is named by itself and by a folder above it is one scan.
    different: dict[tuple[str, ...], tuple[Path, dict | Path | DicomFiles]] = {}
    for source, volume in found:
        parts = volume.values() if isinstance(volume, dict) else [volume]
        different.setdefault(tuple(sorted(os.path.abspath(str(part)) for part in parts)), (source, volume))
    found, scans = list(different.values()), []
    for (source, volume), name in zip(found, _names([source for source, _ in found]), strict=True):
        try:
            check_name(f"the results of {source}", name)
        except ValueError as error:
            failed.append((str(source), str(error)))
            continue
        scans.append(Scan(name, volume, reader.beside(source, brain), source, reader.beside(source, atlas)))
    return scans, failed


def _find_slices(paths: list[str]) -> tuple[dict[Path, Path | DicomFiles], list[Path]]:
    """Returns the series among paths whose files are named one by one, by their folder, or by the file if it is the
    only one of its folder; and the other paths."""
    folders: dict[Path, list[Path]] = {}
    others = []
    for path in dict.fromkeys(map(Path, paths)):
        if not path.is_dir() and (path.suffix.lower() in SUFFIXES[:2] or _is_readable_dicom(path)):
            folders.setdefault(path.parent, []).append(path)
        else:
            others.append(path)
    found = {files[0]: files[0] for files in folders.values() if len(files) == 1}
    return found | {folder: DicomFiles(tuple(files)) for folder, files in folders.items() if len(files) > 1}, others


def name_modality(spelling: str) -> str:
    """Returns the name of a modality, the first of its line in `ALIASES`, for any spelling of it (`T1w` is `t1`);
    raises a `ValueError` if there is no such line."""
    line = next((line for line in ALIASES if _joined(spelling) in line), None)
    if line is None:
        known = ", ".join(line[0] for line in ALIASES)
        raise ValueError(f"`modality` must be one of {known}, or another spelling of one of these, got {spelling!r}.")
    return line[0]


def find_modality(
    paths: list[str],
    brain: str | None = None,
    output: str | os.PathLike | None = None,
    atlas: str | None = None,
) -> str | None:
    """
    Finds the modality that the names of scans say.

    Args:
        paths, brain, output, atlas: As of [`find_scans`].

    Returns:
        `str`: As of [`name_modality`]; `None` if no name says one.

    Raises:
        ValueError: They are of several modalities, or some name one and others, outside of its folder, do not.
    """
    reader = _Reader([ALIASES[0][0]], (brain, atlas), None if output is None else os.path.abspath(output))
    said: dict[str | None, Path] = {}
    slices, others = _find_slices(paths)
    groups = [[source] for source in slices]
    for path in others:
        if not path.is_dir():
            groups.append([path])
            continue
        # A folder that may not be read is listed by `find_scans`.
        with suppress(OSError):
            groups += [reader.images(folder) for folder in (path, *reader.contents(path).folders)]
    for files in groups:
        found: dict[str | None, Path] = {}
        for file in files:
            modality, rest = reader.split(file)
            if not MASKS & set(rest):
                for name in modality.split(" and ") if modality else [None]:
                    found.setdefault(name, file)
        if len(found) > 1:
            found.pop(None, None)  # what lies beside scans with a name is none
        said = found | said
    if len(said) > 1:
        names = " and ".join(f"{modality or 'unknown'} ({file})" for modality, file in said.items())
        raise ValueError(
            f"The scans are of several modalities, by their names: {names}. Say by `--modality` which are meant, or"
            " name a model by `--model`."
        )
    return next(iter(said), None)


class _Reader:
    """Reads folders, each once, for the modalities of a checkpoint; `others` are names of what lies beside scans."""

    def __init__(
        self,
        modalities: list[str],
        others: tuple[str | None, ...],
        output: str | None,
        optional: Collection[str] = (),
    ):
        self.modalities, self.output, self.optional = modalities, output, set(optional)
        self.others = {name.casefold() for name in others if name is not None}
        self.listings: dict[Path, _Listing] = {}
        # Spelling to modality: those of the checkpoint by their own names, others by the first of their line.
        self.spellings = {alias: line[0] for line in ALIASES for alias in line}
        own = {_joined(name): name for name in modalities}
        self.spellings |= {
            alias: own[spelled] for line in ALIASES for spelled in line if spelled in own for alias in line
        }
        # Of a checkpoint that says `image`, nobody knows that FLAIR is not meant.
        if not own.keys() & {alias for line in ALIASES for alias in line}:
            self.spellings = {}
        self.spellings |= own

    def contradiction(self, path: Path) -> str | None:
        """Returns why a file that is named by itself is none of the checkpoint's, by its name."""
        modality, rest = self.split(path)
        if MASKS & set(rest):
            return _MASK
        if len(self.modalities) == 1 and modality not in (None, *self.modalities):
            return (
                f"its name says {modality}, and this checkpoint needs {self.modalities[0]}; rename it if it is that."
            )
        return None

    def alone(self, path: Path, volume: Path | DicomFiles) -> dict | Path | DicomFiles:
        """Returns a volume that is named by itself as that of the modality that its path says, if the others of the
        checkpoint may be missing."""
        modality, _ = self.split(path)
        others = [name for name in self.modalities if name != modality]
        return {modality: volume} if modality in self.modalities and self.may_lack(others) else volume

    def split(self, path: Path) -> tuple[str | None, list[str]]:
        """Returns the modality that a name says, if any, and its other words. The end of the name counts; without one
        there, all of it: names of two modalities are then given as both."""
        words = re.findall(r"[^\W_]+", _stem(split_choice(path)[0]).casefold())
        said, rest, end = [], list(words), len(words)
        while end > 0:
            for start in range(max(0, end - _LONGEST), end):
                modality = self.spellings.get("".join(words[start:end]))
                if modality is not None and not (start and words[start - 1] in _REFERENCES):
                    said.append(modality)
                    rest[start:end] = [""] * (end - start)
                    end = start + 1
                    break
            if said and not rest[-1]:
                break
            end -= 1
        return " and ".join(dict.fromkeys(reversed(said))) or None, [word for word in rest if word]

    def contents(self, folder: Path) -> _Listing:
        if folder in self.listings:
            return self.listings[folder]
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
        listing = self.listings[folder] = _Listing()
        ours = (
            result_files(folder) if any(entry.name in ("result.json", "dispersion.json") for entry in entries) else ()
        )
        for entry in entries:
            path = folder / entry.name
            listing.names[entry.name.casefold()] = path
            if entry.name in ours:
                listing.has_results = True
            elif entry.name.startswith("."):
                pass
            elif entry.is_dir():
                if os.path.abspath(path) != self.output:
                    listing.folders.append(path)
            elif entry.name.casefold() in self.others:
                pass
            elif entry.name.lower().endswith((*VOLUME_SUFFIXES, *IMAGE_SUFFIXES, ".zip")):
                listing.files.append(path)
            elif _is_readable_dicom(path):
                listing.slices.append(path)
            elif (
                entry.name.upper() != "DICOMDIR"
                and path.suffix.lower() not in _TEXTS
                and path.stem.lower() not in _TEXT_NAMES
            ):
                listing.others.append(path)
        return listing

    def images(self, folder: Path) -> list[Path]:
        """Returns what may be a scan, or a modality of one, in a folder: files, and folders that are a series; the
        folder itself, if it is one."""
        series = [folder] if self.is_series(folder) else []
        for child in self.contents(folder).folders:
            with suppress(OSError):  # who looks into all folders says so
                series += [child] if self.is_series(child) else []
        return self.contents(folder).files + series

    def is_series(self, folder: Path) -> bool:
        """Tells whether a folder holds DICOM, and no other scans."""
        listing = self.contents(folder)
        masks = MASKS | {"brain"}
        return bool(listing.slices) and all(masks & set(self.split(file)[1]) for file in listing.files)

    def beside(self, source: Path, name: str | None) -> Path | None:
        """Returns the path of the file of this name beside a scan, whether it is there or not."""
        if name is None:
            return None
        source, _ = split_choice(source)
        folder = source if source.is_dir() else source.parent
        try:
            return self.contents(folder).names.get(name.casefold(), folder / name)
        except OSError:
            return folder / name

    def search(self, folder: Path) -> tuple[list, list]:
        """Returns the scans in a folder and its sub-folders, and what is none with the reason."""
        listing = self.contents(folder)
        scans, failed = self.choose(folder, flat=True)
        whole = len(scans) == 1 and scans[0][0] == folder
        for child in listing.folders:
            with suppress(OSError):
                if self.is_series(child):
                    continue  # one of the scans above
            try:
                more, reasons = self.choose(child, flat=False)
                below = self.contents(child)
            except OSError as error:
                failed.append((child, f"cannot be read: {error.strerror}."))
                continue
            scans += more
            failed += reasons
            if more or reasons or whole or below.has_results:
                continue
            if below.folders:
                names = _some(below.folders)
                failed.append((child, f"holds no scan, but folders, which are not looked into: {names}. Name them."))
            elif below.others:
                failed.append((child, f"holds no scan, only what is not read: {_some(below.others)}."))
            elif not below.names:
                failed.append((child, "is empty."))
        return scans, failed

    def choose(self, folder: Path, flat: bool) -> tuple[list, list]:
        """
        Chooses the scans among the files of one folder.

        Args:
            folder (`Path`): Where.
            flat (`bool`): Whether it may hold several scans, or is one, as every sub-folder is.
        """
        listing, files, single = self.contents(folder), self.images(folder), len(self.modalities) == 1
        masks, unnamed, foreign, named = [], [], [], {name: [] for name in self.modalities}
        split = {path: self.split(path) for path in files}
        whole_names = {(modality, *rest) for modality, rest in split.values()}
        for path, (modality, rest) in split.items():
            shorter = (modality, *(word for word in rest if word != "brain"))
            if MASKS & set(rest) or ("brain" in rest and (modality is None or shorter in whole_names)):
                masks.append(path)
            elif modality is None:
                unnamed.append(path)
            else:
                named.get(modality, foreign).append(path)
        failed = [(path, _foreign(path)) for path in listing.others] if flat else []
        if listing.slices and folder not in files:
            failed.append((folder, "holds DICOM beside other scans, which is left out: give it a folder of its own."))

        chosen = {name: files[0] for name, files in named.items() if len(files) == 1}
        missing = [name for name, files in named.items() if not files]
        # Names that say different subjects are no scan: by BIDS, or, without some of the modalities, by any other word.
        words = [split[path][1] for path in chosen.values()]
        subjects = sorted({path.name.split("_")[0] for path in chosen.values() if path.name.startswith("sub-")})
        alike = not missing or (self.may_lack(missing) and all(_share(words[0], other) for other in words))
        if len(chosen) + len(missing) == len(named) and alike and len(subjects) < 2:
            # One scan; other files belong to it unless their names say another subject.
            own = words[0]
            failed += [(path, self.reason(split[path][0])) for path in foreign + unnamed]
            failed = [(path, reason) for path, reason in failed if not _share(own, self.split(path)[1])]
            return [(folder, chosen)], failed
        if flat and single and named[self.modalities[0]]:
            failed += [(path, self.reason(split[path][0])) for path in foreign + unnamed]
            return [(path, path) for path in named[self.modalities[0]]], failed + [(path, _MASK) for path in masks]
        if foreign or any(named.values()):
            several = [f"{name} ({_some(files)})" for name, files in named.items() if len(files) > 1]
            needed = [name for name in missing if name not in self.optional] or missing
            parts = [
                f"no file for {', '.join(needed)}" if needed else "",
                *(f"several for {one}" for one in several),
                f"files of several subjects, {', '.join(subjects)}" if len(subjects) > 1 else "",
            ]
            present = [path for files in named.values() for path in files] + foreign + unnamed
            reason = f"has {' and '.join(filter(None, parts))}; its files are {_some(present)}."
            return [], [*failed, (folder, reason)]
        if flat:
            studies = self.studies(unnamed)
            failed += [(folder, _several_series(folder, series)) for series in studies if len(series) > 1]
            several = {path for series in studies if len(series) > 1 for path in series}
            scans = [(path, path) for path in unnamed if path not in several]
            return scans, failed + [(path, _MASK) for path in masks]
        if len(unnamed) == 1:
            return [(folder, unnamed[0])], failed
        if unnamed and all(path.is_dir() for path in unnamed):
            failed.append((folder, _several_series(folder, unnamed)))
        elif unnamed:
            wanted = ", ".join(self.modalities)
            failed.append((folder, f"has several files, and none is named after {wanted}: {_some(unnamed)}."))
        elif masks:
            failed.append((folder, f"has no scan, only masks: {_some(masks)}."))
        return [], failed

    def may_lack(self, missing: list[str]) -> bool:
        """Tells whether a scan may lack these modalities, some but not all of the checkpoint's."""
        return bool(missing) and len(missing) < len(self.modalities) and self.optional.issuperset(missing)

    def studies(self, paths: list[Path]) -> list[list[Path]]:
        """Returns the series among paths, those of one examination together: they are no scans of the same kind."""
        studies: dict[str, list[Path]] = {}
        for path in paths:
            if path.is_dir():
                studies.setdefault(find_study(self.contents(path).slices[0]) or str(path), []).append(path)
        return list(studies.values())

    def reason(self, modality: str | None) -> str:
        """Returns why a file beside scans is none."""
        wanted = " or ".join(self.modalities)
        says = f"says {modality}, not {wanted}" if modality else f"does not say {wanted}, as others in its folder do"
        return f"its name {says}."


_MASK = "its name says that it is a mask; rename it if it is a scan."


def _several_series(folder: Path, series: list[Path]) -> str:
    return (
        f"holds several series, {_some(series)}, and their names do not say which is meant. Name the one, or choose it"
        f" by its number: {folder}#4."
    )


def _foreign(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return f"is a link to {os.readlink(path)}, and there is no such file."
    if not os.access(path, os.R_OK):
        return "may not be read."
    return f"is none of {', '.join(VOLUME_SUFFIXES + IMAGE_SUFFIXES)}, and no DICOM."


def _is_readable_dicom(path: Path) -> bool:
    """Tells whether a file is of DICOM; of one that may not be read nobody knows, and it is no reason to leave others
    out."""
    return os.access(path, os.R_OK) and is_dicom_file(path)


def _share(first: list[str], second: list[str]) -> bool:
    """Tells whether the names of two files, without their modalities, can be of one subject: one begins the other."""
    length = min(len(first), len(second))
    return first[:length] == second[:length]


def _some(paths: list[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _names(sources: list[Path]) -> list[str]:
    """Returns different names of scans, also where case does not count: the file's or folder's own, or with as many of
    the folders above it in front as it takes."""
    parts = []
    for source, choice in map(split_choice, map(os.path.abspath, sources)):
        own = _stem(source) if not source.is_dir() else source.name
        own = own if choice is None else f"{own}_{choice}"
        parts.append([part for part in (*source.parts[1:-1], own.strip(". ") and own) if part] or ["scan"])
    lengths = [1] * len(parts)
    while True:
        names = ["_".join(part[-length:]) for part, length in zip(parts, lengths, strict=True)]
        keys = [unicodedata.normalize("NFC", name).casefold() for name in names]
        count = Counter(keys)
        longer = [
            length + 1 if count[key] > 1 and length < len(part) else length
            for part, length, key in zip(parts, lengths, keys, strict=True)
        ]
        if longer == lengths:
            break
        lengths = longer
    twice = [str(source) for source, key in zip(sources, keys, strict=True) if count[key] > 1]
    if twice:
        raise ValueError(
            f"Several scans would be written into the same folder: {', '.join(twice[:10])}. Predict them separately."
        )
    return names


def _joined(name: str) -> str:
    return "".join(re.findall(r"[^\W_]+", name.casefold()))


def _stem(path: Path) -> str:
    for suffix in sorted(VOLUME_SUFFIXES + IMAGE_SUFFIXES + SUFFIXES, key=len, reverse=True):
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name
