"""One NIfTI file to the geometry and Hounsfield units of its slices."""
