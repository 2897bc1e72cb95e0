"""Writes the findings of one series as a DICOM Enhanced SR (PS3.3 A.35.2, template TID 1500 of PS3.16) for a PACS.

**This is the one output with the patient's identity.** It is copied from the source images and goes nowhere else.
"""

from __future__ import annotations

import logging
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final

import highdicom as hd
import pydicom
from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_for_tag
from pydicom.dataelem import DataElement
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import UID, CTImageStorage, generate_uid
from pydicom.valuerep import DA, TM

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.common.files import atomic_path
from ichpipe.dicom.dataset import MAX_FILE_BYTES
from ichpipe.dicom.enhanced import ENHANCED_CT, frame_uid, image_of_frame, read_slice_file
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.inference.findings import PACKAGE_VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from pydicom.dataset import Dataset

    from ichpipe.inference.findings import Extent, Provenance

log = logging.getLogger("ichpipe")

FINDINGS: Final = {  # finding and site; SNOMED CT defines a haemorrhage of the ventricles by morphology and site
    "any": (Code("1386000", "SCT", "Intracranial hemorrhage"), codes.SCT.Intracranial),
    "epidural": (Code("82999001", "SCT", "Epidural intracranial hemorrhage"), codes.SCT.Intracranial),
    "intraparenchymal": (Code("274100004", "SCT", "Cerebral hemorrhage"), codes.SCT.Brain),
    "intraventricular": (codes.SCT.Hemorrhage, codes.SCT.BrainVentricle),
    "subarachnoid": (
        Code("21454007", "SCT", "Subarachnoid intracranial hemorrhage"),
        codes.SCT.CranialSubarachnoidSpace,
    ),
    "subdural": (Code("35486000", "SCT", "Subdural intracranial hemorrhage"), codes.SCT.Intracranial),
}
NOT_FOR_DIAGNOSIS: Final = "Research software, not a medical device: not for diagnosis."
SERIES_NUMBER: Final = 9901

