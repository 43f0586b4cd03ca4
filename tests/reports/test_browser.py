"""Pages of reports in a real browser: what a click, a slide or a key does."""

import io
import re
import shutil
from urllib.parse import unquote

import nibabel as nib
import numpy as np
import PIL.Image
import pytest

from anodiff.reports import Column, Layer, ScanView, Section, Table, write_report


sync_api = pytest.importorskip("playwright.sync_api")
# As flat as a head that lies, its first axis to the left; voxels of 0.024 ml.
AFFINE = np.array([[-2.0, 0, 0, 20], [0, 3.0, 0, -30], [0, 0, 4.0, -16], [0, 0, 0, 1]])
SHAPE = (20, 18, 10)
THRESHOLD = 0.5


def phantom(seed: int) -> dict[str, np.ndarray]:
    """An ellipsoid with a bright ball in it."""
    generator = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, size) for size in SHAPE], indexing="ij")
    head = (x**2 + y**2 + z**2 < 0.9) * (100 + 10 * generator.random(SHAPE))
    ball = (x - 0.3) ** 2 + (y + 0.2) ** 2 + (z - 0.33) ** 2
    scores = (np.exp(-6 * ball) * (head > 0) * (0.8 + 0.2 * generator.random(SHAPE))).astype(np.float32)
    return {"scan": head + 120 * (ball < 0.1), "reconstruction": head, "map": scores, "mask": scores > THRESHOLD}


PHANTOMS = {'first <b>&"': phantom(0), "second": phantom(1), "third": phantom(2)}


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    arguments = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_api.sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=chromium, args=arguments) as browser:
            yield browser


def open_page(browser, path, **settings):
    """Opens a page; whatever it asks for or complains about is in `page.requests` and `page.complaints`."""
    page = browser.new_page(viewport={"width": 1000, "height": 800}, **settings)
    page.set_default_timeout(60_000)
    page.requests, page.complaints = [], []
    page.on("request", lambda request: page.requests.append(unquote(request.url)))
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(path.as_uri())
    return page


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("a b ü") / "report.html"
    scans = []
    for number, (name, arrays) in enumerate(PHANTOMS.items()):
        layers = [
            Layer(kind.title(), kind, nib.Nifti1Image(array.astype(np.float32), AFFINE))
            for kind, array in arrays.items()
        ]
        curve = arrays["map"].max((0, 1)).tolist()
        scans.append(ScanView(name, layers, score=[2.0, 3.0, 1.0][number], threshold=THRESHOLD, slice_scores=curve))
    table = Table(
        "Methods",
        [Column("name", "Method"), Column("dice", "Dice", "Overlap.", better="higher")],
        [{"name": "b", "dice": (0.5, 0.4, 0.6)}, {"name": "a", "dice": 10.0}, {"name": "c", "dice": float("nan")}],
    )
    write_report(path, "Report", scans=scans, sections=[Section("Comparison", [table])])
    return path


@pytest.fixture(scope="module")
def page(browser, path):
    page = open_page(browser, path)
    page.wait_for_selector("body[data-shown]")
    return page


def volume(page) -> str:
    return page.locator("#volume").evaluate("element => element.value")


def shown(page) -> str:
    return page.locator("article.scan.shown h2").inner_text()


def slice_of(page) -> int:
    return int(page.locator("article.shown .curve svg").get_attribute("aria-valuenow"))


def ml(scores: np.ndarray, threshold: float) -> str:
    return f"{(scores > threshold).sum() * abs(np.linalg.det(AFFINE[:3, :3])) / 1000:.2f} ml"


