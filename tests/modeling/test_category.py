"""Category: a query-aware detector without training, against loops and in the heads."""

import copy

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from small_models import build, image_input

from vlnms_d2 import add_vlnms_config, split_by_query
from vlnms_d2.modeling.branch import RelatednessBranch
from vlnms_d2.modeling.relatedness import Category, CategoryMentions, category_relatedness
from vlnms_d2.modeling.relatedness.category import category_names
from vlnms_d2.modeling.text import TextFeatures

NAMES = ("cup", "dog", "dining table", "person", "car")


def category(num_classes: int = 3, slope: float = 4.0, midpoint: float = 0.25) -> Category:
    return Category(visual_dim=num_classes, text_dim=num_classes, slope=slope, midpoint=midpoint)


def one_hot(classes: list[int], num_classes: int = 3) -> torch.Tensor:
    return torch.eye(num_classes)[classes]


def text(lengths: list[int], num_classes: int = 3, seed: int = 0) -> TextFeatures:
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths, default=0)
    words = torch.rand(len(lengths), longest, num_classes, generator=generator) * 2 - 1
    mask = torch.arange(longest) < torch.tensor(lengths).view(-1, 1)
    return TextFeatures(words.masked_fill(~mask[..., None], 0.0), mask)


# --- the module --------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[2, 4, 1], [0, 3], [0], []])
@pytest.mark.parametrize("classes", [[0, 2, 2, 1], [1], []])
def test_logits_and_attention_equal_a_loop(lengths, classes):
    queries = text(lengths)
    output = category()(one_hot(classes), torch.rand(len(classes), 5), queries, True)
    assert output.logits.shape == (len(lengths), len(classes)) and output.deltas is None
    longest = queries.mask.shape[1]
    assert output.attention.shape == (len(lengths), len(classes), longest)
    for q, length in enumerate(lengths):
        for n, c in enumerate(classes):
            cosines = queries.words[q, :length, c].tolist()
            best = max(cosines, default=-1.0)
            assert output.logits[q, n].item() == pytest.approx(4 * (best - 0.25), abs=1e-5)
            attention = [0.0] * longest
            if cosines:
                attention[cosines.index(best)] = 1.0
            assert output.attention[q, n].tolist() == attention


def test_attention_is_given_when_asked_for_only():
    assert category()(one_hot([0]), torch.rand(1, 5), text([2])).attention is None


def test_boxes_of_a_class_are_alike_and_the_rest_of_the_box_does_not_matter():
    queries = text([3, 2])
    first = category()(one_hot([0, 1, 0]), torch.rand(3, 5), queries).logits
    second = category()(one_hot([0, 1, 0]), torch.rand(3, 5), queries).logits
    assert torch.equal(first, second) and torch.equal(first[:, 0], first[:, 2])


def test_classes_and_names_must_be_as_many():
    with pytest.raises(ValueError, match="3 classes, but 4 category names"):
        Category(visual_dim=3, text_dim=4, slope=1.0, midpoint=0.0)


@pytest.mark.parametrize("slope", [4.0, 6.29])
def test_relatedness_of_all_categories_equals_plain_numpy_and_the_module(slope):
    """What reranking computes from a table of cosines, and the head from its features."""
    cosines = np.random.default_rng(0).uniform(-1, 1, (50, 8)).astype(np.float32)
    cosines[::7] = -1  # texts without a mention
    found = category_relatedness(cosines, slope, 0.514)
    expected = 1 / (1 + np.exp(-slope * (cosines.astype(np.float64) - 0.514)))
    expected[::7] = 1
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), expected.astype(np.float32))

    module = category(8, slope, 0.514)
    named = torch.from_numpy(cosines).ne(-1).any(dim=1, keepdim=True)
    queries = TextFeatures(torch.from_numpy(cosines)[:, None] * named[..., None], named)
    branch = RelatednessBranch(None, CategoryMentions(category_names=NAMES), module)
    related, _ = branch.score(torch.eye(8), torch.zeros(8, 5), queries)
    torch.testing.assert_close(related, found, rtol=0, atol=1e-6)


# --- the text ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mentions() -> CategoryMentions:
    return CategoryMentions(category_names=NAMES)


