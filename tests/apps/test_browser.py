"""Both pages in a browser, served as the Space serves them."""

import os
import shutil
import socket
import zipfile
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import yaml

from ..tiny import make_pipeline, make_volume


CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
WAIT = 120_000


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Address of a page with both parts, and a tiny checkpoint to choose."""
    from anodiff.apps.explorer_page import fill_explorer
    from anodiff.apps.maps_page import fill_maps
    from anodiff.apps.pages import launch, make_page

    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_pipeline("AnoDDPMPipeline", ("flair",), noise_level=2, threshold=0.5).save_pretrained(folder)
    parts = {"Anomaly maps": partial(fill_maps, models=[str(folder)]), "Noise explorer": fill_explorer}
    page = make_page("anodiff", parts)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield launch(page, "127.0.0.1", port)
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        with playwright.chromium.launch(executable_path=CHROMIUM, args=arguments) as chromium:
            yield chromium


@pytest.fixture
def tab(browser, address):
    """An open page; no request of it left this computer, and no script complained."""
    context = browser.new_context(viewport={"width": 1300, "height": 1000}, accept_downloads=True)
    tab, requests, complaints = context.new_page(), [], []
    tab.set_default_timeout(WAIT)
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(address)
    yield tab
    context.close()
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
    assert complaints == []


def upload(tab, path):
    """Chooses a file as a scan, and waits until the server has it: before, only its progress is shown, for a moment."""
    tab.set_input_files("#scan input[type=file]", path)
    tab.get_by_role("cell", name=path.name, exact=True).wait_for()


def test_the_explorer_shows_what_is_chosen(tab, tmp_path):
    tab.get_by_role("tab", name="Noise explorer").click()
    noise, noised = (tab.locator("#pictures img").nth(number) for number in (1, 2))
    noise.wait_for()

    def change(picture, act) -> dict:
        """What is copied after a change, once the picture is another one."""
        before = picture.get_attribute("src")
        act()
        tab.wait_for_function("([at, old]) => at.src !== old", arg=[picture.element_handle(), before])
        return seen()

    def seen() -> dict:
        return yaml.safe_load(tab.locator("#yaml .cm-content").inner_text())

    first = seen()
    assert first["method"] == "anoddpm" and first["scheduler"]["octaves"] == 6
    assert first["inference"] == {"noise_level": 250}
    tab.locator("#reconstruction img").first.wait_for()
    assert "anoddpm-any was trained with simplex noise" in tab.inner_text("#reconstruction")

    octaves = tab.locator("#octaves input[type=number]")
    assert change(noise, lambda: (octaves.fill("2"), octaves.press("Enter")))["scheduler"]["octaves"] == 2
    timestep = tab.locator("#timestep input[type=number]")
    assert change(noised, lambda: (timestep.fill("600"), timestep.press("Enter")))["inference"]["noise_level"] == 601
    assert "t = 600 is outside" in tab.inner_text("#reconstruction")
    tab.get_by_role("button", name="Schedule").click()
    steps = tab.locator("#steps input[type=number]")
    longer = change(noised, lambda: (steps.fill("1500"), steps.press("Enter")))
    assert longer["scheduler"]["num_train_timesteps"] == 1500
    late = change(noised, lambda: (timestep.fill("1400"), timestep.press("Enter")))
    assert late["inference"]["noise_level"] == 1401
    tab.locator("#reconstruction").get_by_text("`timestep` must be").wait_for()
    shorter = change(noised, lambda: (steps.fill("400"), steps.press("Enter")))
    assert shorter["scheduler"]["num_train_timesteps"] == 400 and shorter["inference"]["noise_level"] == 400
    pyramid = change(noise, lambda: tab.locator("#noise_type").get_by_text("pyramid").click())
    assert pyramid["method"] == "andi" and pyramid["scheduler"]["noise_type"] == "pyramid"

    def choose_preset():
        tab.locator("#preset input").click()
        tab.get_by_role("option", name="brain_damage").click()

    change(noise, choose_preset)
    tab.wait_for_function("document.querySelector('#wavelength input[type=number]').value === '32'")
    tab.wait_for_function("document.querySelector('#yaml .cm-content').innerText.includes('per_image')")
    assert seen()["scheduler"]["beta_schedule"] == "cosine_clipped"

    # A picture of one's own, and what is none.
    picture, colours = tmp_path / "grey.png", tmp_path / "colours.png"
    grey = np.zeros((40, 30), np.uint8)
    grey[5:35, 5:25] = np.arange(20) * 10 + 20
    PIL.Image.fromarray(grey).save(picture)
    PIL.Image.fromarray(np.stack([grey, 255 - grey, grey], -1)).save(colours)
    tab.locator("#source").get_by_text("my own picture or scan").click()
    tab.get_by_text("No file is there yet").first.wait_for()
    change(tab.locator("#pictures img").first, lambda: tab.set_input_files("#own_file input[type=file]", picture))
    tab.get_by_role("button", name="Clear").click()
    tab.get_by_text("No file is there yet").first.wait_for()
    tab.set_input_files("#own_file input[type=file]", colours)
    tab.locator("#explained").get_by_text("colour picture").wait_for()


def test_a_scan_is_shown_and_taken_home_and_forgotten(tab, tmp_path):
    from anodiff.apps.pages import FOLDER

    before = set(os.listdir(FOLDER))
    scan = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(make_volume(), np.diag([2.0, 2.0, 5.0, 1.0])), scan)
    upload(tab, scan)
    tab.click("#start")
    viewer = tab.frame_locator("#viewer iframe")
    viewer.locator("canvas").first.wait_for()
    assert "Score of the scan" in tab.inner_text("#note") and " ml" in tab.inner_text("#note")
    with tab.expect_download() as download:
        tab.click("#archive")
    with zipfile.ZipFile(download.value.path()) as archive:
        assert {"report.html", "scan/anomaly_map.nii.gz"} <= set(archive.namelist())
    assert len(set(os.listdir(FOLDER)) - before) >= 2  # the upload, the results
    tab.goto("about:blank")
    for _ in range(100):
        left = {name for name in set(os.listdir(FOLDER)) - before if any(Path(FOLDER, name).rglob("scan*"))}
        if not left:
            break
        tab.wait_for_timeout(100)
    assert not left


def test_a_port_that_is_taken_is_named(address):
    from anodiff.apps.pages import launch, make_page

    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(OSError, match=f"Port {port} cannot be had, choose another one by `--port`"):
        launch(make_page("second", {}), "127.0.0.1", port)


def test_a_file_that_is_no_scan_is_named(tab, tmp_path):
    wrong = tmp_path / "letter.nii.gz"
    wrong.write_text("Dear reader")
    upload(tab, wrong)
    tab.click("#start")
    error = tab.locator("#note .anodiff-error")
    error.wait_for()
    assert "letter.nii.gz" in error.inner_text() and "anodiff-pages" not in error.inner_text()
    assert tab.locator("#viewer iframe").count() == 0
