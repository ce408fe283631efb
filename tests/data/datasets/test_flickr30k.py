"""Flickr30k Entities becomes standard dataset dicts, or an error says what is wrong where."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from dataset_folders import (
    FLICKR_IDS,
    OBJECTS,
    SENTENCES,
    make_flickr30k_entities_folder,
    write_boxes,
    write_sentences,
)

from vlnms_d2.data.datasets.flickr30k import (
    load_flickr30k_entities,
    parse_sentence,
    read_boxes,
    read_sentences,
    read_split,
)
from vlnms_d2.data.datasets.refer import XYWH_ABS, merge_by_image

SOURCE = "github.com/BryanPlummer/flickr30k_entities"


@pytest.fixture
def root(tmp_path) -> Path:
    make_flickr30k_entities_folder(tmp_path)
    return tmp_path / "flickr30k_entities"


def load(root: Path, split: str = "val", captions: bool = False) -> list[dict]:
    return load_flickr30k_entities(root, "images", split, captions=captions)


def one_image(tmp_path: Path, objects=OBJECTS, sentences=SENTENCES, **options) -> list[dict]:
    """A split of one image with these objects and sentences."""
    write_boxes(tmp_path / "Annotations" / "7.xml", objects)
    write_sentences(tmp_path / "Sentences" / "7.txt", sentences)
    (tmp_path / "val.txt").write_text("7\n")
    return load(tmp_path, **options)


# --- phrases -----------------------------------------------------------------------------------


def test_an_image_and_its_boxes(root):
    (image,) = load(root)
    assert image["file_name"] == str(Path("images", f"{FLICKR_IDS[3]}.jpg"))
    assert (image["image_id"], image["height"], image["width"]) == (FLICKR_IDS[3], 60, 80)
    assert [(a["id"], a["bbox"]) for a in image["annotations"]] == [
        (1, [0, 0, 30, 60]),  # the first pixel is number 1, the last one belongs to the box
        (2, [40, 10, 30, 40]),
        (3, [4, 4, 16, 16]),
        (5, [59, 39, 21, 21]),  # clipped
        (6, [9, 19, 21, 21]),
        (7, [0, 0, 70, 60]),  # union of chain 1
        (8, [4, 4, 66, 46]),  # union of chain 2
    ]
    for annotation in image["annotations"]:
        assert (annotation["bbox_mode"], annotation["category_id"]) == (XYWH_ABS, -1)
        assert annotation["iscrowd"] == 0


def test_an_expression_for_each_phrase_with_a_box(root):
    (image,) = load(root)
    found = [(e["query"], e["phrase_type"], e["ref_id"]) for e in image["expressions"]]
    assert found == [
        ("Two young guys", ["people"], 1),
        ("shaggy hair", ["bodyparts"], 2),
        ("their hands", ["bodyparts"], 2),
        ("A red “café” van", ["vehicles", "other"], 4),
        ("the men", ["people"], 1),
        ("Two men", ["people"], 1),
        ("a [ green ) shirt", ["clothing"], 6),
    ]
    assert [(e["ann_id"], e["context_ann_ids"]) for e in image["expressions"]] == [
        (7, [1, 2]),  # several boxes: their union, and each of them
        (8, [2, 3]),
        (8, [2, 3]),
        (5, []),
        (7, [1, 2]),
        (7, [1, 2]),
        (6, []),
    ]
    first = image["expressions"][0]
    assert first["sentence"] == (
        "Two young guys with shaggy hair , who look at their hands in the yard ."
    )
    assert (first["split"], first["manner"]) == ("val", None)


def test_images_are_sorted_and_those_without_a_box_left_out(root):
    images = load(root, "train")
    assert [image["image_id"] for image in images] == [36979, 1000092795]


def test_numbers_do_not_change(root):
    (image,) = load(root)
    first = FLICKR_IDS[3] * 10_000
    assert [e["sent_id"] - first for e in image["expressions"]] == [
        101,
        102,
        104,
        201,
        202,
        501,
        502,
    ]


# --- captions ----------------------------------------------------------------------------------


def test_captions_have_the_boxes_of_all_their_phrases_and_no_referent(root):
    (image,) = load(root, captions=True)
    assert [(e["ann_id"], e["ref_id"]) for e in image["expressions"]] == [(None, None)] * 5
    assert [e["context_ann_ids"] for e in image["expressions"]] == [
        [1, 2, 3],
        [1, 2, 5],
        [],
        [],
        [1, 2, 6],
    ]
    assert image["expressions"][2]["query"] == "Un chapeau bleu ."
    assert all(e["query"] == e["sentence"] for e in image["expressions"])


def test_captions_of_an_image_without_a_box_are_kept(root):
    images = load(root, "train", captions=True)
    assert [len(image["expressions"]) for image in images] == [5, 5, 5]
    boxless = next(image for image in images if image["image_id"] == FLICKR_IDS[2])
    assert boxless["annotations"] == []
    assert all(e["context_ann_ids"] == [] for e in boxless["expressions"])


def test_both_views_can_be_merged(root):
    phrases, captions = load(root), load(root, captions=True)
    (merged,) = merge_by_image(phrases, captions)
    assert merged["annotations"] == phrases[0]["annotations"] == captions[0]["annotations"]
    sent_ids = [e["sent_id"] for e in merged["expressions"]]
    assert len(set(sent_ids)) == len(sent_ids) == 12


def test_numbers_of_neighbouring_images_and_sentences_do_not_meet(tmp_path):
    sentences = ["[/EN#1/people a man] sees " * 99] * 99
    for number in (7, 8):
        write_boxes(tmp_path / "Annotations" / f"{number}.xml", [(("1",), (1, 1, 9, 9))])
        write_sentences(tmp_path / "Sentences" / f"{number}.txt", sentences)
    (tmp_path / "val.txt").write_text("7\n8\n")
    images = load(tmp_path) + load(tmp_path, captions=True)
    sent_ids = [e["sent_id"] for image in images for e in image["expressions"]]
    assert len(set(sent_ids)) == len(sent_ids) == 2 * 99 * 100
    write_sentences(tmp_path / "Sentences" / "7.txt", [sentences[0] + "[/EN#1/people a man]"])
    with pytest.raises(ValueError, match=r"7\.txt: more than 99 lines, or phrases"):
        load(tmp_path)


# --- odd files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
def test_line_ends_and_encodings(tmp_path, end, encoding):
    path = tmp_path / "7.txt"
    lines = ["[/EN#1/people Une fille] à gauche .", "", "Deux  garçons\x85 ."]
    path.write_bytes(end.join([*lines, "", ""]).encode(encoding))
    found = read_sentences(path)
    assert {number: one.text for number, one in found.items()} == {
        1: "Une fille à gauche .",
        2: "",
        3: "Deux garçons .",
    }


def test_sentences_and_phrases_without_words_are_left_out(tmp_path, caplog):
    sentences = ["[/EN#1/people ] runs .", "", "[/EN#1/people] ", "[/EN#1/people A man] runs ."]
    with caplog.at_level(logging.WARNING):
        (phrases,) = one_image(tmp_path, sentences=sentences)
        (captions,) = one_image(tmp_path, sentences=sentences, captions=True)
    assert [e["query"] for e in phrases["expressions"]] == ["A man"]
    assert [e["query"] for e in captions["expressions"]] == ["runs .", "A man runs ."]
    assert "left out a phrase of line 1 without words" in caplog.text
    assert "left out line 2, which has no words" in caplog.text
    assert "left out line 3, which has no words" in caplog.text


def test_chain_zero_has_no_box():
    (phrase,) = parse_sentence("[/EN#0/notvisual who] runs").phrases
    assert phrase == (0, ("notvisual",), "who")


def test_boxes_that_are_empty_are_left_out(tmp_path, caplog):
    objects = [
        (("1",), (81, 1, 90, 9)),  # outside
        (("1",), (9, 9, 3, 12)),  # turned round
        (("1",), (5, 5, 5, 5)),  # one pixel
        (("2",), (-4, -4, 0, 0)),
    ]
    sentences = ["[/EN#1/people A man] with [/EN#2/other a hat] ."]
    with caplog.at_level(logging.WARNING):
        (image,) = one_image(tmp_path, objects, sentences)
    assert [(a["id"], a["bbox"]) for a in image["annotations"]] == [(3, [4, 4, 1, 1])]
    (expression,) = image["expressions"]  # of the three boxes one is left: no union
    assert (expression["ann_id"], expression["context_ann_ids"]) == (3, [])
    assert "Left out 3 boxes that are empty inside their image" in caplog.text
    assert str(tmp_path / "Annotations" / "7.xml") in caplog.text


def test_a_chain_named_twice_by_an_object_has_its_box_once(tmp_path):
    objects = [(("1", "1"), (1, 1, 9, 9))]
    (image,) = one_image(tmp_path, objects, ["[/EN#1/people A man] runs ."])
    assert image["expressions"][0]["ann_id"] == 1


def test_split_lists(tmp_path):
    (tmp_path / "val.txt").write_bytes(b"30\r\n7\r\n\r\n30\r\n")
    assert read_split(tmp_path / "val.txt") == [7, 30]


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["val.txt", "Annotations/{}.xml", "Sentences/{}.txt"])
def test_a_missing_file_is_named_with_its_source(root, name):
    path = root / name.format(FLICKR_IDS[3])
    path.unlink()
    with pytest.raises(FileNotFoundError) as raised:
        load(root)
    assert str(path) in str(raised.value) and SOURCE in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("val.txt", "", r"val\.txt: the list is empty"),
        ("val.txt", "12\nx7.jpg\n", r"val\.txt: entry 2 is 'x7\.jpg', expected a Flickr image"),
        ("Sentences/{}.txt", " \n", r"65567\.txt: the file is empty"),
        ("Sentences/{}.txt", "A [/EN#1/people man\n", r"65567\.txt, line 1: .* is not marked"),
        ("Sentences/{}.txt", "A .\n[/EN#x/people man]", r"65567\.txt, line 2: .* is not marked"),
        ("Sentences/{}.txt", "[/EN#1 man] .", r"line 1: '\[/EN#1 man\] \.' is not marked"),
        ("Annotations/{}.xml", "", r"65567\.xml: not valid XML"),
        ("Annotations/{}.xml", "<annotation><size>", r"65567\.xml: not valid XML .*cut short"),
        ("Annotations/{}.xml", "<xml/>", r"the root element is <xml>, expected <annotation>"),
        ("Annotations/{}.xml", "<annotation/>", r"65567\.xml: <size> has no <height>"),
    ],
)
def test_a_broken_file_is_named_with_its_source(root, name, content, message):
    (root / name.format(FLICKR_IDS[3])).write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        load(root)
    assert SOURCE in str(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<width>80</width>", "<width>0</width>", r"7\.xml: <size> is 0 x 60, expected"),
        ("<height>60", "<height>sixty", r"7\.xml: <size>: <height> is 'sixty', expected a whole"),
        ("<name>4</name>", "", r"7\.xml: <object> number 5 has no <name>"),
        ("<name>4</name>", "<name/>", r"<object> number 5: <name> is None, expected a whole"),
        ("<xmax>95</xmax>", "", r"<object> number 5 has no <xmax>, expected a whole number"),
        ("<ymin>40<", "<ymin>nan<", r"<object> number 5: <ymin> is 'nan', expected a whole"),
    ],
)
def test_a_damaged_element_is_named(tmp_path, old, new, message):
    path = tmp_path / "7.xml"
    write_boxes(path)
    whole = path.read_text()
    assert old in whole
    path.write_text(whole.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_boxes(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize(
    "doctype",
    [
        '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;">]>',
        '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]>',
        '<!DOCTYPE annotation SYSTEM "http://localhost/annotation.dtd">',
    ],
)
def test_declared_entities_are_refused(tmp_path, doctype, encoding):
    path = tmp_path / "7.xml"
    head = f'<?xml version="1.0" encoding="{encoding}"?>'
    path.write_text(f"{head}{doctype}<annotation>&c;</annotation>", encoding=encoding)
    with pytest.raises(ValueError, match=r"7\.xml: refused, as it declares a document type"):
        read_boxes(path)


def test_an_unknown_encoding(tmp_path):
    (tmp_path / "7.xml").write_text('<?xml version="1.0" encoding="morse"?><annotation/>')
    with pytest.raises(ValueError, match=r"7\.xml: not valid XML"):
        read_boxes(tmp_path / "7.xml")
