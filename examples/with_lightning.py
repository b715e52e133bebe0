"""Digits with PyTorch Lightning; on several devices their batches are one. --resume goes on from the last epoch."""

import sys
from pathlib import Path

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from roadmap_ext import RetrievalMetrics, RoadmapLoss
from roadmap_ext.data import PerClassBatchSampler


class Retrieval(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 32))
        self.loss, self.metrics = RoadmapLoss(), RetrievalMetrics(k=(1, 10))
        pixels, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
        self.items = TensorDataset(pixels.float() / 16, labels, torch.arange(len(labels)))

    def train_dataloader(self):
        self.loss.gather_across_devices = self.trainer.world_size > 1  # their batches are one
        place = {"rank": self.global_rank, "world_size": self.trainer.world_size}
        sampler = PerClassBatchSampler(self.items.tensors[1][:1200], per_class=16, batch_size=160, **place)
        return DataLoader(self.items, batch_sampler=sampler)

    def val_dataloader(self):
        return DataLoader(torch.utils.data.Subset(self.items, range(1200, 1797)), batch_size=100)

    def training_step(self, batch, index):
        pixels, labels, _ = batch
        return self.loss(self.network(pixels), labels)

    def validation_step(self, batch, index):
        pixels, labels, ids = batch
        self.metrics.update(self.network(pixels), labels, ids)  # an item that two devices see counts once

    def on_validation_epoch_end(self):
        self.log_dict(self.metrics.compute(), prog_bar=True)
        self.metrics.reset()

    def configure_optimizers(self):
        return torch.optim.Adam(self.network.parameters(), lr=1e-3)


def main(epochs=3, out=Path("runs/lightning"), resume=False):
    lightning.seed_everything(0)
    keep = lightning.pytorch.callbacks.ModelCheckpoint(out, save_last=True)
    trainer = lightning.Trainer(
        max_epochs=epochs, default_root_dir=out, callbacks=[keep], use_distributed_sampler=False
    )
    trainer.fit(model := Retrieval(), ckpt_path=out / "last.ckpt" if resume else None)
    return model.network, trainer.callback_metrics


if __name__ == "__main__":
    print(main(resume="--resume" in sys.argv)[1])
