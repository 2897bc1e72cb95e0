"""Turns a series' descriptions and kernel into words of a fixed vocabulary, never free text.

People type SeriesDescription (0008,103E), ProtocolName (0018,1030) and StudyDescription (0008,1030), which may hold
names; only the marks below leave this module.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Final

PLAIN: Final = "plain"
CONTRAST: Final = "contrast"

_AGENT: Final = (  # a C-spine is no agent
    r"(?:CONTRAST\w*|KONTRAST\w*|CON|CE|CIV|C|DYE|ENH\w*|INJ\w*|IV|KM|MDC|PDC|ORAL"
    r"|(?:PRODUIT|MEZZO|MEDIO|MEIO|AGENTE)\W+(?:DI|DE)\W+CONTRAST\w*)\b(?![- ]*SP)"
)
_WITHOUT: Final = r"(?:W[/ ]?O(?:UT)?|WITHOUT)"
_ABROAD: Final = r"(?:SANS|OHNE|SIN|SEM|SENZA|ZONDER|GEEN|UTAN|UDEN|INGEN|UTEN|BEZ)"
_BOTH: Final = re.compile(  # W/WO, with and without: a protocol of two phases
    rf"\bW(?:ITH)?\W*(?:AND|OR)?\W*{_WITHOUT}\b|\b{_WITHOUT}\W*(?:AND|OR)?\W*W(?:ITH)?\b(?![/ ]?O)"
)
_PLAIN: Final = re.compile(  # a contrast that is denied is part of the match
    rf"\b{_WITHOUT}\b(?!\W*(?:GANTRY|TILT|ANG|SED|MOTION))(?:\W*(?:IV\W+)?{_AGENT})?"
    rf"|\b{_ABROAD}\W+(?:I\W?V\W+)?{_AGENT}(?:\W*(?:IV|EV)\b)?|\bS/ ?C(?:ONTRAST\w*)?\b"
    r"|\bNON?[- ]?(?:IV[- ]?)?(?:CON(?:TRAST\w*)?|CE|ENH\w*|IV|ORAL)\b|\bUNENHANCED\b|\bN(?:C|E)CT\b|\bNCHCT\b"
    r"|\bPLAIN\b|\bPRE[- ]?(?:CON(?:TRAST\w*)?|CE|C(?![- ]*SP))\b|\bCONTRAST[- ]?FREE\b|\bNATI(?:VE?|VO|F)\b|\bSIMPLE\b"
    r"|\bBLANCO\b|(?<![\w+/])-C\b(?!-)|\bC-(?!\w)"
)
_CONTRAST: Final = re.compile(
    rf"CONTRAST|\bKONTRAST|\bPOST[- ]?(?:CON|CE|INJ\w*)\b|\b(?:W/?|WITH|MIT|AVEC) ?{_AGENT}|\b(?:W/?|WITH)$|\bCECT\b"
    r"|\bENHANCED\b|\+ ?C\b(?![- ]*SP)|\bC\+|\bE\+|\bCE\b|\bC?IV\b|\bORAL\b|\bARTERIAL\b|\bVENOUS\b|\bDELAYED\b"
    r"|\bKM\b|\bMDC\b|\bPDC\b|\bAPRES INJ"
    r"|\b\d+ ?(?:CC|ML)\b"  # 4cc/sec 150cc: rate and amount of an injection
)
# Words of a ContrastBolusAgent that says that there was none; also in other languages of Europe.
_DENIALS: Final = frozenset({
    "N", "NO", "NON", "NONE", "NIL", "NIHIL", "NOTHING", "NULL", "NEG", "NEGATIVE", "NA", "N/A", "NOT", "OFF", "FALSE",
    "F", "UNKNOWN", "UNK", "UNSPECIFIED", "UNDEFINED", "EMPTY", "XXX", "WO", "W/O", "W/OUT", "WITHOUT", "BEFORE",
    "PRE", "OHNE", "KEIN", "KEINE", "KEINER", "KEINES", "K", "SANS", "AUCUN", "SIN", "NINGUNO", "SENZA", "NESSUNO",
    "SEM", "NENHUM", "ZONDER", "GEEN", "UTAN", "UDEN", "UTEN", "INGEN", "BEZ", "BRAK", "EI", "KONTRASTSIZ", "S/C",
    "SC", "PLAIN", "NATIV", "NATIVE", "NATIVO", "NATIF", "UNENHANCED",
})  # fmt: skip
_FILLERS: Final = frozenset({
    "A", "I", "V", "E", "IV", "EV", "CON", "CE", "KM", "CM", "CIV", "MDC", "PDC", "DYE", "ORAL", "AGENT", "AGENTS",
    "MEDIA", "MEDIUM", "BOLUS", "GIVEN", "USED", "ADMINISTERED", "ADDED", "APPLICABLE", "AVAILABLE", "DONE",
    "REQUIRED", "INJECTED", "INJECTION", "SPECIFIED", "PRODUIT", "MEZZO", "MEDIO", "MEIO", "DE", "DI", "AND", "OR",
    "ML", "CC",
})  # fmt: skip
_CONTRAST_WORD: Final = re.compile(r"[CK]ONTRAST\w*|VARJOAINE\w*")
_DENIED_BY_SIGN: Final = re.compile(r"(?:C|CM|CE|KM|IV) ?\(?-\)?|\(?-\)? ?(?:C|CM|CE|KM|IV)")  # C-, -C, IV (-)
_NO_DOSE: Final = re.compile(r"0+(?: 0+)? ?(?:ML|CC)\b")
_DENIED_IN_OTHER_SCRIPTS: Final = re.compile("なし|無|无|未|平扫|平掃|単純|單純|없음|없|БЕЗ|НЕТ|НАТИВ|ΧΩΡΙΣ|ללא|بدون")
_MARKS: Final = {
    name: re.compile(pattern)
    for name, pattern in {
        "angio": r"\bCT ?A\b|\bANGIO|\bCOW\b|\bWILLIS\b|\bCT ?V\b|\bVENOGRA|\bVESSEL",
        "perfusion": r"\bCT ?P\b|\bPERF(?:US\w*)?\b|\bCBF\b|\bCBV\b|\bMTT\b|\bTTP\b|\bTMAX\b",
        "monitoring": r"\bSMART ?PREP\b|MONITORING\b|BOLUS|\bTRACK(?:ER|ING)\b|\bSURE ?START\b",
        "report": r"(?<!LOW[- ])(?<!REDUCED[- ])\bDOSE\b(?! RED)|\bREPORT\b|\bSUMMARY\b"
        r"|\bSCOUT|\bTOPO|\bLOCALI[SZ]ER|\bSCANOGRAM|\bSURVIEW",
        "spine": r"SPIN(?:E|AL)\b|\bCERVICAL\b|\bLUMBAR\b",
        "neck": r"\bNECK\b|\bCAROTID",
        "chest": r"\bCHEST\b|\bTHORA|\bLUNGS?\b",
        "abdomen": r"\bABD|\bPELVI|\bLIVER\b|\bKUB\b",
        "face": r"\bFAC(?:E|IAL)\b|\bSINUS|\bPNS\b|\b(?:HEAD)?ORBIT|\bTEMPORAL\b(?! LOBE)|\bIAC|\bMASTOID|\bMAXILL"
        r"|\bMANDIB|\bDENTAL\b|\bPARANASAL|\bNASAL\b|\bPETROUS\b",
        "brain": r"\bBRAIN|\bHEAD|\bSKULL\b|\bCRAN(?:I|E)|\bCEREB|\bKOPF\b|\bSCHAE?DEL\b",
        "bone": r"\bBONE|\bOSS(?:E?OUS|O)\b|\bOSEO\b|\bKNOCHEN",
        "reformatted": r"\bMPR\b|\bCOR(?:ONAL)?\b|\bSAG(?:ITTAL)?\b|\bREFORMAT|\b3 ?D\b|\bVRT?\b|\bVOLUME REND"
        r"|\bM(?:IN|AX)?IPS?\b|\bSSD\b",
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
_SIEMENS: Final = re.compile(r"[BCDHIJQSTUV][A-Z]?(\d\d)[A-Z]?")
_TOSHIBA: Final = re.compile(r"FC(\d)\d(?:-[A-Z])?")
_TOSHIBA_KINDS: Final = dict.fromkeys("0126", "soft") | dict.fromkeys("358", "bone")
_SIEMENS_SOFT_BELOW: Final = 50
_SIEMENS_BONE_FROM: Final = 55


@lru_cache(maxsize=4096)
def marks_of(series: str, *others: str) -> str:
    """Return the marks of a series, sorted, joined by spaces; empty where no word is known.

    ``series`` is its own description, ``others`` those of protocol and study, which describe further series too: of
    them only ``plain`` or ``contrast`` is taken, and only where nothing nearer says either. A text with both (``HEAD
    W/O & W CONTRAST``) says neither. Case, accents and underscores don't matter.
    """
    texts = [" ".join(_ascii_upper(text).replace("_", " ").split()) for text in (series, *others)]
    marks = {name for name, pattern in _MARKS.items() if pattern.search(texts[0])}
    for text in texts:
        rest, plain = _PLAIN.subn(" ", text)
        contrast = _CONTRAST.search(rest)
        if _BOTH.search(text) or (plain and contrast):
            break
        if plain or contrast:
            marks.add(PLAIN if plain else CONTRAST)
            break
    return " ".join(sorted(marks))


@lru_cache(maxsize=4096)
def names_agent(text: str) -> bool:
    """Say whether a ContrastBolusAgent (0018,0010) names an agent; people also type that there was none.

    ``NONE``, ``-``, ``UNENHANCED``, ``NO IV CONTRAST``, ``0 ml`` and ``UNKNOWN`` name none, also in other languages.
    A text in another script names an agent unless it has one of a few words that deny it.
    """
    latin = _ascii_upper(text)
    if not re.search(r"[A-Z0-9]", latin):
        return any(map(str.isalnum, text)) and not _DENIED_IN_OTHER_SCRIPTS.search(text.upper())
    words = {word.replace(" ", "") for word in re.findall(r"\b[WNS]/ ?[OAC][A-Z]*|[A-Z0-9]+", latin)}
    denials = {word for word in words if word in _DENIALS or word.startswith("S/CONTRAST") or not word.strip("0")}
    if denials and all(word in _FILLERS or _CONTRAST_WORD.fullmatch(word) for word in words - denials):
        return False
    spaced = re.sub(r"[^A-Z0-9/]+", " ", latin).strip()
    if _DENIED_BY_SIGN.fullmatch(latin.strip()) or _NO_DOSE.match(spaced):
        return False
    return not _PLAIN.search(spaced) or bool(_CONTRAST.search(_PLAIN.sub(" ", spaced)))


def _ascii_upper(text: str) -> str:
    return unicodedata.normalize("NFKD", text.upper()).encode("ascii", "ignore").decode("ascii")


def kernel_kind(kernel: str) -> str:
    """Tell ``soft`` from ``bone`` by ConvolutionKernel (0018,1210); ``unknown`` for a code not known here.

    ``bone`` stands for every sharp kernel, those for lungs too. Of several values the first counts. GE (also after
    ``HD``) and Philips by name. Siemens (H31s, J40f, Hr38): the number is the sharpness, below 50 soft, from 55 sharp.
    Toshiba and Canon (FC21, FC68-H): 00 to 29 and 60 to 69 are for soft tissue, 30 to 39 and 80 to 89 for bone, 50 to
    59 for lung. docs/cq500.md names the sources.
    """
    code = kernel.partition("\\")[0].strip().upper().removeprefix("HD ")
    if code in _SOFT:
        return "soft"
    if code in _BONE:
        return "bone"
    if match := _TOSHIBA.fullmatch(code):
        return _TOSHIBA_KINDS.get(match[1], "unknown")
    if match := _SIEMENS.fullmatch(code):
        number = int(match[1])
        return "soft" if number < _SIEMENS_SOFT_BELOW else "bone" if number >= _SIEMENS_BONE_FROM else "unknown"
    return "unknown"
