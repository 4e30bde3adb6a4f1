"""Trained classifiers whose stem is converted: at once, calibrated, and after distillation."""
