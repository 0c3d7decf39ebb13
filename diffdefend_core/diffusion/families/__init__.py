"""Model families: each module turns what one kind of network predicts into the answers of a `Denoiser`."""
