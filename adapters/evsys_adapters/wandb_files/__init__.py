"""Parts of `wandb_logger`: the records of W&B's run files, one run and its rows, and the upload."""
