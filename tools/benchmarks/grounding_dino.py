"""VL-NMS compared with a text-conditioned detector, Grounding DINO, with one forward per query."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .base import Benchmark, Options, show_machine, time_interleaved
from .detector import CONFIG, IMAGE_SIZE, ask, build_pair

if TYPE_CHECKING:
    from transformers import GroundingDinoConfig

NUM_QUERIES = 100
WORD_PIECES = 12
CLS, SEP, DOT = 101, 102, 1012  # of BERT's vocabulary
FIRST_WORD = 2000


class GroundingDino(Benchmark):
    """Grounding DINO with Swin-T (transformers' default size), random weights, the same image.

    It processes one sentence at a time, as the scores for a sentence depend on the other text.
    """

    def measure(self, options: Options) -> dict[str, Any]:
        """See `Benchmark.measure`; Grounding DINO's time is that of one query."""
        cfg = options.load_config(CONFIG, ["MODEL.MASK_ON", "False"])
        pair = build_pair(cfg, options.candidates)
        counts = options.queries or (NUM_QUERIES,)
        sides = {0: grounding_dino(options.torch_device)}
        sides |= {count: partial(ask, pair.vlnms, pair.image_input, count) for count in counts}
        seconds = time_interleaved(sides, options.rounds, options.torch_device)
        rows = [
            {
                "queries": count,
                "vlnms_s": round(seconds[count], 3),
                "grounding_dino_s_per_query": round(seconds[0], 3),
                "times_faster": round(count * seconds[0] / seconds[count], 1),
            }
            for count in counts
        ]
        return options.timed(rows=rows)

    def show(self, results: dict[str, Any]) -> str:
        """See `Benchmark.show`."""
        lines = [
            f"{row['queries']} queries: {row['vlnms_s']:.2f} s with VL-NMS, "
            f"{row['grounding_dino_s_per_query']:.2f} s a query with Grounding DINO-T: "
            f"{row['times_faster']:.0f} times faster"
            for row in results["rows"]
        ]
        return "\n".join([*lines, show_machine(results)])


def grounding_dino(
    device: torch.device, config: GroundingDinoConfig | None = None
) -> Callable[[], object]:
    """One query about one image of `IMAGE_SIZE` for a Grounding DINO with random weights.

    Args:
        device: the device to run on.
        config: None for the default of transformers, which is Grounding DINO-T.

    Raises:
        ValueError: transformers is not installed.
    """
    try:
        from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection
    except ImportError as error:
        raise ValueError("transformers is not installed: pip install transformers") from error
    torch.manual_seed(0)
    config = config or GroundingDinoConfig()
    model = GroundingDinoForObjectDetection(config).eval().to(device)
    words = range(FIRST_WORD, FIRST_WORD + WORD_PIECES)
    inputs = {
        "pixel_values": torch.randn(1, 3, *IMAGE_SIZE, device=device),
        "input_ids": torch.tensor([[CLS, *words, DOT, SEP]], device=device),
    }
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return torch.no_grad()(partial(model, **inputs))
