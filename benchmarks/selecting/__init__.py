"""Which channels to pool by the modulus: the analytic partner, predictions from the weights, thresholds."""
