"""Pages of reports, without a browser."""

import base64
import gc
import gzip
import json
import os
import re
import weakref

import nibabel as nib
import numpy as np
import pytest

from anodiff.files import read_text, sha256
from anodiff.reports import Column, Figure, Layer, ScanView, Section, Table, layers, page, write_report
from anodiff.reports.layers import encode_layers


AFFINE = np.array([[-2.0, 0, 0, 30], [0, 1.5, 0, -20], [0, 0, 4.0, -10], [0, 0, 0, 1]])


def image(array, affine=AFFINE) -> nib.Nifti1Image:
    return nib.Nifti1Image(np.asarray(array, dtype=np.float32), affine)


def view(name="scan", seed=0, shape=(6, 5, 4), **more) -> ScanView:
    generator = np.random.default_rng(seed)
    return ScanView(
        name,
        [
            Layer("Scan", "scan", image(generator.random(shape) * 100)),
            Layer("Map", "map", image(generator.random(shape))),
        ],
        **{"threshold": 0.3, **more},
    )


def data_of(path) -> list[dict]:
    return json.loads(re.search(r'id="data">(.*?)</script>', read_text(path), re.DOTALL)[1])


def layer_of(path, scan: int, layer: int) -> nib.Nifti1Image:
    text = re.search(rf'id="layer-{scan}-{layer}">(.*?)</script>', read_text(path))[1]
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


def test_one_page_holds_scans_tables_and_figures(tmp_path):
    table = Table(
        "Methods",
        [Column("name", "Method"), Column("dice", "Dice", "Overlap.", better="higher")],
        [{"name": "one", "dice": (0.5, 0.4, 0.61)}, {"name": "two", "dice": 0.25}, {"name": "three", "dice": None}],
    )
    drawing = "<?xml version='1.0'?><!DOCTYPE svg><svg><metadata>made today</metadata><path d='M0 0'/></svg>"
    sections = [
        Section("Comparison", [table, Figure("Curve", drawing), "Text."]),
        Section("More", ["In."], folded=True),
        Section("First", ["Over the scans."], above=True),
    ]
    path = tmp_path / "report.html"
    assert write_report(path, "Title", scans=[view()], sections=sections) == [path]
    text = read_text(path)
    assert "<b>0.500</b> <small>0.400 to 0.610</small>" in text and ">0.250<" in text and ">–<" in text
    assert 'title="Overlap."' in text and "<svg><path d='M0 0'/></svg>" in text and "made today" not in text
    assert re.search(r"<details><summary><h2>More</h2>", text)
    places = [text.index(f"<h2>{title}</h2>") for title in ("First", "Comparison", "More")]
    assert places == sorted(places) and places[0] < text.index('id="viewer"') < places[1]
    assert "Content-Security-Policy" in text and "Research use only" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_slice_scores_that_are_not_finite_are_left_out_of_the_curve(tmp_path, odd):
    write_report(tmp_path / "some.html", "Report", scans=[view(slice_scores=[0.5, odd, 1.0, 0.0])])
    assert data_of(tmp_path / "some.html")[0]["slice_scores"] == [0.5, None, 1.0, 0.0]
    assert "0.0,52.0 666.7,4.0 1000.0,100.0" in read_text(tmp_path / "some.html")
    write_report(tmp_path / "none.html", "Report", scans=[view(slice_scores=[odd] * 4)])
    assert data_of(tmp_path / "none.html")[0]["slice_scores"] == [None] * 4


def test_what_names_hold_is_text(tmp_path):
    name = "</script><script>alert(1)</script> <b>&\"' ü 日本"
    table = Table(name, [Column("a", name, name)], [{"a": name}])
    path = tmp_path / "report.html"
    write_report(path, name, scans=[view(name, facts={name: name})], sections=[Section(name, [table])], summary=name)
    text = read_text(path)
    assert "alert(1)</script>" not in text and "<b>&" not in text
    assert data_of(path)[0]["name"] == name


def test_a_path_that_is_not_utf8_is_shown_with_its_bytes(tmp_path):
    table = Table("Failed", [Column("path", "Path", "")], [{"path": os.fsdecode(b"raw/\xff.nii")}])
    write_report(tmp_path / "report.html", "Report", scans=[view()], sections=[Section("Failed", [table])])
    assert "raw/\\udcff.nii" in read_text(tmp_path / "report.html")


