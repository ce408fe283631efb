"""The page: two tabs with the same controls, one for a model and one for detections of a file."""

from __future__ import annotations

import json
import re
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr

from vlnms_d2.file_io import atomic_write
from vlnms_d2.layers import FUSION_MODES

from .answers import Answer, Settings, answer, read_queries, to_files
from .panels import CSS, render, render_error, render_photo
from .scenes import DetectionFiles, Models, Scene

SCENES = Path(__file__).parents[1] / "demo_scenes" / "scenes.json"
MAX_UPLOAD = "20mb"
IMAGE_TYPES = [".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"]
KEEP = ("a number of boxes", "all above a score")
_ANSWERING = threading.Lock()  # one answer at a time, which has all cores


def build_page(models: Models) -> gr.Blocks:
    """The page of some models; the state of each visitor is their own.

    Args:
        models: at least one.
    """
    cfg = models.first.cfg
    threshold = cfg.MODEL.VLNMS.FINAL_SCORE_THRESH
    # Uploaded files are deleted after an hour.
    with gr.Blocks(
        title="VL-NMS: query-aware proposals", analytics_enabled=False, delete_cache=(600, 3600)
    ) as page:
        gr.Markdown("# VL-NMS\nThe boxes that a detector keeps, and those that your words keep.")
        with gr.Tab("Model"):
            _model_tab(page, models, threshold)
        with gr.Tab("Detections of a file"):
            _detections_tab(DetectionFiles())
    return page


def launch(page: gr.Blocks, host: str, port: int, block: bool = True) -> tuple[Any, str, str]:
    """Serve the page, to this machine alone unless `host` says otherwise.

    Raises:
        OSError: the port is in use.
    """
    fonts = ["ui-sans-serif", "system-ui", "sans-serif"]
    mono = ["ui-monospace", "monospace"]
    return page.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=MAX_UPLOAD,
        theme=gr.themes.Default(font=fonts, font_mono=mono),  # no font from elsewhere
        css=CSS,
        prevent_thread_lock=not block,
        quiet=not block,
    )


