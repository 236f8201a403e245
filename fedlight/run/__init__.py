"""One call of fit, validate, test or analyze: what surrounds the rounds."""
