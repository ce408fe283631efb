"""From a mask of pixels to its box and COCO polygons."""

from __future__ import annotations

import cv2
import numpy as np

_ZOOM = 4  # an outline is traced at this scale, to pass along pixel edges and not pixel centres
_TOLERANCE = 0.5  # pixels a simplified outline may lie off the exact one
_LEAST_AREA = 3.0  # square pixels; specks and holes below are dropped


def mask_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """(x1, y1, x2, y2) in pixels around the set pixels of a bool (H, W) mask, x2, y2 exclusive."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise ValueError("the mask is empty")
    return float(cols[0]), float(rows[0]), float(cols[-1] + 1), float(rows[-1] + 1)


def mask_polygons(mask: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """COCO polygons, each [x1, y1, x2, y2, ...] in pixels, of a bool (H, W) mask.

    COCO polygons cannot hold holes, so a region with a hole is cut through it into two.
    """
    x1, y1, x2, y2 = map(int, mask_box(mask))
    polygons: list[tuple[float, ...]] = []
    _trace(np.ascontiguousarray(mask[y1:y2, x1:x2]).astype(np.uint8), x1, y1, polygons)
    return tuple(polygons)


def _trace(mask: np.ndarray, left: int, top: int, found: list[tuple[float, ...]]) -> None:
    # A border of zeros keeps outlines at the crop's edge intact.
    zoomed = np.kron(np.pad(mask, 1), np.ones((_ZOOM, _ZOOM), np.uint8))
    outlines, hierarchy = cv2.findContours(zoomed, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    holes = [
        outline
        for outline, (_, _, _, parent) in zip(
            outlines, hierarchy[0] if len(outlines) else (), strict=True
        )
        if parent >= 0 and cv2.contourArea(outline) >= _LEAST_AREA * _ZOOM**2
    ]
    if holes:
        x, _, width, _ = cv2.boundingRect(holes[0])
        cut = int(np.clip(round((x + width / 2) / _ZOOM) - 1, 1, mask.shape[1] - 1))
        _trace(mask[:, :cut], left, top, found)
        _trace(mask[:, cut:], left + cut, top, found)
        return
    for outline, (_, _, _, parent) in zip(
        outlines, hierarchy[0] if len(outlines) else (), strict=True
    ):
        if parent >= 0:
            continue
        simple = cv2.approxPolyDP(outline, _TOLERANCE * _ZOOM, True)[:, 0]
        if len(simple) < 3 or cv2.contourArea(outline) < _LEAST_AREA * _ZOOM**2:
            continue
        # Outlines run through the centres of the zoomed pixels on the border.
        points = (simple + 0.5) / _ZOOM - 1 + (left, top)
        found.append(tuple(np.round(points, 2).ravel().tolist()))
