"""Tests of the arithmetic of NMS."""

from fractions import Fraction

import torch

from vlnms_d2.layers import nms_iou


def exact_fused_iou(better, worse):
    """IoU of two float32 boxes by exact arithmetic, rounded where the CUDA kernel rounds."""

    def rounded(value: Fraction) -> Fraction:
        # Dividing integers rounds once, to float64, and converting to float32 once more. The result
        # may not be the nearest float32 if it is near the middle of two.
        nearest = torch.tensor(float(value), dtype=torch.float32)
        around = [
            nearest,
            *(torch.nextafter(nearest, nearest.new_tensor(x)) for x in (-1e30, 1e30)),
        ]
        return min((Fraction(x.item()) for x in around), key=lambda x: abs(x - value))

    a, b = ([Fraction(x) for x in box.tolist()] for box in (better, worse))
    width = max(rounded(min(a[2], b[2]) - max(a[0], b[0])), Fraction(0))
    height = max(rounded(min(a[3], b[3]) - max(a[1], b[1])), Fraction(0))
    inter = rounded(width * height)
    better_area = rounded(rounded(a[2] - a[0]) * rounded(a[3] - a[1]))
    areas = rounded(rounded(b[2] - b[0]) * rounded(b[3] - b[1]) + better_area)
    return float(rounded(inter / rounded(areas - inter)))


def test_fused_iou_rounds_as_the_cuda_kernel():
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(40, 2, generator=generator) * 30
    size = torch.rand(40, 2, generator=generator) * 80 + 20
    boxes = torch.cat([corner, corner + size], dim=1)
    better, worse = boxes[:20], boxes[20:]
    fused = nms_iou.iou(better.t(), worse.t(), fused=True)
    expected = [exact_fused_iou(a, b) for a, b in zip(better, worse, strict=True)]
    assert fused.tolist() == expected
    pairs = boxes.t()[:, :, None], boxes.t()[:, None]
    assert not torch.equal(nms_iou.iou(*pairs, fused=True), nms_iou.iou(*pairs, fused=False))
