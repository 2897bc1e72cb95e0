"""Many DICOM files to ordered, labelled and split slices."""
