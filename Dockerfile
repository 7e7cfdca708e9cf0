FROM python:3.14-slim AS build
WORKDIR /source
RUN python -m venv /opt/dispatcher
ENV PATH=/opt/dispatcher/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY requirements.lock ./
RUN pip install --require-hashes --requirement requirements.lock
COPY LICENSE README.md pyproject.toml ./
COPY migrations migrations
COPY dispatcher dispatcher
RUN pip install --no-deps .

FROM python:3.14-slim
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/dispatcher dispatcher
COPY --from=build /opt/dispatcher /opt/dispatcher
ENV PATH=/opt/dispatcher/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    DISPATCHER_DATA_DIR=/var/lib/dispatcher \
    DISPATCHER_HTTP_HOST=0.0.0.0
USER dispatcher
WORKDIR /var/lib/dispatcher
EXPOSE 8080
STOPSIGNAL SIGTERM
# Whether the process lives: a database that is away is no reason to stop a worker that waits.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ.get('DISPATCHER_HTTP_PORT', '8080') + '/healthz', timeout=3)"]
ENTRYPOINT ["dispatcher"]
CMD ["run"]
