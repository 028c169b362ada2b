"""Autoencoders: spectrum -> latents -> spectrum. `distspec.models.build` makes them from their settings.

- `dense`: fully connected layers; what all kinds share (`Loss`), and one autoencoder behind another (`TwoStage`).
- `convolutional`: each block of the encoder convolves and halves, the decoder mirrors it.
- `variational`: latents are held to a normal distribution.
- `redshifted`: observed spectra, decoded at rest; weights that `spender` published.
- `redshifted_losses`: what `redshifted` is trained with beside its residuals.
- `ends`: a network cut where it touches pixels.
"""
