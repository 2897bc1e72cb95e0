"""A folder of DICOM to findings, heat maps and DICOM reports."""