def pixels(page, selector="#canvas") -> np.ndarray:
    """What a person sees of an element, once the graphics have drawn it."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return np.asarray(PIL.Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB"), dtype=float)


def test_the_viewer_shows_the_most_suspicious_scan_first(page):
    assert shown(page) == "second"
    assert page.locator("#scan-list tbody a").all_inner_texts() == ["second", 'first <b>&"', "third"]
    picture = pixels(page)
    assert picture.std() > 20  # a blank one has none


def test_the_threshold_moves_the_mask_and_its_volume(page):
    scores = PHANTOMS["second"]["map"]
    assert volume(page) == ml(scores, THRESHOLD)
    before = pixels(page)
    for position in (300, 650):
        page.locator("#threshold").evaluate(
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", position
        )
        low = scores.min()
        threshold = float(page.input_value("#threshold-number"))
        exact = page.evaluate("document.getElementById('volume').title")
        assert volume(page) == ml(scores, threshold) and exact.startswith(f"{(scores > threshold).sum()} ")
        assert low < threshold < scores.max() and abs(threshold - THRESHOLD) > 0.05
    assert abs(pixels(page) - before).max() > 60
    page.fill("#threshold-number", "0.25")
    page.locator("#threshold-number").press("Enter")
    assert volume(page) == ml(scores, 0.25)
    page.click("#reset")
    assert volume(page) == ml(scores, THRESHOLD)
    page.click("h1")
    page.keyboard.press("]")
    assert float(page.input_value("#threshold-number")) > THRESHOLD
    page.keyboard.press("[")
    page.keyboard.press("[")
    assert float(page.input_value("#threshold-number")) < THRESHOLD
    page.click("#reset")


def test_the_curve_and_keys_go_to_a_slice(page):
    scores = PHANTOMS["second"]["map"].max((0, 1))
    assert slice_of(page) == int(scores.argmax())
    box = page.locator("article.shown .curve svg").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 2 / 9, box["y"] + box["height"] / 2)
    assert slice_of(page) == 2
    assert f"slice 2: {scores[2]:.3f}" in page.locator("article.shown .at").inner_text()
    assert re.search(r"Voxel \d+, \d+, 2 ", page.locator("#values").inner_text())
    page.keyboard.press("ArrowUp")
    assert slice_of(page) == 3
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert slice_of(page) == 1


def test_values_are_those_of_the_voxel_that_is_clicked(page):
    page.click("button[data-plane='axial']")
    box = page.locator("#canvas").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2 + 20, box["y"] + box["height"] / 2 + 10)
    text = page.locator("#values").inner_text()
    voxel = tuple(map(int, re.search(r"Voxel (\d+), (\d+), (\d+)", text).groups()))
    arrays = PHANTOMS["second"]
    assert float(re.search(r"Map ([\d.]+)", text)[1]) == pytest.approx(arrays["map"][voxel], abs=6e-4)
    assert float(re.search(r"Scan ([\d.]+)", text)[1]) == pytest.approx(arrays["scan"][voxel], abs=0.06)
    # Right of the middle is the patient's left, where the first axis begins.
    assert voxel[0] > 10 or AFFINE[0, 0] * voxel[0] + AFFINE[0, 3] < 0
    page.click("button[data-plane='all']")


def test_layers_are_shown_and_hidden(page):
    def colour():
        """How many pixels of the images, without the cursor's lines, have a colour, and how blue they are."""
        picture = pixels(page)
        picture = picture[np.abs(picture - [180, 130, 60]).max(-1) > 70]
        strong = picture.max(-1) - picture.min(-1) > 40
        return strong.sum(), (picture[..., 2] - picture[..., 0])[strong].sum()

    page.click("h1")
    number, blue = colour()
    assert number > 200
    page.keyboard.press("m")
    assert colour()[1] < blue - 1000
    page.keyboard.press("o")
    assert colour()[0] < number / 4
    assert page.locator("#layers input:checked").count() == 0
    page.keyboard.press("m")
    page.keyboard.press("o")
    assert page.locator("#layers input:checked").count() == 2
    page.keyboard.press("r")
    assert page.locator("#beside").is_visible() and pixels(page, "#canvas-beside").std() > 10
    page.keyboard.press("r")
    assert page.locator("#beside").is_hidden()


