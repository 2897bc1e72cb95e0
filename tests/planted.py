"""Plants identifiers in DICOM files, and searches for them in everything that a command wrote or printed."""

import base64
import html
import io
import re
import zipfile

import pandas as pd
import pyarrow.parquet as pq
from PIL import Image
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from ichpipe.dicom.pydicom_quiet import quiet_pydicom

TEXT = {"AE", "AS", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"}
KEPT = {  # what the product may write (PatientID and UIDs are keys of its tables) or needs to read
    "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "Modality", "ImageType",
    "PhotometricInterpretation", "SpecificCharacterSet", "RescaleType", "ConvolutionKernel", "LossyImageCompression",
    "BodyPartExamined", "ContrastBolusAgent", "PatientOrientation",
}  # fmt: skip
DATES = {"PatientBirthDate": "19370213", "StudyDate": "19981117", "SeriesDate": "19981118", "AcquisitionDate":
         "19981119", "ContentDate": "19981120", "PatientBirthTime": "235907", "StudyTime": "221943"}  # fmt: skip
IDENTITY = {
    "PatientName", "PatientBirthDate", "PatientBirthTime", "PatientSex", "PatientAge", "AccessionNumber", "StudyDate",
    "StudyTime", "StudyID", "StudyDescription", "ReferringPhysicianName", "IssuerOfPatientID", "TimezoneOffsetFromUTC",
    "nested PatientID",
}  # fmt: skip
"""What a DICOM Structured Report must repeat of its source (PS3.3, C.7.1.1 and C.7.2.1): --sr says that it does."""


class Planter:
    """Hands out words that occur nowhere else, and remembers in which element each one went."""

    def __init__(self):
        self.where = {}

    def word(self, what):
        word = f"ZQ{len(self.where):05d}X"
        self.where[word] = what
        return word

    def plant(self, dataset, every=False):
        """Fill elements with words; ``every``: all text elements of DICOM's dictionary, else the usual ones."""
        with quiet_pydicom():
            for keyword, value in DATES.items():
                setattr(dataset, keyword, value)
                self.where[value] = keyword
            for keyword in self._keywords(every):
                setattr(dataset, keyword, self.word(keyword))
            self._plant_deep(dataset)
            self._plant_in_meta(dataset)

    def _keywords(self, every):
        usual = ("PatientName", "OtherPatientNames", "OtherPatientIDs", "PatientAddress", "PatientComments",
                 "AccessionNumber", "InstitutionName", "InstitutionAddress", "ReferringPhysicianName", "OperatorsName",
                 "PerformingPhysicianName", "NameOfPhysiciansReadingStudy", "StudyDescription", "SeriesDescription",
                 "ProtocolName", "StudyID", "ImageComments", "AdditionalPatientHistory", "StationName", "MilitaryRank",
                 "RequestingPhysician", "DeviceSerialNumber", "PatientMotherBirthName", "CountryOfResidence",
                 "EthnicGroup", "Occupation", "PatientTelephoneNumbers")  # fmt: skip
        if not every:
            return usual
        by_name = {entry[4]: entry[0] for tag, entry in DicomDictionary.items() if tag >> 16 not in (0, 2, 4)}
        return [name for name, vr in by_name.items() if vr in TEXT and name and name not in KEPT]

    def _plant_deep(self, dataset):
        inner, outer = Dataset(), Dataset()
        inner.PatientName, inner.PatientID = self.word("nested name"), self.word("nested PatientID")
        inner.TextValue = self.word("nested text")
        outer.OtherPatientIDsSequence, outer.RequestedProcedureDescription = Sequence([inner]), self.word("nested once")
        dataset.RequestAttributesSequence = Sequence([outer])
        dataset.OtherPatientIDsSequence = Sequence([inner])
        block = dataset.private_block(0x0029, self.word("private creator"), create=True)
        block.add_new(0x01, "LO", self.word("private text"))
        block.add_new(0x02, "UN", self.word("private bytes").encode())

    def _plant_in_meta(self, dataset):
        meta = dataset.file_meta
        meta.SourceApplicationEntityTitle = self.word("meta: source")
        meta.ImplementationVersionName = self.word("meta: version")
        meta.PrivateInformationCreatorUID = "1.2.3.4"
        meta.PrivateInformation = self.word("meta: private").encode().ljust(10)
        dataset.preamble = self.word("preamble").encode().ljust(128, b"\0")


def found_in(content, words):
    """The words that stand in some bytes, or in what these bytes pack, in any of the usual encodings."""
    found = set()
    for part in unpacked(content):
        for text in (part, part.replace(b"\0", b""), html.unescape(part.decode("latin-1")).encode("latin-1", "ignore")):
            found |= _words(text) & words
            # A probability may hold six digits of a time by chance.
            no_floats = re.sub(rb"(?<![\d.])\d\.\d{6,}(?:e[-+]?\d+)?(?![\d.])", b"", text)
            decimal = {word for word in words if word.isdecimal()}
            found |= {word for word in decimal if word.encode() in no_floats or _as_date(word).encode() in no_floats}
    return found


def _words(text):
    return {match.decode() for match in re.findall(rb"ZQ\d{5}X", text)}


def _as_date(word):
    return f"{word[:4]}-{word[4:6]}-{word[6:]}"


def unpacked(content, depth=0):
    """The bytes themselves, and those within: archives, tables, pictures' texts, base64 in pages."""
    yield content
    if depth > 3:
        return
    if content[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                yield from unpacked(archive.read(name), depth + 1)
    elif content[:4] == b"PAR1":
        table = pq.read_table(io.BytesIO(content))
        yield repr(table.schema.metadata).encode()
        yield pd.DataFrame(table.to_pandas()).to_csv().encode()
    elif content[:8] == b"\x89PNG\r\n\x1a\n" or content[:4] in (b"RIFF", b"\xff\xd8\xff\xe0"):
        yield repr(Image.open(io.BytesIO(content)).info).encode()
    for packed in re.findall(rb"base64,([A-Za-z0-9+/=]+)", content):
        yield from unpacked(base64.b64decode(packed), depth + 1)


def files_below(*folders):
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
