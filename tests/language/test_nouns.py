"""Nouns and noun chunks: the pipeline that comes with vlnms_d2, and stand-ins for others."""

import copy
import json
import multiprocessing
import os
import pickle
import sys
import time

import pytest
import spacy
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import exit_code
from spacy.language import Language
from spacy.tokens import Doc

from vlnms_d2.language import NounFinder, nouns
from vlnms_d2.language.nouns import EMBEDDED, FEW, MAX_CHARS, NOUN_POS, chunks_by_tags

POS = {
    "the": "DET",
    "two": "NUM",
    "red": "ADJ",
    "cup": "NOUN",
    "paris": "PROPN",
    "it": "PRON",
    "sits": "VERB",
}
SEEN: list[str] = []


@Language.component("tests_tagger")
def tag_by_table(doc: Doc) -> Doc:
    """Tags words by a table, anything else as X."""
    SEEN.append(doc.text)
    for token in doc:
        token.pos_ = POS.get(token.lower_, "X")
    return doc


@Language.component("tests_parser")
def parse_to_the_right(doc: Doc) -> Doc:
    """Hangs every word on the last one, which is an object."""
    SEEN.append(f"parsed {doc.text}")
    last = len(doc) - 1
    for token in doc:
        token.head, token.dep_ = doc[last], "dep"
    doc[last].dep_ = "ROOT"
    return doc


@pytest.fixture(scope="module")
def finder() -> NounFinder:
    return NounFinder()


@pytest.fixture
def pipeline(tmp_path):
    """`pipeline(*components)`: the folder of a pipeline of stand-ins."""
    SEEN.clear()

    def make(*components: tuple[str, str]) -> str:
        nlp = spacy.blank("en")
        for factory, name in components:
            nlp.add_pipe(factory, name=name)
        nlp.to_disk(tmp_path / "pipeline")
        return str(tmp_path / "pipeline")

    return make


# --- the pipeline that comes with vlnms_d2 -----------------------------------------------------


def test_it_is_small_and_says_what_it_is():
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6 * 2**20
    meta = json.loads((EMBEDDED / "meta.json").read_text())
    assert meta["license"] == "CC BY-SA 4.0"
    readme = (EMBEDDED / "README.md").read_text()
    assert "UD English EWT" in readme and "CC BY-SA 4.0" in readme
    for split in ("dev", "test"):
        for value in meta["performance"][split].values():
            assert 85 < value < 100
            assert f"{value:.2f}" in readme  # the numbers told are those measured


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("man in red shirt", ["man", "shirt"]),
        ("second pizza from left", ["pizza"]),
        ("the woman holding a white umbrella", ["woman", "umbrella"]),
        ("two dogs on the couch", ["two", "dogs", "couch"]),
        ("she is sitting next to the blue car", ["she", "car"]),
        ("kid with baseball bat", ["kid", "baseball", "bat"]),
        ("a brown horse standing behind a wooden fence", ["horse", "fence"]),
        ("red cup", ["cup"]),
        ("the smallest striped cat on the table", ["cat", "table"]),
    ],
)
def test_nouns_of_expressions(finder, text, expected):
    found = finder.nouns([text, text.upper()[:1] + text[1:]])
    # "left" may be a noun, too.
    assert [[word for word in words if word != "left"] for words in found] == [expected, expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("man in red shirt", ["man", "red shirt"]),
        ("the woman holding a white umbrella", ["the woman", "a white umbrella"]),
        ("two brown dogs near the old couch", ["two brown dogs", "the old couch"]),
    ],
)
def test_noun_chunks_of_expressions(finder, text, expected):
    assert finder.noun_chunks([text]) == [expected]


def test_empty_texts_have_no_nouns(finder):
    assert finder.nouns(["", "  \n\t ", "...", "- -"]) == [[], [], [], []]
    assert finder.noun_chunks(["", "\n"]) == [[], []]
    assert finder.nouns([]) == []


def test_lines_and_white_space_change_nothing(finder):
    assert finder.nouns(["man in\n red\t\tshirt\r\n"]) == finder.nouns(["man in red shirt"])
    assert finder.noun_chunks([" man in\nred  shirt"]) == [["man", "red shirt"]]


def test_words_of_other_alphabets(finder):
    found = finder.nouns(["the café next to the jalapeño stand", "杯", "👍 the dog"])
    assert found[0][0] == "café" and "stand" in found[0]
    assert "dog" in found[2] and "👍" not in found[2]


def test_very_long_texts_are_read_to_their_end(finder):
    count = MAX_CHARS // 8
    text = " ".join(["the red dog"] * count) + " " + "x" * (2 * MAX_CHARS) + " and the cat"
    words = finder.nouns([text])[0]
    assert words.count("dog") >= count - 5 and words[-1] == "cat"
    chunks = finder.noun_chunks([text])[0]
    assert chunks.count("the red dog") >= count - 5 and chunks[-1] == "the cat"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("ab é杯'-.,1\n👍", max_size=20), max_size=6))