_DESCRIBED: Final = ("PixelSpacing", "SliceThickness", "ImagePositionPatient", "ImageOrientationPatient")
_REQUIRED: Final = (  # type 2 of the modules Patient and General Study: may be empty, not absent
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
_COPIED: Final = (  # of the same modules, if present: a PACS may tell patients apart by them
    "IssuerOfPatientID", "IssuerOfPatientIDQualifiersSequence", "OtherPatientIDsSequence", "PatientBirthTime",
    "PatientAge", "PatientSize", "PatientWeight", "StudyDescription", "IssuerOfAccessionNumberSequence",
    "TimezoneOffsetFromUTC",
)  # fmt: skip
_KEPT_CODES: Final = ("Modality", "ImageType", "PatientSex", "PhotometricInterpretation", "SpecificCharacterSet")
_TEXT_VRS: Final = frozenset({"AE", "CS", "LO", "LT", "PN", "SH", "SQ", "ST", "UC", "UN", "UR", "UT"})
_TYPED: Final = {"StudyDate": DA, "StudyTime": TM, "PatientBirthDate": DA}
_SEXES: Final = frozenset({"", "M", "F", "O"})  # (0010,0040)
_ESCAPE_58: Final = "\x1b$)A"
_OF_OTHER_IDS: Final = ("PatientID", "IssuerOfPatientID", "TypeOfPatientID", "IssuerOfPatientIDQualifiersSequence")


def read_source(paths: Sequence[str]) -> list[Dataset]:
    """Read the headers of a series' images, files or members of archives, without pixels.

    The header of a frame has the class and the UID of its file, and the frame's number as its InstanceNumber.

    Text that the report need not repeat is removed: highdicom would copy names of physicians and the like. A date, time
    or sex that is none becomes empty, and a warning names the element.
    """
    sources: list[Dataset] = []
    emptied: set[str] = set()
    with quiet_pydicom():
        for path in paths:
            data = read_slice_file(path, MAX_FILE_BYTES)
            source = pydicom.dcmread(BytesIO(data), stop_before_pixels=True, force=True)
            for keyword, value in image_of_frame(path).items():
                setattr(source, keyword, value)
            _remove_other_text(source)
            for keyword in _REQUIRED:
                if keyword not in source:
                    setattr(source, keyword, "")
            emptied |= _empty_invalid(source)
            _repair_character_set(source)
            sources.append(source)
    if emptied:
        log.warning("%s: no valid value; empty in the report", ", ".join(sorted(emptied)))
    return sources


def _remove_other_text(source: Dataset) -> None:
    kept = {*_REQUIRED, *_COPIED, *_KEPT_CODES}
    for tag in list(source.keys()):  # as parsed: a value that can't be converted is no error here
        vr = source.get_item(tag).VR or (dictionary_VR(tag) if dictionary_has_tag(tag) else "UN")
        if vr in _TEXT_VRS and keyword_for_tag(tag) not in kept:
            del source[tag]
    for item in source.get("OtherPatientIDsSequence") or []:
        for tag in list(item.keys()):
            if keyword_for_tag(tag) not in _OF_OTHER_IDS:
                del item[tag]


def _empty_invalid(source: Dataset) -> set[str]:
    """Empty those dates, times and the sex that are none, as a report may have them; return their keywords."""
    invalid = set()
    for keyword in (*_TYPED, "PatientSex"):
        try:
            value = source.get(keyword) or ""
            valid = value in _SEXES if keyword == "PatientSex" else not value or _TYPED[keyword](str(value)) is not None
        except (ValueError, TypeError):
            valid = False
        if not valid:
            source[keyword] = DataElement(keyword, dictionary_VR(keyword), "")
            invalid.add(keyword)
    return invalid


def _repair_character_set(source: Dataset) -> None:
    """Name the character set (0008,0005) as highdicom knows it; text under any other name becomes UTF-8.

    ASCII without a name keeps none: it is the default set, and dcmtk 3.6.7 warns of UTF-8.

    An empty first value means the default set, ISO 2022 IR 6 (PS3.3 C.12.1.1.2): usual in Japan and Korea.
    """
    value = source.get("SpecificCharacterSet") or []
    names = [name or "ISO 2022 IR 6" for name in ([value] if isinstance(value, str) else value)]
    source.decode()
    if "ISO 2022 IR 58" in names:  # pydicom leaves its escape sequence in the text
        for keyword in (*_REQUIRED, *_COPIED):
            if _ESCAPE_58 in str(source.get(keyword, "")) and source[keyword].VR != "SQ":
                source[keyword].value = str(source[keyword].value).replace(_ESCAPE_58, "")
    known = {name.value for name in hd.enum.SpecificCharacterSetValues} - {"ISO 2022 IR 58"}  # can't be written
    sound = known.issuperset(names) and all(name.startswith("ISO 2022") == (len(names) > 1) for name in names)
    if names and sound:
        source.SpecificCharacterSet = names
    elif names or not all(str(source.get(keyword, "")).isascii() for keyword in (*_REQUIRED, *_COPIED)):
        source.SpecificCharacterSet = "ISO_IR 192"
    elif "SpecificCharacterSet" in source:  # empty, which highdicom refuses
        del source.SpecificCharacterSet


def require_reportable(sources: Sequence[Dataset]) -> None:
    """Raise DataError if a UID is invalid, as in RSNA's files (``ID_…``): a PACS rejects such a report."""
    for source in sources:
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            with quiet_pydicom():
                valid = UID(str(source.get(keyword, ""))).is_valid
            if not valid:
                raise DataError(f"{keyword} is no DICOM UID, so a report could not refer to the images")


def make_report(
    sources: Sequence[Dataset],
    probability: Mapping[str, float],
    where: Mapping[str, Extent],
    provenance: Provenance,
    forced: str = "",
) -> hd.sr.EnhancedSR:
    """Make the report of one series.

    ``sources`` are the headers of all its images. ``forced`` tells why it would have been refused without ``--force``.
    Each measurement refers to the slices that show the finding, or else to the one with the highest probability. All
    slices are listed as evidence, and in the image library (TID 1600) if their headers have its attributes. Raises
    DataError where a UID is invalid, or a header holds a value that a report can't repeat.
    """
    require_reportable(sources)
    try:
        with quiet_pydicom():
            return _make_document(sources, probability, where, provenance, forced)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # its text may quote the header
        raise DataError(f"a header has what a report can't repeat ({type(error).__name__})") from None


def write_report(target: Path, report: hd.sr.EnhancedSR) -> None:
    """Write a report, whole or not at all."""
    with atomic_path(target) as temporary, quiet_pydicom():
        report.save_as(temporary, enforce_file_format=True)


def _make_document(
    sources: Sequence[Dataset],
    probability: Mapping[str, float],
    where: Mapping[str, Extent],
    provenance: Provenance,
    forced: str,
) -> hd.sr.EnhancedSR:
    by_uid = {_name_in_tables(source): source for source in sources}
    groups = [_make_group(name, float(probability[name]), where[name], by_uid, provenance, forced) for name in CLASSES]
    model = provenance.model_sha256
    uid = f"2.25.{int(model[:32], 16)}"  # one UID for one model (PS3.5 B.2)
    device = hd.sr.DeviceObserverIdentifyingAttributes(
        uid, name="ichpipe", manufacturer_name="ichpipe", model_name="ichpipe", serial_number=model
    )
    in_library = all(
        source.get("SOPClassUID") == CTImageStorage and all(map(source.get, _DESCRIBED)) for source in sources
    )
    observer = hd.sr.ObserverContext(codes.DCM.Device, device)
    content = hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(observer_device_context=observer),
        procedure_reported=codes.SCT.ComputedTomographyOfHead,
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
        referenced_images=sources if in_library else None,
    )
    report = hd.sr.EnhancedSR(
        evidence=sources,
        content=content[0],
        series_instance_uid=generate_uid(prefix=None),
        series_number=SERIES_NUMBER,
        sop_instance_uid=generate_uid(prefix=None),
        instance_number=1,
        manufacturer="ichpipe",
        manufacturer_model_name="ichpipe",
        software_versions=PACKAGE_VERSION,
        device_serial_number=model,
        series_description=f"ichpipe haemorrhage (research{', FORCED' if forced else ''})",
        is_complete=True,  # neither final nor verified
    )
    for keyword in _COPIED:
        if keyword in sources[0]:
            report[keyword] = sources[0][keyword]
    return report


