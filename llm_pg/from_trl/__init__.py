"""What a script written for TRL reads and calls beside the arguments: logs, results, parser, checkpoints, the hub."""
