"""Control path. What Ray reads from the environment when it is imported is set here, before any file imports it.

No usage report leaves this machine; accelerators are left as they are; 127.0.0.1 is not taken for the address of a
network interface; and Ray does not end our process when it loses its control store, the GCS: that is for us to do.
"""

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray's switch for staying on loopback
os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "3600")
