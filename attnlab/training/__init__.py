"""Training: one config-driven loop around one jitted step (`build`, `loop`), checkpoints, meshes, sizing without hardware."""
