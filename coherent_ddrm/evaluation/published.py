"""Numbers that papers report, as rows; which pictures, masks and metrics they belong to is said in protocols.py.

`checked` rows were read when this file was written, in the place that `source` names; the others are from memory, and
every page that prints them says "unverified" beside them. P-IDS, U-IDS and votes are shares of 1 here, as this project
scores them; the papers print per cent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PERCENT = ("p_ids", "u_ids", "votes")  # printed as per cent in the papers


@dataclass(frozen=True)
class Published:
    """One number of a paper.

    Attributes:
        method: as the paper calls it
        mask: this project's maker of that kind of hole
        metric: this project's name of the score; "votes" is the share of votes against RePaint in its user study
        value: in this project's unit
        printed: as the paper prints it
        source: the table, and where it was read
        data: the pictures, a name of the protocol's `data`
        checked: read in the source; False: from memory
    """

    method: str
    mask: str
    metric: str
    value: float
    printed: str
    source: str
    data: str
    checked: bool = True


Columns = Sequence[tuple[str, str]]  # (mask, metric) of each number in a line


def _rows(text: str, columns: Columns, source: str, data: str, checked: bool = True) -> Iterator[Published]:
    """Rows of a table: each line a method, a bar, and its numbers in the paper's unit; - where there is none."""
    for line in text.strip().splitlines():
        method, numbers = line.split("|")
        for (mask, metric), number in zip(columns, numbers.split(), strict=True):
            if number != "-":
                value = round(float(number) / 100, 6) if metric in PERCENT else float(number)
                printed = f"{number} %" if metric in PERCENT else number
                yield Published(method.strip(), mask, metric, value, printed, source, data, checked)


def _each(masks: Sequence[str], *metrics: str) -> list[tuple[str, str]]:
    return [(mask, metric) for mask in masks for metric in metrics]


# LaMa: narrow, then wide masks; FID and LPIPS of each.
_LAMA = _each(("lama-thin", "lama-thick"), "fid", "lpips_vgg")
_LAMA_READ = "read in a transcription of the paper's tables"

PLACES_LAMA = (
    *_rows("LaMa-Fourier | 0.63 0.090 2.21 0.135", _LAMA, f"LaMa, Tables 1 and 2; {_LAMA_READ}", "places2"),
    *_rows(
        """
        LaMa-Dilated | 0.66 0.089 2.30 0.136
        LaMa-Regular | 0.60 0.089 3.51 0.139
        """,
        _LAMA,
        f"LaMa, Table 2; {_LAMA_READ}",
        "places2",
    ),
    *_rows("CoModGAN | - - 1.82 0.147", _LAMA, f"LaMa, Table 1; {_LAMA_READ}", "places2"),
    *_rows(
        """
        RegionWise   | 0.90 0.102 4.75 0.149
        DeepFill v2  | 1.06 0.104 5.20 0.155
        EdgeConnect  | 1.33 0.111 8.37 0.160
        """,
        _LAMA,
        f"LaMa, Table 4, rows trained with narrow masks; {_LAMA_READ}",
        "places2",
    ),
    *_rows(
        """
        CoModGAN     | 0.82 0.111 - -
        MADF         | 0.57 0.085 3.76 0.139
        AOT GAN      | 0.79 0.091 5.94 0.149
        """,
        _LAMA,
        "LaMa, Table 1; from memory",
        "places2",
        checked=False,
    ),
)

CELEBAHQ_LAMA = (
    *_rows("LaMa-Fourier | 7.26 0.085 6.96 0.098", _LAMA, f"LaMa, Table 1; {_LAMA_READ}", "celebahq"),
    *_rows(
        """
        CoModGAN     | 16.8 0.079 24.4 0.102
        AOT GAN      | 6.67 0.081 10.3 0.118
        RegionWise   | 11.1 0.124 8.54 0.121
        DeepFill v2  | 12.5 0.130 11.2 0.126
        EdgeConnect  | 9.61 0.099 9.02 0.120
        """,
        _LAMA,
        "LaMa, Table 1; from memory",
        "celebahq",
        checked=False,
    ),
)

# RePaint: wide, narrow, super-resolve 2x, alternating lines, half, expand, in the order of its Table 1.
_REPAINT_MASKS = (
    "repaint-thick",
    "repaint-thin",
    "repaint-super-resolve",
    "repaint-every-second-line",
    "repaint-half",
    "repaint-expand",
)
_LPIPS = _each(_REPAINT_MASKS, "lpips_alex")
_VOTES = _each(_REPAINT_MASKS, "votes")
_REPAINT_READ = "read in a transcription of the paper"
_REPAINT_1 = f"RePaint, Table 1; {_REPAINT_READ}"
_REPAINT_4 = f"RePaint, Table 4; {_REPAINT_READ}"
_REPAINT_5 = f"RePaint, Table 5 (appendix); {_REPAINT_READ}"

