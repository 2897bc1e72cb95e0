"""Search cached embeddings for similar slices, and fit a linear probe on them.

python examples/search_and_probe.py artifacts
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ichpipe import open_store

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("artifacts", nargs="?", type=Path, default=Path("artifacts"), help="folder of a finished run")
options = arguments.parse_args()

# A store may hold embeddings of several networks; the folder of the slice CNN selects one.
store = open_store(options.artifacts / "embeddings.zarr", model=options.artifacts / "slice-cnn")
all_series = list(store)
embedding = np.concatenate([series.embedding for series in all_series])  # (n, d), float32
sop_uids = [uid for series in all_series for uid in series.sop_uids]

# Labels and splits are joined by SOPInstanceUID, never by position.
index = pd.read_parquet(options.artifacts / "index" / "slices.parquet").set_index("sop_uid").loc[sop_uids]

# Search: cosine similarity to one slice, over slices of other patients.
unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
query = int(np.argmax(index["any"] == 1))
similar = np.where(index["patient_id"] == index["patient_id"].iloc[query], -np.inf, unit @ unit[query])
print(f"slices most like {sop_uids[query]} (any: {index['any'].iloc[query]:.0f})")
for row in np.argsort(-similar)[:5]:
    print(f"  {sop_uids[row]}  similarity {similar[row]:.3f}  any {index['any'].iloc[row]:.0f}")

# Probe: a regularised logistic regression, fitted on the train patients, scored on the test patients.
labelled = index["any"].notna()
train, test = ((labelled & (index["split"] == split)).to_numpy() for split in ("train", "test"))
probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
probe.fit(embedding[train], index["any"][train])
scores = probe.predict_proba(embedding[test])[:, 1]
print(f"linear probe, any haemorrhage: AUC {roc_auc_score(index['any'][test], scores):.3f} on {test.sum()} test slices")
# The slice CNN was fitted on the train slices, so their embeddings are more separable than those of new patients.
