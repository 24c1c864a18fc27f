"""Control path. Sets what Ray reads from the environment when it is imported, before any file imports it.

Ray sends no usage reports, leaves the environment variables of accelerators as they are, does not replace 127.0.0.1 by
the address of a network interface, and does not end our process when it loses its control store (GCS): we do that.
"""

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray's switch for staying on loopback
os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "3600")
