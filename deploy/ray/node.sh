#!/usr/bin/env bash
# Has this machine join: node.sh HEAD POOL, where POOL is the pool whose workers it takes and HEAD the head's address.
# It needs the head's token in ~/.ray/auth_token, or where RAY_AUTH_TOKEN_PATH says.
set -euo pipefail
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 PIP_NO_DEPS=1  # see head.sh
exec ray start --address="$1:${RAY_PORT:-6379}" --labels="pool=$2" "${@:3}"
