"""The network: transformer, layers, autoencoder. Architecture only, written once for Tensor and Dual."""
