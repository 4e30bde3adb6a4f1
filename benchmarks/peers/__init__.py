"""Other packages' anti-aliased pooling, by their own code."""
