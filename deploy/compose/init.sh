#!/bin/sh
# Makes what compose.yaml wants and nobody may ship: passwords, a folder for API keys, a certificate.
# Nothing that is there already is touched, so it may run again.
set -eu
cd "$(dirname "$0")"
umask 077

mkdir -p keys certs
chmod 755 keys certs # read by the containers' users too

if [ ! -e .env ]; then
  {
    echo "# Read by docker compose. Letters and digits only: the first is part of an address."
    echo "REDIS_PASSWORD=$(openssl rand -hex 24)"
    echo "GRAFANA_ADMIN_PASSWORD=$(openssl rand -hex 24)"
    # nginx runs as whoever owns the certificate's key, so that nobody else need read it.
    [ "$(id -u)" = 0 ] || echo "NGINX_USER=$(id -u):$(id -g)"
    echo "# Metrics, traces, logs, dashboards:"
    echo "#COMPOSE_PROFILES=observability"
  } >.env
  echo "made .env"
fi

if [ ! -e certs/tls.crt ]; then
  # For a trial on this machine: put a certificate that your callers trust in its place.
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 \
    -subj "/CN=localhost" -addext "subjectAltName=DNS:localhost,IP:127.0.0.1" \
    -keyout certs/tls.key -out certs/tls.crt 2>/dev/null
  chmod 644 certs/tls.crt
  [ "$(id -u)" != 0 ] || chown 101:101 certs/tls.key # the image's own user
  echo "made certs/tls.crt, self-signed, for localhost"
fi

[ -e keys/keys.yaml ] || echo "next: make an API key; docs/compose.md has the command"
