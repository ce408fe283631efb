"""Word vectors in GloVe's text format."""

import re

import numpy as np
import pytest

from vlnms_d2.modeling.text import read_word_vectors


@pytest.fixture
def write(tmp_path):
    def write(*lines: str, end: str = "\n") -> str:
        path = tmp_path / "vectors.txt"
        path.write_bytes("".join(line + end for line in lines).encode())
        return str(path)

    return write


def as_lists(vectors: dict[str, np.ndarray]) -> dict[str, list[float]]:
    assert all(v.dtype == np.float32 for v in vectors.values())
    return {word: v.tolist() for word, v in vectors.items()}


def test_wanted_words_only(write):
    path = write("red 1 2 -0.5", "cup 4e-1 5 6", "dog 7 8 9")
    found = as_lists(read_word_vectors(path, ("dog", "red", "zebra"), 3))
    assert found == {"red": [1, 2, -0.5], "dog": [7, 8, 9]}


def test_one_number_a_word(write):
    assert as_lists(read_word_vectors(write("red 1", "cup 2"), ["cup"], 1)) == {"cup": [2]}


@pytest.mark.parametrize("lines", [[], [""], ["red 1 2", "", "  ", "cup 3 4"]])
def test_empty_files_and_lines(write, lines):
    found = read_word_vectors(write(*lines), ["cup"], 2)
    assert list(found) == (["cup"] if lines[3:] else [])


@pytest.mark.parametrize("end", ["\r\n", " \n", " \r\n", "  \n"])
def test_line_ends_and_trailing_spaces(write, end):
    path = write("red 1 2", "cup 3 4", end=end)
    assert as_lists(read_word_vectors(path, ["red", "cup"], 2)) == {"red": [1, 2], "cup": [3, 4]}


def test_the_last_line_may_lack_its_end(tmp_path):
    (tmp_path / "v.txt").write_bytes(b"red 1 2\ncup 3 4")
    assert as_lists(read_word_vectors(tmp_path / "v.txt", ["cup"], 2)) == {"cup": [3, 4]}


def test_the_first_of_equal_words_wins(write):
    path = write("red 1 2", "cup 3 4", "red 5 6")
    assert as_lists(read_word_vectors(path, ["red"], 2)) == {"red": [1, 2]}


def test_lines_of_words_with_spaces_are_not_taken_for_their_first_word(write):
    path = write(". . . 1 2", "at name@domain.com 3 4", "at 5 6", ". 7 8")
    assert as_lists(read_word_vectors(path, [".", "at"], 2)) == {"at": [5, 6], ".": [7, 8]}


def test_words_are_utf8_and_damaged_bytes_of_other_words_do_not_matter(tmp_path):
    content = "naïve 1 2\n杯 3 4\n".encode() + b"\xff\xfe 5 6\n" + b"cup 7 8\n"
    (tmp_path / "v.txt").write_bytes(content)
    found = as_lists(read_word_vectors(tmp_path / "v.txt", ["naïve", "杯", "cup"], 2))
    assert found == {"naïve": [1, 2], "杯": [3, 4], "cup": [7, 8]}


@pytest.mark.parametrize(
    "line",
    [
        "cup",
        "cup 1",
        "cup 1 2",
        "cup 1 2 3 4",
        "cup 1 2 3 4 5 6",
        "cup 1 two 3",
        "cup 1 2 ",
        "cup 1  3",
        "cup nan 2 3",
        "cup 1 2 inf",
        "cup 1 2 1e39",  # infinite in float32
    ],
)
def test_a_wanted_line_without_that_many_finite_numbers_is_named(write, line):
    path = write("red 1 2 3", line, "dog 1 2 3")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: ")) as error:
        read_word_vectors(path, ["cup", "dog"], 3)
    assert "'cup'" in str(error.value) and "3" in str(error.value)


def test_a_line_that_is_not_wanted_may_hold_anything(write):
    path = write("zebra 1", "lion x y z", "red 1 2 3")
    assert list(read_word_vectors(path, ["red"], 3)) == ["red"]


def test_a_missing_file_is_named_with_the_key(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MODEL\.VLNMS\.WORD_VECTORS") as error:
        read_word_vectors(tmp_path / "glove.txt", ["cup"], 3)
    assert str(tmp_path / "glove.txt") in str(error.value)
