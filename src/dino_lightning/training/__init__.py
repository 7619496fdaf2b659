"""One training run: build, preflight checks, fit, resume, summary, callbacks, automatic settings, debugging."""
