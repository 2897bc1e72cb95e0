"""One DICOM file to its header and Hounsfield units."""
