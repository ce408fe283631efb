"""Similarities of stored pairs, against a model that is called pair by pair."""

import importlib.util
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_rounds_alike
from conftest import REPO
from killing import exit_code, kill_at_move

from second_stages.pair_similarity import TextImageAttention
from vlnms_d2.evaluation import pair_retrieval, score_pairs
from vlnms_d2.evaluation.retrieval import retrieval_recall
from vlnms_d2.export import PairStore
from vlnms_d2.export.workers import Processes
from vlnms_d2.modeling.text import Vocabulary

DIM, KEPT = 6, 4


def load_tool(name):
    spec = importlib.util.spec_from_file_location(f"{name}_tool", REPO / "tools" / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


WORDS = ("red", "cup", "dog", "left", "of", "the")


def make_store(folder: Path, images=7, each=2, seed=0, dtype=np.float32, digest="0") -> PairStore:
    """As tools/export_pairs.py writes it, with made-up numbers; some pairs have no boxes."""
    rng = np.random.default_rng(seed)
    (folder / "pools").mkdir(parents=True)
    sizes = rng.integers(1, 9, images)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    index = np.full((images, images * each, KEPT), PairStore.PADDING, np.uint16)
    for i, j in np.ndindex(*index.shape[:2]):
        chosen = rng.permutation(sizes[i])[: rng.integers(0, KEPT + 1)]
        index[i, j, : len(chosen)] = chosen
    arrays = {
        "index": index,
        "pools/starts": starts,
        "pools/boxes": rng.random((starts[-1], 4), np.float32),
        "pools/scores": rng.random(starts[-1], np.float32),
        "pools/classes": rng.integers(0, 3, starts[-1]),
        "pools/features": rng.standard_normal((starts[-1], DIM)).astype(dtype),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    image = {"file_name": "a.jpg", "height": 10, "width": 20}
    captions = [
        {"caption_id": 100 + j, "caption": " ".join(rng.choice(WORDS, 3)), "split": "test"}
        | {"image_id": 50 - j // each}
        for j in range(images * each)
    ]
    contents = {
        "images": [image | {"image_id": 50 - i} for i in range(images)],
        "captions": captions,
        "manifest": {"outputs": {"index.npy": digest, "pools": "1"}},
    }
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return PairStore(folder)


def plain_features(store, image, caption, count=KEPT):
    """Of a pair, as SCAN's files have them."""
    found = store.proposals(image, caption).features[:count].astype(np.float32)
    rows = [found[k % len(found)] if len(found) else np.zeros(DIM) for k in range(count)]
    return torch.tensor(np.array(rows), dtype=torch.float32)


def toy(features, captions):
    """Depends on every box, their order and the words."""
    weights = torch.linspace(1, 2, features.shape[1] * features.shape[2])
    scores = (features.flatten(1) * weights).sum(1, keepdim=True)
    return torch.cat([scores * len(caption) for caption in captions], dim=1)


def plain_toy(store, count=KEPT):
    shape = (len(store.images), len(store.captions))
    values = np.zeros(shape, np.float32)
    for i, j in np.ndindex(*shape):
        features = plain_features(store, i, j, count)[None]
        values[i, j] = toy(features, [store.captions[j].caption])
    return torch.from_numpy(values)


def check(found, expected):
    assert isinstance(found, np.memmap) and found.dtype == np.float32
    assert_rounds_alike(torch.from_numpy(np.array(found)), expected)


@pytest.mark.parametrize("call_size", [1, 3, 7, 32])
@pytest.mark.parametrize("count", [None, 2])
def test_every_pair_is_compared_by_its_own_boxes(tmp_path, call_size, count):
    store = make_store(tmp_path / "store")
    assert (store.index[:, :, 0] == PairStore.PADDING).any()  # a pair without boxes
    calls = []

    def sim(features, captions):
        calls.append((tuple(features.shape), len(captions)))
        assert not torch.is_grad_enabled()
        return toy(features, captions)

    found = score_pairs(
        tmp_path / "store", sim, tmp_path / "out", num_boxes=count, images_per_call=call_size
    )
    check(found, plain_toy(store, count or KEPT))
    assert set(calls) == {((call_size, count or KEPT, DIM), 1)}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "similarities.npy",
    ]


def test_features_are_those_of_scans_files(tmp_path):
    store = make_store(tmp_path / "store", dtype=np.float16)
    seen = []
    score_pairs(
        tmp_path / "store", lambda f, c: seen.append(f) or f[:, :1, 0], tmp_path / "out",
        images_per_call=7,
    )  # fmt: skip
    pairs = [(store.images[i].image_id, c.caption_id) for c in store.captions for i in range(7)]
    load_tool("export_pairs").write_scan(store, pairs, KEPT, tmp_path / "scan", "train")
    rows = torch.from_numpy(np.load(tmp_path / "scan" / "train_ims.npy"))
    assert torch.equal(torch.cat(seen[-len(store.captions) :]), rows)


def scan_score(images, captions, lengths, smooth=9.0, eps=1e-8):
    """Equations of SCAN's t2i AVG, word by word; images [n, K, H], captions [m, L, H]."""
    result = torch.zeros(len(images), len(captions))
    for i, boxes in enumerate(images):
        for j, length in enumerate(lengths):
            words = captions[j][:length]
            cosines = boxes @ words.T  # [K, L]
            clipped = cosines.clamp(min=0)
            normal = clipped / (clipped.pow(2).sum(1, keepdim=True).sqrt() + eps)
            for t, word in enumerate(words):
                weights = (normal[:, t] * smooth).exp()
                attended = (weights / weights.sum()) @ boxes
                result[i, j] += word @ attended / (word.norm() * attended.norm()) / length
    return result


def test_a_scan_like_model(tmp_path):
    store = make_store(tmp_path / "store")
    torch.manual_seed(0)
    model = TextImageAttention(Vocabulary(WORDS), DIM, embed_dim=5, joint_dim=8).eval()
    found = score_pairs(
        tmp_path / "store", model, tmp_path / "out",
        encode_boxes=model.encode_boxes, images_per_call=3, processes=Processes(processes=2),
    )  # fmt: skip
    expected = torch.zeros(found.shape)
    with torch.no_grad():
        for i, j in np.ndindex(*found.shape):
            text = model.encode_captions([store.captions[j].caption])
            boxes = model.encode_boxes(plain_features(store, i, j))[None]
            expected[i, j] = scan_score(boxes, text.words, [3])
            # As SCAN does without encoding in advance.
            assert_rounds_alike(model(boxes, [store.captions[j].caption])[0, 0], expected[i, j])
    check(found, expected)
    assert expected.std() > 0.01


def xattn_score_t2i(images, captions, lengths, smooth=9.0):
    """As SCAN's model.py computes it (clipped_l2norm, AVG); its `squeeze` needs several images."""
    similarities = []
    for caption, length in zip(captions, lengths, strict=True):
        words = caption[:length].repeat(len(images), 1, 1)
        attention = F.leaky_relu(images @ words.transpose(1, 2), 0.1)  # [n, K, L]
        attention = attention / (attention.pow(2).sum(2, keepdim=True).sqrt() + 1e-8)
        weights = (attention.transpose(1, 2) * smooth).softmax(dim=-1)
        attended = weights @ images  # [n, L, d]
        lengths_of_both = words.norm(dim=2) * attended.norm(dim=2)
        cosines = ((words * attended).sum(2) / lengths_of_both.clamp(min=1e-8)).squeeze()
        similarities.append(cosines.mean(dim=1, keepdim=True))
    return torch.cat(similarities, 1)


def test_scans_own_function_fits(tmp_path):
    store = make_store(tmp_path / "store", images=3)
    torch.manual_seed(0)
    vectors = dict(zip(WORDS, torch.randn(len(WORDS), DIM), strict=True))

    def sim(features, captions):
        words = torch.stack([vectors[word] for word in captions[0].split()])
        return xattn_score_t2i(features, words[None], [len(words)])

    found = score_pairs(tmp_path / "store", sim, tmp_path / "out", images_per_call=2)
    expected = torch.zeros(found.shape)
    for i, j in np.ndindex(*found.shape):
        twice = plain_features(store, i, j).repeat(2, 1, 1)
        expected[i, j] = sim(twice, [store.captions[j].caption])[0, 0]
    check(found, expected)


def test_two_processes_and_a_name_give_the_same_bytes(tmp_path, monkeypatch):
    make_store(tmp_path / "store")
    (tmp_path / "own_similarity.py").write_text(
        "import numpy as np\n"
        "def sim(features, captions):\n"
        "    return features.sum((1, 2))[:, None] * len(captions[0])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    outs = []
    for count in (1, 2):
        outs.append(tmp_path / str(count))
        score_pairs(
            tmp_path / "store", "own_similarity:sim", outs[-1],
            images_per_call=2, processes=Processes(processes=count),
        )  # fmt: skip
    for name in ("similarities.npy", "manifest.json"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    assert json.loads((outs[0] / "manifest.json").read_text())["counts"]["pairs"] == 7 * 14


def run_killed(folder, place, number):
    kill_at_move(folder / "out" / place, number)
    score_pairs(folder / "store", toy, folder / "out", images_per_call=2)


def test_killed_runs_go_on(tmp_path):
    store = make_store(tmp_path / "store")
    calls = []

    def counting(features, captions):
        calls.append(captions)
        return toy(features, captions)

    counting.__qualname__ = toy.__qualname__
    # Before the first block is there, among them, and before the matrix and the manifest are.
    for place, number in [(".work/shards", 1), (".work/shards", 3), (".", 1), (".", 2)]:
        code = exit_code(run_killed, tmp_path, place, number)
        assert code == -signal.SIGKILL, (place, number)
        assert not (tmp_path / "out" / "manifest.json").exists()
    found = score_pairs(tmp_path / "store", counting, tmp_path / "out", images_per_call=2)
    check(found, plain_toy(store))
    assert len(calls) == 1  # only to see that it answers as before
    assert not (tmp_path / "out" / ".work").exists()


def test_other_input_is_named(tmp_path):
    make_store(tmp_path / "store")
    make_store(tmp_path / "other", digest="9")

    def score(store="store", sim=toy, **given):
        return score_pairs(tmp_path / store, sim, tmp_path / "out", **given)

    def changed(features, captions):
        return toy(features, captions) + 1

    score()
    changed.__qualname__ = toy.__qualname__
    for message, given in {
        r"store\.index\.npy is '0' there, '9' now": {"store": "other"},
        "sim is 'toy' there, 'own:sim' now": {"sim": sim_named("own:sim")},
        "first_answers": {"sim": changed},
        "num_boxes is 4 there, 2 now": {"num_boxes": 2},
        "encode_boxes is None there": {"encode_boxes": torch.nn.Identity()},
    }.items():
        with pytest.raises(ValueError, match=message):
            score(**given)
    before = np.array(score())
    assert np.array_equal(np.array(score(sim=changed, overwrite=True)), before + 1)


def sim_named(name):
    """A function under a name."""

    def sim(features, captions):
        return toy(features, captions)

    sim.__qualname__ = name
    return sim


def test_errors(tmp_path):
    make_store(tmp_path / "store")
    for given in ({"num_boxes": KEPT + 1}, {"num_boxes": -1}, {"images_per_call": 0}):
        with pytest.raises(ValueError, match="expected at least 1, and of the boxes at most the 4"):
            score_pairs(tmp_path / "store", toy, tmp_path / "out", **given)
    with pytest.raises(ValueError, match=r"shape \[32\] .* \[32, 4, 6\] .* expected \[32, 1\]"):
        score_pairs(tmp_path / "store", lambda f, c: f.sum((1, 2)), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no finished export of pairs"):
        score_pairs(tmp_path / "nothing", toy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_store_is_never_overwritten(tmp_path):
    folder = tmp_path / "store"
    make_store(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    published = [path.name for path in folder.iterdir() if path.name != "manifest.json"]
    manifest |= {"identity": {"of": "pairs"}, "published": published}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    before = sorted(path.name for path in folder.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is an input and would be replaced by output"):
            score_pairs(folder, toy, folder, overwrite=overwrite)
    assert sorted(path.name for path in folder.rglob("*")) == before
    assert json.loads((folder / "manifest.json").read_text()) == manifest


def test_retrieval_as_published(tmp_path):
    store = make_store(tmp_path / "store", images=6, each=7)
    found = score_pairs(tmp_path / "store", toy, tmp_path / "out")
    owner = np.repeat(np.arange(6), 7)
    five = np.arange(42) % 7 < 5
    results = pair_retrieval(store, found, fold=3, output_dir=str(tmp_path))
    assert results["all"] == retrieval_recall(found[:, five], owner[five])
    halves = [retrieval_recall(found[:3, :21][:, five[:21]], owner[:21][five[:21]]),
              retrieval_recall(found[3:, 21:][:, five[21:]], owner[:21][five[:21]])]  # fmt: skip
    for key, value in results["folds_of_3"].items():
        assert value == pytest.approx(np.mean([half[key] for half in halves]))
    every = pair_retrieval(store, found, captions_per_image=None)
    assert every["all"] == retrieval_recall(found, owner)
    assert json.loads((tmp_path / "retrieval_pairs.json").read_text()) == results


def test_the_tool_scores_and_evaluates(tmp_path, monkeypatch, capsys):
    store = make_store(tmp_path / "store", images=4, each=6)
    (tmp_path / "my_scan.py").write_text(
        "def sim(features, captions):\n"
        "    return features.sum((1, 2))[:, None] * len(captions[0])\n"
        "def double(features):\n"
        "    return 2 * features\n"
    )
    monkeypatch.chdir(tmp_path)
    tool = load_tool("score_pairs")
    words = ["--pairs", "store", "--sim", "my_scan:sim", "--out", "scores", "--boxes", "2"]
    assert tool.main([*words, "--encode-boxes", "my_scan:double", "--processes", "2"]) == 0
    found, captions = np.load("scores/similarities.npy"), store.captions
    expected = [
        [2 * plain_features(store, i, j, 2).sum() * len(c.caption) for j, c in enumerate(captions)]
        for i in range(4)
    ]
    assert_rounds_alike(torch.from_numpy(found), torch.tensor(expected))
    results = pair_retrieval(store, found)
    assert results["captions"] == 20
    shown = capsys.readouterr().out
    assert "pairs: 96" in shown and f"{results['all']['r@sum']:.2f}" in shown
    assert tool.main(words) == 1
    message = "encode_boxes is 'double' there, None now"
    assert message in capsys.readouterr().err
    assert tool.main([*words, "--overwrite", "--all-captions"]) == 0
    for name, message in {
        "my_scan:nothing": "no attribute 'nothing'",
        "nowhere:sim": "No module named 'nowhere'",
    }.items():
        assert tool.main(["--pairs", "store", "--sim", name, "--out", "other"]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main(["--pairs", "store", "--sim", "my_scan", "--out", "other"])
    assert "'my_scan': expected MODULE:NAME" in capsys.readouterr().err