def test_scans_are_chosen_sorted_and_filtered(page):
    page.click("h1")
    page.keyboard.press("j")
    page.wait_for_selector("body[data-shown='1']")
    assert shown(page) == 'first <b>&"'
    assert volume(page) == ml(PHANTOMS['first <b>&"']["map"], THRESHOLD)
    page.keyboard.press("k")
    page.wait_for_selector("body[data-shown='0']")
    page.click("#scan-list tbody tr:last-child")
    page.wait_for_selector("body[data-shown='2']")
    assert shown(page) == "third"
    page.click("#scan-list th button >> text=Scan")
    assert page.locator("#scan-list tbody a").all_inner_texts() == ['first <b>&"', "second", "third"]
    page.fill("#filter", "SEC")
    assert page.locator("#scan-list tbody tr:visible").count() == 1
    page.fill("#filter", "")
    page.click("#scan-list th button >> text=Score")


def test_tables_sort_by_numbers_and_what_is_missing_comes_last(page):
    def names():
        return page.locator(".part tbody td:first-child").all_inner_texts()

    assert names() == ["b", "a", "c"]
    heading = page.locator(".part th", has_text="Dice")
    heading.locator("button").click()
    assert names() == ["a", "b", "c"] and heading.get_attribute("aria-sort") == "descending"
    heading.locator("button").click()
    assert names() == ["b", "a", "c"] and heading.get_attribute("aria-sort") == "ascending"


def test_light_dark_and_help(page):
    def brightness():
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    light = brightness()
    page.click("#theme-button")
    assert brightness() < 150 < light
    page.click("#theme-button")
    assert brightness() == light
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    page.emulate_media(color_scheme="dark")
    page.emulate_media(color_scheme="light")


def test_the_page_asks_for_nothing_and_complains_about_nothing(page, path):
    """The last test that uses the page: of all that the others have done with it."""
    assert page.requests == [unquote(path.as_uri())]
    assert page.complaints == []
    # It could not: what it tries is refused.
    assert page.evaluate("fetch('https://example.org/').then(() => 'sent', () => 'refused')") == "refused"


def test_without_the_viewer_a_slice_and_the_tables_are_there(browser, path):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator("img.fallback").first.is_visible() and page.locator(".part table").is_visible()
    context.close()
    page = browser.new_page()
    page.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
    page.goto(path.as_uri())
    assert page.locator("#viewer").is_hidden()
    assert page.locator(".no-viewer").first.is_visible() and page.locator("img.fallback").first.is_visible()
    assert pixels(page, "article:first-of-type img.fallback").std() > 20
    page.close()


def nested(count: int, size: int, depth: int = 1) -> np.ndarray:
    """Masks `(16, 12, depth, count)` from the same corner, each a pixel larger than the last one."""
    masks = np.zeros((16, 12, depth, count))
    for number in range(count):
        masks[4 : 4 + size + number, 3 : 3 + size + number, :, number] = 1
    return masks


@pytest.fixture(scope="module")
def ensembles(browser, tmp_path_factory):
    """A picture with three members and two annotations, a volume with two members, and one with two maps."""
    path = tmp_path_factory.mktemp("ensembles") / "report.html"
    plain = np.diag([-1.0, -1.0, 1.0, 1.0])
    scans = []
    for name, depth, members, more in (
        ("picture", 1, nested(3, 3), [("Annotations", "reference", nested(2, 6))]),
        ("volume", 4, nested(2, 4, 4), []),
        ("maps", 4, nested(2, 4, 4) * [0.02, 0.04], []),
    ):
        arrays = [("Scan", "scan", np.linspace(0, 50, 16 * 12 * depth).reshape(16, 12, depth))]
        share = members.mean(-1)
        arrays += [("Share", "probability", share), ("Agreement", "probability", np.maximum(share, 1 - share))]
        arrays += [("Deviation", "map", members.std(-1)), ("Members", "members", members), *more]
        layers = [
            Layer(title, kind, nib.Nifti1Image(array.astype(np.float32), plain)) for title, kind, array in arrays
        ]
        scans.append(ScanView(name, layers, threshold=0.5, is_picture=depth == 1))
    write_report(path, "Ensembles", scans=scans)
    page = open_page(browser, path)
    page.wait_for_selector("body[data-shown='0']")
    return page