def _name_in_tables(source: Dataset) -> str:
    """Return the UID by which the tables name a slice."""
    if source.get("SOPClassUID") not in ENHANCED_CT:
        return str(source.SOPInstanceUID)
    return frame_uid(str(source.SOPInstanceUID), int(source.InstanceNumber), int(source.NumberOfFrames))


def _refer_to(sources: Sequence[Dataset]) -> list[hd.sr.SourceImageForMeasurement]:
    """Refer to each image once; to one of several frames by their numbers (0008,1160)."""
    images: dict[str, tuple[Dataset, list[int]]] = {}
    for source in sources:
        frames = images.setdefault(str(source.SOPInstanceUID), (source, []))[1]
        if source.get("SOPClassUID") in ENHANCED_CT:
            frames.append(int(source.InstanceNumber))
    refer = hd.sr.SourceImageForMeasurement.from_source_image
    return [refer(image, sorted(frames) or None) for image, frames in images.values()]


def _make_group(
    name: str, probability: float, where: Extent, by_uid: Mapping[str, Dataset], provenance: Provenance, forced: str
) -> Any:
    """Make the group of TID 1501 for one class: finding, site, probability with its images, present or absent."""
    finding, site = FINDINGS[name]
    images = _refer_to([by_uid[uid] for uid in where.sop_uids or [where.highest]])
    percent = float(f"{100 * probability:.6g}")
    measurement = hd.sr.Measurement(codes.DCM.Probability, percent, codes.UCUM.Percent, referenced_images=images)
    presence = codes.SCT.Present if probability >= provenance.threshold else codes.SCT.Absent
    parameters = [
        f"model SHA-256 {provenance.model_sha256}",
        f"present: probability of at least {provenance.threshold:g}",
        provenance.describe_calibration(),
    ]
    comment = NOT_FOR_DIAGNOSIS
    if forced:
        parameters.append(f"forced, although refused: {forced}")
        comment += f" Forced: the series was refused ({forced})."
    software = hd.sr.AlgorithmIdentification("ichpipe", PACKAGE_VERSION, parameters, manufacturer="ichpipe")
    group = hd.sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(generate_uid(prefix=None), f"ichpipe {name}"),
        finding_type=finding,
        finding_sites=[hd.sr.FindingSite(site)],
        algorithm_id=software,
        measurements=[measurement],
        qualitative_evaluations=[hd.sr.QualitativeEvaluation(codes.DCM.PresenceOfProperty, presence)],
    )
    contains = hd.sr.RelationshipTypeValues.CONTAINS
    group[0].ContentSequence.append(hd.sr.TextContentItem(codes.DCM.Comment, comment, contains))
    return group
