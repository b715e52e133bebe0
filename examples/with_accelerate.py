"""Digits with accelerate, ranking past batches, too; `accelerate launch` takes several devices. --resume goes on."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from roadmap_ext import EmbeddingMemory, RetrievalMetrics, RoadmapLoss
from roadmap_ext.data import PerClassBatchSampler


def main(epochs=3, out=Path("runs/accelerate"), resume=False):
    accelerator = Accelerator()
    several = accelerator.num_processes > 1
    pixels, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    items = TensorDataset(pixels.float() / 16, labels, torch.arange(len(labels)))
    loader = DataLoader(items, batch_sampler=PerClassBatchSampler(labels[:1200], per_class=16, batch_size=160))
    test_loader = DataLoader(Subset(items, range(1200, len(items))), batch_size=100)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 32))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    model, optimizer, loader, test_loader = accelerator.prepare(network, optimizer, loader, test_loader)
    loss_function = RoadmapLoss(gather_across_devices=several)
    memory = EmbeddingMemory(600, 32, gather_across_devices=several, device=accelerator.device)
    accelerator.register_for_checkpointing(memory)
    if resume:
        accelerator.load_state(out)
    begin = int((out / "epochs").read_text()) if resume else 0
    metrics = RetrievalMetrics(k=(1, 10))
    for epoch in range(begin, epochs):
        loader.set_epoch(epoch)
        for images, of_images, ids in loader:
            embeddings = model(images)
            memory.enqueue(embeddings, of_images, ids)
            loss = loss_function(embeddings, of_images, ref_emb=memory, ids=ids)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for images, of_images, ids in test_loader:
                metrics.update(model(images), of_images, ids)  # ids: an item that two processes see counts once
        accelerator.print(epoch + 1, measured := metrics.compute())
        metrics.reset()
        accelerator.save_state(out)
        (out / "epochs").write_text(str(epoch + 1))
    return network, measured


if __name__ == "__main__":
    main(resume="--resume" in sys.argv)
