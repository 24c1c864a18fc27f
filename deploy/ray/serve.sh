#!/usr/bin/env bash
# Serves a spec on a Ray that runs: serve.sh HEAD SPEC. HEAD: host:port of its jobs API, as 127.0.0.1:8265; SPEC: a path on
# the head. The job has as long to drain as RAY_JOB_STOP_WAIT_TIME_S says; Ray's own default is 3 s.
set -euo pipefail
export RAY_AUTH_MODE=token
exec ray job submit --address "http://$1" --runtime-env-json "{\"env_vars\": {\"RAY_JOB_STOP_WAIT_TIME_S\": \"60\"}}" \
  -- tercet serve "$2" "${@:3}"
