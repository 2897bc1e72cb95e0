"""Read one CT series as Hounsfield units and look at it.

python examples/read_series.py data/phantom/dicom
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from ichpipe import read_studies

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("path", nargs="?", default="data/phantom/dicom", help="folder, zip archive or file")
arguments.add_argument("--out", type=Path, default=Path("series.png"), help="picture to write")
options = arguments.parse_args()

# One series a study, one at a time in memory. For a path with a single study: read_series(path).
series = next(read_studies(options.path))

# `hu` is (slices, rows, columns), int16. Slices ascend from feet to head, whatever the file names.
print(f"series {series.series_uid}: {series.hu.shape}, {series.hu.dtype}, {series.hu.min()} to {series.hu.max()} HU")
first, last = series.position_mm[[0, -1]]
print(f"from {first:.1f} to {last:.1f} mm, a slice every {series.spacing_mm[1]:.2f} mm")

# The brain window, 40 ± 40 HU: blood is brighter than brain, bone and air are clipped.
picture = np.clip(series.hu / 80.0, 0.0, 1.0)

rows = np.linspace(0, len(series) - 1, 8).round().astype(int)
figure, axes = plt.subplots(2, 4, figsize=(10, 5.4), layout="constrained")
for axis, number in zip(axes.flat, rows, strict=True):
    # Pixels may not be square: PixelSpacing is the distance of rows and of columns (NaN where it is absent).
    aspect = np.divide(*series.pixel_mm) if np.isfinite(series.pixel_mm).all() else 1.0
    axis.imshow(picture[number], cmap="gray", vmin=0, vmax=1, aspect=aspect)
    axis.set_title(f"slice {number}, {series.position_mm[number]:.0f} mm", fontsize=9)
    axis.axis("off")
figure.savefig(options.out, dpi=120)
print(f"picture: {options.out}")
