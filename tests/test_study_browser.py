"""The pages in a real browser: scripted raters click and type; what they prefer is known and must be recovered."""

import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest
from browser import needs_browser, new_page, open_browser
from study_raters import Judge, make_study, serving, serving_process

from coherent_ddrm.cli import main
from coherent_ddrm.study.analysis import analyse
from coherent_ddrm.study.answers import Answers
from coherent_ddrm.study.questions import sheet

pytest.importorskip("uvicorn")
pytestmark = needs_browser
READY = "#ask[aria-busy=false]:not([hidden])"
TRUE = (1.5, 0.0, -1.5)


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture
def study(tmp_path):
    return make_study(tmp_path, "ABC", questions=5, catches=3)


def shown(page, side):
    """The id of the picture on one side."""
    return page.get_attribute(f"#{side}-picture", "src").removeprefix("pictures/").removesuffix(".png")


def answer(page, judge, how):
    """Judge the question on the page; `how` is "click", "arrow", "digit" or "tab" (focus and Enter)."""
    page.wait_for_selector(READY)
    side = judge.choose(shown(page, "left"), shown(page, "right"))
    if how == "click":
        page.click(f"#{side}")
    elif how == "tab":
        page.focus(f"#{side}")
        page.keyboard.press("Enter")
    else:
        keys = {"arrow": {"left": "ArrowLeft", "right": "ArrowRight"}, "digit": {"left": "1", "right": "2"}}
        page.keyboard.press(keys[how][side])


def answer_all(page, judge, how, count=8):
    page.wait_for_selector("#start:not([hidden])")
    page.click("#begin")
    for _ in range(count):
        answer(page, judge, how)
    page.wait_for_selector("#end:not([hidden])")


def test_raters_in_the_browser_are_recovered(browser, tmp_path, study):
    folder = tmp_path / "study"
    with serving(folder) as address:
        for seed, how in enumerate(["click", "arrow", "digit", "tab", "arrow"]):
            judge = Judge(study, TRUE if seed < 4 else None, seed)  # the last tosses a coin
            with new_page(browser, color_scheme=("light", "dark")[seed % 2]) as visit:
                visit.page.goto(address)
                answer_all(visit.page, judge, how)
                assert visit.page.title() == study.title
                visit.check()
    results = analyse(folder)
    assert [row["method"] for row in results["methods"]] == list("ABC")
    for row, true in zip(results["methods"], TRUE, strict=True):
        assert row["score"] == pytest.approx(true, abs=1.2)
    assert [row["kept"] for row in results["raters"]] == [True] * 4 + [False]
    assert all(0 <= row["median_seconds"] < 20 for row in results["raters"])


def test_a_rater_goes_on_with_the_same_browser_and_with_the_same_link(browser, tmp_path, study):
    with serving(tmp_path / "study") as address:
        judge = Judge(study, TRUE, 0)
        with new_page(browser) as first:
            page = first.page
            page.goto(address)
            page.click("#begin")
            for _ in range(2):
                answer(page, judge, "click")
            page.wait_for_selector(READY)
            assert page.inner_text("#count") == "Question 3 of 8"
            page.goto("about:blank")
            page.goto(address)  # without the token: the browser remembers
            page.wait_for_selector(READY)
            assert page.inner_text("#count") == "Question 3 of 8"
            link = page.url
            with new_page(browser) as other:  # another browser with the link
                other.page.goto(link)
                answer(other.page, judge, "arrow")
                other.page.wait_for_selector(READY)
                assert other.page.inner_text("#count") == "Question 4 of 8"
                other.check()
            answer(page, judge, "arrow")  # the old window answers question 3 again: it is led on, nothing is lost
            page.wait_for_selector(READY)
            assert page.inner_text("#count") == "Question 4 of 8"
        ((_, kept),) = Answers(tmp_path / "study").all().items()
        assert [one.position for one in kept] == [0, 1, 2]


def test_a_lost_connection_keeps_the_answer(browser, tmp_path, study):
    with serving(tmp_path / "study") as address, new_page(browser) as visit:
        visit.page.goto(address)
        visit.page.click("#begin")
        visit.page.wait_for_selector(READY)
        visit.page.context.set_offline(True)
        visit.page.keyboard.press("2")
        visit.page.wait_for_selector("#trouble:not([hidden])")
        visit.page.context.set_offline(False)
        visit.page.click("#again")
        visit.page.wait_for_selector(READY)
        assert visit.page.inner_text("#count") == "Question 2 of 8" and visit.outside == []
        ((_, kept),) = Answers(tmp_path / "study").all().items()
        assert [one.choice for one in kept] == ["right"]


