"""The paper's claim on MNIST: UID and RealUID by the criterion of registered.md, written before the results."""