REPAINT = (
    *_rows(
        """
        AOT        | 0.104 0.047 0.714 0.667 0.287 0.604
        DSI        | 0.067 0.038 0.128 0.049 0.211 0.487
        ICT        | 0.063 0.036 0.483 0.353 0.166 0.432
        DeepFillv2 | 0.066 0.049 0.119 0.049 0.209 0.467
        LaMa       | 0.045 0.028 0.177 0.083 0.138 0.342
        RePaint    | 0.059 0.028 0.029 0.009 0.165 0.435
        """,
        _LPIPS,
        _REPAINT_1,
        "celebahq",
    ),
    *_rows("SDEdit | 0.076 0.046 0.113 0.030 0.189 0.449", _LPIPS, _REPAINT_4, "celebahq"),
    *_rows(
        """
        AOT        | 11.6 12.8  1.1  2.4  9.0  8.3
        DSI        | 16.0 22.3  5.5  5.1  4.5  4.7
        ICT        | 27.6 30.9  4.2  0.7 12.7  8.8
        DeepFillv2 | 23.9 21.0  9.8 10.6  4.1 13.1
        LaMa       | 41.8 33.8  5.5 20.6 35.6 24.7
        """,
        _VOTES,
        _REPAINT_1,
        "celebahq",
    ),
    *_rows(
        """
        DSI        | 0.117 0.072 0.153 0.069 0.283 0.583
        ICT        | 0.107 0.073 0.708 0.620 0.255 0.544
        LaMa       | 0.105 0.061 0.272 0.121 0.254 0.534
        RePaint    | 0.134 0.064 0.183 0.089 0.304 0.629
        """,
        _LPIPS,
        _REPAINT_1,
        "imagenet",
    ),
    *_rows("SDEdit | 0.153 0.095 0.390 0.185 0.327 0.628", _LPIPS, _REPAINT_4, "imagenet"),
    *_rows(
        """
        DSI        | 31.7 28.6 26.9 23.6 31.4  9.2
        ICT        | 42.9 33.0  1.1  6.6 51.5 25.6
        LaMa       | 42.4 33.6 13.0  9.6 41.1 20.3
        """,
        _VOTES,
        _REPAINT_1,
        "imagenet",
    ),
    *_rows(
        """
        AOT        | 0.112 0.062 0.560 0.399 0.263 0.686
        DSI        | 0.101 0.054 0.157 0.083 0.265 0.565
        ICT        | 0.101 0.057 0.776 0.672 0.256 0.554
        DeepFillv2 | 0.097 0.051 0.120 0.070 0.254 0.550
        LaMa       | 0.078 0.039 0.369 0.138 0.233 0.512
        RePaint    | 0.105 0.044 0.099 0.051 0.286 0.615
        """,
        _LPIPS,
        _REPAINT_5,
        "places2",
    ),
    *_rows("SDEdit | 0.130 0.062 0.271 0.130 0.304 0.620", _LPIPS, _REPAINT_4, "places2"),
    *_rows(
        """
        AOT        | 35.4 36.0  2.2  0.8 34.0  0.7
        DSI        | 27.4 33.1  8.4  6.9 33.7 13.8
        ICT        | 35.7 33.7  0.9  1.3 26.0 26.6
        DeepFillv2 | 29.7 33.0 15.8 15.4 32.8 12.9
        LaMa       | 47.7 43.3  7.5 21.5 34.0 39.4
        """,
        _VOTES,
        _REPAINT_5,
        "places2",
    ),
)

# MAT: small, then large masks; FID, P-IDS and U-IDS of each.
_MAT = _each(("mat-small", "mat-large"), "fid", "p_ids", "u_ids")
_MAT_README = "read in the README of the authors' repository"
_PSM_READ = "read in a third party's summary of PSM (arXiv:2212.02963), which repeats them"

PLACES_MAT = (
    *_rows(
        """
        MAT           | 1.07 27.42 41.93 2.90 19.03 35.36
        CoModGAN      | 1.10 26.95 41.88 2.92 19.64 35.78
        LaMa-Big      | 0.99 22.79 40.58 2.97 13.09 32.39
        """,
        _MAT,
        f"MAT, Table 2; {_MAT_README}",
        "places2",
    ),
    *_rows(
        "MAT (8M pictures) | 0.78 31.72 43.71 1.96 23.42 38.34",
        _MAT,
        f"MAT, released after the paper; {_MAT_README}",
        "places2",
    ),
)

CELEBAHQ_MAT = (
    *_rows("MAT | 2.86 21.15 32.56 - - -", _MAT, "MAT; given by an author in issue 86 of its repository", "celebahq"),
    *_rows(
        """
        MAT           | - - - 4.86 13.83 25.33
        CoModGAN      | 3.26 19.65 31.41 5.65 11.23 22.54
        """,
        _MAT,
        f"MAT; {_PSM_READ}",
        "celebahq",
    ),
)
