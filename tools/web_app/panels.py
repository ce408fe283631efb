"""Answers as HTML: for each query its words, two panels side by side, and a table of scores.

The boxes are SVG over the picture, so that they scale with the window and tell their scores to a
mouse and to a screen reader. All text from outside is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from detectron2.structures import Instances, pairwise_iou

from vlnms_d2.visualization import (
    DROPPED,
    GAINED,
    IN_BOTH,
    IOU_THRESHOLD,
    Style,
    proposal_records,
    short_number,
)

from .answers import Answer
from .scenes import Scene

MAX_LABELS = 10  # boxes of a panel with their name on them

CSS = """
#scenes, #scenes .gallery-container {height: auto !important}
#scenes .grid-wrap {max-height: none !important; min-height: 0 !important; height: auto;
  padding: 8px; overflow: visible}
#scenes .grid-container {grid-template-columns: repeat(auto-fill, minmax(96px, 1fr))}
.vl {color: #1e1e1e; background: #fff; padding: 4px 12px 12px; border-radius: 8px}
.vl * {color: inherit}
.vl h3 {font-size: 1.05rem; font-weight: 600; margin: 14px 0 6px}
.vl .word {display: inline-block; padding: 1px 9px; margin: 2px 4px 2px 0; border-radius: 6px}
.vl .word.strong {color: #fff}
.vl .panels {display: flex; flex-wrap: wrap; gap: 12px}
.vl figure {flex: 1 1 300px; min-width: 0; margin: 0}
.vl figcaption {font-size: .9rem; padding-bottom: 3px}
.vl svg {display: block; width: 100%; max-height: 70vh; background: #ebebeb}
.vl svg g:focus rect, .vl svg g:hover rect {fill: rgba(255, 255, 255, .35)}
.vl table {border-collapse: collapse; font-size: .85rem}
.vl td, .vl th {border: 0; padding: 2px 10px 2px 0; text-align: left; white-space: nowrap}
.vl td.n, .vl th.n {text-align: right; font-variant-numeric: tabular-nums}
.vl .scroll {overflow-x: auto}
.vl summary {cursor: pointer; font-size: .9rem; padding: 6px 0}
.vl .key {display: inline-block; width: 22px; height: 12px; margin: 0 5px -1px 14px}
.vl .note {font-size: .9rem; color: #4a4a4a; margin: 6px 0}
.vl .error {border-left: 4px solid #d55e00; padding: 8px 12px; background: #fdf1ea;
  overflow-wrap: anywhere}
"""

_MEANING = {IN_BOTH: "in both", GAINED: "gained by the query", DROPPED: "dropped by the query"}


def render(scene: Scene, answers: Sequence[Answer], seconds: float) -> str:
    """The boxes for each query, and how long the detector and the queries took. They lie over the
    picture that `render_photo` has put on the page."""
    if not answers:
        note = "Type what you are looking for, one query per line."
        panels = f'<div class="panels"><figure>{_svg(scene)}</figure></div>'
        return f'<div class="vl"><p class="note">{note}</p>{panels}</div>'
    took = f"{1000 * seconds / len(answers):.0f} ms per query"
    if scene.seconds:
        took = f"Detector {1000 * scene.seconds:.0f} ms, once for this picture; {took}."
    legend = "".join(
        f'<span class="key" style="border:{style.width}px solid {_color(style)}"></span>{meaning}'
        for style, meaning in _MEANING.items()
    )
    sections = "".join(_section(scene, answer) for answer in answers)
    return f'<div class="vl"><p class="note">{took}{legend}</p>{sections}</div>'


def render_photo(scene: Scene) -> str:
    """The picture, which the panels show by its id: it is sent once and not with each answer."""
    height, width = scene.image.shape[:2]
    image = f'<image id="{scene.photo_id}" width="{width}" height="{height}" '
    return f'<svg><defs>{image}href="{scene.data_uri}"/></defs></svg>'


def render_error(message: str) -> str:
    """What is wrong and what to do."""
    return f'<div class="vl"><p class="error" role="alert">{escape(message)}</p></div>'


def _section(scene: Scene, answer: Answer) -> str:
    same = pairwise_iou(answer.detector.pred_boxes, answer.aware.pred_boxes) > IOU_THRESHOLD
    left = [IN_BOTH if kept else DROPPED for kept in same.any(dim=1)]
    right = [IN_BOTH if known else GAINED for known in same.any(dim=0)]
    panels = _panel(scene, f"Detector alone: its best {len(left)}", answer.detector, left)
    panels += _panel(scene, f"With the query: {len(right)} kept", answer.aware, right)
    return (
        f"<section><h3>{_words(answer)}</h3>"
        f'<div class="panels">{panels}</div>{_table(scene, answer, right)}</section>'
    )


def _words(answer: Answer) -> str:
    """The words, darker with more attention; the query as typed if the model reads no words."""
    if not answer.words:
        return escape(answer.query) + ' <span class="note">(no word that the model knows)</span>'
    if answer.weights is None:
        return escape(answer.query)
    most = max(float(answer.weights.max()), 1e-9)
    spans = []
    for word, weight in zip(answer.words, answer.weights.tolist(), strict=True):
        share = weight / most
        strong = " strong" if share > 0.5 else ""
        spans.append(
            f'<span class="word{strong}" title="attention {100 * weight:.0f} %" '
            f'style="background:rgba(0,100,180,{0.1 + 0.9 * share:.2f})">{escape(word)}</span>'
        )
    return "".join(spans)


def _panel(scene: Scene, title: str, instances: Instances, styles: Sequence[Style]) -> str:
    height, width = scene.image.shape[:2]
    unit = max(width, height) / 640  # of lines and letters, which scale with the picture
    records = proposal_records(instances, scene.class_names)
    shapes, places = [], _label_places(records, unit, height)
    # What matters most is drawn last: dropped boxes first, then the others from low to high rank.
    order = sorted(range(len(records)), key=lambda i: (styles[i] != DROPPED, -i))
    for i in order:
        record, color = records[i], _color(styles[i])
        x1, y1, x2, y2 = record["box"]
        name, scores = escape(record["class"]), _scores(record)
        label = ""
        if i in places:
            x, y = places[i]
            label = (
                f'<text x="{x:.1f}" y="{y:.1f}" font-size="{15 * unit:.1f}" '
                f'fill="{color}" stroke="#fff" stroke-width="{4 * unit:.1f}" '
                f'paint-order="stroke">{escape(_label(record))}</text>'
            )
        shapes.append(
            f'<g tabindex="0" role="img" aria-label="{i + 1}. {name}, {scores}, '
            f'{_MEANING[styles[i]]}"><title>{i + 1}. {name}: {scores}</title>'
            f'<rect x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" '
            f'fill="transparent" stroke="{color}" stroke-width="{styles[i].width * unit:.2f}" '
            f'stroke-opacity="{styles[i].alpha / 255:.2f}"/>{label}</g>'
        )
    return f"<figure><figcaption>{title}</figcaption>{_svg(scene, ''.join(shapes))}</figure>"


def _svg(scene: Scene, shapes: str = "") -> str:
    height, width = scene.image.shape[:2]
    photo = f'<use href="#{scene.photo_id}"/>'
    return f'<svg viewBox="0 0 {width} {height}">{photo}{shapes}</svg>'


def _label(record: dict) -> str:
    return f"{record['class']} {short_number(record.get('s', record['c']))}"


def _label_places(
    records: Sequence[dict], unit: float, height: int
) -> dict[int, tuple[float, float]]:
    """Where labels stand, by proposal: above their boxes or in them, and none over a better one."""
    places, taken = {}, []
    for i, record in enumerate(records[:MAX_LABELS]):
        x1, y1, *_ = record["box"]
        x = max(x1, 2 * unit)
        y = y1 - 4 * unit if y1 > 18 * unit else min(y1 + 15 * unit, height - 4 * unit)
        box = (x, y - 13 * unit, x + 8.5 * unit * len(_label(record)), y + 3 * unit)
        if all(
            box[2] < other[0] or other[2] < box[0] or box[3] < other[1] or other[3] < box[1]
            for other in taken
        ):
            places[i] = (x, y)
            taken.append(box)
    return places


def _table(scene: Scene, answer: Answer, styles: Sequence[Style]) -> str:
    rows = "".join(
        f'<tr><td class="n">{i}</td><td>{escape(record["class"])}</td>'
        + "".join(f'<td class="n">{record[key]:.3f}</td>' for key in "scr")
        + f"<td>{_MEANING[style]}</td></tr>"
        for i, (record, style) in enumerate(
            zip(proposal_records(answer.aware, scene.class_names), styles, strict=True), 1
        )
    )
    head = (
        '<tr><th class="n">rank</th><th>class</th><th class="n">s</th>'
        '<th class="n">c</th><th class="n">r</th><th></th></tr>'
    )
    return (
        "<details><summary>Scores: s, the fusion of class confidence c and relatedness r"
        f'</summary><div class="scroll"><table>{head}{rows}</table></div></details>'
    )


def _scores(record: dict) -> str:
    return ", ".join(f"{key} = {record[key]:.3f}" for key in "scr" if key in record)


def _color(style: Style) -> str:
    return "rgb({}, {}, {})".format(*style.color)
