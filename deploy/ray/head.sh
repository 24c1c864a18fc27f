#!/usr/bin/env bash
# Starts Ray's head on this machine: head.sh. It has no CPUs for workers, only the gateway and the controller.
# The token lies in ~/.ray/auth_token, or where RAY_AUTH_TOKEN_PATH says; made by `ray get-auth-token --generate`.
# That makes only ~/.ray/auth_token; for another path: `openssl rand -hex 32 > "$RAY_AUTH_TOKEN_PATH"`.
set -euo pipefail
# PIP_NO_DEPS: a job that brings a wheel of tercet uses the torch and Ray that are installed, and fetches no others.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 PIP_NO_DEPS=1
exec ray start --head --port="${RAY_PORT:-6379}" --dashboard-host="${DASHBOARD_HOST:-127.0.0.1}" --num-cpus=0 --labels=pool=head "$@"
