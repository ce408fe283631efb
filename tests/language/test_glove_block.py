"""Lines of word vectors read together, against reading them one by one."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlnms_d2.language.glove_block import MalformedLine, hash_word, read_block
from vlnms_d2.language.glove_line import parse_vector, split_line
from vlnms_d2.language.glove_numbers import MARGIN, parse_numbers

FORMS = ("%.5g", "%.6f", "%.8f", "%.3e", "%.1f", "%.17g", "%d", "%+.4f")


def parse(numbers: list[str]) -> tuple[np.ndarray, np.ndarray]:
    text = " " * MARGIN + "".join(number + " " for number in numbers) + " "
    ends = np.cumsum([len(number.encode()) + 1 for number in numbers]) + MARGIN - 1
    starts = np.concatenate([[MARGIN], ends[:-1] + 1])
    return parse_numbers(np.frombuffer(text.encode(), np.uint8), starts, ends)


written = st.tuples(st.sampled_from(FORMS), st.floats(-20, 20)).map(lambda pair: pair[0] % pair[1])
short = st.from_regex(r"-?[0-9]\.[0-9]{1,8}", fullmatch=True)
anything = st.text("0123456789.-+e:/é_", max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.lists(written | short | anything, min_size=1, max_size=30))
@example(
    ["-0.0", "0.0", "9.99999999", "0.12345678", "0.123456789", "1.", ".5", "-.5", "-", "", "."]
)
@example(["1.:", "/.5", "1.é", "1.5e1", "1..5", "1.2.3", "--1.5", "1.-5", "1.5-", "1._5", "é.5"])
def test_numbers_are_those_of_float_to_the_bit(numbers):
    values, fits = parse(numbers)
    assert values.dtype == np.float64 and fits.dtype == bool
    for number, value, fit in zip(numbers, values, fits, strict=True):
        digits = number.removeprefix("-")
        plain = digits[:1].isdecimal() and digits[1:2] == "." and digits[2:].isdecimal()
        assert fit == (plain and digits.isascii() and len(digits) <= 10), number
        if fit:
            expected = np.float64(float(number))
            assert value.tobytes() == expected.tobytes(), number
            assert np.float32(value).tobytes() == np.float32(expected).tobytes()


def one_by_one(text: bytes, dim: int):
    """Words and vectors of unit length; or the number of the first malformed line."""
    words, vectors = [], []
    lines = text.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number, line in enumerate(lines[:-1]):
        if line.strip():
            word, values = split_line(line + "\n", dim)
            vector = parse_vector(values, dim)
            if vector is None or not word:
                return number
            words.append(word)
            row = vector.astype(np.float64)[None]
            length = np.linalg.norm(row, axis=1)[0]
            vectors.append((row[0] / (length if length > 0 else 1)).astype(np.float32))
    return words, np.array(vectors, np.float32).reshape(-1, dim), len(lines) - 1


word = st.text("aé 1.\u00a0\u2028\t", min_size=1, max_size=4) | st.just("cup")
number = written | short | st.sampled_from(["0", "1_0", "1e39", "nan", "\u0661", "x", ""])
good = st.tuples(word, st.lists(written | short, min_size=3, max_size=3))
other = st.tuples(word | st.just(""), st.lists(number, max_size=5))
line = (good | good | good | other).map(lambda pair: " ".join([pair[0], *pair[1]]))
end = st.sampled_from(["\n", "\n", "\n", "\r\n", "\r", " \n", "\n\n", "\t\n", "\u00a0\n"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(good.map(lambda p: " ".join([p[0], *p[1]])), end), max_size=8))
def test_blocks_of_good_lines_equal_line_by_line(lines):
    compare("".join(one + own_end for one, own_end in lines).encode())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(line, end), min_size=1, max_size=6))
def test_blocks_of_any_lines_equal_line_by_line(lines):
    compare("".join(one + own_end for one, own_end in lines).encode())


@pytest.mark.parametrize(
    "text", [b"", b"\n", b"\xff\xe2\x82 1 2 3\ncup\xe2 1 2.5 3\n", b" 1 2 3\n"]
)
def test_odd_bytes_equal_line_by_line(text):
    compare(text)


def compare(text: bytes) -> None:
    text += b"" if text.endswith(b"\n") else b"\n"
    expected = one_by_one(text, 3)
    if isinstance(expected, int):
        with pytest.raises(MalformedLine) as error:
            read_block(text, 3)
        assert error.value.number == expected
        return
    words, vectors, num_lines = expected
    block = read_block(text, 3)
    assert block.num_lines == num_lines
    assert block.hashes.tolist() == [hash_word(word) for word in words]
    assert block.vectors.dtype == np.float32
    assert block.vectors.tobytes() == vectors.tobytes()
