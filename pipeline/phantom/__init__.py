"""A synthetic head-CT data set in the layout of RSNA 2019, for demos and tests without patients' data."""

from __future__ import annotations

from ichpipe.phantom.dataset import PhantomSummary, write_dataset
from ichpipe.phantom.study import Study, make_study

__all__ = ["PhantomSummary", "Study", "make_study", "write_dataset"]
