"""What every method of an evaluation is given alike."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """What every method is given alike."""

    data: str  # folder of pictures, or of shards
    masks: tuple[str, ...]  # names of makers, or NAME=FOLDER of masks named as the pictures
    size: int  # side of the pictures, pixels
    count: int  # pictures, spread evenly over the data; 0 = all
    seed: int
    candidates: int = 1  # results per picture and hole
    resize: str = "crop"  # how a photograph becomes a square: a policy of images.fit
