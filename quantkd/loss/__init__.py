"""The distillation loss: the readable reference, the fused form, and the metrics at each position."""
