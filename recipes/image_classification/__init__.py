"""Image classification: the paper's Tables 1 and 2, its convergence and calibration studies."""
