"""One picture -> the members of its sample: the square picture, its edges, its segmentation, its description."""

import hashlib
import json
import os
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from plan import Options
from records import Result, class_id

from coherent_ddrm.images import ImageError, encode, fit, read_image, read_labels, read_size, resize
from coherent_ddrm.saliency import WORKING_SIZE, foreground
from coherent_ddrm.structure_maps import IGNORE, SegmentationModel, edges

PILLOW_NAME = {"png": "PNG", "webp": "WEBP", "jpg": "JPEG"}


def start_maker(images: Path, options: Options, plan: dict) -> "Maker":
    """A Maker, in a process that it has to itself."""
    one_thread()
    return Maker(images, options, plan)


def one_thread() -> None:
    """One thread a process: the processes fill the cores, and the bytes do not depend on a thread count."""
    import torch  # late: the parent of worker processes does without it

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    Image.MAX_IMAGE_PIXELS = None  # --max-pixels is the limit, checked before decoding, and it may be higher


class Maker:
    """Makes the members of one sample. Lives in a worker; holds no state that a picture could change."""

    def __init__(self, images: Path, options: Options, plan: dict) -> None:
        self.images, self.options, self.plan = images, options, plan
        kind, _, self.argument = options.segmentation.partition(":")
        self.segment = {"none": None, "saliency": self._saliency, "labels": self._labels, "model": self._model}[kind]
        self.network = SegmentationModel(self.argument) if kind == "model" else None

    def __call__(self, row: dict) -> Result:
        result = Result(row)
        try:
            self._make(result)
        except ImageError as error:
            result.members, result.skipped = {}, str(error).removeprefix(f"{row['path']}: ")
        except Exception as error:  # one odd picture must not end a run over millions; it is listed, never lost
            result.members, result.skipped = {}, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return result

    def _make(self, result: Result) -> None:
        options, path = self.options, result.row["path"]
        try:
            content = (self.images / path).read_bytes()
        except OSError as error:
            raise ImageError(f"{path}: cannot be read ({error.strerror}).") from error
        height, width = read_size(content, path, options.max_pixels)
        if min(height, width) < options.min_size:
            raise ImageError(f"{path}: {width} x {height} is smaller than --min-size {options.min_size}.")
        source = read_image(content, path, options.max_pixels, at_least=4 * max(options.size, 64))
        picture = fit(source, options.size, options.fit)
        twice = fit(source, 2 * options.size, options.fit)
        members = {"image": encode(picture, PILLOW_NAME[options.format], options.quality)}
        members["edges"] = encode(edges(twice[None])[0], "PNG")
        if self.segment is not None:
            labels = self.segment(source, (height, width), result)
            found = labels[labels != IGNORE]
            result.largest_id = int(found.max()) if found.size else -1
            members["segmentation"] = encode(labels, "PNG")
        members["json"] = self._description(result.row, content, (height, width))
        result.members = members

    def _description(self, row: dict, content: bytes, size: tuple[int, int]) -> bytes:
        description = {
            "class": row["class"],
            "class_id": class_id(row, self.plan),
            "caption": row["caption"],
            "path": row["path"],
            "size": list(size),
            "source_sha256": hashlib.sha256(content).hexdigest(),
        }
        return json.dumps(description, sort_keys=True).encode()

    def _saliency(self, source: np.ndarray, source_size: tuple[int, int], result: Result) -> np.ndarray:
        """Background 0; foreground 1, or 1 + the class; all ignored when no cut was good enough."""
        size = self.options.size
        cut = foreground(fit(source, WORKING_SIZE, self.options.fit))
        result.saliency = "kept" if cut.kept else "refused"
        if not cut.kept:
            return np.full((size, size), IGNORE, np.uint8)
        inside = 1
        if self.plan["class_names"]:
            known = class_id(result.row, self.plan)
            inside = 1 + known if known >= 0 else IGNORE
        covered = resize(cut.mask.astype(np.uint8) * 255, size, size) >= 128
        return np.where(covered, inside, 0).astype(np.uint8)

    def _labels(self, source: np.ndarray, source_size: tuple[int, int], result: Result) -> np.ndarray:
        relative = os.path.splitext(result.row["path"])[0] + ".png"
        labels = read_labels(Path(self.argument) / relative, f"label map {relative}", self.options.max_pixels)
        if labels.shape != source_size:
            raise ImageError(f"label map {relative} is {labels.shape[::-1]}, its picture {source_size[::-1]} (w, h).")
        return self._known_ids(fit(labels, self.options.size, self.options.fit, labels=True))

    def _model(self, source: np.ndarray, source_size: tuple[int, int], result: Result) -> np.ndarray:
        side = max(self.options.size, min(512, *source.shape[:2]))
        ids = self.network(fit(source, side, self.options.fit))
        return self._known_ids(fit(ids, self.options.size, "stretch", labels=True))

    def _known_ids(self, labels: np.ndarray) -> np.ndarray:
        labels = np.where(np.isin(labels, self.options.ignore_label), IGNORE, labels).astype(np.uint8)
        names = self.plan["label_names"]
        unknown = [] if names is None else sorted(set(np.unique(labels)) - set(range(len(names))) - {IGNORE})
        if unknown:
            raise ImageError(f"the label map holds the id {unknown[0]}, but there are {len(names)} label names.")
        return labels
