"""Terms of the DICOM standard. No other coded value is shown: a hospital may have typed a name there.

DICOM PS3.3 C.7.3.1.1.1 (Modality), C.11.1.1.2 (Rescale Type); PS3.16 annex L (Body Part Examined), with words that
scanners write instead.
"""

from __future__ import annotations

import re
from typing import Final

MODALITIES: Final = frozenset({
    "ANN", "AR", "ASMT", "AU", "BDUS", "BI", "BMD", "CFM", "CR", "CT", "CTPROTOCOL", "DG", "DMS", "DOC", "DX",
    "ECG", "EEG", "EMG", "EOG", "EPS", "ES", "FID", "GM", "HC", "HD", "IO", "IOL", "IVOCT", "IVUS", "KER", "KO",
    "LEN", "LS", "M3D", "MG", "MR", "NM", "OAM", "OCT", "OP", "OPM", "OPT", "OPTBSV", "OPTENF", "OPV", "OSS",
    "OT", "PLAN", "POS", "PR", "PT", "PX", "REG", "RESP", "RF", "RG", "RTDOSE", "RTIMAGE", "RTINTENT", "RTPLAN",
    "RTRAD", "RTRECORD", "RTSEGANN", "RTSTRUCT", "RWV", "SEG", "SM", "SMR", "SR", "SRF", "STAIN", "TEXTUREMAP",
    "TG", "US", "VA", "XA", "XAPROTOCOL", "XC", "CS", "DD", "DF", "DM", "DS", "EC", "FA", "FS", "LP", "MA", "MS",
    "ST", "VF", "CF", "CP", "DDR", "PET",
})  # fmt: skip
RESCALE_TYPES: Final = frozenset({
    "OD", "HU", "US", "MGML", "Z_EFF", "ED", "EDW", "HU_MOD", "PCT", "HOUNSFIELD", "NORMALIZED",
})  # fmt: skip
PHOTOMETRIC: Final = frozenset({
    "PALETTE COLOR", "RGB", "HSV", "ARGB", "CMYK", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422", "YBR_PARTIAL_420",
    "YBR_ICT", "YBR_RCT", "XYB",
})  # fmt: skip
BODY_PARTS: Final = frozenset({
    "ABDOMEN", "ABDOMENPELVIS", "ADRENAL", "ANKLE", "AORTA", "ARM", "ARTERY", "AXILLA", "BACK", "BLADDER", "BODY",
    "BOWEL", "BRAIN", "BREAST", "BREASTS", "BRONCHUS", "BUTTOCK", "CALCANEUS", "CALF", "CAROTID", "CEREBELLUM",
    "CERVIX", "CHEEK", "CHEST", "CHESTABDOMEN", "CHESTABDPELVIS", "CIRCLEOFWILLIS", "CLAVICLE", "COCCYX", "COLON",
    "CORNEA", "CRANIUM", "CSPINE", "CTSPINE", "DUODENUM", "EAR", "ELBOW", "ENTIRE", "ESOPHAGUS", "EXTREMITY",
    "EYE", "EYELID", "FACE", "FEMUR", "FINGER", "FOOT", "FOREARM", "GALLBLADDER", "GLUTEUS", "HAND", "HEAD",
    "HEADNECK", "HEART", "HIP", "HUMERUS", "IAC", "ILEUM", "ILIUM", "JAW", "JEJUNUM", "JOINT", "KIDNEY", "KNEE",
    "LARYNX", "LEG", "LIVER", "LOWER", "LSPINE", "LSSPINE", "LUNG", "MANDIBLE", "MAXILLA", "MEDIASTINUM", "MOUTH",
    "NECK", "NECKCHEST", "NECKCHESTABDOMEN", "NECKCHESTABDPELV", "NEURO", "NOSE", "ORBIT", "OVARY", "PANCREAS",
    "PAROTID", "PATELLA", "PELVIS", "PENIS", "PHARYNX", "PROSTATE", "RECTUM", "RIB", "SACRUM", "SCALP", "SCAPULA",
    "SCLERA", "SCROTUM", "SHOULDER", "SINUS", "SKULL", "SPINE", "SPLEEN", "SSPINE", "STERNUM", "STOMACH",
    "SUBMANDIBULAR", "TESTIS", "THIGH", "THORAX", "THUMB", "THYMUS", "THYROID", "TIBIA", "TLSPINE", "TMJ", "TOE",
    "TONGUE", "TRACHEA", "TRUNK", "TSPINE", "UNKNOWN", "UPPER", "URETER", "URETHRA", "UTERUS", "VAGINA", "VEIN",
    "VULVA", "WHOLEBODY", "WRIST", "ZYGOMA",
})  # fmt: skip
_HEAD: Final = re.compile("HEAD|BRAIN|SKULL|CRANI|CEREB|NEURO|UNKNOWN")
OTHER: Final = "OTHER"


def shown(value: str, terms: frozenset[str]) -> str:
    """Return a value in quotes where it is a term, else words that quote nothing of it."""
    return repr(value) if value in terms else "no term of the standard"


def body_part(value: str) -> str:
    """Return the terms in a BodyPartExamined (0018,0015), upper case; OTHER where there is only other text."""
    upper = value.upper()
    words = [word for word in re.findall(r"[A-Z]+", upper) if word in BODY_PARTS]
    if not any(map(_HEAD.search, words)) and (head := _HEAD.search(upper)):
        words.append(head.group())
    return " ".join(words) or (OTHER if upper else "")
