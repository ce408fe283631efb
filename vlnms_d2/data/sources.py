"""Where the files of the public data sets come from: a sentence each, for error messages."""

REFER = (
    "RefCOCO, RefCOCO+ and RefCOCOg come from https://github.com/lichengunc/refer (refs(...).p "
    "and instances.json of each); RefShapes is made by tools/make_refshapes.py."
)
COCO = "The images of COCO (train2014, val2014) come from https://cocodataset.org."
FLICKR30K_ENTITIES = (
    "Flickr30k Entities (Annotations, Sentences and the lists of the splits) comes from "
    "https://github.com/BryanPlummer/flickr30k_entities."
)
FLICKR30K_IMAGES = (
    "The images of Flickr30k (flickr30k-images) come from the University of Illinois, which sends "
    "the address to those who fill in its form: "
    "https://shannon.cs.illinois.edu/DenotationGraph/."
)
KARPATHY = (
    "Karpathy's splits (dataset_flickr30k.json, dataset_coco.json) come from "
    "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip."
)
COCO_RESULTS = (
    "It is a JSON list of {image_id, category_id, bbox [x, y, width, height], score}, as "
    "Detectron2's COCOEvaluator writes (coco_instances_results.json)."
)
