"""The diffusers pipeline under its public import path: `from emf.pipeline import EMFPipeline`."""

from emf.sample.emf_pipeline import EMFPipeline, EMFTransformer

__all__ = ["EMFPipeline", "EMFTransformer"]