def _model_tab(page: gr.Blocks, models: Models, threshold: float) -> None:
    content = json.loads(SCENES.read_text())
    scenes = [*content["scenes"], *content["more_scenes"]]
    files = [str(SCENES.parent / scene["file"]) for scene in scenes]
    queries = ["\n".join(q["query"] for q in scene["questions"]) for scene in scenes]
    picture = gr.State(files[0])
    gallery = gr.Gallery(
        files,
        label="Scenes",
        show_label=False,
        columns=6,
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id="scenes",
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            text = _query_field(queries[0])
            upload = gr.File(
                label="Your picture", file_types=IMAGE_TYPES, height=110, elem_id="picture"
            )
        with gr.Column(scale=1, min_width=300):
            controls = _controls(models.names, threshold)
    panels = gr.HTML(visible="hidden", elem_id="photo"), gr.HTML(elem_id="answer")
    changes = [page.load, picture.change, text.change, *(each.change for each in controls)]
    _answer_at(changes, models, models.scene, [picture], [text, *controls], panels)

    def look(path: str) -> None:
        """Run the detector, so that the progress of the event shows how long it takes."""
        with suppress(OSError, ValueError):  # which the answer tells
            models.scene(path)

    def choose(event: gr.SelectData) -> tuple[str, str, None]:
        look(files[event.index])
        return files[event.index], queries[event.index], None

    def take(path: str) -> str:
        look(path)
        return path

    progress = {"show_progress": "minimal", "show_progress_on": panels[1]}
    gallery.select(choose, None, [picture, text, upload], **progress)
    # `upload` and not `change`, which also fires when a scene clears the file.
    upload.upload(take, upload, picture, **progress)


def _detections_tab(files: DetectionFiles) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            text = _query_field("", "rerank-queries")
            picture = gr.File(
                label="Picture", file_types=IMAGE_TYPES, height=110, elem_id="rerank-picture"
            )
            detections = gr.File(
                label="Detections: COCO results, best before NMS",
                file_types=[".json"],
                height=110,
                elem_id="rerank-detections",
            )
            categories = gr.File(
                label="Categories: a file in COCO's format (without it, COCO's 80)",
                file_types=[".json"],
                height=110,
                elem_id="rerank-categories",
            )
        with gr.Column(scale=1, min_width=300):
            controls = _controls(files.names, 0.0)
            button = gr.Button("Make files to download", elem_id="make-files")
            downloads = gr.Files(label="JSON, COCO results, picture", elem_id="downloads")
    panels = gr.HTML(visible="hidden", elem_id="rerank-photo"), gr.HTML(elem_id="rerank-answer")
    sources, asked = [picture, detections, categories], [text, *controls]

    def scene_of(picture: str | None, detections: str | None, categories: str | None) -> Scene:
        if picture is None or detections is None:
            raise ValueError("Add a picture and the detections of a detector on it.")
        return files.scene(picture, detections, categories)

    changes = [each.change for each in (*sources, *asked)]
    _answer_at(changes, files, scene_of, sources, asked, panels)

    def write(*values: Any) -> tuple[str, list[str] | None]:
        try:
            scene = scene_of(*values[:3])
            answers, seconds = _answers(files, scene, *values[3:])
            if not answers:
                raise ValueError("Type a query first.")
            folder = Path(tempfile.mkdtemp())
            paths = []
            for name, content in to_files(scene, answers).items():
                with atomic_write(folder / name) as file:
                    file.write(content)
                paths.append(str(folder / name))
            return render(scene, answers, seconds), paths
        except (OSError, ValueError) as error:
            return _show_error(error), None

    button.click(write, [*sources, *asked], [panels[1], downloads])


def _query_field(value: str, elem_id: str = "queries") -> gr.Textbox:
    return gr.Textbox(
        value, label="Queries, one per line", lines=3, max_lines=8, elem_id=elem_id, autofocus=False
    )


def _controls(names: Sequence[str], threshold: float) -> list[Any]:
    """The controls in the order of `Settings`."""
    relatedness = gr.Radio(list(names), value=names[0], label="Relatedness")
    keep = gr.Radio(list(KEEP), value=KEEP[0], label="Keep")
    top_n = gr.Slider(1, 100, 8, step=1, label="Number of boxes")
    score = gr.Slider(0, 1, threshold, step=0.0001, label="Least score s", visible=False)
    with gr.Accordion("NMS and fusion", open=False):
        nms = gr.Slider(0, 1, 0.5, step=0.05, label="IoU of NMS")
        agnostic = gr.Checkbox(False, label="NMS across classes")
        fusion = gr.Radio(
            [(mode.replace("_", " "), mode) for mode in FUSION_MODES],
            value="product",
            label="Fusion of confidence and relatedness",
        )
        weight = gr.Slider(0, 1, 0.5, step=0.05, label="Weight of relatedness")

    def switch(keep: str) -> tuple[dict, dict]:
        by_number = keep == KEEP[0]
        return gr.update(visible=by_number), gr.update(visible=not by_number)

    keep.change(switch, keep, [top_n, score], show_progress="hidden")
    return [relatedness, keep, top_n, score, nms, agnostic, fusion, weight]


def _answer_at(
    changes: Sequence[Any],
    scorer: Models | DetectionFiles,
    scene_of: Callable[..., Scene],
    sources: Sequence[Any],
    asked: Sequence[Any],
    panels: tuple[gr.HTML, gr.HTML],
) -> None:
    """Answer while the visitor types: show the picture and the boxes over it, in `panels`.

    All changes are one event, whose answers cannot overtake each other: of those that come
    meanwhile the last one waits its turn, and none waits for the round trips of Gradio's queue.
    The picture is sent only when it is another one.

    Args:
        changes: events.
        scorer, scene_of: give the answers, and the scene of what the sources contain.
        sources: components whose values `scene_of` takes.
        asked: text field and controls.
    """
    shown = gr.State()

    def show(before: Any, *values: Any) -> tuple[Any, str, Any]:
        now, (text, *controls) = values[: len(sources)], values[len(sources) :]
        try:
            scene = scene_of(*now)
            html = render(scene, *_answers(scorer, scene, text, *controls))
        except (OSError, ValueError) as error:
            return gr.skip(), _show_error(error), before
        return gr.skip() if now == before else render_photo(scene), html, now

    gr.on(
        changes,
        show,
        [shown, *sources, *asked],
        [*panels, shown],
        show_progress="hidden",
        trigger_mode="always_last",
        queue=False,
    )


def _answers(
    scorer: Models | DetectionFiles, scene: Scene, text: str, *controls: Any
) -> tuple[list[Answer], float]:
    relatedness, keep, *rest = controls
    settings = Settings(relatedness, keep == KEEP[1], *rest)
    with _ANSWERING:
        return answer(scorer, scene, read_queries(text), settings)


def _show_error(error: Exception) -> str:
    """The message, with names of uploaded files in place of where they are kept."""
    return render_error(re.sub(r"\S*/[0-9a-f]{64}/", "", str(error)))
