"""How large the public data sets are, to notice a download that is not whole."""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    """Size of a data set; None where it is not known for certain.

    Attributes:
        images: images with at least one expression.
        expressions: expressions of all images.
    """

    images: int | None
    expressions: int | None


PUBLISHED_SIZES: dict[str, Size] = {
    "refcoco": Size(19_994, 142_210),
    "refcoco+": Size(19_992, 141_564),
    # With its test split, which was never published: REFER's files hold 95,010 expressions.
    "refcocog": Size(26_711, 104_560),
    "flickr30k": Size(31_783, 158_915),
}
"""Of whole data sets, as their papers give them."""

KNOWN_SIZES: dict[str, Size] = {
    "refcoco_unc_train": Size(16_994, 120_624),
    "refcoco_unc_val": Size(1_500, 10_834),
    "refcoco_unc_testA": Size(750, 5_657),
    "refcoco_unc_testB": Size(750, 5_095),
    # The splits of Google are by object, so that an image may be in several of them.
    "refcoco_google_train": Size(19_213, None),
    "refcoco_google_val": Size(4_559, None),
    "refcoco_google_test": Size(4_527, None),
    "refcoco+_unc_train": Size(16_992, 120_191),
    "refcoco+_unc_val": Size(1_500, 10_758),
    "refcoco+_unc_testA": Size(750, 5_726),
    "refcoco+_unc_testB": Size(750, 4_889),
    "refcocog_umd_train": Size(21_899, 80_512),
    "refcocog_umd_val": Size(1_300, 4_896),
    "refcocog_umd_test": Size(2_600, 9_602),
    "refcocog_google_train": Size(24_698, 85_474),
    "refcocog_google_val": Size(4_650, 9_536),
    # Phrases with a box are counted in several ways; and an image whose phrases have no box at all
    # is not in these sets.
    "flickr30k_entities_captions_train": Size(29_783, 148_915),
    "flickr30k_entities_captions_val": Size(1_000, 5_000),
    "flickr30k_entities_captions_test": Size(1_000, 5_000),
    "flickr30k_captions_train": Size(29_000, 145_000),
    "flickr30k_captions_val": Size(1_014, 5_070),
    "flickr30k_captions_test": Size(1_000, 5_000),
    # Most images of COCO have five captions, some have more.
    "coco_captions_train": Size(82_783, 414_113),
    "coco_captions_restval": Size(30_504, 152_634),
    "coco_captions_val": Size(5_000, 25_010),
    "coco_captions_test": Size(5_000, 25_010),
}
"""Of the registered data sets, by name."""


def check_counts(name: str, num_images: int, num_expressions: int) -> str | None:
    """Compare what was read with the known size of a data set.

    Args:
        name: of a registered data set, or of a whole one (`PUBLISHED_SIZES`).
        num_images: images that were read.
        num_expressions: expressions that were read.

    Returns:
        A sentence for the user if they differ; None if they agree or nothing is known of `name`.
    """
    known = KNOWN_SIZES.get(name) or PUBLISHED_SIZES.get(name)
    if known is None:
        return None
    pairs = (
        (num_images, known.images, "images"),
        (num_expressions, known.expressions, "expressions"),
    )
    wrong = [
        f"{found:,} {what} where the published one has {expected:,}"
        for found, expected, what in pairs
        if expected is not None and found != expected
    ]
    if not wrong:
        return None
    return (
        f"Data set {name} has {' and '.join(wrong)}; if it should be the published one, fetch its "
        "files again."
    )
