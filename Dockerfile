# ichpipe in a container, by default `ichpipe predict`. docs/cluster.md shows how to build and run it.
#
#   docker build -t ichpipe .
#
# Nothing is written but to the folders that you mount and to /tmp, so a read-only root works (--read-only --tmpfs /tmp).

ARG PYTHON=3.11
FROM python:${PYTHON}-slim AS build

# Address of an index with another build of PyTorch, as pytorch.org shows it under "Get started": one without CUDA is much
# smaller, another serves ROCm. Empty: the build of pip's configured index, which on x86-64 runs on CPUs and NVIDIA GPUs.
ARG TORCH_INDEX=
# Extras of setup.cfg. DVC needs git, which is not in the image: the commands work without it.
ARG EXTRAS=dicom-codecs,explain,nifti,s3,sr,train

WORKDIR /src
RUN python -m venv /opt/ichpipe
COPY constraints.txt ./
# A pip.conf with your own index may be given as a secret: docker build --secret id=pip,src=pip.conf
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    test -z "$TORCH_INDEX" || /opt/ichpipe/bin/python -m pip install --no-cache-dir --disable-pip-version-check \
      --no-deps -c constraints.txt --index-url "$TORCH_INDEX" torch torchvision
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY pipeline pipeline
COPY stages stages
COPY cache cache
COPY params params
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/ichpipe/bin/python -m pip install --no-cache-dir --disable-pip-version-check -c constraints.txt ".[$EXTRAS]"

FROM python:${PYTHON}-slim
COPY --from=build /opt/ichpipe /opt/ichpipe
COPY LICENSE /opt/ichpipe/LICENSE
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin ichpipe \
    && mkdir /data \
    && chown ichpipe:ichpipe /data

# Any user may run the image (docker run --user): libraries that want a home, a name or a cache find them in /tmp.
ENV PATH=/opt/ichpipe/bin:$PATH \
    HOME=/tmp \
    USER=ichpipe \
    TMPDIR=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /data
ENTRYPOINT ["ichpipe"]
CMD ["predict", "--help"]
