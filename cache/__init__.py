"""The embedding store: numpy, zarr and dask only; never torch, pydicom, or anything of ours."""
