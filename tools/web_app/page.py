"""The page: two tabs with the same controls, one for a model and one for detections of a file."""

from __future__ import annotations

import json
import re
import tempfile
import threading
from collections.abc import Callable, Sequence
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
            _model_tab(models, threshold)
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


def _model_tab(models: Models, threshold: float) -> None:
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
    photo, output = gr.HTML(visible="hidden", elem_id="photo"), gr.HTML(elem_id="answer")

    def show(path: str, text: str, *controls: Any) -> str:
        return _try(lambda: _answer(models, models.scene(path), text, controls)[0])

    def show_picture(path: str, *values: Any) -> tuple[str, str]:
        return _photo(lambda: models.scene(path)), show(path, *values)

    inputs, outputs = [picture, text, *controls], [photo, output]
    _update_when_changed([text, *controls], show, inputs, output)

    def choose(event: gr.SelectData) -> tuple[str, str, None]:
        return files[event.index], queries[event.index], None

    gallery.select(choose, None, [picture, text, upload], show_progress="hidden").then(
        show_picture, inputs, outputs, show_progress="minimal"
    )
    # `upload` and not `change`, which also fires when a scene clears the file.
    upload.upload(lambda path: path, upload, picture).then(
        show_picture, inputs, outputs, show_progress="minimal"
    )
    gr.on(None, show_picture, inputs, outputs, show_progress="minimal")


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
    photo = gr.HTML(visible="hidden", elem_id="rerank-photo")
    output = gr.HTML(elem_id="rerank-answer")

    def scene_of(picture: str | None, detections: str | None, categories: str | None) -> Scene:
        if picture is None or detections is None:
            raise ValueError("Add a picture and the detections of a detector on it.")
        return files.scene(picture, detections, categories)

    def compute(*values: Any) -> tuple[str, Scene, list[Answer]]:
        return _answer(files, scene_of(*values[:3]), values[3], values[4:])

    def show_picture(*values: Any) -> tuple[str, str]:
        return _photo(lambda: scene_of(*values[:3])), _try(lambda: compute(*values)[0])

    def write(*values: Any) -> tuple[str, list[str] | None]:
        try:
            html, scene, answers = compute(*values)
            if not answers:
                raise ValueError("Type a query first.")
            folder = Path(tempfile.mkdtemp())
            paths = []
            for name, content in to_files(scene, answers).items():
                with atomic_write(folder / name) as file:
                    file.write(content)
                paths.append(str(folder / name))
            return html, paths
        except (OSError, ValueError) as error:
            return _show_error(error), None

    inputs = [picture, detections, categories, text, *controls]
    _update_when_changed(inputs, show_picture, inputs, [photo, output])
    button.click(write, inputs, [output, downloads])


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


def _answer(
    scorer: Models | DetectionFiles, scene: Scene, text: str, controls: Sequence[Any]
) -> tuple[str, Scene, list[Answer]]:
    relatedness, keep, *rest = controls
    settings = Settings(relatedness, keep == KEEP[1], *rest)
    with _ANSWERING:
        answers, seconds = answer(scorer, scene, read_queries(text), settings)
    return render(scene, answers, seconds), scene, answers


def _try(make: Callable[[], str]) -> str:
    try:
        return make()
    except (OSError, ValueError) as error:
        return _show_error(error)


def _photo(get_scene: Callable[[], Scene]) -> str:
    """The picture of a scene; nothing where there is an error, which the answer shows."""
    try:
        return render_photo(get_scene())
    except (OSError, ValueError):
        return ""


def _show_error(error: Exception) -> str:
    """The message, with names of uploaded files in place of where they are kept."""
    return render_error(re.sub(r"\S*/[0-9a-f]{64}/", "", str(error)))


def _update_when_changed(
    components: Sequence[Any], function: Callable[..., Any], inputs: Sequence[Any], outputs: Any
) -> None:
    """Answer while the visitor types. All changes are one event, whose answers cannot overtake each
    other: of those that come meanwhile the last one waits its turn, and none waits for the round
    trips of Gradio's queue."""
    gr.on(
        [each.input if hasattr(each, "input") else each.change for each in components],
        function,
        inputs,
        outputs,
        show_progress="hidden",
        trigger_mode="always_last",
        queue=False,
    )
