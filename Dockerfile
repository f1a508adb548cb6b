# The quick start in a container, as any user:
#
#   docker build -t flax_cifar .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD/runs:/work/runs" flax_cifar
#   docker run --rm flax_cifar --config=s9:smoke --workdir=/tmp/run
FROM python:3.12-slim
# The kernels for CPUs are compiled here, on the first run.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip install --no-cache-dir /src && rm -rf /src
# Any user may write here: results, and compiled programs, which nobody else may replace.
RUN mkdir -p -m 1777 /work/runs /work/.cache
ENV HOME=/work XDG_CACHE_HOME=/work/.cache MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /work
ENTRYPOINT ["flax_cifar"]
CMD ["--config=quickstart"]
