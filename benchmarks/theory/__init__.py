"""The experiment around the theory: wavelet packets on photos, their gaps and how they move with the image."""
