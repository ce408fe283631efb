"""Checkpoints that a kill cannot leave half-written."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer

from ..file_io import atomic_write


class AtomicCheckpointer(DetectionCheckpointer):
    """`DetectionCheckpointer` that writes to a temporary file and renames it."""

    def save(self, name: str, **kwargs) -> None:
        """Save the model, all checkpointables and `kwargs` to `{save_dir}/{name}.pth`."""
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict(), **kwargs}
        content.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info("Saving checkpoint to %s", path)
        with atomic_write(path) as file:
            torch.save(content, file)
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Remember which checkpoint is the last, for `resume_or_load`."""
        with atomic_write(Path(self.save_dir) / "last_checkpoint") as file:
            file.write(last_filename_basename.encode())
