"""The six classes of RSNA 2019, in the order of tables, logits and metrics."""

from __future__ import annotations

from typing import Final

# ``any`` first, as in ``slices.csv``. The Kaggle table lists ``any`` last: join by name, never by position.
CLASSES: Final = ("any", "epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
SUBTYPES: Final = CLASSES[1:]
METRIC_WEIGHTS: Final = (2.0, 1.0, 1.0, 1.0, 1.0, 1.0)  # RSNA 2019, in the order of CLASSES; the metric divides by 7
METRIC_CLIP: Final = 1e-15  # RSNA 2019 clips to [1e-15, 1 - 1e-15]; logarithms and logits of these are finite
