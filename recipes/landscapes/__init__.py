"""The recipe of the bundled landscapes model: painter, autoencoder, denoiser, export and evaluation."""
