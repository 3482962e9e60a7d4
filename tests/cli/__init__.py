"""The command, run as a user does: other processes, real brokers, exit statuses."""
