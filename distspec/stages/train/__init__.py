"""Store -> trained model.

- `stage`: `TrainStage`: starts the workers, follows their epochs, registers the model.
- `attempts`: goes on after a worker or node is lost, with as many workers as there is room for.
- `workers`: what runs in workers: the fits, one after the other.
- `density`: latents of the training spectra and the fit of their density.
- `accuracy`: errors of the reconstructions of the validation spectra, as a table.
- `section`: its part of the page: the model, its fits and its density, in words and figures.
- `section.html.jinja`: the same as HTML: the fits.
- `density.html.jinja`: the same as HTML: the density of the latents.
"""

__all__: list[str] = []
