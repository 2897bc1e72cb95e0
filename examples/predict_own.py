"""Predict your own scans: tables for a folder, and an array that you have in memory.

python examples/predict_own.py data/phantom/dicom --model artifacts/finetuned --out predictions
"""

import argparse
from pathlib import Path

from ichpipe import IchpipeError, load_model, read_series

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("path", nargs="?", default="data/phantom/dicom", help="folder, zip archive or file")
arguments.add_argument("--model", default="artifacts/finetuned", help="folder of a fine-tuned model")
arguments.add_argument("--out", type=Path, default=Path("predictions"), help="folder to write to")
given = arguments.parse_args()

model = load_model(given.model)  # gpu="cpu" or "0" chooses the device; with the calibration beside it, if any

# A folder: one series a study, chosen by rule; what can't be used is listed with the reason.
found = model.predict_folder(given.path)
given.out.mkdir(parents=True, exist_ok=True)
for name in ("slices", "studies", "series", "refused", "rejected"):
    getattr(found, name).to_csv(given.out / f"{name}.csv", index=False)
print(
    f"{len(found.studies)} studies, {len(found.slices)} slices; {len(found.rejected)} files left out; see {given.out}"
)

# Tables are pandas: here the studies that are most likely to bleed, and where the likeliest slice lies.
for study in found.studies.sort_values("any", ascending=False).head(3).to_dict("records"):
    slices = found.slices[found.slices["series_uid"] == study["series_uid"]]
    top = slices.loc[slices["any"].idxmax()]
    print(f"{study['study_uid']}: any {study['any']:.3f}, likeliest slice at {top['position_mm']:.0f} mm")

# An array: HU (slices, rows, columns) from feet to head, with places in mm, or one spacing for all slices.
series = read_series(given.path, series_uid=found.studies["series_uid"].iloc[0])
one = model.predict(series.hu, series.position_mm)
print(f"as an array {series.hu.shape}: slices {one.slices.shape}, study:")
for name, probability in zip(one.classes, one.study, strict=True):
    print(f"  {name:<18}{probability:.3f}")

# What is wrong with data or files comes as one kind of error, with the remedy in its message.
try:
    model.predict(series.hu)
except IchpipeError as error:
    print(f"without places: {error}")
