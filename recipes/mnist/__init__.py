"""MNIST, 28x28: the paper's smallest classification task."""
