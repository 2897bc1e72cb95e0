"""What a series' description and kernel say about it, as words of a fixed vocabulary and never as free text.

SeriesDescription (0008,103E), ProtocolName (0018,1030) and StudyDescription (0008,1030) are typed by people and may
hold names; only the marks below leave this module.
"""

from __future__ import annotations

import re
from typing import Final

PLAIN: Final = "plain"
CONTRAST: Final = "contrast"

_PLAIN: Final = re.compile(  # a contrast that is denied is part of the match
    r"(?:\bW[/ ]?O\b|\bWITHOUT\b|\bSANS\b|\bOHNE\b)(?:\W*(?:IV )?(?:CONTRAST\w*|CON\b|C\b))?"
    r"|\bNON?[- ]?(?:IV[- ])?CON(?:TRAST)?\b|\bNON[- ]?ENHANCED\b|\bUNENHANCED\b|\bN(?:C|E)CT\b|\bNCHCT\b"
    r"|\bPLAIN\b|\bPRE[- ]?CON(?:TRAST)?\b|\bNATIVE?\b|(?:^|\s)-C\b|\bC-(?=\s|$)"
)
_CONTRAST: Final = re.compile(
    r"CONTRAST|\bPOST[- ]?CON\b|\bWITH\b|\bW(?:[/ ] ?C(?:ON)?\b|/|$)|\bCECT\b|\bENHANCED\b|\+ ?C\b|\bC\+|\bE\+|\bCE\b"
    r"|\bARTERIAL\b|\bVENOUS\b|\bDELAYED\b|\b\d+ ?(?:CC|ML)\b"  # 4cc sec 150cc: rate and amount of an injection
)
_MARKS: Final = {
    name: re.compile(pattern)
    for name, pattern in {
        "angio": r"\bCT ?A\b|\bANGIO|\bCOW\b|\bWILLIS\b|\bCT ?V\b|\bVENOGRA",
        "perfusion": r"\bCT ?P\b|\bPERF|\bCBF\b|\bCBV\b|\bMTT\b|\bTTP\b|\bTMAX\b",
        "monitoring": r"\bSMART ?PREP\b|MONITORING\b|\bBOLUS\b|\bTRACK(?:ER|ING)\b",
        "report": r"\bDOSE\b|\bREPORT\b|\bSUMMARY\b|\bSCOUT\b|\bTOPO",
        "spine": r"\bSPINE?\b|\bCERVICAL\b|\bLUMBAR\b|\bC[- ]SPINE\b",
        "neck": r"\bNECK\b|\bCAROTID",
        "chest": r"\bCHEST\b|\bTHORA|\bLUNGS?\b",
        "abdomen": r"\bABD|\bPELVI|\bLIVER\b",
        "face": r"\bFAC(?:E|IAL)\b|\bSINUS|\bPNS\b|\bORBIT|\bTEMPORAL\b|\bIAC|\bMASTOID|\bMAXILL|\bMANDIB|\bDENTAL\b",
        "brain": r"\bBRAIN|\bHEAD\b|\bSKULL\b|\bCRANI|\bCEREBR|\bKOPF\b|\bSCHAEDEL\b",
        "bone": r"\bBONES?\b|\bBONE|\bOSSE?OUS\b",
        "reformatted": r"\bMPR\b|\bCOR(?:ONAL)?\b|\bSAG(?:ITTAL)?\b|\bREFORMAT|\b3 ?D\b|\bVRT?\b|\bMIP\b|\bSSD\b",
        "thin": r"\bTHIN\b",
    }.items()
}

_SOFT: Final = frozenset(
    {"SOFT", "STANDARD", "STND", "STD", "STD+", "BRAIN"}  # GE
    | {"A", "B", "C", "UA", "UB", "UC"}  # Philips
)
_BONE: Final = frozenset(
    {"BONE", "BONE+", "BONEPLUS", "BONE PLUS", "LUNG", "EDGE", "EDGE PLUS", "ULTRA"}  # GE
    | {"D", "E", "L", "YB", "YC", "YD", "YE"}  # Philips
)
_SIEMENS: Final = re.compile(r"[A-Z][A-Z]?(\d{2})[A-Z]?")
_TOSHIBA: Final = re.compile(r"FC(\d{2})")
_SIEMENS_SOFT_TO: Final = 50
_SIEMENS_BONE_FROM: Final = 54


def marks_of(series: str, *others: str) -> str:
    """Return the marks of a series, sorted, joined by spaces; empty where no word is known.

    ``series`` is its own description, ``others`` those of protocol and study, which describe further series too: of
    them only ``plain`` or ``contrast`` is taken, and only where nothing nearer says either. A text with both (``HEAD
    W/O & W CONTRAST``) says neither.
    """
    texts = [" ".join(text.upper().replace("_", " ").split()) for text in (series, *others)]
    found = {name for name, pattern in _MARKS.items() if pattern.search(texts[0])}
    said = next((one for text in texts if (one := _contrast_of(text)) is not None), "")
    return " ".join(sorted(found | ({said} if said else set())))


def _contrast_of(text: str) -> str | None:
    """Return ``plain``, ``contrast``, an empty text for both, or None for neither."""
    rest, plain = _PLAIN.subn(" ", text)
    contrast = _CONTRAST.search(rest)
    if plain and contrast:
        return ""
    return PLAIN if plain else CONTRAST if contrast else None


def kernel_kind(kernel: str) -> str:
    """Tell ``soft`` from ``bone`` by ConvolutionKernel (0018,1210); ``unknown`` for a code not known here.

    GE and Philips by name. Siemens (H31s, J40f, Hr38): the number is the sharpness, up to 50 soft, from 54 sharp.
    Toshiba and Canon (FC21): head and body kernels are 01 to 29, 40 to 49 and 60 to 69; 30 to 39 and 80 to 89 are for
    bone, 50 to 59 for lung.
    """
    code = kernel.partition("\\")[0].strip().upper()
    if code in _SOFT:
        return "soft"
    if code in _BONE:
        return "bone"
    if found := _TOSHIBA.fullmatch(code):
        tens = int(found[1]) // 10
        return "soft" if tens in {0, 1, 2, 4, 6} else "bone" if tens in {3, 5, 8} else "unknown"
    if found := _SIEMENS.fullmatch(code):
        number = int(found[1])
        return "soft" if number <= _SIEMENS_SOFT_TO else "bone" if number >= _SIEMENS_BONE_FROM else "unknown"
    return "unknown"
