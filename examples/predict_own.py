"""Predict your own scans: a folder as tables, and an array in memory.

python examples/predict_own.py data/phantom/dicom --model artifacts/finetuned --out predictions
"""

import argparse
from pathlib import Path

from ichpipe import IchpipeError, load_model, read_series

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("path", nargs="?", default="data/phantom/dicom", help="folder, zip archive or file")
arguments.add_argument("--model", default="artifacts/finetuned", help="folder of a fine-tuned model")
arguments.add_argument("--out", type=Path, default=Path("predictions"), help="folder to write to")
options = arguments.parse_args()

model = load_model(options.model)  # gpu="cpu" or "0" chooses the device; with the calibration beside it, if any

# A folder: one series a study, chosen by rule. Unusable files are listed with the reason.
predicted = model.predict_folder(options.path)
options.out.mkdir(parents=True, exist_ok=True)
for name in ("slices", "studies", "series", "refused", "rejected"):
    getattr(predicted, name).to_csv(options.out / f"{name}.csv", index=False)
counts = f"{len(predicted.studies)} studies, {len(predicted.slices)} slices; {len(predicted.rejected)} files left out"
print(f"{counts}; see {options.out}")

# Tables are pandas: the studies with the highest probability, and the position of their likeliest slice.
for study in predicted.studies.sort_values("any", ascending=False).head(3).to_dict("records"):
    slices = predicted.slices[predicted.slices["series_uid"] == study["series_uid"]]
    top = slices.loc[slices["any"].idxmax()]
    print(f"{study['study_uid']}: any {study['any']:.3f}, likeliest slice at {top['position_mm']:.0f} mm")

# An array: HU (slices, rows, columns) from feet to head, with positions in mm, or one spacing for all slices.
series = read_series(options.path, series_uid=predicted.studies["series_uid"].iloc[0])
prediction = model.predict(series.hu, series.position_mm)
print(f"as an array {series.hu.shape}: slices {prediction.slices.shape}, study:")
for name, probability in zip(prediction.classes, prediction.study, strict=True):
    print(f"  {name:<18}{probability:.3f}")

# Wrong data or files raise one kind of error, with the remedy in its message.
try:
    model.predict(series.hu)
except IchpipeError as error:
    print(f"without positions: {error}")
