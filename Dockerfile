# The base is an argument so that a house can put its own in its place.
ARG BASE_IMAGE=python:3.13-slim

# Dependencies alone: this layer is built anew only when the lock changes.
FROM ${BASE_IMAGE} AS dependencies
WORKDIR /build
COPY requirements/runtime.txt .
# pip leaves with the build: nothing in the image installs anything.
RUN python3 -m venv /opt/weir \
 && /opt/weir/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes --no-deps -r runtime.txt \
 && /opt/weir/bin/pip uninstall --yes --quiet pip \
 && find /opt/weir -type d \( -name tests -o -name test \) -prune -exec rm -rf {} +

# The watcher of the dev target, in an environment of its own: what the service imports stays as locked.
FROM ${BASE_IMAGE} AS reload
WORKDIR /build
COPY requirements/reload.txt .
RUN python3 -m venv /opt/reload \
 && /opt/reload/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes --no-deps -r reload.txt \
 && /opt/reload/bin/pip uninstall --yes --quiet pip

# What every target has: all but the source.
FROM ${BASE_IMAGE} AS runtime
ENV PATH=/opt/weir/bin:$PATH \
    HOME=/tmp \
    HOST=0.0.0.0 \
    LOG_FORMAT=json \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /app
COPY --from=dependencies /opt/weir /opt/weir
EXPOSE 8000 9000
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
  CMD ["python3", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ.get('ADMIN_PORT', '9000') + '/readyz', timeout=2)"]

# For development: the user of the process owns the source, so that files can be synced into a running pod, and a
# watcher starts the service anew when one changes. After a fault in the source it waits for the next change.
FROM runtime AS dev
RUN chown 10001:10001 /app
COPY --from=reload /opt/reload /opt/reload
COPY --chown=10001:10001 service service
USER 10001:10001
ENTRYPOINT ["/opt/reload/bin/python3", "-m", "watchfiles", "--filter", "python", "--target-type", "command", "--sigint-timeout", "3", "python3 -m service", "service"]

# What runs in production; the last target, so the one that is built when none is named.
FROM runtime AS production
ARG VERSION=dev
LABEL org.opencontainers.image.title="Weir" \
      org.opencontainers.image.description="One stateless LLM service between applications and OpenAI-compatible models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
COPY service service
# The root is read-only where it runs, so byte code is made now.
RUN python3 -m compileall -q service
USER 10001:10001
ENTRYPOINT ["python3", "-m", "service"]