def of_member(page, name: str = "Members") -> str:
    return page.locator("#ensemble-rows label", has_text=name).locator("output").evaluate("element => element.value")


def pressed(page) -> str:
    return page.locator("#ensemble-show [aria-pressed=true]").inner_text()


def test_outlines_of_masks(ensembles):
    draw = "([all, shape, frames, factor]) => Array.from(members.drawOutlines(all, shape, frames, 2, factor))"
    block = np.zeros((5, 5), int)
    block[1:4, 1:4] = 1
    ring = block.copy()
    ring[2, 2] = 0
    twice = ensembles.evaluate(draw, [[*block.ravel().tolist(), *block.ravel().tolist()], [5, 5, 1], 2, 1])
    assert np.array_equal(np.reshape(twice, (5, 5)), 2 * ring)
    pixel = np.zeros((2, 2), int)
    pixel[0, 1] = 1
    fine = np.reshape(ensembles.evaluate(draw, [pixel.ravel().tolist(), [2, 2, 1], 1, 5]), (10, 10))
    expected = np.zeros((10, 10), int)
    expected[:5, 5:] = 1
    expected[1:4, 6:9] = 0
    assert np.array_equal(fine, expected)


def test_members_one_all_and_what_they_disagree_on(ensembles):
    page = ensembles
    assert of_member(page) == "1 of 3, 9 pixels" and of_member(page, "Annotations") == "1 of 2, 36 pixels"
    assert pressed(page) == "All outlines"
    # Of several maps the one with the threshold shows.
    checked = {name: page.get_by_label(name, exact=True).is_checked() for name in ("Share", "Agreement", "Deviation")}
    assert checked == {"Share": True, "Agreement": False, "Deviation": False}
    assert not page.locator("#layers").get_by_label("Members", exact=True).is_checked()
    assert re.search(r"Members [0-3] of 3 .* Annotations [0-2] of 2", page.locator("#values").inner_text())
    seen = [pixels(page)]
    page.keyboard.press("n")
    seen.append(pixels(page))
    page.keyboard.press(".")
    assert of_member(page) == "2 of 3, 16 pixels" and pressed(page) == "One"
    seen.append(pixels(page))
    page.keyboard.press(".")
    page.keyboard.press(".")  # there is no fourth one
    assert of_member(page) == "3 of 3, 25 pixels"
    seen.append(pixels(page))
    page.click("[data-show=disagreement]")
    seen.append(pixels(page))
    assert all(abs(one - other).max() > 60 for one, other in zip(seen, seen[1:], strict=False))
    page.locator("#ensemble-rows label", has_text="Annotations").locator("input").press("ArrowRight")
    assert of_member(page, "Annotations") == "2 of 2, 49 pixels" and pressed(page) == "Disagreement"
    page.click("[data-show=outlines]")


def test_members_of_volumes_and_of_maps(ensembles):
    page = ensembles
    for number, text in ((1, "2 of 2, 0.10 ml"), (2, "2 of 2")):
        page.keyboard.press("j")
        page.wait_for_selector(f"body[data-shown='{number}']")
        page.keyboard.press(".")
        page.keyboard.press(".")
        assert of_member(page) == text
        assert page.locator("#ensemble-show").is_visible() == (number == 1)
    assert page.input_value("#threshold-number") == "0.500"  # above all values of this map
    assert page.complaints == [] and all(url.startswith(("file:", "data:", "blob:")) for url in page.requests)
