"""The policy of the gate and its decision, from records alone."""