def test_nouns_fit_their_own_category_best(mentions):
    queries = ["the red cup", "a puppy left of the table", "man in a taxi"]
    features = mentions(queries)
    assert mentions.output_dim == len(NAMES)
    assert features.words.shape[2] == len(NAMES) and features.words.dtype == torch.float32
    assert [mentions.tokenize(query) for query in queries] == [
        ["cup"], ["puppy", "table"], ["man", "taxi"],
    ]  # fmt: skip
    assert features.mask.sum(dim=1).tolist() == [1, 2, 2]
    best = [NAMES[i] for i in features.words[features.mask].argmax(dim=1).tolist()]
    assert best == ["cup", "dog", "dining table", "person", "car"]


def test_a_query_without_a_noun_is_one_without_words(mentions):
    features = mentions(["", "red", "dog"])
    assert features.mask.tolist() == [[False], [False], [True]]
    assert not features.words[:2].any()
    assert mentions([]).words.shape == (0, 0, len(NAMES))


def test_the_features_are_those_of_the_matcher(mentions):
    queries = ["dog", "a cup on a table"]
    features = mentions(queries)
    for row, mask, own in zip(
        features.words, features.mask, mentions.matcher.cosines(queries), strict=True
    ):
        np.testing.assert_array_equal(row[mask].numpy(), own)


def named_config(names=(), test=(), train=()):
    cfg = get_cfg()
    add_vlnms_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    cfg.MODEL.VLNMS.CATEGORY.NAMES = names
    cfg.DATASETS.TEST, cfg.DATASETS.TRAIN = test, train
    return cfg


def test_names_come_from_the_config_or_from_the_data_sets():
    MetadataCatalog.get("category_names_of_a_test").set(thing_classes=list("abcde"))
    assert category_names(named_config(NAMES, ("category_names_of_a_test",))) == list(NAMES)
    assert category_names(named_config((), ("category_names_of_a_test",))) == list("abcde")
    assert category_names(named_config((), (), ("category_names_of_a_test",))) == list("abcde")


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (named_config(("cup",)), "MODEL.VLNMS.CATEGORY.NAMES has 1 category names; give"),
        (named_config((), ("coco_2017_val",)), "data set coco_2017_val has 80 category names"),
        (named_config(), "not known.*MODEL.VLNMS.CATEGORY.NAMES the names of the 5 classes"),
    ],
)
def test_names_that_do_not_fit_are_refused(cfg, message):
    with pytest.raises(ValueError, match=message):
        category_names(cfg)


# --- in the heads ------------------------------------------------------------------------------


@pytest.fixture
def category_config(config):
    def make(head: str = "VLNMSHead"):
        cfg = config(head, "Category")
        cfg.MODEL.VLNMS.CATEGORY.NAMES = NAMES
        return cfg

    return make


@pytest.mark.parametrize("head", ["VLNMSHead", "VLNMSRes5Head", "VLNMSCascadeHead"])
def test_relatedness_depends_on_class_and_query_alone(category_config, head):
    cfg = category_config(head)
    model = build(cfg)
    queries = ["the red cup", "a dog", ""]
    with torch.no_grad():
        (output,) = model([image_input(0, query=queries)])
    own = split_by_query(output["instances"], len(queries))
    best = model.roi_heads.vlnms.text_encoder.matcher.best_cosines(queries)
    node = cfg.MODEL.VLNMS.CATEGORY
    for q, found in enumerate(own):
        assert len(found) > 3
        logits = node.SLOPE * (torch.from_numpy(best[q])[found.pred_classes] - node.MIDPOINT)
        expected = logits.sigmoid() if q < 2 else torch.ones(len(found))
        torch.testing.assert_close(found.relatedness, expected)
        torch.testing.assert_close(found.scores, found.cls_scores * expected)


def test_the_checkpoint_of_a_stock_detector_is_all_it_needs(category_config, config):
    """One line in the config, no weights of its own, and the config's other names do not count."""
    model = build(category_config())
    stock = {k: v for k, v in build(config()).state_dict().items() if ".vlnms." not in k}
    assert set(model.state_dict()) == set(stock)
    model.load_state_dict(stock)


def test_a_copy_of_the_model_answers_the_same(category_config):
    model = build(category_config())
    given = [image_input(0, query=["dog", "cup"])]
    with torch.no_grad():
        first, second = model(given), copy.deepcopy(model)(given)
    assert torch.equal(first[0]["instances"].scores, second[0]["instances"].scores)


def test_training_it_says_that_there_is_nothing_to_train(category_config, tmp_path):
    from vlnms_d2.engine.trainer import VLNMSTrainer

    cfg = category_config()
    with pytest.raises(ValueError, match=r"Category.*nothing to train.*--eval-only"):
        VLNMSTrainer.build_optimizer(cfg, build(cfg))
