"""Classical baselines that need no weights: uint8 (H, W, 3) and a bool hole (H, W) -> uint8 (H, W, 3)."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

RADIUS = 3  # pixels that Telea and Navier-Stokes look at around each


def telea(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Fast marching. Telea 2004, https://doi.org/10.1080/10867651.2004.10487596"""
    return cv2.inpaint(_blank(picture, hole), hole.astype(np.uint8), RADIUS, cv2.INPAINT_TELEA)


def navier_stokes(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Isophotes carried on as a flow. Bertalmio et al. 2001, https://doi.org/10.1109/CVPR.2001.990497"""
    return cv2.inpaint(_blank(picture, hole), hole.astype(np.uint8), RADIUS, cv2.INPAINT_NS)


def biharmonic(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """The smoothest surface (biharmonic equation); a linear system as large as the hole, so for small pictures.

    Damelin and Hoang 2018, https://doi.org/10.1155/2018/3950312
    """
    from skimage.restoration import inpaint_biharmonic

    if hole.all():
        return np.full_like(picture, 128)  # nothing to go on from
    filled = inpaint_biharmonic(_blank(picture, hole), hole, channel_axis=-1)
    return np.round(255 * filled.clip(0, 1)).astype(np.uint8)


BASELINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "telea": telea,
    "navier-stokes": navier_stokes,
    "biharmonic": biharmonic,
}


def _blank(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Grey in the hole, so that nothing can look at the truth."""
    return np.where(hole[..., None], np.uint8(128), picture)
