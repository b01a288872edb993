"""What predictive coding costs: time per step and memory, against backprop."""
