#!/bin/sh
# What the tests need that is not Python: taken from the PATH, else installed, else one sentence.
# NAME PACKAGE pairs, one a line; none so far.
need() {
    command -v "$1" >/dev/null 2>&1 && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$2"; } >/dev/null 2>&1
    fi
    command -v "$1" >/dev/null 2>&1 || { echo "weir: the tests need $1: install the package $2, then run 'make test' again" >&2; exit 1; }
}
need curl curl
