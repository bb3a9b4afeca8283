"""Lion, AdaHessian, Sophia's ablations, and how a config becomes an optimizer."""
