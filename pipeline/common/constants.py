"""Constants and abbreviations that several rooms share."""

from __future__ import annotations

from typing import Final

from ichpipe.common.classes import CLASSES

MIN_HU: Final = -1024  # the lowest Hounsfield unit that the DICOM reader returns; padding gets this value
MAX_HU: Final = 32767  # the highest Hounsfield unit that the DICOM reader returns
AIR_HU: Final = -1000.0  # air, by definition
MAX_SIDE_PX: Final = 4096  # no CT image is wider; decoding what a damaged header claims would fill the memory
SPACINGS_MM: Final = (0.05, 5.0)  # distances of pixels; a damaged one would ask for any amount of work
SQUARE_WITHIN: Final = 0.01  # pixels whose sides differ by less count as square
TIE_MM: Final = 1e-3  # slices closer than this along the normal lie at one position
THICK_SLICE_MM: Final = 5.0  # slice thickness of most head scans, and of RSNA 2019's, on which models are trained
# Usual abbreviation of each class; CQ500 names its columns by them.
ABBREVIATIONS: Final = dict(zip(CLASSES, ("ICH", "EDH", "IPH", "IVH", "SAH", "SDH"), strict=True))
