"""Static checks of a model folder, which is an untrusted file, and safe loading into a Denoiser."""

import os

# diffusers reads this when it is imported, which only the modules of this package make it do for a model.
os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "true"