def test_a_rater_who_was_replaced_is_led_to_a_new_start(browser, tmp_path, study):
    """Away for long before the first answer: the answer is refused, with why, and the page begins anew."""
    answers = Answers(tmp_path / "study")
    with serving(tmp_path / "study") as address, new_page(browser) as visit:
        visit.page.goto(address)
        visit.page.click("#begin")
        visit.page.wait_for_selector(READY)
        with sqlite3.connect(answers.path) as database:
            database.execute("UPDATE raters SET came = came - 1801")
        answers.admit(10)
        visit.page.keyboard.press("2")
        visit.page.wait_for_selector("#trouble:not([hidden])")
        assert "went to another" in visit.page.inner_text("#trouble-text")
        visit.page.click("#again")
        visit.page.wait_for_selector("#start:not([hidden])")
        visit.page.click("#begin")
        answer(visit.page, Judge(study, TRUE, 0), "arrow")
        visit.page.wait_for_selector(READY)
        assert visit.page.inner_text("#count") == "Question 2 of 8"
    assert [(rater.sheet, len(kept)) for rater, kept in answers.all().items()] == [(0, 0), (1, 1)]


def test_small_pictures_are_enlarged_and_all_fits_the_window(browser, tmp_path, study):
    with serving(tmp_path / "study") as address:
        for width, height in ((1280, 800), (1920, 1080), (390, 780)):
            with new_page(browser, viewport={"width": width, "height": height}) as visit:
                visit.page.goto(address)
                visit.page.click("#begin")
                visit.page.wait_for_selector(READY)
                box = visit.page.locator("#left-picture").bounding_box()
                assert box["width"] % 16 == 0 and box["width"] >= (120 if width < 400 else 256)
                size = "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
                assert visit.page.evaluate(size) <= [width, height]
                assert visit.page.evaluate(size)[1] <= height
                style = "getComputedStyle(document.getElementById('left-picture')).imageRendering"
                assert visit.page.evaluate(style) == "pixelated"


def test_static_export_from_the_disk(browser, tmp_path, study):
    """Opened as a file, answered with a break, downloaded, imported, analysed."""
    folder, out = tmp_path / "study", tmp_path / "export"
    assert main(["study", "export", str(folder), "-o", str(out), "--sheets", "4"]) == 0
    text = (out / "index.html").read_text()
    assert not any(word in text for word in ("by-A", "catch", "broken", str(tmp_path)))
    files = []
    for number in range(2):
        judge = Judge(study, TRUE, number)
        with new_page(browser, accept_downloads=True) as visit:
            page = visit.page
            page.goto(f"{out.as_uri()}/index.html#sheet={number}")
            page.wait_for_selector("#start:not([hidden])")
            page.click("#begin")
            for _ in range(3):
                answer(page, judge, "arrow")
            page.wait_for_selector(READY)
            page.reload()
            page.wait_for_selector(READY)
            assert page.inner_text("#count") == "Question 4 of 8"
            for _ in range(5):
                answer(page, judge, "click")
            page.wait_for_selector("#end:not([hidden])")
            with page.expect_download() as download:
                page.click("#download")
            files.append(str(tmp_path / download.value.suggested_filename))
            download.value.save_as(files[-1])
            visit.check()
    contents = [json.loads(open(file).read()) for file in files]
    assert [one["sheet"] for one in contents] == [0, 1] and len({one["rater"] for one in contents}) == 2
    assert main(["study", "import", str(folder), *files]) == 0
    kept = Answers(folder).all()
    for rater, answers in kept.items():
        assert [(a.left, a.right) for a in answers] == [(q.left, q.right) for q in sheet(study, rater.sheet)]
    results = analyse(folder)
    assert results["answers"]["raters_kept"] == 2 and results["methods"][0]["method"] == "A"


def test_two_servers_on_one_study(tmp_path, study):
    """Two processes and many raters at once: every answer is kept."""
    httpx = pytest.importorskip("httpx")

    def take_part(address, seed):
        judge = Judge(study, TRUE, seed)
        with httpx.Client(base_url=address, timeout=60, verify=False) as client:
            client.headers["authorization"] = f"Bearer {client.post('api/raters', json={}).json()['rater']}"
            for i, q in enumerate(client.get("api/sheet").json()["questions"]):
                given = {"position": i, "choice": judge.choose(q["left"], q["right"]), "milliseconds": 900}
                client.post("api/answers", json=given).raise_for_status()

    folder = tmp_path / "study"
    with serving_process(folder) as one, serving_process(folder) as two, ThreadPoolExecutor(6) as pool:
        list(pool.map(take_part, [one, two] * 4, range(8)))
    kept = Answers(folder).all()
    assert sorted(rater.sheet for rater in kept) == list(range(8)) and {len(a) for a in kept.values()} == {8}
