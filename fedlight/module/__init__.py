"""What is asked of a LightningModule: its hooks, logs, optimizers, parameters, steps and other state."""
