"""Static checks of a model folder, which is an untrusted file, and safe loading into a Denoiser."""
