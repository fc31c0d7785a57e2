"""The control plane: the one process that configures all sidecars and hears their telemetry."""
