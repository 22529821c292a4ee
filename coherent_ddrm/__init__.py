"""Coherent-DDRM: fill large holes in pictures so that what is invented agrees with what is known.

Importing the package is cheap on purpose (no torch): `coherent-ddrm --help` must answer at once.
"""

__version__ = "0.1.0"
