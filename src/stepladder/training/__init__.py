"""The training loop, its checkpoints, its logs and its alarms."""
