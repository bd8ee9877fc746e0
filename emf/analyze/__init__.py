"""The paper's evidence on text encoders: discriminability, disentanglement, and few-step flow matching on each."""