def test_a_threshold_counts_what_the_values_count(tmp_path):
    """Levels lie between the bounds, and the threshold is one of them: no voxel changes its side."""
    generator = np.random.default_rng(3)
    array = generator.gamma(0.4, 0.1, (12, 11, 10)).astype(np.float32)
    threshold = float(array.ravel()[77])  # equal to one of the values, which is not above it
    for step, bits in enumerate((16, 16, 8)):
        encoded = encode_layers({0: ("map", array, AFFINE)}, threshold, step)[0]
        facts = encoded.facts
        stored = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(encoded.file)))
        levels = np.asarray(stored.dataobj.get_unscaled())
        assert stored.get_data_dtype() == f"uint{bits}" and facts["bytes"] == bits // 8
        assert facts["offset"] + (facts["mark"] + 0.5) * facts["slope"] == pytest.approx(threshold, rel=1e-12)
        assert (levels > facts["mark"]).sum() == (array > threshold).sum()
        for level in (0, 3, facts["mark"] + 40, int(levels.max()) - 1):
            bound = facts["offset"] + (level + 0.5) * facts["slope"]
            assert (levels > level).sum() == (array > bound).sum()
        assert facts["voxel_ml"] == pytest.approx(0.012)


@pytest.mark.parametrize("threshold", [0.0, 1e-9, 1.0, 50.0])
def test_thresholds_at_the_ends_of_a_map_leave_its_values(threshold):
    array = np.linspace(0, 1, 210, dtype=np.float32).reshape(7, 6, 5)
    encoded = encode_layers({0: ("map", array, AFFINE)}, threshold, 0)[0]
    stored = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(encoded.file)))
    np.testing.assert_allclose(stored.get_fdata(), array, rtol=0, atol=1e-5)
    mark = encoded.facts["mark"]
    assert (mark is None) == (threshold < 1)
    assert mark is None or not (stored.dataobj.get_unscaled() > mark).any()


def test_headers_say_nothing_but_the_grid(tmp_path):
    given = image(np.arange(120).reshape(6, 5, 4))
    given.header["descrip"], given.header["aux_file"], given.header["intent_name"] = b"Jane Doe", b"Jane", b"Doe"
    given.header["db_name"] = b"Jane Doe"
    given.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe, born 1970"))
    nib.save(given, tmp_path / "scan.nii.gz")
    write_report(
        tmp_path / "report.html", "Title", scans=[ScanView("scan", [Layer("Scan", "scan", tmp_path / "scan.nii.gz")])]
    )
    stored = layer_of(tmp_path / "report.html", 0, 0)
    np.testing.assert_array_equal(stored.get_fdata(), np.arange(120).reshape(6, 5, 4))
    np.testing.assert_allclose(stored.affine, AFFINE)
    assert not stored.header.extensions
    content = gzip.decompress(
        base64.b64decode(re.search(r'id="layer-0-0">(.*?)<', read_text(tmp_path / "report.html"))[1])
    )
    assert b"Jane" not in content and b"Doe" not in content


def test_a_damaged_layer_is_named(tmp_path):
    nib.save(image(np.random.default_rng(0).random((20, 20, 20))), tmp_path / "scan.nii.gz")
    content = (tmp_path / "scan.nii.gz").read_bytes()
    (tmp_path / "scan.nii.gz").write_bytes(content[:-8])  # all voxels are there, not their checksum
    with pytest.raises(ValueError, match="scan.nii.gz cannot be read, it may be truncated or damaged"):
        layers.read_layer("Scan", tmp_path / "scan.nii.gz")


def test_many_scans_get_a_page_each(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "_niivue", lambda: "")  # 300 copies are 300 MB
    names = [f"group/sub {number} ü" for number in range(300)]
    alive = []

    def scans():
        for seed, name in enumerate(names):
            scan = view(name, seed, score=float(seed % 7))
            alive.append(weakref.ref(scan.layers[0].image))
            yield scan
        # Memory holds the few that might have become one page, not the cohort.
        del scan
        gc.collect()
        assert sum(image() is not None for image in alive) < 40

    written = write_report(tmp_path / "report.html", "Cohort", scans=scans(), sections=[Section("Part", ["Text."])])
    assert len(written) == 301 and written[0] == tmp_path / "report.html"
    assert {path.name for path in (tmp_path / "report_scans").iterdir()} == {path.name for path in written[1:]}
    index = read_text(written[0])
    links = re.findall(r'href="(report_scans/[^"]+)">([^<]+)<', index)
    assert sorted(name for _, name in links) == sorted(names)
    assert all((tmp_path / link).is_file() for link, _ in links)
    values = re.findall(r'class="number" data-value="([\d.]+)"', index)
    volumes, scores = values[::2], values[1::2]
    marked = view(seed=names.index(links[0][1])).layers[1].image.get_fdata() > 0.3
    assert float(volumes[0]) == pytest.approx(marked.sum() * 0.012)
    assert [float(score) for score in scores] == sorted(map(float, scores), reverse=True)
    (first,), (last,) = data_of(written[1]), data_of(written[-1])
    assert (first["previous"], first["next"]) == ("", written[2].name)
    assert (last["previous"], last["next"]) == (written[-2].name, "")
    assert max(path.stat().st_size for path in written) < page.LIMIT
    # An earlier report makes room for one of other scans; what somebody else put there stays.
    (tmp_path / "report_scans" / "notes.html").write_text("mine")
    write_report(tmp_path / "report.html", "One", scans=[view()])
    assert [path.name for path in (tmp_path / "report_scans").iterdir()] == ["notes.html"]


