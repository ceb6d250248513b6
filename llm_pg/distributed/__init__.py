"""How an update is spread over processes: one, whole weights on each (DDP), or parts (FSDP2, DeepSpeed's ZeRO)."""

# Gradients that travel in one message under DDP. A message has a latency of its own, and a bucket is a copy of its
# gradients while it travels: two for half a billion parameters in float32.
BUCKET_BYTES = 2**30
