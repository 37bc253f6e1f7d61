"""What is learnt and how a run is carried out: configuration types, run files, presets; never imports torch."""