def test_any_texts_give_words_of_theirs_in_order(finder, texts):
    found = finder.nouns(texts)
    assert len(found) == len(texts)
    for text, words in zip(texts, found, strict=True):
        at = 0
        for word in words:
            assert word == word.lower() and any(map(str.isalnum, word))
            at = text.lower().index(word, at) + len(word)
    assert found == [finder.nouns([text])[0] for text in texts]


# --- other pipelines ---------------------------------------------------------------------------


def test_parts_of_speech_are_a_choice(pipeline):
    folder = pipeline(("tests_tagger", "tagger"))
    text = "Two red cups? The CUP of Paris: it sits, cup"
    assert NounFinder(folder).nouns([text]) == [["two", "cup", "paris", "it", "cup"]]
    assert NounFinder(folder, pos=["ADJ", "VERB"]).nouns([text]) == [["red", "sits"]]
    assert NOUN_POS == ("NOUN", "NUM", "PRON", "PROPN")


def test_each_distinct_text_is_read_once(pipeline):
    finder = NounFinder(pipeline(("tests_tagger", "tagger")), batch_size=2)
    SEEN.clear()
    found = finder.nouns(iter(["the cup", "it", "the  cup", "it", "two", "the cup"]))
    assert found == [["cup"], ["it"], ["cup"], ["it"], ["two"], ["cup"]]
    assert SEEN == ["the cup", "it", "two"]
    found[0].append("changed")  # equal texts have lists of their own
    assert found[2] == ["cup"]


def test_numpy_multiplies_for_many_texts_and_says_the_same(finder, monkeypatch):
    by_blis = set()
    gemm = finder._ops.gemm

    def observed(*args, **kwargs):
        by_blis.add(finder._ops.use_blis)
        return gemm(*args, **kwargs)

    monkeypatch.setattr(finder._ops, "gemm", observed)
    texts = [f"the {n} red cups that a man holds beside dog {n}" for n in range(FEW + 1)]
    many = finder.tagged(texts)
    assert by_blis == {False}
    by_blis.clear()
    few = finder.tagged(texts[:FEW])
    assert by_blis == {True}
    assert few == many[:FEW]


def test_a_parser_gives_the_chunks_and_is_not_run_for_nouns(pipeline):
    finder = NounFinder(pipeline(("tests_tagger", "tagger"), ("tests_parser", "parser")))
    SEEN.clear()
    assert finder.nouns(["the red sits cup"]) == [["cup"]]
    assert SEEN == ["the red sits cup"]
    # By tags alone "sits" would end the chunk.
    assert finder.noun_chunks(["the red sits CUP"]) == [["the red sits cup"]]


def test_components_without_use_are_left_out(pipeline):
    folder = pipeline(("tests_tagger", "tagger"), ("sentencizer", "sentencizer"))
    assert NounFinder(folder)._nlp.pipe_names == ["tagger"]


@pytest.mark.parametrize(
    ("tagged", "expected"),
    [
        ("the/DET red/ADJ cup/NOUN", ["the red cup"]),
        ("all/DET the/DET cups/NOUN", ["the cups"]),
        ("man/NOUN wearing/VERB+Ger red/ADJ hat/NOUN", ["man", "red hat"]),
        ("the/DET parked/VERB+Part car/NOUN", ["the parked car"]),
        ("in/ADP parked/VERB+Part car/NOUN", ["parked car"]),
        ("man/NOUN sits/VERB+Fin there/ADV", ["man"]),
        ("Coffee/NOUN cup/NOUN red/ADJ", ["coffee cup"]),
        ("two/NUM of/ADP them/PRON", []),
        ("red/ADJ -/PUNCT haired/ADJ man/NOUN", ["red - haired man"]),
        ("-/PUNCT cup/NOUN", ["cup"]),
        ("the/DET", []),
        ("", []),
    ],
)
def test_chunks_by_tags(tagged, expected):
    words, tags = (
        zip(*(part.split("/") for part in tagged.split()), strict=True) if tagged else ((), ())
    )
    forms = [tag.partition("+") for tag in tags]
    doc = Doc(
        spacy.blank("en").vocab,
        words=list(words),
        spaces=[not (word == "-" or "-" in words[i + 1 : i + 2]) for i, word in enumerate(words)],
        pos=[pos for pos, _, _ in forms],
        morphs=[f"VerbForm={form}" if form else "" for _, _, form in forms],
    )
    assert chunks_by_tags(doc) == [chunk.replace(" - ", "-") for chunk in expected]


# --- several processes -------------------------------------------------------------------------


class WithProcess(NounFinder):
    """Adds the id of the process to the nouns of each text."""

    def _nouns_of(self, doc):
        if doc.text == "fails":
            raise ValueError("no such text")
        return [*super()._nouns_of(doc), str(os.getpid())]


@pytest.fixture
def few_texts_suffice(monkeypatch):
    monkeypatch.setattr(nouns, "MIN_FOR_PROCESSES", 4)
    monkeypatch.setattr(nouns, "CHUNK", 3)


