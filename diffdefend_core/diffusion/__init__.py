"""Diffusion models as everything else sees them: a `Denoiser` over noise `Levels`.

`families` turn networks into denoisers and `samplers` turn denoisers into images (`generate`), with one random
generator per sample (`random`). `training` fine-tunes a denoiser; `response` measures how one answers to a shift of its
input.
"""
