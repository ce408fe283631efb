"""The benchmark of texts, on few of them; the loop it compares with finds the same."""

import numpy as np

from benchmarks import BENCHMARKS, Options
from benchmarks.text import DIM, made_up_images, write_vectors
from vlnms_d2.language import GloveVectors


def test_it_runs_and_both_ways_agree():
    benchmark = BENCHMARKS["text"].load()
    results = benchmark.measure(Options(lines=300, captions=40))  # raises where they differ
    glove, pseudo = results["glove"], results["pseudo_gt"]
    assert glove["lines"] == 300 and glove["peak_mib"] > 0 < glove["cached_s"]
    assert pseudo["expressions"] == 40 and pseudo["ratio"] > 0
    assert "300 lines" in benchmark.show(results)


def test_made_up_expressions_are_distinct():
    names = ["cup", "dining table"]
    images = made_up_images(500, names)
    queries = [e["query"] for image in images for e in image["expressions"]]
    assert len(queries) == len(set(queries)) == 500
    ids = [e["sent_id"] for image in images for e in image["expressions"]]
    assert ids == list(range(500))


def test_made_up_vectors_are_read(tmp_path):
    write_vectors(tmp_path / "v.txt", 1200)
    vectors = GloveVectors(tmp_path / "v.txt")
    assert len(vectors) == 1200 and vectors.dim == DIM
    np.testing.assert_array_equal(vectors(["word3"]), vectors(["word1003"]))
