"""Training: `deepspeed --module emf.train RECIPE --out DIR [--field value ...]`, or `emf train`."""
