"""Networks trained from scratch on CIFAR-10 that differ in the stem alone."""
