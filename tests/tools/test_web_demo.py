"""Tests of the web demo: its answers against the predictor's, and the page in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import socket
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import REPO, find_chromium
from detectron2.data import MetadataCatalog
from detectron2.structures import pairwise_iou

import web_demo
from demo import setup
from vlnms_d2 import VLNMSPredictor, rerank
from web_app.answers import MAX_LENGTH, MAX_QUERIES, Settings, answer, read_queries, to_files
from web_app.panels import render, render_error, render_photo
from web_app.scenes import DetectionFiles, Models, Scenes

SCENE = REPO / "tools" / "demo_scenes" / "refshapes_testB_024.jpg"
CONFIGS = REPO / "configs" / "refshapes"
QUERIES = ["brown clock bottom right", "yellow building with spots", ""]
DEFAULT = Settings("FC", False, 8, 0.0, 0.5, False, "product", 0.5)


@pytest.fixture(scope="module")
def models() -> Models:
    return Models([setup(path, []) for path in web_demo.DEFAULT_CONFIGS])


@pytest.mark.parametrize("name", ["FC", "Trans"])
def test_answers_are_those_of_the_predictor(models, name):
    cfg = setup(CONFIGS / f"vlnms_{name.lower()}_trained.yaml", [])
    predictor = VLNMSPredictor(cfg)
    image = cv2.imread(str(SCENE))
    detector, expected = predictor.compare(image, QUERIES)
    threshold = cfg.MODEL.VLNMS.FINAL_SCORE_THRESH
    settings = DEFAULT._replace(relatedness=name, by_threshold=True, score_thresh=threshold)
    answers, _ = answer(models, models.scene(SCENE), QUERIES, settings)
    for got, instances in zip(answers, expected, strict=True):
        assert len(got.aware) == len(instances)
        torch.testing.assert_close(got.aware.scores, instances.scores, atol=1e-4, rtol=1e-3)
        boxes = got.aware.pred_boxes.tensor
        torch.testing.assert_close(boxes, instances.pred_boxes.tensor, atol=0.05, rtol=1e-3)
        best = detector[: len(instances)]
        torch.testing.assert_close(got.detector.scores, best.scores, atol=1e-4, rtol=1e-3)


def test_controls_change_the_answer_as_they_say(models):
    scene = models.scene(SCENE)

    def ask(**changes):
        [only], _ = answer(models, scene, QUERIES[:1], DEFAULT._replace(**changes))
        return only.aware

    assert [len(ask(top_n=n)) for n in (1, 5, 30)] == [1, 5, 30]
    scores = ask(top_n=100).scores
    above = float(scores[20])
    assert len(ask(by_threshold=True, score_thresh=above)) == int((scores > above).sum())
    assert len(ask(by_threshold=True, score_thresh=1.0)) == 1  # always the best one
    for threshold in (0.1, 0.5):
        kept = ask(top_n=100, nms_thresh=threshold)
        overlaps = pairwise_iou(kept.pred_boxes, kept.pred_boxes).fill_diagonal_(0)
        same = kept.pred_classes[:, None] == kept.pred_classes
        assert (overlaps * same).max() <= threshold < overlaps.max()
    agnostic = ask(top_n=100, class_agnostic=True).pred_boxes
    assert pairwise_iou(agnostic, agnostic).fill_diagonal_(0).max() <= 0.5
    by_sum = ask(fusion="weighted_sum", fusion_weight=1.0)
    torch.testing.assert_close(by_sum.scores, by_sum.relatedness)


def test_detector_runs_once_for_an_image(models, monkeypatch, tmp_path):
    path, calls = tmp_path / "mirrored.png", []
    cv2.imwrite(str(path), cv2.imread(str(SCENE))[:, ::-1])
    backbone = models.first.model.backbone.forward
    monkeypatch.setattr(
        models.first.model.backbone, "forward", lambda x: calls.append(1) or backbone(x)
    )
    for name in models.names:
        for top_n in (3, 8):
            settings = DEFAULT._replace(relatedness=name, top_n=top_n)
            answer(models, models.scene(path), QUERIES, settings)
    assert len(calls) == 1


def test_an_answer_refers_to_the_picture_and_does_not_repeat_it(models):
    scene = models.scene(SCENE)
    photo = render_photo(scene)
    assert scene.data_uri in photo and f'id="{scene.photo_id}"' in photo
    for queries, panels in ((QUERIES[:2], 4), ([], 1)):
        html = render(scene, *answer(models, scene, queries, DEFAULT))
        assert "data:" not in html
        assert html.count(f'<use href="#{scene.photo_id}"/>') == html.count("<svg") == panels


def test_scenes_are_dropped_when_there_are_too_many():
    scenes, made = Scenes(2), []

    def make(key):
        return scenes.get(key, lambda: made.append(key) or key)

    assert [make(key) for key in "abacab"] == list("abacab")
    assert made == list("abcb")  # a was used again before c came


def test_models_of_different_detectors_are_refused(tmp_path):
    path = CONFIGS / "vlnms_trans_trained.yaml"
    cfg = setup(path, [])
    weights = torch.load(cfg.MODEL.WEIGHTS, weights_only=True)
    key = next(k for k in weights["model"] if k.startswith("backbone") and k.endswith("weight"))
    weights["model"][key] = weights["model"][key] + 1
    torch.save(weights, tmp_path / "other.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="detector of Trans differs from the first one in"):
        Models([setup(CONFIGS / "vlnms_fc_trained.yaml", []), cfg])


def test_queries_of_the_text_field_are_limited():
    assert read_queries(" a cup \n\n  left dog\n") == ["a cup", "left dog"]
    assert read_queries("") == []
    with pytest.raises(ValueError, match=f"at most {MAX_QUERIES}"):
        read_queries("cup\n" * (MAX_QUERIES + 1))
    with pytest.raises(ValueError, match=f"at most {MAX_LENGTH}"):
        read_queries("x" * (MAX_LENGTH + 1))


class _Tags(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


def test_text_from_outside_stays_text(models):
    nasty = "<script>alert(1)</script> <img src=x onerror=alert(1)> cup & \"dog'"
    scene = models.scene(SCENE)
    for name in models.names:
        answers, seconds = answer(models, scene, [nasty], DEFAULT._replace(relatedness=name))
        page = _Tags(render(scene, answers, seconds))
        assert "script" not in page.tags and "img" not in page.tags
    assert _Tags(render_error(nasty)).text == nasty
    assert "script" not in _Tags(render_error(nasty)).tags


def _detections(folder: Path, image_ids=(7,)) -> Path:
    path = folder / "detections.json"
    rows = [
        {"image_id": i, "category_id": c, "bbox": [20 * k, 30, 60, 80], "score": 0.9 - 0.1 * k}
        for i in image_ids
        for k, c in enumerate((1, 18, 3, 47))  # person, dog, car, cup
    ]
    path.write_text(json.dumps(rows))
    return path


def test_detections_of_a_file(tmp_path):
    files = DetectionFiles()
    scene = files.scene(SCENE, _detections(tmp_path), None)
    settings = DEFAULT._replace(relatedness="Category", top_n=2)
    answers, _ = answer(files, scene, ["the puppy", "a cup"], settings)
    names = MetadataCatalog.get("coco_2017_val").thing_classes
    for got, query in zip(answers, ["the puppy", "a cup"], strict=True):
        [expected] = rerank(scene.boxes, scene.scores, scene.classes, names, [query], topk=2)
        assert torch.equal(got.aware.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(got.aware.scores, expected.scores)
    written = to_files(scene, answers)
    assert names[int(answers[0].aware.pred_classes[0])] == "dog"
    records = json.loads(written["proposals.json"])
    assert [q["proposals"][0]["class"] for q in records["queries"]] == ["dog", "cup"]
    coco = json.loads(written["coco_results.json"])
    assert [coco[0][key] for key in ("image_id", "category_id", "sent_id")] == [7, 18, 0]
    np.testing.assert_allclose(coco[0]["bbox"], [20, 30, 60, 80])
    picture = cv2.imdecode(np.frombuffer(written["proposals.png"], np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape[0] > picture.shape[1] / 2  # two comparisons, one below the other


def test_detections_of_several_images_go_by_the_name_of_the_picture(tmp_path):
    files, path = DetectionFiles(), _detections(tmp_path, (7, 42))
    with pytest.raises(ValueError, match=r"detections of 2 images.*picture.png.*as 7.jpg"):
        files.scene(shutil.copy(SCENE, tmp_path / "picture.png"), path, None)
    picture = shutil.copy(SCENE, tmp_path / "000000000042.jpg")
    assert files.scene(picture, path, None).image_id == 42
    path.write_text("[]")
    with pytest.raises(ValueError, match="has no detections"):
        files.scene(picture, path, None)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"detections\.json"):
        files.scene(picture, path, None)


def test_bad_options_end_with_one_line(capsys, tmp_path):
    for arguments in (
        ["--config-file", str(tmp_path / "none.yaml")],
        ["--opts", "MODEL.WEIGHTS", str(tmp_path / "none.pth")],
        ["--port", "many"],
    ):
        with pytest.raises(SystemExit) as ended:
            web_demo.main(arguments)
        assert ended.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


# --- in a browser ------------------------------------------------------------------------------

CHROMIUM = find_chromium()
browser_only = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")


class Visitor:
    """A session of the page; every wait has two minutes, enough for a busy machine."""

    def __init__(self, context, address: str, width: int):
        self.page = context.new_page()
        self.page.set_viewport_size({"width": width, "height": 900})
        self.hosts, self.posts, self.errors = set(), [], []
        self.page.on("request", self._note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.expect('document.querySelectorAll("#answer section").length == 3')
        assert "brown" in self.page.inner_text("#answer h3")

    def _note(self, request) -> None:
        self.hosts.add(request.url.split("/")[2])
        if request.method == "POST":
            self.posts.append(request.post_data or "")

    def expect(self, condition: str) -> None:
        self.page.wait_for_function(condition)

    def open_tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def choose(self, scene: int, word: str) -> None:
        """Click a scene, and wait for the answer to its first query, which has this word."""
        self.page.locator("#scenes button").nth(scene).click()
        self.expect(f'document.querySelector("#answer h3")?.innerText.includes("{word}")')

    def ask(self, query: str) -> None:
        self.page.fill("#queries textarea", query)
        heading = 'document.querySelector("#answer h3")?.innerText'
        self.expect(f"{heading}.replace(/\\s/g, '') == '{query.replace(' ', '')}'")

    def expect_boxes(self, number: int) -> None:
        """Wait for so many boxes in the right panel of the only query."""
        boxes = 'document.querySelectorAll("#answer figure:nth-child(2) rect").length'
        self.expect(f"{boxes} == {number}")

    def photo(self, panel: str = "#answer") -> str:
        """The address of the picture that each panel shows."""
        return self.page.evaluate(
            """panel => {
                const uses = [...document.querySelectorAll(`${panel} svg use`)];
                const [id, ...others] = new Set(uses.map(use => use.href.baseVal));
                return others.length ? null : document.querySelector(id).href.baseVal;
            }""",
            panel,
        )


@pytest.fixture(scope="module")
def visitors(models):
    """Two sessions, in a wide window and in a narrow one."""
    pytest.importorskip("gradio", reason="the web demo needs gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    from web_app.page import build_page, launch  # takes seconds, so not in every process of tests

    page = build_page(models)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch(page, "127.0.0.1", port, block=False)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context()
        context.set_default_timeout(120_000)
        yield [Visitor(context, f"http://127.0.0.1:{port}", width) for width in (1280, 390)]
        browser.close()
    page.close()


@pytest.fixture
def wide(visitors):
    visitors[0].open_tab("Model")
    yield visitors[0]
    _check(visitors[0])


@pytest.fixture
def narrow(visitors):
    yield visitors[1]
    _check(visitors[1])


def _check(visitor: Visitor) -> None:
    assert not visitor.errors
    assert {host.split(":")[0] for host in visitor.hosts} <= {"127.0.0.1", ""}


@browser_only
def test_browser_choose_type_and_change_the_number(wide, record_property):
    wide.choose(4, "bird")
    wide.ask("green cu")
    wide.page.press("#queries textarea", "p")
    wide.expect('document.querySelector("#answer h3").innerText.endsWith("cup")')
    wide.expect_boxes(8)
    assert sum("green cup" in post for post in wide.posts) == 1  # an answer is asked for once
    wide.page.get_by_label("number input for Number of boxes").filter(visible=True).fill("3")
    wide.page.keyboard.press("Enter")
    wide.expect_boxes(3)
    wide.page.bring_to_front()  # a page behind another one is drawn once a second
    milliseconds = wide.page.evaluate(
        """async () => {
            const field = document.querySelector("#queries textarea");
            const times = [];
            for (const word of ["pink", "blue", "red", "black", "yellow"]) {
                field.value = word;
                const start = performance.now();
                field.dispatchEvent(new Event("input", {bubbles: true}));
                await new Promise(shown => new MutationObserver((_, observer) => {
                    if (document.querySelector("#answer h3")?.innerText.trim() == word)
                        shown(observer.disconnect());
                }).observe(document.body, {childList: true, subtree: true, characterData: true}));
                times.push(performance.now() - start);
            }
            return times.sort((a, b) => a - b)[2];
        }"""
    )
    took = f"a new query on a shown picture answers in {milliseconds:.0f} ms (median of 5)"
    record_property("Web demo", took)


@browser_only
def test_browser_upload_and_bad_file(wide, tmp_path):
    bad = tmp_path / "notes.jpg"
    bad.write_text("no image")
    wide.page.set_input_files("#picture input[type=file]", str(bad))
    wide.expect('document.querySelector("#answer [role=alert]") !== null')
    message = wide.page.inner_text("#answer [role=alert]")
    assert message.startswith("notes.jpg cannot be read")
    picture = tmp_path / "mine.png"
    cv2.imwrite(str(picture), np.full((120, 350, 3), 200, np.uint8))
    wide.page.click("#picture button[aria-label=Clear]")
    wide.page.set_input_files("#picture input[type=file]", str(picture))
    wide.expect("""document.querySelector('#answer svg[viewBox="0 0 350 120"]') !== null""")
    assert wide.photo().startswith("data:image/jpeg")
    wide.page.fill("#queries textarea", "x" * (MAX_LENGTH + 1))
    wide.expect('document.querySelector("#answer [role=alert]") !== null')


@browser_only
def test_browser_second_tab(wide, models, tmp_path):
    wide.open_tab("Detections of a file")
    wide.page.fill("#rerank-queries textarea", "the puppy")
    wide.page.set_input_files("#rerank-picture input[type=file]", str(SCENE))
    wide.page.set_input_files("#rerank-detections input[type=file]", str(_detections(tmp_path)))
    wide.expect('document.querySelectorAll("#rerank-answer section").length == 1')
    assert wide.page.locator("#rerank-answer td").nth(1).text_content() == "dog"
    assert wide.photo("#rerank-answer") == models.scene(SCENE).data_uri
    wide.page.fill("#rerank-queries textarea", "a cup")  # as pasted, without a key
    wide.expect('document.querySelector("#rerank-answer td:nth-child(2)").textContent == "cup"')
    wide.page.click("#make-files")
    links = wide.page.locator("#downloads a")
    links.nth(2).wait_for(state="attached")
    with wide.page.expect_download() as download:
        links.first.click()
    assert json.loads(Path(download.value.path()).read_text())["queries"][0]["query"] == "a cup"


@browser_only
def test_browser_two_visitors_get_their_own_answers(wide, narrow, models):
    wide.choose(0, "brown")
    narrow.choose(4, "bird")
    wide.ask("yellow house")
    narrow.ask("red chair")
    assert "yellow" in wide.page.inner_text("#answer h3")
    files = ("refshapes_testB_024.jpg", "refshapes_testB_015.jpg")
    for visitor, name in zip((wide, narrow), files, strict=True):
        assert visitor.photo() == models.scene(SCENE.parent / name).data_uri


@browser_only
def test_browser_narrow_window_and_keyboard(narrow):
    assert narrow.page.evaluate("document.documentElement.scrollWidth") <= 390
    narrow.page.focus("#answer section g")
    label = narrow.page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert "s = " in label or "c = " in label
    if folder := os.environ.get("VLNMS_D2_SCREENSHOTS"):
        narrow.page.screenshot(path=f"{folder}/narrow.png", full_page=True)
        narrow.page.set_viewport_size({"width": 1280, "height": 900})
        narrow.page.screenshot(path=f"{folder}/wide.png", full_page=True)
