"""Configuration types of model, training and run, run files and presets; never imports torch."""