def test_scans_that_do_not_fit_on_one_page_get_one_each(tmp_path, monkeypatch):
    empty = len(page._niivue()) + 60_000
    monkeypatch.setattr(page, "LIMIT", empty + 75_000)
    scans = [view(f"scan {number}", number, (24, 24, 16)) for number in range(2)]
    written = write_report(tmp_path / "report.html", "Two", scans=scans)
    assert [path.name for path in written[1:]] == ["0001_scan_0.html", "0002_scan_1.html"]
    assert all(path.stat().st_size <= page.LIMIT for path in written)
    assert "to keep this page small" not in read_text(written[1])


@pytest.mark.parametrize(("room", "bits", "shape"), [(75_000, "8", (32, 32, 16)), (12_000, "8", (16, 16, 8))])
def test_a_scan_that_alone_does_not_fit_is_stored_coarser_and_says_so(tmp_path, monkeypatch, room, bits, shape):
    shared = {"title": "Large", "summary": "", "index": "report.html", "folder": "report_scans"}
    empty = page._render(shared, scans=[], sections=[], with_viewer=False)
    base = len(page._niivue()) + len(empty.encode()) + 40_000
    monkeypatch.setattr(page, "LIMIT", base + room)
    write_report(tmp_path / "report.html", "Large", scans=[view(shape=(32, 32, 16))])
    path = tmp_path / "report.html"
    assert path.stat().st_size <= page.LIMIT
    stored = layer_of(path, 0, 0)
    assert stored.shape == shape and stored.get_data_dtype() == f"uint{bits}"
    assert re.search(r'<p class="note">.*to keep this page small.*</p>', read_text(path))
    # The corner of the field of view stays where it was.
    corner = [-0.5, -0.5, -0.5]
    np.testing.assert_allclose(
        nib.affines.apply_affine(stored.affine, corner), nib.affines.apply_affine(AFFINE, corner), atol=1e-4
    )


def test_the_viewer_is_the_released_one():
    licence = read_text(page._ASSETS / "niivue.LICENSE")
    assert sha256(page._ASSETS / "niivue.umd.js") in licence and "BSD 2-Clause License" in licence


def test_foreign_files_are_not_replaced(tmp_path):
    (tmp_path / "report.html").write_text("<p>mine</p>")
    with pytest.raises(FileExistsError, match="no report of this library"):
        write_report(tmp_path / "report.html", "Title")
    assert (tmp_path / "report.html").read_text() == "<p>mine</p>"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (ScanView("a", [Layer("Map", "map", image(np.ones((2, 2, 2))))]), "must be of the kind 'scan'"),
        (ScanView("a", [Layer("Scan", "picture", image(np.ones((2, 2, 2))))]), "`kind` must be one of"),
        (view(slice_scores=[1.0, 2.0]), "each of the 4 axial slices, got 2"),
        (ScanView("a", [Layer("Scan", "scan", image(np.full((2, 2, 2), np.nan)))]), "NaN or infinite"),
        (ScanView("a", [Layer("Scan", "scan", image(np.ones((2, 2, 2, 2, 2))))]), "2 to 4 dimensions"),
    ],
)
def test_what_cannot_be_shown_is_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "report.html", "Title", scans=[wrong])
    assert not (tmp_path / "report.html").exists()


def test_the_slices_of_planes_are_those_of_the_affine():
    """An image whose first axis runs downwards, second to the right, third to the front."""
    affine = np.array([[0, 1.0, 0, 0], [0, 0, 1.0, 0], [-1.0, 0, 0, 0], [0, 0, 0, 1]])
    assert layers.plane_axes(affine) == {"axial": (0, -1), "coronal": (2, 1), "sagittal": (1, 1)}
