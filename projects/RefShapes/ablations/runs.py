"""The runs of an ablation: their configs, their settings, and whether they are finished."""

from __future__ import annotations

import functools
import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from vlnms_d2.config import default_config, load_config
from vlnms_d2.data.pseudo_gt import prepared_folder, pseudo_gt_file
from vlnms_d2.file_io import shown, write_json
from vlnms_d2.modeling.relatedness import relatedness_class

# Settings that do not change the results of a run.
IRRELEVANT = (
    "OUTPUT_DIR",
    "MODEL.VLNMS.CACHE_DIR",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.CHECKPOINT_PERIOD",
)
# Variants without a config of their own: the ending of their name, what their config's name has
# in its place, and KEY VALUE on top of it.
VARIANTS = {
    "_no_context": ("", "MODEL.VLNMS.PSEUDO_GT.CONTEXT", "False"),
    "_no_refinement": ("_joint", "MODEL.VLNMS.REG_WEIGHT", "0.0"),
}


@dataclass(frozen=True)
class Run:
    """One config with one seed.

    Attributes:
        config_file: the config.
        seed: its `SEED`.
        folder: its `OUTPUT_DIR`.
        opts: all KEY VALUE overrides of the config.
    """

    config_file: Path
    seed: int
    folder: Path
    opts: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.folder.parent.name

    @property
    def title(self) -> str:
        return f"{self.name} seed {self.seed}"

    @property
    def trains(self) -> bool:
        """Whether the model has parameters to train; otherwise it is only evaluated."""
        return relatedness_class(self.cfg).learns

    @property
    def weights(self) -> Path:
        """The file of its final weights."""
        return self.folder / "model_final.pth" if self.trains else Path(self.cfg.MODEL.WEIGHTS)

    @functools.cached_property
    def cfg(self) -> CfgNode:
        """The config as tools/train_net.py builds it."""
        cfg = load_config(self.config_file, self.opts)
        cfg.MODEL.VLNMS.FINAL_SCORE_THRESH = 0.0
        return cfg

    def recall_files(self) -> dict[str, Path]:
        """The result file of each test set."""
        inference = self.folder / "inference"
        return {name: inference / f"recall_{name}.json" for name in self.cfg.DATASETS.TEST}

    def digest(self) -> str | None:
        """A digest of the settings that the run was started with; None before it was started."""
        path = self.folder / "settings.json"
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None

    def done(self) -> dict[str, Any] | None:
        """The content written by `finish`, if the run is finished and all its results exist."""
        path = self.folder / "done.json"
        if not path.is_file() or not all(p.is_file() for p in self.recall_files().values()):
            return None
        done = json.loads(path.read_text())
        return done if done["digest"] == self.digest() else None

    def finish(self, seconds: float) -> None:
        """Mark the run as finished.

        Args:
            seconds: wall time of the last process, with training and evaluation.

        Raises:
            ValueError: results are missing.
        """
        missing = [str(path) for path in self.recall_files().values() if not path.is_file()]
        if missing:
            raise ValueError(f"it ended without writing {', '.join(missing)}")
        write_json(self.folder / "done.json", {"digest": self.digest(), "seconds": seconds})


def plan(
    out: Path, config_files: Sequence[Path], seeds: Sequence[int], overrides: Sequence[str]
) -> list[Run]:
    """All runs, ordered by seed. A config without training has a single run.

    Raises:
        ValueError: a config is missing, has the name of another one or no test set; a seed is given
            twice; or overrides are not pairs or change a key that is set here.
    """
    variants = {path: resolve_variant(path) for path in config_files}
    missing = [str(path) for path, (file, _) in variants.items() if not file.is_file()]
    if missing:
        raise ValueError(f"no such config: {', '.join(missing)}")
    if len({path.stem for path in config_files}) < len(config_files):
        raise ValueError("two configs have the same name, hence the same folder")
    if len(set(seeds)) < len(seeds):
        raise ValueError("a seed is given twice")
    keys = overrides[::2]
    if len(overrides) % 2:
        raise ValueError(f"overrides must be KEY VALUE pairs, got {shlex.join(overrides)}")
    for key in ("SEED", "OUTPUT_DIR"):
        if key in keys:
            raise ValueError(f"{key} cannot be overridden; use --seeds and --out")
    runs = []
    for seed in seeds:
        for path in config_files:
            folder = out / path.stem / f"seed{seed}"
            opts = ["SEED", str(seed), "OUTPUT_DIR", str(folder)]
            opts += ["MODEL.META_ARCHITECTURE", "CachedRCNN"]
            opts += ["MODEL.VLNMS.CACHE_DIR", str(out / "cache")]
            file, variant_opts = variants[path]
            run = Run(file, seed, folder, (*opts, *variant_opts, *overrides))
            if seed == seeds[0] or run.trains:
                runs.append(run)
            if not run.cfg.DATASETS.TEST:
                raise ValueError(
                    f"{path}: DATASETS.TEST is empty, so there is no result to wait for"
                )
    return runs


def resolve_variant(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The config file of a variant, and the KEY VALUE pairs on top of it.

    `X_no_context.yaml` stands for `X.yaml` with the pair in `VARIANTS`, unless that file exists. A
    name can have several of these endings.
    """
    opts: list[str] = []
    for ending, (instead, *pair) in VARIANTS.items():
        if path.stem.endswith(ending) and not path.is_file():
            path = path.with_stem(path.stem.removesuffix(ending) + instead)
            opts += pair
    return path, tuple(opts)


def settings(cfg: CfgNode) -> dict[str, Any]:
    """All settings that change the results of a run, by their full keys. Weights and pseudo ground
    truth are represented by a digest of their content."""
    flat = _flatten(json.loads(json.dumps(cfg)))  # with lists for tuples, as in settings.json
    folder = prepared_folder(cfg.MODEL.VLNMS.PSEUDO_GT.DIR)
    contents = {
        "MODEL.WEIGHTS": [Path(cfg.MODEL.WEIGHTS)],
        "MODEL.VLNMS.PSEUDO_GT.DIR": [pseudo_gt_file(folder, n) for n in cfg.DATASETS.TRAIN],
    }
    for key, paths in contents.items():
        digests = [_file_digest(path) for path in paths if path.is_file()]
        if digests:
            flat[key] = f"sha256 {' '.join(digests)}"
    return {key: value for key, value in flat.items() if key not in IRRELEVANT}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        full = f"{prefix}{key}"
        flat |= _flatten(value, f"{full}.") if isinstance(value, dict) else {full: value}
    return flat


@functools.cache
def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def check_settings(run: Run) -> None:
    """Check that the content of the run's folder was made with the present settings.

    Raises:
        ValueError: it was made with other settings, or the settings are unknown.
    """
    advice = f"delete {run.folder} or give another --out"
    path = run.folder / "settings.json"
    if not path.is_file():
        if any((run.folder / name).exists() for name in ("last_checkpoint", "done.json")):
            raise ValueError(
                f"{run.folder} holds a run that was not started as one of these; {advice}"
            )
        return
    # Keys that were added to the config later had the effect of their default.
    before = settings(default_config()) | json.loads(path.read_text())
    now = settings(run.cfg)
    changes = [
        f"{key} was {shown(before.get(key))}, is {shown(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changes:
        raise ValueError(
            f"{run.folder} was made with other settings ({'; '.join(changes)}); {advice}"
        )