def test_processes_give_the_nouns_of_each_text_in_order(few_texts_suffice, finder):
    things = ("cup", "car", "tree", "table", "man", "road", "bird")
    texts = [f"the {thing} near a dog" for thing in things]
    several = NounFinder(processes=2)
    found = several.nouns(iter(texts))
    assert found == finder.nouns(texts) and found[0] == ["cup", "dog"]
    assert several.tagged(texts) == finder.tagged(texts)
    assert several.noun_chunks(texts) == finder.noun_chunks(texts)


def test_processes_are_used_where_there_are_enough_texts(few_texts_suffice):
    here = str(os.getpid())
    texts = [f"a cup, {i}" for i in range(10)]
    several = WithProcess(processes=2)
    found = several.nouns(texts)
    assert [words[0] for words in found] == ["cup"] * 10
    assert here not in {words[-1] for words in found}
    for finder, some in ((several, texts[:3]), (WithProcess(), texts), (several, [])):
        assert all(words[-1] == here for words in finder.nouns(some))


def test_a_process_that_cannot_fork_reads_all_texts_itself(few_texts_suffice, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
    found = WithProcess(processes=2).nouns([f"cup {i}" for i in range(9)])
    assert {words[-1] for words in found} == {str(os.getpid())}


def test_an_error_in_a_process_is_raised_here(few_texts_suffice):
    with pytest.raises(ValueError, match="no such text"):
        WithProcess(processes=2).nouns(["a", "b", "c", "d", "fails"])


class Slow(NounFinder):
    def __init__(self, pipe):
        super().__init__(processes=2)
        self.pipe = os.open(pipe, os.O_WRONLY)

    def _nouns_of(self, doc):
        os.write(self.pipe, b"begun\n")
        time.sleep(600)


def find_slowly(pipe):
    nouns.MIN_FOR_PROCESSES, nouns.CHUNK = 4, 3
    Slow(pipe).nouns([f"a cup {i}" for i in range(9)])


def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=find_slowly, args=(tmp_path / "pipe",))
    process.start()
    with open(tmp_path / "pipe") as pipe:
        first = pipe.readline()
        process.kill()
        rest = pipe.read()  # to the end of the pipe: no process has it open any more
    process.join()
    assert set((first + rest).splitlines()) == {"begun"}


def test_a_process_ends_whose_parent_was_killed_as_it_began():
    process = multiprocessing.get_context("fork").Process(
        target=nouns._set_forked,
        args=(None, os.getppid()),  # not the process that starts it
    )
    process.start()
    process.join()
    assert process.exitcode == 1


def test_no_process_is_refused():
    with pytest.raises(ValueError, match="processes is 0, expected at least 1"):
        NounFinder(processes=0)


# --- copies and errors -------------------------------------------------------------------------


def test_copies_share_the_pipeline_and_pickles_load_it_again(finder):
    assert copy.deepcopy(finder) is finder
    other = NounFinder(pos=["ADJ"], batch_size=7, processes=2)
    again = pickle.loads(pickle.dumps(other))
    assert (again.pos, again.batch_size, again.processes) == (("ADJ",), 7, 2)
    assert again.nouns(["the red cup"]) == [["red"]]


def test_a_pipeline_that_is_not_installed_is_named(tmp_path):
    for name in ("no_such_pipeline", str(tmp_path / "nowhere")):
        with pytest.raises(ImportError, match="python -m spacy download en_core_web_sm") as error:
            NounFinder(name)
        assert f"MODEL.VLNMS.PSEUDO_GT.SPACY_PIPELINE is {name!r}" in str(error.value)


def test_a_folder_that_is_no_pipeline_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"SPACY_PIPELINE .*loading it gave: .*meta\.json"
    ) as error:
        NounFinder(str(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_a_pipeline_without_parts_of_speech_is_named(pipeline):
    with pytest.raises(ValueError, match=r"SPACY_PIPELINE .*components \[\] give no parts of"):
        NounFinder(pipeline(("sentencizer", "sentencizer")))


def test_missing_spacy_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ImportError, match=r'pip install "vlnms_d2\[nlp\]"'):
        NounFinder()


def test_spacy_and_transformers_are_imported_when_they_are_needed():
    script = (
        "import sys\n"
        "import vlnms_d2.language as language\n"
        "from vlnms_d2.modeling.text import TEXT_ENCODER_REGISTRY\n"
        "TEXT_ENCODER_REGISTRY.get('BERT')\n"
        "assert not {'spacy', 'transformers'} & sys.modules.keys()\n"
        "language.NounFinder()\n"
        "assert 'spacy' in sys.modules\n"
    )
    assert exit_code(exec, script, {}) == 0


def test_tagged_words_are_all_words_in_lower_case():
    tagged = NounFinder().tagged(["The dog runs.", ""])
    assert [word for word, _ in tagged[0]] == ["the", "dog", "runs", "."] and tagged[1] == []
    assert dict(tagged[0])["dog"] == "NOUN" and dict(tagged[0])["the"] == "DET"
